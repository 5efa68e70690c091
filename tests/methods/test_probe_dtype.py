"""`probe_dtype`: probes under autocast, full passes as they are; and nothing of it is left behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from tests.bert import text, tiny_bert
from tests.every import EVERY
from tests.methods.test_faults import PLACES, Trap, check_as_new, prepare
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import (
    assert_close,
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    record,
    refused,
    relative,
    same_bits,
    seeded,
    snapshot,
)

ROOT = Path(__file__).parent.parent.parent
LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
NUMBERS: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 3, "scope": "sample"}
PGD = partial(fastadv.PGD, embedding="word_embeddings", **NUMBERS)
AWP = partial(fastadv.AWP, gamma=0.3)


def tiny(dropout: float = 0.0) -> TinyModel:
    return seeded(lambda: TinyModel("tfm", dropout), dtype=torch.float32)


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


def autocast_state() -> tuple[Any, ...]:
    """Of the CPU: on or off, to what, whether casts are kept, and how many are around."""
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(), depth


@contextlib.contextmanager
def matmuls(module: nn.Linear) -> Iterator[list[torch.dtype]]:
    """The dtype of what a linear layer returns to each pass that takes gradients."""
    seen: list[torch.dtype] = []

    def look(*call: Any) -> None:
        if torch.is_grad_enabled():  # not to the Bregman teacher
            seen.append(call[-1].dtype)

    handle = module.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def stepped(make: Callable[..., fastadv.Method], dtype: torch.dtype | None, **options: Any) -> dict[str, Tensor]:
    """The gradients of one step."""
    model, data = tiny(), batch()
    adv = make(model, embedding="word_embeddings", probe_dtype=dtype, **options)
    torch.manual_seed(2)
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    adv.close()
    return gradients(model)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.cosine_similarity(flat(a), flat(b), dim=0))


# Which passes


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


def never(*_: Any, **__: Any) -> None:
    raise AssertionError


def test_by_default_there_is_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", never)
    with pytest.raises(AssertionError):
        stepped(PGD, LOW)
    stepped(PGD, None)


# What comes out


@pytest.mark.parametrize("place", ["word_embeddings", "ff1"])
@pytest.mark.parametrize("dtype", [LOW, HALF], ids=str)
def test_perturbation_and_gradient_stay_float32(dtype: torch.dtype, place: str) -> None:
    """Also where the perturbed module, a linear layer, returns the lower precision in probes."""
    model, data = tiny(), batch()
    adv = fastadv.PGD(model, embedding=place, probe_dtype=dtype, **NUMBERS)
    perturbation, found = adv.engine.perturbation, []
    take = perturbation.take
    perturbation.take = lambda grads: [found.extend(grads), take(grads)]
    adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    assert [grad.dtype for grad in found] == [FULL] * 2
    assert all(grad.abs().sum() > 0 for grad in found)
    assert [leaf.dtype for leaf in perturbation.leaves()] == [FULL]
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


def test_vat_looks_as_far_as_under_autocast() -> None:
    model = tiny()
    makes = {dtype: fastadv.VAT(model, embedding="word_embeddings", probe_dtype=dtype) for dtype in (None, LOW)}
    assert [adv.xi for adv in makes.values()] == [0.01, 1.0]


def test_a_model_that_goes_to_float64_later() -> None:
    """Autocast leaves float64 alone: the step is that without the option."""
    found = []
    for dtype in (None, LOW):
        model, data = tiny(), batch()
        adv = PGD(model, probe_dtype=dtype)
        model.double()
        adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])  # noqa: B023
        assert [leaf.dtype for leaf in adv.engine.perturbation.leaves()] == [torch.float64]
        found.append(gradients(model))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


# What surrounds a step


def test_a_scaler_scales_probes() -> None:
    """By powers of two, which changes nothing in bfloat16."""
    want = stepped(PGD, LOW)
    scaled = stepped(PGD, LOW, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert_gradients({name: grad / 2**10 for name, grad in scaled.items()}, want, 1e-6, floor=1e-3)


@pytest.mark.parametrize(("scale", "norm", "skipped"), [(None, 0.1, 0), (2.0**16, 0.3, 0), (2.0**48, 0.1, 8)])
def test_float16_underflows_without_a_scaler(scale: float | None, norm: float, skipped: int) -> None:
    """A small loss's gradient is zero, and with far too large a scale none is finite: the probes' ascents are lost."""
    model, data = tiny(), batch()
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    adv = fastadv.PGD(
        model, embedding="word_embeddings", probe_dtype=HALF, scaler=scaler, **{**NUMBERS, "step_size": 0.1}
    )
    adv.backward(lambda: 1e-7 * model(**data).loss, mask=data["attention_mask"])
    assert (round(float(adv.perturbation_norm), 1), int(adv.skipped)) == (norm, skipped)


@pytest.mark.parametrize("cached", [True, False])
def test_under_an_autocast_to_the_same_dtype_nothing_changes(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its casts serve probes as well: no other autocast is entered."""
    found = []
    for dtype in (None, LOW):
        with torch.autocast("cpu", LOW, cache_enabled=cached), monkeypatch.context() as patch:
            patch.setattr(torch, "autocast", never)
            found.append(stepped(PGD, dtype))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("enabled", [True, False])
