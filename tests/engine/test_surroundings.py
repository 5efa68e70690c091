"""Grad mode, autocast and attention's kernels after a step that failed inside what changes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import fastadv
from fastadv.engine.safety import surroundings
from tests.support import batch, same_bits, with_gradients

CPU = torch.device("cpu")


def test_everything_is_put_back() -> None:
    before = surroundings.look(CPU)
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_cache_enabled(False)
    torch.autocast_increment_nesting()
    surroundings.use_attention(math=True)
    assert all(mine != its for mine, its in zip(surroundings.look(CPU), before, strict=True))
    surroundings.put_back(before)
    assert surroundings.look(CPU) == before


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("method", [partial(fastadv.PGD, embedding="word_embeddings"), fastadv.AWP])
def test_a_step_that_is_left_half_way(method: Callable[..., fastadv.Method], inside: bool) -> None:
    """As by an interrupt at the entry of an `__exit__`, which then never runs."""
    model, data = with_gradients(), batch()
    adv = method(model)

    def closure() -> None:
        torch.set_grad_enabled(False)
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        surroundings.use_attention(math=True)
        raise KeyboardInterrupt

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        before = surroundings.look(CPU)
        with pytest.raises(KeyboardInterrupt):
            adv.backward(closure)
        assert surroundings.look(CPU) == before
    model.zero_grad()
    assert adv.backward(lambda: model(**data)).adv_loss is not None


def test_casts_that_autocast_kept_of_moved_weights_are_forgotten() -> None:
    model, data = with_gradients().to(torch.float32), batch()
    adv = fastadv.AWP(model, gamma=0.5)
    passes: list[int] = []

    def closure() -> torch.Tensor:
        loss = model(**data).loss
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(**data).logits
        with pytest.raises(KeyboardInterrupt):
            adv.backward(closure)
        assert same_bits(model(**data).logits, want)


@pytest.mark.parametrize("call", ["attack", "restore", "backup_grad", "restore_grad"])
def test_a_classic_call_whose_no_grad_never_ends(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_gradients()
    adv = fastadv.PGD(model, "word_embeddings", fused=False)
    calls = {
        "attack": lambda: adv.attack(is_first_attack=True),
        "backup_grad": adv.backup_grad,
        "restore_grad": adv.restore_grad,
        "restore": adv.restore,
    }
    first = {"restore": "attack", "restore_grad": "backup_grad"}
    if call in first:
        calls[first[call]]()

    def struck(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.no_grad, "__exit__", struck)
        with pytest.raises(KeyboardInterrupt):
            calls[call]()
    assert torch.is_grad_enabled()
    calls[call]()
