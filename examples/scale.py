"""Adversarial pretraining on hundreds of GPUs, on paper: what a step computes, sends and holds, by method.

Prints the tables of docs/scale.md. The counts of passes and collectives are those of a real run of two processes
(tests/distributed/test_scale.py); times and activations are estimates, from data sheets and the fractions of them that
`Cluster` assumes. Change a number there, or a shape, and run it again.

    python examples/scale.py
    python examples/scale.py --picture docs/pictures/scale.svg
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

LENGTH = 4096  # tokens of a row
TOKENS, FEW = 8192, 2048  # of a GPU in a pass
WEIGHT, GRADIENT = 2, 4  # bytes: gathered in bf16, reduced in float32
STATE = 16  # bytes of a parameter: float32 weight, gradient and AdamW's two moments
GPUS = (8, 64, 1024)
NODE = 8  # GPUs
CHOICES = ("each", "last", "keep")


@dataclass(frozen=True)
class Decoder:
    """Llama's shape. FSDP2 has a unit for each block, and the root: the embedding, the last norm and the head."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    tied: bool

    @property
    def kv_width(self) -> int:
        return self.width * self.kv_heads // self.heads

    @property
    def block(self) -> int:
        """Parameters of one: attention's four matrices, the feed-forward's three, two norms."""
        return 2 * self.width * (self.width + self.kv_width) + 3 * self.width * self.hidden + 2 * self.width

    @property
    def root(self) -> int:
        return (1 if self.tied else 2) * self.vocabulary * self.width + self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.root

    @property
    def products(self) -> int:
        """Weights of a block that multiply."""
        return self.block - 2 * self.width

    @property
    def last(self) -> int:
        """Weights of a block's last product, which checkpointing does not compute anew: nothing reads its result."""
        return self.width * self.hidden

    @property
    def head(self) -> int:
        return self.vocabulary * self.width


MODELS = (
    Decoder("1B", 16, 2048, 32, 8, 8192, 128_256, tied=True),  # as Llama 3.2
    Decoder("8B", 32, 4096, 32, 8, 14_336, 128_256, tied=False),  # as Llama 3.1
    Decoder("70B", 80, 8192, 64, 8, 28_672, 128_256, tied=False),
)


# What a step sends


@dataclass(frozen=True)
class Phase:
    """A forward or a backward: what it computes, of all blocks and the head, and how often it sends each unit."""

    forwards: int = 0
    inputs: int = 0  # gradients by the inputs of products
    weights: int = 0  # and by their weights
    again: int = 0  # forwards of the blocks that checkpointing recomputes
    blocks: int = 0  # gathers of a block
    root: int = 0  # gathers of the root
    reductions: int = 0  # of each unit

    def products(self, model: Decoder, tokens: int) -> float:
        """Flops of weights' products: two for each weight and token."""
        blocks = (self.forwards + self.inputs + self.weights) * model.products
        again = self.again * (model.products - model.last)
        head = (self.forwards + self.inputs + self.weights) * model.head
        return 2.0 * tokens * (model.layers * (blocks + again) + head)

    def attention(self, model: Decoder, tokens: int) -> float:
        """Flops of causal attention's two products, over half of a row; four in a backward."""
        return 2.0 * tokens * model.layers * model.width * LENGTH * (self.forwards + 2 * self.inputs + self.again)

    def flops(self, model: Decoder, tokens: int) -> float:
        return self.products(model, tokens) + self.attention(model, tokens)


@dataclass(frozen=True)
class Method:
    """The passes of a step: "full" trains, "probe" brings the perturbation's gradient alone.

    SMART's clean pass is a "forward" whose graph waits, until the backward of "both".
    """

    name: str
    passes: tuple[str, ...]
    graphs: int = 1  # held at a time
    answers: int = 0  # logits held through the step without a graph

    def phases(self, communication: str = "each", *, recomputed: bool = True) -> Iterator[Phase]:
        """Forwards and backwards in order. `recomputed`: by activation checkpointing, a forward in each backward."""
        several, later = len(self.passes) > 1, False
        kept = communication == "keep" and several
        rooted = False  # the root stays gathered from a forward to the next backward
        for number, kind in enumerate(self.passes):
            last = number == len(self.passes) - 1
            anew = 0 if kept and later else 1
            yield Phase(forwards=1, blocks=anew, root=0 if rooted else anew)
            later, rooted = True, kind == "forward"
            if kind == "forward":
                continue
            graphs = 2 if kind == "both" else 1
            trains = kind != "probe"
            yield Phase(
                inputs=graphs,
                weights=graphs if trains else 0,
                again=graphs if recomputed else 0,
                blocks=graphs - 1 if kept else graphs,  # the first graph's backward frees what was kept
                reductions=int(trains and (last or communication == "each")),
            )

    def total(self, communication: str = "each", *, recomputed: bool = True) -> Phase:
        """All of a step."""
        phases = list(self.phases(communication, recomputed=recomputed))
        return Phase(*(sum(getattr(one, name) for one in phases) for name in Phase.__dataclass_fields__))

    def over_plain(self, model: Decoder, *, recomputed: bool = True) -> float:
        """What a step computes over what plain training does."""
        mine, plain = (method.total(recomputed=recomputed).flops(model, 1) for method in (self, METHODS[0]))
        return mine / plain

    def described(self) -> str:
        full = len(self.passes) - self.passes.count("probe")
        probes = self.passes.count("probe")
        return f"{full} full" + (f", {probes} probe{'s' if probes > 1 else ''}" if probes else "")


