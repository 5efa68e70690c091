"""What is timed. Each case asks fastadv by name for what it needs, when it is made: a revision may not have it yet.

The ops run on 16 x 128 Zipf-distributed ids of a BERT-base's table; the steps on a BERT without dropout, without an
optimizer, from gradients that are None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCABULARY, DIMENSION = 30_522, 768
RULE: dict[str, Any] = {"step_size": 0.3, "epsilon": 0.2, "direction": "l2", "ball": "l2"}
SMALL, MINILM = (128, 2, 2, 512), (384, 6, 12, 1536)  # hidden, layers, heads, intermediate


def _nothing() -> None: ...


def _as_it_is(result: Any) -> Any:
    return result


class Case(NamedTuple):
    """`setup` comes before every run and is not timed; `found` says by what revisions are held against each other."""

    run: Callable[[], Any]
    setup: Callable[[], object] = _nothing
    found: Callable[[Any], Any] = _as_it_is  # of what `run` returned: tensors


class Spec(NamedTuple):
    """How a case is made, and how far two revisions' results may be apart, relative."""

    make: Callable[[], Case]
    tolerance: float = 1e-4


def tensors(found: Any) -> Iterator[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for one in found:
            yield from tensors(one)


# The ops


class Batch:
    """A table, ids, a gradient at the embedding's output, and a perturbation near the edge of the ball."""

    def __init__(self) -> None:
        from bench.workloads import gradient, table, zipf

        self.ids, self.weight = zipf(16, 128, VOCABULARY), table(VOCABULARY, DIMENSION)
        self.grad, delta = (gradient(*self.ids.shape, DIMENSION, seed=seed) for seed in (2, 4))
        self.delta = delta.mul_(0.9 * RULE["epsilon"] / delta.norm())
        self.flat, self.skipped = self.grad.flatten(0, 1), torch.zeros((), dtype=torch.int64)

    def groups(self) -> Any:
        from fastadv import ops

        return ops.segments(self.ids.flatten(), VOCABULARY).trimmed()


def table_step() -> Case:
    """The second step from a fresh start, so that every run does the same."""
    from fastadv import ops

    batch = Batch()
    groups, out = batch.groups(), batch.grad.new_empty(batch.ids.numel(), DIMENSION)
    r = torch.zeros(len(groups.stops), DIMENSION)
    lookup: dict[str, Any] = {"weight": batch.weight, "ids": batch.ids.flatten(), "embedded": out}
    lookup["room"] = torch.empty_like(r)

    def run() -> Any:
        ops.table_step(r, batch.flat, groups, skipped=batch.skipped, group=0, **RULE, **lookup)
        return r, out

    return Case(run, lambda: (r.zero_(), run()))


def sample_step() -> Case:
    from fastadv import ops

    batch = Batch()
    delta, out = batch.delta.clone(), torch.empty_like(batch.grad)
    lookup: dict[str, Any] = {"weight": batch.weight, "ids": batch.ids, "embedded": out}

    def run() -> Any:
        ops.ascend(delta, batch.grad, skipped=batch.skipped, group=1, **RULE, **lookup)
        return delta, out

    return Case(run, lambda: delta.copy_(batch.delta))


def segments() -> Case:
    return Case(Batch().groups)


def segment_sum() -> Case:
    from fastadv import ops

    batch = Batch()
    groups = batch.groups()
    return Case(lambda: ops.segment_sum(batch.flat, groups))


def gather_perturb() -> Case:
    from fastadv import ops

    batch = Batch()
    leaf = torch.zeros_like(batch.delta).requires_grad_()
    return Case(lambda: ops.gather_perturb(batch.weight, batch.ids, leaf, added=batch.delta))


def gather_perturb_backward() -> Case:
    from fastadv import ops

    batch = Batch()
    groups, into, ids = batch.groups(), torch.zeros_like(batch.weight), batch.ids.flatten()
    run = lambda: ops.gather_perturb_backward(into, [batch.flat], ids, groups)  # noqa: E731
    return Case(run, into.zero_, lambda _: into)


def gather_perturb_backward_fresh() -> Case:
    """The same as a step has it: into zeros whose pages the system has yet to give."""
    from fastadv import ops
    from fastadv.engine.zeros import zeros_like

    batch = Batch()
    groups, into, ids = batch.groups(), [batch.weight], batch.ids.flatten()

    def setup() -> None:
        into[0] = zeros_like(batch.weight)

    run = lambda: ops.gather_perturb_backward(into[0], [batch.flat], ids, groups)  # noqa: E731
    return Case(run, setup, lambda _: into[0])


def divergence(rows: int, classes: int) -> Callable[[], Case]:
    """Symmetric KL, and its gradient by both logits."""

    def make() -> Case:
        from fastadv import ops

        drawn = torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(5))
        logits, target = (one.clone().requires_grad_() for one in drawn)

        def run() -> Any:
            value = ops.divergence(logits, target)
            return value, torch.autograd.grad(value, (logits, target))

        return Case(run)

    return make


