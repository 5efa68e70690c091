"""`probe_dtype`: probes under autocast, full passes as they are; what comes out, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.perturb.positions import PositionPerturbation
from tests.contracts.precision import FULL, HALF, LOW, NUMBERS, PGD, autocast_state, matmuls, never, stepped, tiny
from tests.every import EVERY
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import (
    assert_close,
    assert_gradients,
    batch,
    clear,
    gradients,
    record,
    refused,
    relative,
    same_bits,
    seeded,
)

ROOT = Path(__file__).parent.parent.parent
AWP = partial(fastadv.AWP, gamma=0.3)


def bregman(model: nn.Module, embedding: str, probe_dtype: torch.dtype | None) -> fastadv.Method:
    inner = fastadv.PGD(model, embedding=embedding, probe_dtype=probe_dtype)
    return fastadv.BregmanProximal(model, decay=0.9, method=inner)


def awp(model: nn.Module, embedding: str, **options: Any) -> fastadv.Method:
    return AWP(model, steps=2, **options)


ALL: dict[str, Callable[..., fastadv.Method]] = {**EVERY, "awp": awp, "bregman": bregman}
SCHEDULES = {  # f: a full pass, p: a probe or a partial pass
    "fgsm": "ff",
    "fgm": "ff",
    "pgd": "fppf",
    "freeat": "f",
    "yopo": "fppfppf",
    "freelb": "fff",
    "neftune": "f",
    "llr": "fpppf",
    "smart": "fpf",
    "vat": "fpf",
    "awp": "fpf",
    "bregman": "fppff",
}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.cosine_similarity(flat(a), flat(b), dim=0))


@pytest.mark.parametrize("name", ALL)
def test_every_methods_probes_and_they_alone(name: str) -> None:
    """A matrix product in a probe is in bfloat16, in a full pass in float32."""
    assert ALL.keys() == SCHEDULES.keys()
    model, data = tiny(), batch()
    adv = ALL[name](model, embedding="word_embeddings", probe_dtype=LOW)
    before = autocast_state()
    with matmuls(model.bert.q) as seen:
        adv.backward(lambda: model(**data), mask=data["attention_mask"])
    assert seen == [LOW if kind == "p" else FULL for kind in SCHEDULES[name]]
    assert autocast_state() == before


@pytest.mark.parametrize("dtype", [LOW, HALF], ids=str)
def test_a_step_that_begins_with_a_probe(dtype: torch.dtype) -> None:
    model, data = tiny(), batch()
    adv = PGD(model, clean_weight=0, random_start=True, probe_dtype=dtype)
    with matmuls(model.bert.q) as seen:
        adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    assert seen == [dtype] * 3 + [FULL]


def test_for_evaluation_the_search_alone() -> None:
    model, data = tiny(), batch()
    adv = PGD(model, probe_dtype=LOW)
    with matmuls(model.bert.q) as seen, adv.perturbed(lambda: model(**data).loss, mask=data["attention_mask"]):
        model(**data)
    assert seen == [LOW] * 3 + [FULL]


def test_by_default_there_is_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", never)
    with pytest.raises(AssertionError):
        stepped(PGD, LOW)
    stepped(PGD, None)


@pytest.mark.parametrize("place", ["word_embeddings", "ff1"])
@pytest.mark.parametrize("dtype", [LOW, HALF], ids=str)
def test_perturbation_and_gradient_stay_float32(dtype: torch.dtype, place: str, monkeypatch: Any) -> None:
    """Also where the perturbed module, a linear layer, returns the lower precision in probes."""
    model, data = tiny(), batch()
    adv = fastadv.PGD(model, embedding=place, probe_dtype=dtype, **NUMBERS)
    found: list[Tensor] = []
    take = PositionPerturbation.take

    def watched(self: Any, grads: Any) -> None:
        found.extend(grads)
        take(self, grads)

    monkeypatch.setattr(PositionPerturbation, "take", watched)
    adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    assert [grad.dtype for grad in found] == [FULL] * 2
    assert all(grad.abs().sum() > 0 for grad in found)
    assert [value.dtype for value in adv.find(lambda: model(**data).loss).values] == [FULL]
    assert float(adv.perturbation_norm) == pytest.approx(0.5, abs=1e-4)


def by_hand(dtype: torch.dtype | None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """PGD-3, its two probes under autocast: what the passes see, and the gradients."""
    model, data = tiny(), batch()
    mask, labels = data["attention_mask"], data["labels"]
    words, keep = model.word_embeddings.weight, mask.unsqueeze(-1).float()
    numbers: dict[str, Any] = {"scope": "sample", "norm": "l2", "step_size": 0.3, "epsilon": 0.5}
    r, seen = torch.zeros(*data["input_ids"].shape, words.shape[1]), []

    def loss(r: Tensor) -> Tensor:
        embedded = words[data["input_ids"]] + keep * r
        seen.append(embedded.detach())
        return model(None, mask, labels, inputs_embeds=embedded).loss

    clean = loss(r.requires_grad_())
    clean.backward(retain_graph=True)
    g = torch.autograd.grad(clean, r)[0]
    for _ in range(2):
        r = oracles.ascend(r.detach(), g, **numbers).requires_grad_()
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            probed = loss(r)
        g = torch.autograd.grad(probed, r)[0]
    loss(oracles.ascend(r.detach(), g, **numbers)).backward()
    return seen, gradients(model)


@pytest.mark.parametrize("dtype", [None, LOW, HALF], ids=str)
def test_equals_pgd_with_its_own_autocast(dtype: torch.dtype | None) -> None:
    want_seen, want = by_hand(dtype)
    model, data = tiny(), batch()
    adv = PGD(model, probe_dtype=dtype)
    with record(model) as seen:
        adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    deltas, want_deltas = ([embedded - every[0] for embedded in every[1:]] for every in (seen, want_seen))
    for number, (mine, its) in enumerate(zip(deltas, want_deltas, strict=True), 1):
        assert_close(mine, its, 5e-6, f"perturbation of pass {number}")  # of embeddings ten times as long, rounded
    assert_gradients(gradients(model), want, 1e-6, floor=1e-3)
    if dtype is not None:  # the comparison can tell
        unaided = by_hand(None)[0]
        assert relative(unaided[-1] - unaided[0], want_deltas[-1]) > 5e-5


ANGLE = 0.006  # three times the rounding of a bfloat16, 2^-9; largest of eight models and batches: 0.0021
COSINE = 1 - ANGLE**2 / 2


@pytest.mark.parametrize("seed", range(3))
def test_the_direction_is_that_of_float32_probes(seed: int) -> None:
    """The perturbation turns by about what bfloat16 rounds; the adversarial pass's gradient by less."""
    deltas, grads, rises = [], [], []
    for dtype in (None, LOW):
        model, data = seeded(lambda: TinyModel("tfm"), seed, FULL), batch(seed=seed + 1)
        model(**data).loss.backward()
        clean = gradients(model)
        clear(model)
        with record(model) as seen:
            result = PGD(model, probe_dtype=dtype).backward(lambda: model(**data).loss, data["attention_mask"])  # noqa: B023
        deltas.append((seen[-1] - seen[0]).flatten(1).double())
        grads.append({name: grad - clean[name] for name, grad in gradients(model).items()})
        rises.append(float(result.adv_loss - result.loss))
    assert not torch.equal(*deltas)
    assert torch.cosine_similarity(*deltas).min() > COSINE
    assert cosine(*grads) > COSINE
    assert rises[1] == pytest.approx(rises[0], rel=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_the_gradients_of_every_method(name: str) -> None:
    """Bit for bit the same where the step has no probe. Of SMART, VAT, LLR and AWP no more is asked: the first three
    ascend a difference of two passes, and AWP moves the weights far here."""
    plain, low = stepped(ALL[name], None), stepped(ALL[name], LOW)
    same = all(same_bits(plain[key], low[key]) for key in plain)
    assert same == ("p" not in SCHEDULES[name])
    assert cosine(plain, low) > (0.99 if name in ("smart", "vat", "llr", "awp") else COSINE)


def test_a_model_that_goes_to_float64_later() -> None:
    """Autocast leaves float64 alone: the step is that without the option."""
    found = []
    for dtype in (None, LOW):
        model, data = tiny(), batch()
        adv = PGD(model, probe_dtype=dtype)
        model.double()
        adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])  # noqa: B023
        found_one = adv.find(lambda: model(**data).loss)  # noqa: B023
        assert [value.dtype for value in found_one.values] == [torch.float64]
        found.append(gradients(model))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        ("bfloat16", TypeError),
        (16, TypeError),
        (True, TypeError),
        (torch.float32, ValueError),
        (torch.int8, ValueError),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(name: str, dtype: Any, error: type[Exception]) -> None:
    model = tiny()
    make = partial(ALL[name], model, embedding="word_embeddings", probe_dtype=dtype)
    refused(model, make, error, "probe_dtype", "torch.bfloat16", "torch.float16", "None", repr(dtype))


def test_a_float64_model_is_refused() -> None:
    model = tiny().double()
    refused(model, lambda: PGD(model, probe_dtype=LOW), ValueError, "float64", "probe_dtype=torch.bfloat16", "nothing")
    model.bert.ff1.float()
    PGD(model, probe_dtype=LOW).close()