def test_the_casts_of_an_autocast_around_the_step(enabled: bool) -> None:
    """Probes take none of those that it keeps, and leave none of theirs to it."""
    model, data = tiny(), batch()
    adv = PGD(model, probe_dtype=HALF)

    def step() -> dict[str, Tensor]:
        clear(model)
        adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
        return gradients(model)

    with torch.autocast("cpu", LOW):
        kept = model(**data).logits
        with torch.autocast("cpu", LOW, enabled=enabled):
            before = autocast_state()
            with matmuls(model.bert.q) as seen:
                found = step()
            assert autocast_state() == before
        assert same_bits(model(**data).logits, kept)
    outside = LOW if enabled else FULL
    assert seen == [outside, HALF, HALF, outside]
    with torch.autocast("cpu", LOW, enabled=enabled, cache_enabled=False):
        want = step()
    assert_gradients(found, want, 1e-6, floor=1e-3)


def test_a_closure_with_its_own_autocast_keeps_it() -> None:
    def step(dtype: torch.dtype | None) -> dict[str, Tensor]:
        model, data = tiny(), batch()

        def closure() -> Tensor:
            with torch.autocast("cpu", LOW):
                return model(**data).loss

        PGD(model, probe_dtype=dtype).backward(closure, mask=data["attention_mask"])
        return gradients(model)

    plain, half = step(None), step(HALF)
    assert all(same_bits(plain[name], half[name]) for name in plain)


def test_checkpoints_are_recomputed_in_the_probes_precision() -> None:
    found = []
    for checkpointed in (False, True):
        model, data = tiny(), batch()
        if checkpointed:
            forward = model.bert.ff1.forward
            model.bert.ff1.forward = partial(checkpoint, forward, use_reentrant=False)
        with matmuls(model.bert.q) as seen:
            PGD(model, probe_dtype=LOW).backward(lambda: model(**data).loss, mask=data["attention_mask"])  # noqa: B023
        assert seen.count(LOW) == 2
        found.append(gradients(model))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_compiled() -> None:
    """Two graphs, and the second step compiles nothing."""
    want, unaided = stepped(PGD, LOW), stepped(PGD, None)
    model, data, graphs = tiny(), batch(), []
    compiled: Any = torch.compile(model, backend="aot_eager")
    adv = PGD(compiled, probe_dtype=LOW)
    for _ in range(2):
        clear(model)
        adv.backward(lambda: compiled(**data).loss, mask=data["attention_mask"])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    adv.close()
    assert graphs == [2, 2]
    found = gradients(model)
    assert_gradients(found, want, 1e-6, floor=1e-3)
    with pytest.raises(AssertionError, match="relative error"):  # the comparison can tell
        assert_gradients(found, unaided, 1e-6, floor=1e-3)


