"""FreeAT's memory: what is left at which slot, and what a checkpoint brings back."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.methods.carry_buffer import CarryBuffer
from tests.methods.replays import SIZES, Run, batches
from tests.models import TinyModel
from tests.support import assert_unchanged, batch, clear, ready, same_bits, snapshot


@pytest.mark.parametrize(
    "options", [{}, {"norm": "l2"}, {"carry": False}, {"carry": False, "random_start": 0.05}], ids=str
)
@pytest.mark.parametrize("stop", range(1, len(SIZES)))
def test_a_checkpoint_goes_on_bit_for_bit(stop: int, options: dict[str, Any]) -> None:
    """Stopped between any two replays, in the middle of a batch too."""
    torch.manual_seed(0)
    whole, parts = Run(**options), Run(**options)
    want = [whole.replay(data) for data in batches()]
    torch.manual_seed(0)
    found = []
    for number, data in enumerate(batches()):
        if number == stop:
            file = io.BytesIO()
            torch.save(parts.adv.state_dict(), file)
            model, optimizer = parts.model.state_dict(), parts.optimizer.state_dict()
            parts.adv.close()
            parts = Run(**options)
            parts.model.load_state_dict(model)
            parts.optimizer.load_state_dict(optimizer)
            file.seek(0)
            parts.adv.load_state_dict(torch.load(file, weights_only=True))
        found.append(parts.replay(data))
    assert all(same_bits(mine, its) for mine, its in zip(found, want, strict=True))
    for (name, mine), its in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert same_bits(mine.detach(), its.detach()), name


def test_a_checkpoint_of_another_method_is_refused() -> None:
    run = Run()
    other = fastadv.FGM(ready()[0], embedding="word_embeddings")
    with pytest.raises(KeyError, match="last"):
        run.adv.load_state_dict(other.state_dict())


def test_carry_begins_where_the_last_batch_ended() -> None:
    """By slot and position: rows 0 and 1 of the smaller batch find what rows 0 and 1 left, masked places nothing."""
    run = Run()
    first, second = batch(4, 7, seed=0), batch(2, 9, seed=1)
    assert not run.replay(first).any()
    run.replay(first)
    left = run.adv.state_dict()["slots.0.0"].clone()
    assert left.shape == (4, 7, 16)
    assert left.abs().max() == pytest.approx(0.1)
    seen = run.replay(second)
    keep = second["attention_mask"].bool()
    assert torch.allclose(seen[:, :7][keep[:, :7]], left[:2][keep[:, :7]], atol=1e-12)
    assert not seen[:, 7:].any()
    assert not seen[~keep].any()
    now = run.adv.state_dict()["slots.0.0"]
    assert now.shape == (4, 9, 16)
    assert torch.equal(now[2:, :7], left[2:]), "no row of the second batch was there"
    hidden = ~torch.cat((keep[:, :7], torch.ones(2, 7).bool()))[:, :7]
    assert torch.equal(now[:, :7][hidden], left[hidden]), "what is masked leaves its slot alone"


@pytest.mark.parametrize(("start", "every"), [(0, 1), (1, 1), (1, 2), (3, 2), (1, 4)])
def test_without_carry_every_batch_begins_anew(start: int, every: int) -> None:
    """Whatever steps are attacked: the first attacked replay of a batch starts at zero."""
    run, sizes = Run(carry=False, start_step=start, every=every), [(4, 7)] * 12
    fresh: set[int] = set()
    for number, data in enumerate(batches(sizes)):
        seen = run.replay(data)
        attacked = number >= start and (number - start) % every == 0
        if not attacked or number // 2 not in fresh:
            assert not seen.any(), number
        else:
            assert seen.abs().max() > 0, number
        if attacked:
            fresh.add(number // 2)


def test_a_random_start_is_drawn_once_a_batch() -> None:
    run = Run(carry=False, random_start=0.05, step_size=0.0)
    data = batch()
    first, again, second = run.replay(data), run.replay(data), run.replay(data)
    assert first.abs().max() > 0.04
    assert torch.allclose(first, again, atol=1e-12)
    assert not torch.allclose(first, second, atol=1e-3)


def test_micro_batches_of_a_step_have_slots_of_their_own() -> None:
    """With `step=`, two micro-batches accumulate and each finds its own perturbation in the next replay."""
    run = Run()
    one, other = batch(4, 7, seed=1), batch(4, 7, seed=2)
    for step in range(2):
        for data in (one, other):
            run.adv.backward(lambda data=data: run.model(**data).loss, mask=data["attention_mask"], step=step)
        names = [name for name in run.adv.state_dict() if name.startswith("slots")]
        assert sorted(names) == ["slots.0.0", "slots.1.0"]
        run.optimizer.step()
        clear(run.model)
    both = run.adv.state_dict()
    for micro, data in enumerate((one, other)):
        alone = Run()
        for step in range(2):
            alone.model.load_state_dict(ready()[0].state_dict())
            if step == 1:  # the model after the step on both
                alone.model.load_state_dict(stepped(one, other).state_dict())
            alone.adv.backward(lambda: alone.model(**data).loss, mask=data["attention_mask"], step=step)  # noqa: B023
            clear(alone.model)
        assert torch.allclose(both[f"slots.{micro}.0"], alone.adv.state_dict()["slots.0.0"], atol=1e-12)


def stepped(*parts: dict[str, Tensor]) -> TinyModel:
    """The model after a plain step on all `parts`: the first replay's perturbation is zero."""
    model = ready()[0]
    sum(model(**data).loss for data in parts).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    return model