METHODS = (
    Method("plain", ("full",)),
    Method("NEFTune", ("full",)),
    Method("FGM", ("full", "full")),
    Method("PGD-3", ("full", "probe", "probe", "full")),
    Method("FreeLB-3", ("full", "full", "full")),
    Method("YOPO-3-3", ("full", "probe", "probe", "full", "probe", "probe", "full")),
    Method("SMART", ("forward", "probe", "both"), graphs=2),
    Method("VAT", ("full", "probe", "full"), answers=1),
)


def gathered(model: Decoder, phase: Phase) -> int:
    """Bytes of weights that every GPU receives, its own shards among them."""
    return WEIGHT * (phase.blocks * model.layers * model.block + phase.root * model.root)


def reduced(model: Decoder, phase: Phase) -> int:
    """Bytes of gradients that every GPU hands over."""
    return GRADIENT * phase.reductions * model.parameters


def gathers(model: Decoder, phase: Phase) -> int:
    """How many all-gathers there are; reductions: as many reduce-scatters as units."""
    return phase.blocks * model.layers + phase.root


# How long it takes


@dataclass(frozen=True)
class Cluster:
    """Data sheets' figures, in flops and bytes per second and direction, and the fractions of them that are reached."""

    name: str
    memory: float  # bytes
    peak: float  # dense bf16
    nvlink: float  # of a GPU, within a node
    network: float  # of a GPU, between nodes
    computes: float = 0.4  # of the peak
    sends: float = 0.8  # of a link
    hop: float = 3.4e-6  # seconds, from GPU to GPU: those of NCCL's own model of a ring
    node_hop: float = 14e-6
    launch: float = 8.4e-6
    overlaps: bool = True  # communication hides behind computing, and the other way round


CLUSTERS = (
    Cluster("H100, 3.2 Tb/s", 80e9, 989e12, 450e9, 50e9),
    Cluster("A100, 400 Gb/s", 80e9, 312e12, 300e9, 6.25e9),
)
IN_TURN = replace(CLUSTERS[0], overlaps=False)


@dataclass(frozen=True)
class Sharding:
    """Over `shards` GPUs, next to each other; as many replicas as there are GPUs left."""

    gpus: int
    shards: int

    @property
    def name(self) -> str:
        return "full" if self.gpus == self.shards else f"{self.gpus // self.shards} x {self.shards}"

    def ring(self, cluster: Cluster) -> tuple[float, float]:
        """Seconds until an all-gather or reduce-scatter has gone round, and bytes per second."""
        nodes = math.ceil(self.shards / NODE)
        hops = (self.shards - nodes) * cluster.hop + (nodes - 1) * cluster.node_hop
        speed = cluster.nvlink if nodes == 1 else min(cluster.nvlink, NODE * cluster.network)
        return cluster.launch + hops, cluster.sends * speed * self.shards / (self.shards - 1)

    def all_reduce(self, cluster: Cluster, size: float) -> float:
        """Seconds for a shard's gradient, over the replicas: a GPU of each, by its own network card."""
        others = self.gpus // self.shards - 1
        if not others:
            return 0.0
        moved = 2 * others / (others + 1) * size / self.shards
        return cluster.launch + 2 * others * cluster.node_hop + moved / (cluster.sends * cluster.network)


def shardings(model: Decoder) -> Iterator[Sharding]:
    """All GPUs, or replicas over as few of them as hold 16 bytes a parameter in a quarter of their memory."""
    few = next(n for n in (8, 64) if STATE * model.parameters / n < CLUSTERS[0].memory / 4)
    for gpus in GPUS:
        yield Sharding(gpus, gpus)
        if gpus > few:
            yield Sharding(gpus, few)


def sending(model: Decoder, cluster: Cluster, sharding: Sharding, phase: Phase) -> float:
    """Seconds of a phase's collectives, one after the other."""
    delay, speed = sharding.ring(cluster)
    units = gathers(model, phase) + phase.reductions * (model.layers + 1)
    seconds = units * delay + (gathered(model, phase) + reduced(model, phase)) / speed
    sizes = [GRADIENT * model.block] * model.layers + [GRADIENT * model.root]
    return seconds + phase.reductions * sum(sharding.all_reduce(cluster, size) for size in sizes)