def rows(what: str) -> Callable[[], Case]:
    """The touched rows of a table: found, copied, moved, put back."""

    def make() -> Case:
        from fastadv.ops import rows

        batch = Batch()
        grad, ids = torch.zeros_like(batch.weight), batch.ids.flatten()
        grad.index_add_(0, ids, batch.flat)
        chosen, kept = ids.unique(), batch.weight.clone()
        saved = batch.weight[chosen]
        rule: dict[str, Any] = {**RULE, "skipped": batch.skipped, "saved": saved, "rows": chosen}
        work: dict[str, Callable[[], Any]] = {
            "touched": lambda: rows.touched(grad),
            "back_up": lambda: rows.back_up(kept, chosen),
            "step": lambda: rows.step(kept, grad, **rule),
            "restore": lambda: rows.restore(kept, saved, chosen),
        }
        setup = (lambda: kept.copy_(batch.weight)) if what == "step" else _nothing
        return Case(work[what], setup, lambda result: kept if result is None else result)

    return make


def grads(what: str) -> Callable[[], Case]:
    """The gradients of a model of 20 million parameters."""

    def make() -> Case:
        from bench.workloads import gradient
        from fastadv.ops import grads

        start, sources = ([gradient(200_000, seed=seed) for seed in range(at, at + 100)] for at in (0, 100))
        into = [one.clone() for one in start]
        plan, numbers = grads.Plan(into, sources), () if what == "copy" else (0.5,)
        run = lambda: getattr(plan, what)(*numbers)  # noqa: E731
        return Case(run, lambda: torch._foreach_copy_(into, start), lambda _: into)

    return make


# The steps


class Model:
    """A BERT, its batch, and closures of it."""

    def __init__(self, network: tuple[int, int, int, int], shape: tuple[int, int]) -> None:
        from bench.workloads import classifier, inputs

        self.model: Any = classifier(network, VOCABULARY)
        self.batch = inputs(*shape, VOCABULARY)

    def output(self) -> Any:
        return self.model(**self.batch)

    def losses(self) -> Tensor:
        """Of each sample, which LLR asks for."""
        logits = self.model(input_ids=self.batch["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits, self.batch["labels"], reduction="none")

    def gradients(self, _: Any) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def setup(self) -> None:
        """Random starts are the same in every run."""
        self.model.zero_grad()
        torch.manual_seed(0)

    def case(self, run: Callable[[], object]) -> Case:
        """The second step is what is compared: FreeAT's first one is not perturbed."""
        self.setup()
        run()
        return Case(run, self.setup, self.gradients)


def step(
    method: str,
    network: tuple[int, int, int, int] = SMALL,
    shape: tuple[int, int] = (8, 32),
    closure: str = "output",
    **numbers: Any,
) -> Callable[[], Case]:
    """A training step of a method."""

    def make() -> Case:
        import fastadv

        model = Model(network, shape)
        adv, mask = getattr(fastadv, method)(model.model, **numbers), torch.ones(shape, dtype=torch.int64)
        return model.case(lambda: adv.backward(getattr(model, closure), mask=mask))

    return make


def proximal() -> Case:
    """The teacher moves with the step; the model has gone away from it."""
    import fastadv

    model = Model(SMALL, (8, 32))
    adv = fastadv.BregmanProximal(model.model, weight=1.0, decay=0.99)
    adv.update()
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.01)
    return model.case(lambda: (adv.backward(model.output), adv.update()))


def plain() -> Case:
    """Nothing of fastadv: a mark here says that the machine was not quiet."""
    model = Model(SMALL, (8, 32))

    def run() -> None:
        model.output().loss.backward()

    return model.case(run)


PGD: dict[str, Any] = {"epsilon": 1.0, "step_size": 0.3, "steps": 3}
STEPS: dict[str, Callable[[], Case]] = {
    "FGSM": step("FGSM", epsilon=0.002),
    "FGM": step("FGM", epsilon=1.0),
    "PGD-3": step("PGD", **PGD),
    "PGD-3, sample scope": step("PGD", **PGD, scope="sample"),
    "FreeAT": step("FreeAT", epsilon=0.002),
    "YOPO-3-3": step("YOPO", step_size=0.1),
    "FreeLB-3": step("FreeLB", step_size=0.1),
    "SMART": step("SMART", epsilon=0.002),
    "BregmanProximal": proximal,
    "VAT": step("VAT", epsilon=0.1, xi=0.5),
    "LLR": step("LLR", closure="losses", epsilon=0.002),
    "AWP": step("AWP", gamma=0.01),
    "NEFTune": step("NEFTune", alpha=5.0),
    "PGD-3, MiniLM's size": step("PGD", MINILM, (16, 128), **PGD),
}

CASES: dict[str, Spec] = {
    "attack step, table scope": Spec(table_step),
    "attack step, sample scope": Spec(sample_step),
    "segments": Spec(segments, 0.0),
    "segment_sum": Spec(segment_sum),
    "gather_perturb": Spec(gather_perturb),
    "gather_perturb backward": Spec(gather_perturb_backward),
    "gather_perturb backward, fresh pages": Spec(gather_perturb_backward_fresh),
    "divergence, 32 x 1,000": Spec(divergence(32, 1_000)),
    "divergence, 256 x 30,522": Spec(divergence(256, VOCABULARY)),
    **{f"rows, {what}": Spec(rows(what)) for what in ("touched", "back_up", "step", "restore")},
    **{f"grads, {what}": Spec(grads(what)) for what in ("copy", "accumulate", "average")},
    "plain training (control)": Spec(plain),
    **{f"step of {name}": Spec(make, 1e-3) for name, make in STEPS.items()},
}
