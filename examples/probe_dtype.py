"""What bfloat16 probes change: the perturbation, the gradient that trains, how far the loss rises, and the time.

Trains MiniLM plainly on some batches of the default data, then takes the same step with float32 probes and with
`probe_dtype=torch.bfloat16` on the batches after them, without dropout. Full passes are float32 in both. Prints, for
PGD-3, cosines and the ratio of what the loss rises by; for the other methods with probes, on half of the batches, what
they find; and the time of a step of PGD-3 with dropout, in turns, on one thread. `--output` keeps the numbers as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

import fastadv
from fastadv.jobs.surroundings import device_name
from fastadv.train.job import Settings, prepare
from fastadv.train.tokens import LengthGrouped

PGD = {"epsilon": 0.1, "step_size": 0.05, "steps": 3, "scope": "sample"}
BF16 = {"probe_dtype": torch.bfloat16}
RATE = 1e-4
OTHERS: dict[str, tuple[type[fastadv.Method], dict[str, Any]]] = {
    "YOPO": (fastadv.YOPO, {"epsilon": 0.1, "step_size": 0.02, "random_start": 0.03}),
    "VAT": (fastadv.VAT, {"epsilon": 0.3}),
    "SMART": (fastadv.SMART, {}),
    "LLR": (fastadv.LLR, {}),
}


class Step(NamedTuple):
    """What one step has found."""

    delta: Tensor  # [B, T * D]
    gradient: Tensor  # of all parameters
    loss: float
    adv_loss: float


def step_of(method: type[fastadv.Method], model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Step:
    """One step, dropout off, from a seed."""
    adv = method(model, dropout="off", **options)
    torch.manual_seed(0)
    result = adv.backward(lambda: model(**batch), mask=batch["attention_mask"])
    (delta,) = (leaf.detach().flatten(1).clone() for leaf in adv.engine.perturbation.leaves())
    adv.close()
    assert result.adv_loss is not None
    return Step(delta, taken(model), float(result.loss), float(result.adv_loss))


def taken(model: nn.Module) -> Tensor:
    """Every gradient in one vector; the model has none afterwards."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """By row, in float64."""
    return torch.cosine_similarity(a.double(), b.double(), dim=-1)


def compare(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """PGD-3 with bfloat16 probes against PGD-3."""
    deltas, steps, adversarial, rises = [], [], [], []
    for batch in batches:
        model.eval()
        model(**batch).loss.backward()
        clean = taken(model.train())
        plain, low = (step_of(fastadv.PGD, model, batch, **PGD, **more) for more in ({}, BF16))
        deltas.append(cosine(plain.delta, low.delta))
        steps.append(float(cosine(plain.gradient, low.gradient)))
        adversarial.append(float(cosine(plain.gradient - clean, low.gradient - clean)))
        rises.append((low.adv_loss - low.loss) / (plain.adv_loss - plain.loss))
    every = torch.cat(deltas)
    return {
        "perturbation, cosine, least sample": float(every.min()),
        "perturbation, cosine, mean over samples": float(every.mean()),
        "parameter gradient, cosine, least batch": min(steps),
        "its adversarial part, cosine, least batch": min(adversarial),
        "rise of the loss, ratio, least batch": min(rises),
        "rise of the loss, ratio, mean": statistics.mean(rises),
    }


def others(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The other methods with probes: the perturbation, and what it does to that which they climb.

    What SMART and VAT climb is the same at a small perturbation and at its opposite, so that the sign is left out.
    """
    found = {}
    for name, (method, options) in OTHERS.items():
        pairs = [[step_of(method, model, batch, **options, **more) for more in ({}, BF16)] for batch in batches]
        cosines = torch.cat([cosine(plain.delta, low.delta).abs() for plain, low in pairs])
        ratios = [low.adv_loss / plain.adv_loss for plain, low in pairs]
        found[name] = {
            "absolute cosine, least sample": float(cosines.min()),
            "absolute cosine, mean over samples": float(cosines.mean()),
            "adv_loss, ratio, least batch": min(ratios),
            "adv_loss, ratio, mean": statistics.mean(ratios),
        }
    return found


def seconds(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """The median time of a step, with dropout, one of each kind in turn; each batch is run once before."""
    times: dict[str, list[float]] = {"float32 probes": [], "bfloat16 probes": []}
    methods = [fastadv.PGD(copy.deepcopy(model).train(), **PGD, **more) for more in ({}, BF16)]
    for batch, turn in itertools.product(batches, range(3)):
        for adv, kept in zip(methods, times.values(), strict=True):
            begin = time.perf_counter()
            adv.backward(lambda: adv.model(**batch).loss, mask=batch["attention_mask"])  # noqa: B023
            if turn:
                kept.append(time.perf_counter() - begin)
            adv.model.zero_grad()
    ratios = [low / plain for plain, low in zip(*times.values(), strict=True)]
    medians = {name: statistics.median(kept) for name, kept in times.items()}
    return {**medians, "bfloat16 over float32, median of pairs": statistics.median(ratios)}


def instructions() -> list[str]:
    """Those of this CPU that compute in bfloat16, as Linux names them."""
    with contextlib.suppress(OSError):
        return sorted({flag for flag in Path("/proc/cpuinfo").read_text().split() if "bf16" in flag})
    return []


def trained(model: nn.Module, batches: Iterator[dict[str, Tensor]], count: int) -> nn.Module:
    """After `count` plain steps."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=RATE, weight_decay=0.01)
    for batch in itertools.islice(batches, count):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm-up", type=int, default=40, help="plain steps before")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job = prepare(Settings(method="pgd"))
    sampler = LengthGrouped(job.train.lengths(), 32, arguments.seed)
    loader = DataLoader(job.train, 32, sampler=sampler, collate_fn=DataCollatorWithPadding(job.tokenizer))
    batches = (dict(batch) for batch in loader)
    model = trained(job.build(arguments.seed), batches, arguments.warm_up)
    chosen = list(itertools.islice(batches, arguments.batches))
    result = {
        "settings": {**PGD, "warm_up": arguments.warm_up, "batches": arguments.batches, "seed": arguments.seed},
        "shapes": [list(batch["input_ids"].shape) for batch in chosen],
        "hardware": f"{device_name('cpu')}; bfloat16 instructions: {', '.join(instructions()) or 'none'}",
        "torch": torch.__version__,
        "seconds": seconds(model, chosen),
        "pgd": compare(model, chosen),
        "others": others(model, chosen[: arguments.batches // 2]),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