def computing(model: Decoder, cluster: Cluster, phase: Phase, tokens: int) -> float:
    """Seconds of a phase's products."""
    return phase.flops(model, tokens) / (cluster.computes * cluster.peak)


def step(
    model: Decoder,
    cluster: Cluster,
    sharding: Sharding,
    method: Method,
    communication: str = "each",
    tokens: int = TOKENS,
) -> float:
    """Seconds of a step's passes; the optimizer's are left out."""
    seconds = 0.0
    for phase in method.phases(communication):
        work, wait = computing(model, cluster, phase, tokens), sending(model, cluster, sharding, phase)
        seconds += max(work, wait) if cluster.overlaps else work + wait
    return seconds


def balance(model: Decoder, cluster: Cluster, sharding: Sharding) -> int:
    """Tokens of a GPU with which every phase of plain training computes as long as it sends."""
    return math.ceil(
        max(
            sending(model, cluster, sharding, phase) / computing(model, cluster, phase, 1)
            for phase in METHODS[0].phases()
        )
    )


# What a GPU holds


def states(model: Decoder, sharding: Sharding) -> float:
    """Bytes of its shards."""
    return STATE * model.parameters / sharding.shards


def running(model: Decoder, method: Method, tokens: int = TOKENS) -> float:
    """Bytes of a pass, about: units in use, what checkpointing keeps, one block's activations twice, logits.

    Logits are there in bf16, as a float32 copy, and as that copy's gradient.
    """
    largest = max(model.block, model.root)
    units = WEIGHT * (model.root + 2 * model.block) + (WEIGHT + GRADIENT) * largest
    kept = WEIGHT * tokens * model.width * model.layers * method.graphs
    block = 2 * WEIGHT * tokens * (6 * model.width + 2 * model.kv_width + 4 * model.hidden)
    logits = tokens * model.vocabulary * ((WEIGHT + 4) * method.graphs + 4 + WEIGHT * method.answers)
    return units + kept + block + logits


def delta(model: Decoder, method: Method, tokens: int = TOKENS) -> float:
    """Bytes of the perturbation and its gradient, B x T x D each, in float32."""
    return 0.0 if method.name == "plain" else 2 * 4 * tokens * model.width


def held(model: Decoder, method: Method, communication: str) -> float:
    """Bytes between the passes: whole gradients, whole weights."""
    if len(method.passes) == 1 or communication == "each":
        return 0.0
    return model.parameters * (GRADIENT + (WEIGHT if communication == "keep" else 0))


def memory(model: Decoder, sharding: Sharding, method: Method, communication: str, tokens: int = TOKENS) -> float:
    """Bytes of a GPU."""
    parts = (running(model, method, tokens), delta(model, method, tokens), held(model, method, communication))
    return states(model, sharding) + sum(parts)


def fits(cluster: Cluster, size: float) -> bool:
    """With a tenth left for fragments, buffers and the driver."""
    return size <= 0.9 * cluster.memory


# Tables


def table(head: str, rows: Iterator[list[str]]) -> list[str]:
    names = head.split(" | ")
    return [f"| {head} |", "|" + "---|" * len(names), *(f"| {' | '.join(row)} |" for row in rows)]


def shapes() -> list[str]:
    head = "model | layers | width | heads, key-value heads | feed-forward | vocabulary | parameters | a block | root"
    return table(
        head,
        (
            [
                *(m.name, str(m.layers), str(m.width), f"{m.heads}, {m.kv_heads}", str(m.hidden)),
                f"{m.vocabulary}{', tied' if m.tied else ''}",
                *(f"{count / 1e9:.3f}e9" for count in (m.parameters, m.block, m.root)),
            ]
            for m in MODELS
        ),
    )


def passes() -> list[str]:
    head = "method | passes | computing over plain | without checkpointing | gathers of a block | reductions of a unit"
    model = MODELS[1]
    return table(
        head,
        (
            [
                *(m.name, m.described(), f"{m.over_plain(model):.2f}", f"{m.over_plain(model, recomputed=False):.2f}"),
                *(", ".join(str(getattr(m.total(c), kind)) for c in CHOICES) for kind in ("blocks", "reductions")),
            ]
            for m in METHODS
        ),
    )


def traffic() -> list[str]:
    def cells(method: Method) -> Iterator[str]:
        for model in MODELS:
            totals = [method.total(choice) for choice in CHOICES]
            yield " / ".join(f"{(gathered(model, one) + reduced(model, one)) / 1e9:.0f}" for one in totals)

    return table("method | 1B | 8B | 70B", ([method.name, *cells(method)] for method in METHODS))