def test_a_failed_replay_leaves_its_slots() -> None:
    run, data = Run(), batch()
    run.replay(data)
    left, state = run.adv.state_dict()["slots.0.0"].clone(), run.adv.state_dict()
    clear(run.model)
    before = snapshot(run.model)

    def fails() -> Tensor:
        loss = run.model(**data).loss
        loss.register_hook(lambda _: pytest.fail("boom"))
        return loss

    with pytest.raises(pytest.fail.Exception, match="boom"):
        run.adv.backward(fails, mask=data["attention_mask"])
    assert_unchanged(run.model, before)
    assert same_bits(run.adv.state_dict()["slots.0.0"], left)
    assert {name: value.tolist() for name, value in run.adv.state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }


class Left(NamedTuple):
    """A call of the embedding, as far as slots look at it."""

    delta: Tensor
    mask: Tensor | None = None


def test_a_captured_graph_cannot_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule; that a graph is being captured only a CUDA device can say (the next test)."""
    slots = CarryBuffer()
    slots.keep((0, 0), Left(torch.ones(2, 3, 4)))  # type: ignore[arg-type]
    monkeypatch.setattr("fastadv.methods.carry_buffer._captured", lambda device: True)
    slots.keep((0, 0), Left(torch.full((1, 2, 4), 2.0)))  # type: ignore[arg-type]
    for shape in [(3, 3, 4), (1, 5, 4)]:
        with pytest.raises(RuntimeError, match=r"larger than any before.*largest batch.*once before"):
            slots.keep((0, 0), Left(torch.ones(shape)))  # type: ignore[arg-type]
    assert slots.buffers[0, 0][:, :, 0].tolist() == [[2, 2, 1], [1, 1, 1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_that_a_device_captures_cannot_grow() -> None:
    slots, small, large = CarryBuffer(), torch.ones(2, 3, 4, device="cuda"), torch.ones(3, 3, 4, device="cuda")
    slots.keep((0, 0), Left(small))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="larger than any before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        slots.keep((0, 0), Left(large))  # type: ignore[arg-type]


def test_perturbed_leaves_the_slots_alone() -> None:
    run, data = Run(), batch()
    run.replay(data)
    left = run.adv.state_dict()["slots.0.0"].clone()
    with run.adv.perturbed(lambda: run.model(**data).loss, mask=data["attention_mask"]):
        run.model(**data)
    assert same_bits(run.adv.state_dict()["slots.0.0"], left)
