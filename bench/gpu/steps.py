"""Attack steps by device time, and training steps by the time they take, against what else there is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

import fastadv
from bench import attack_steps as who
from bench import training
from bench.attack_steps import Ball
from bench.contest import check
from bench.gpu.clock import captured, device_race, microseconds
from bench.race import Copy, Entry, Run
from bench.workloads import classifier, gradient, table, zipf


class Size(NamedTuple):
    """A batch, and the BERT that it is trained on."""

    batch: int
    length: int
    vocabularies: tuple[int, ...]
    dimension: int  # of the attack step's embeddings
    model: tuple[int, int, int, int]  # workloads.PARTS
    small: tuple[int, int]  # a batch for which the host is too slow


SIZES = {
    "full": Size(32, 128, (30_522, 250_002), 768, (768, 12, 12, 3072), (8, 32)),
    "tiny": Size(4, 16, (500, 4_000), 32, (32, 2, 1, 128), (2, 8)),
}
BALL = Ball(0.3, 0.2)


# Attack steps


class DeviceStep(who.BestStep):
    """The best plain PyTorch with no number read on the host."""

    def step(self, grad: Tensor) -> Tensor:
        g = F.embedding_bag(self.rows.order, grad, self.rows.starts, mode="sum")
        self.r.addcdiv_(g, vector_norm(g).expand_as(g), value=self.ball.step_size)
        self.r.mul_((self.ball.epsilon / vector_norm(self.r)).clamp_(max=1))
        torch.add(self.base, self.r, out=self.moved)
        return torch.index_select(self.moved, 0, self.rows.inverse, out=self.out)


class WholeCompiledStep(who.BestStep):
    """Everything under torch.compile, gather and scatter too."""

    def step(self, grad: Tensor) -> Tensor:
        self.r, out = _compiled_whole(grad, self.rows.inverse, self.base, self.r, *self.ball)
        return out


@torch.compile(dynamic=False)
def _compiled_whole(
    grad: Tensor, inverse: Tensor, base: Tensor, r: Tensor, step_size: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    g = torch.zeros_like(r).index_add(0, inverse, grad)
    moved = r + g * (step_size / vector_norm(g))
    r = moved * (epsilon / vector_norm(moved)).clamp(max=1)
    return r, (base + r)[inverse]


ATTACKS: dict[str, tuple[str, Any]] = {
    "reference": ("classic_us", who.ClassicStep),
    "torch, index_add": ("torch_us", who.IndexAddStep),
    "torch": ("torch_us", DeviceStep),
    "compiled": ("compiled_us", who.CompiledStep),
    "compiled, all of it": ("compiled_us", WholeCompiledStep),
    "fused": ("fused_us", who.FusedStep),
}
WAITS = ("reference",)  # reads norms on the host, so that it cannot be captured


def attack_steps(size: Size, device: torch.device, copy: Copy, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """By vocabulary, table scope: from dE to the next forward's E, the second step of PGD. The best of each kind."""
    for vocabulary in size.vocabularies:
        ids = zipf(min(size.batch, 16), size.length, vocabulary).to(device)
        weight = table(vocabulary, size.dimension).to(device)
        first = gradient(ids.numel(), size.dimension).to(device)
        second = first.flip(0)
        torch._dynamo.reset()
        made = {name: build(weight, ids, BALL) for name, (_, build) in ATTACKS.items()}
        check(who.entries(made, weight[ids.flatten()], first, second), 1e-4)
        entries = {name: _attack(name, step, first, second) for name, step in made.items()}
        found = microseconds(device_race(entries, rounds, copy))
        yield str(vocabulary), {**_best(found), "contestants": found}


def _attack(name: str, step: Any, first: Tensor, second: Tensor) -> Entry:
    read: list[Tensor] = []  # a graph reads what was there when it was captured: it must stay

    def run() -> None:
        read.append(getattr(step, "r", second))
        step.step(second)

    return Entry(lambda: [step.reset(), step.step(first)], run if name in WAITS else captured(run))


def _best(found: dict[str, float]) -> dict[str, float]:
    best: dict[str, float] = {}
    for name, us in found.items():
        kind = ATTACKS[name][0]
        best[kind] = min(us, best.get(kind, us))
    return best


# Training steps


class PassesAlone(training.BestTraining):
    """The passes of PGD without its attack: what no engine can do without."""

    def backward(self, closure: training.Closure) -> None:
        self.live = True
        try:
            for left in range(self.steps, -1, -1):
                (self._full if left in (0, self.steps) else self._probe)(closure)
                assert self.leaf is not None
                self.leaf.grad = None
        finally:
            self.live, self.leaf = False, None


def training_steps(size: Size, device: torch.device, copy: Copy, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """PGD-3 under bfloat16 autocast: the gradients of one step, by vocabulary, and of a small batch."""
    for vocabulary in size.vocabularies:
        model = classifier(size.model, vocabulary).to(device)
        small = [size.small] if vocabulary == size.vocabularies[0] else []
        for batch, length in [(size.batch, size.length), *small]:
            ids = zipf(batch, length, vocabulary).to(device)
            yield f"{batch}x{length}, V {vocabulary}", _training(model, ids, copy, rounds)
        del model
        gc.collect()


def _training(model: nn.Module, ids: Tensor, copy: Copy, rounds: int) -> dict[str, Any]:
    ball, steps = training.schedule("PGD-3")
    labels = torch.arange(len(ids), device=ids.device) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def closure(given: dict[str, Tensor] = batch) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss: Tensor = model(**given).loss
        return loss

    names = {"plain": "plain_us", "reference": "classic_us", "torch, index_add": "index_add_us", "torch": "torch_us"}
    made: dict[str, Run] = {short: training.step(name, "PGD-3", model, closure) for name, short in names.items()}
    adv = fastadv.PGD(model, epsilon=ball.epsilon, step_size=ball.step_size, steps=steps)
    made["fastadv_us"] = lambda: adv.backward(closure)
    compared = {name: made[name] for name in ("classic_us", "index_add_us", "torch_us", "fastadv_us")}
    check(training.entries(model, compared), 5e-2)  # in bfloat16 the order of sums shows
    passes = PassesAlone(model, ball, steps)
    made["passes_us"] = lambda: passes.backward(closure)
    if ids.device.type == "cuda":
        step = adv.capture(lambda given: adv.backward(lambda: closure(given)).loss, batch)
        made["captured_us"] = lambda: step(batch)
    found = microseconds(device_race({name: Entry(model.zero_grad, run) for name, run in made.items()}, rounds, copy))
    peaks = _peaks(model, made)
    adv.close()
    overhead = (found["fastadv_us"] - found["passes_us"]) / found["fastadv_us"]
    return {**found, "beside_the_passes": round(overhead, 4), "peak_mib": peaks}


def _peaks(model: nn.Module, made: dict[str, Run]) -> dict[str, float]:
    """MiB that a step needs beyond what is there before it."""
    if not torch.cuda.is_available():
        return {}
    peaks = {}
    for name, run in made.items():
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peaks[name.removesuffix("_us")] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    model.zero_grad()
    return peaks