def memories() -> list[str]:
    cluster, pgd = CLUSTERS[0], METHODS[3]

    def rows() -> Iterator[list[str]]:
        for model in MODELS:
            for one in shardings(model):
                sizes = [memory(model, one, pgd, choice) for choice in CHOICES]
                parts = (states(model, one), running(model, pgd), delta(model, pgd))
                cells = [f"{size / 1e9:.0f}" if fits(cluster, size) else f"({size / 1e9:.0f})" for size in sizes]
                yield [model.name, str(one.gpus), one.name, *(f"{part / 1e9:.1f}" for part in parts), *cells]

    return table("model | GPUs | shards | states | a pass | delta | each | last | keep", rows())


def overheads(cluster: Cluster, tokens: int) -> list[str]:
    """A step over plain training's, by communication where that matters."""

    def cell(model: Decoder, one: Sharding, method: Method) -> str:
        plain, cells = step(model, cluster, one, METHODS[0], tokens=tokens), []
        for choice in CHOICES:
            ratio = step(model, cluster, one, method, choice, tokens) / plain
            cells.append(f"{ratio:.2f}" if fits(cluster, memory(model, one, method, choice, tokens)) else "-")
        same = {value for value in cells if value != "-"}
        return " / ".join(cells) if len(same) > 1 else min(same, default="-")

    def rows() -> Iterator[list[str]]:
        for model in MODELS:
            for one in shardings(model):
                if not fits(cluster, memory(model, one, METHODS[0], "each", tokens)):
                    continue
                plain = step(model, cluster, one, METHODS[0], tokens=tokens)
                sent = sum(sending(model, cluster, one, phase) for phase in METHODS[0].phases())
                first = [model.name, str(one.gpus), one.name, f"{plain:.2f}", f"{sent:.2f}"]
                yield [*first, *(cell(model, one, method) for method in METHODS[2:])]

    head = "model | GPUs | shards | plain, s | sending, s | " + " | ".join(m.name for m in METHODS[2:])
    return table(head, rows())


def balances() -> list[str]:
    def rows() -> Iterator[list[str]]:
        for model in MODELS:
            for one in shardings(model):
                cells = [f"{balance(model, cluster, one):,}" for cluster in CLUSTERS]
                yield [model.name, str(one.gpus), one.name, *cells]

    return table("model | GPUs | shards | " + " | ".join(c.name for c in CLUSTERS), rows())


def tables() -> dict[str, list[str]]:
    """By what each shows."""
    return {
        "Shapes": shapes(),
        "Passes of a step; gathers and reductions with each, last, keep": passes(),
        "GB that a GPU sends and receives in a step, with each / last / keep": traffic(),
        f"GB of a GPU with PGD-3, {TOKENS} tokens": memories(),
        f"A step over plain training's, {TOKENS} tokens": overheads(CLUSTERS[0], TOKENS),
        f"A step over plain training's, {FEW} tokens": overheads(CLUSTERS[0], FEW),
        f"A step over plain training's, {TOKENS} tokens, nothing hides": overheads(IN_TURN, TOKENS),
        "Tokens of a GPU below which plain training waits for its network": balances(),
    }


def draw(path: Path) -> None:
    """The 8B decoder over 1,024 GPUs, by the tokens of a GPU, as far as its memory goes."""
    from matplotlib.axes import Axes

    from fastadv.jobs.drawing import on_axes, svg

    model, cluster, sharding, plain, pgd = MODELS[1], CLUSTERS[0], Sharding(1024, 1024), METHODS[0], METHODS[3]
    counts = [int(256 * 2 ** (power / 8)) for power in range(49)]
    shown = [(pgd, choice, colour) for choice, colour in zip(CHOICES, ("#c2410c", "#1d5fbf", "#16a34a"), strict=True)]

    def curves(axes: Axes) -> None:
        for method, choice, colour in [*shown, (plain, "each", "#6b7280")]:
            few = [n for n in counts if fits(cluster, memory(model, sharding, method, choice, n))]
            seconds = [step(model, cluster, sharding, method, choice, n) for n in few]
            axes.plot(few, seconds, color=colour, label=method.name + (f', "{choice}"' if method is pgd else ""))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks([2**power for power in range(8, 15)], [f"{2**power:,}" for power in range(8, 15)])
        axes.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axes.set_xlabel("tokens of a GPU in a pass")
        axes.set_ylabel("seconds of a step")
        axes.legend()

    path.write_text(svg(on_axes(curves), "scale", (7, 3.2), opaque=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="draw docs/scale.md's picture there")
    options = parser.parse_args()
    for title, lines in tables().items():
        print(title, "", *lines, "", sep="\n")
    if options.picture:
        draw(options.picture)


if __name__ == "__main__":
    main()
