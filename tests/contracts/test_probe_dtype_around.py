"""`probe_dtype` beside what surrounds a step: scalers, other autocasts, checkpoints, compilers, dropout, faults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastadv
from tests.bert import text, tiny_bert
from tests.contracts.faults import PLACES, Trap, check_as_new, prepare
from tests.contracts.precision import FULL, HALF, LOW, NUMBERS, PGD, autocast_state, matmuls, never, stepped, tiny
from tests.support import assert_gradients, assert_unchanged, batch, clear, gradients, same_bits, snapshot


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