# Dropout


def dropped(monkeypatch: pytest.MonkeyPatch, attention: str, mode: str) -> tuple[list[list[Tensor]], list[float]]:
    """The masks that each of PGD-3's passes draws, and its loss; the perturbation stays zero."""
    model, data = tiny_bert(0.4, FULL, attention=attention), text()
    passes: list[list[Tensor]] = []
    losses, dropout, sdpa = [], F.dropout, F.scaled_dot_product_attention

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = dropout(x, *args, **kwargs)
        passes[-1].append((out != 0) | (x == 0))
        return out

    def attended(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        state = torch.get_rng_state()
        probabilities = sdpa(q, k, torch.eye(k.shape[-2], dtype=v.dtype).expand(*k.shape[:-1], -1), **kwargs)
        passes[-1].append(probabilities != 0)
        torch.set_rng_state(state)
        return sdpa(q, k, v, **kwargs)

    def closure() -> Any:
        passes.append([])
        output = model(**data)
        losses.append(float(output.loss.detach()))
        return output

    monkeypatch.setattr(F, "dropout", watched)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attended)
    torch.manual_seed(5)
    adv = fastadv.PGD(model, step_size=0.0, dropout=mode, probe_dtype=LOW)
    adv.backward(closure, mask=data["attention_mask"])
    return passes, losses


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_same_masks_in_both_precisions(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: hidden states' and attention's; and a fresh one is another."""
    passes, losses = dropped(monkeypatch, attention, "same")
    assert len(passes) == 4
    assert len(passes[0]) == 1 + 2 * 3 + 1  # behind the embedding, three per layer, before the classifier
    for others in passes[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(passes[0], others, strict=True))
    assert losses[0] == losses[3] != losses[1] == losses[2]
    fresh, _ = dropped(monkeypatch, attention, "fresh")
    assert not any(torch.equal(mine, its) for mine, its in zip(fresh[0], fresh[1], strict=True))


# Faults and mistakes


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("outer", [False, True], ids=["alone", "under autocast"])
def test_a_fault_leaves_no_autocast(index: int, place: str, outer: bool) -> None:
    model, data = prepare("some")
    make = partial(fastadv.PGD, clean_weight=0, random_start=0.1, scope="sample", probe_dtype=HALF)
    adv = make(model, embedding=model.embed)
    with torch.autocast("cpu", LOW) if outer else contextlib.nullcontext():
        before, state = snapshot(model), autocast_state()
        with pytest.raises(KeyboardInterrupt):
            adv.backward(Trap(model, data, index, place, KeyboardInterrupt()))
        assert autocast_state() == state
        assert_unchanged(model, before)
        check_as_new(adv, model, data, make)


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


def test_the_page_shows_what_was_measured() -> None:
    page = (ROOT / "docs/engine.md").read_text()
    kept = json.loads((ROOT / "docs/results/probe_dtype.json").read_text())
    pgd, seconds = kept["pgd"], kept["seconds"]
    rows = [
        [f"{pgd[f'perturbation, cosine, {of}']:.5f}" for of in ("mean over samples", "least sample")],
        [f"{pgd[f'{of}, cosine, least batch']:.7f}" for of in ("parameter gradient", "its adversarial part")],
        [f"{pgd[f'rise of the loss, ratio, {of}']:.4f}" for of in ("mean", "least batch")],
    ]
    for row in rows:
        assert f"| {', '.join(row)} |" in page
    mine, plain, ratio = seconds["bfloat16 probes"], seconds["float32 probes"], list(seconds.values())[2]
    assert f"| {mine:.2f}, and {plain:.2f} in float32: x {ratio:.2f} |" in page
    for name, row in kept["others"].items():
        cells = [f"{value:.3f}" for value in row.values()]
        assert f"| {name} | {cells[1]}, {cells[0]} | {cells[3]}, {cells[2]} |" in page
