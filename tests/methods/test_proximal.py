"""The Bregman proximal point: its term, its teacher, and every method that it holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastadv
from fastadv import reference
from fastadv.methods.proximal import BregmanProximal
from tests.every import EVERY
from tests.models import Stateful, TinyModel
from tests.oracles.regularisers import symmetric_kl
from tests.support import (
    assert_close,
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    ready,
    same_bits,
    seeded,
    snapshot,
)

FUSED = pytest.mark.parametrize("fused", [pytest.param(None, id="fused"), pytest.param(False, id="eager")])
HELD = {**EVERY, "smart": fastadv.SMART, "vat": fastadv.VAT, "neftune": fastadv.NEFTune}


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


@FUSED
def test_is_the_papers(fused: bool | None) -> None:
    """Five steps with an optimizer, against a second model as teacher."""
    found = []
    for mine in (True, False):
        model, data, closure = ready()
        optimizer, seen = trained(model), []
        if mine:
            adv: Any = BregmanProximal(model, 2.0, 0.7, fused=fused).attach(optimizer)
        else:
            adv = reference.BregmanProximal(model, 2.0, 0.7)
        for _ in range(5):
            if mine:
                result = adv.backward(closure)
                seen += [result.loss, adv.distance]
            else:
                seen += adv.step(lambda one: one(**data)[:2])  # noqa: B023
            seen += gradients(model).values()
            optimizer.step()
            optimizer.zero_grad()
            if not mine:
                adv.update()
        found.append([*seen, *(p.detach() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 1e-9 * max(float(other.norm()), 1e-3)  # a key's bias has no gradient
    assert float(found[0][-len(list(model.parameters())) - 1].norm()) > 0


@FUSED
def test_without_decay_the_teacher_is_the_model(fused: bool | None) -> None:
    """Bit for bit, with dropout: the distance is zero, and the gradient that of plain training."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model, data = seeded(lambda: TinyModel("tfm", dropout=0.3), dtype=dtype), batch()
        optimizer = trained(model)
        adv = BregmanProximal(model, 5.0, 0.0, fused=fused).attach(optimizer)
        for _ in range(3):
            result = adv.backward(lambda: model(**data))  # noqa: B023
            assert result.adv_loss.item() == 0
            optimizer.step()
            optimizer.zero_grad()
            assert all(same_bits(adv.teacher[name], p.detach()) for name, p in model.named_parameters())
        assert adv.updates == 3
        adv.close()


def test_the_average() -> None:
    model, _, closure = ready()
    adv = BregmanProximal(model, decay=0.9)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        adv.update()
        want = {name: 0.9 * want[name] + 0.1 * p.detach() for name, p in model.named_parameters()}
    for name, tensor in adv.teacher.items():
        assert_close(tensor, want[name], 1e-12, name)
    assert float(adv.backward(closure).adv_loss) > 0


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("dropout", ["same", "fresh"])
def test_holds_every_method(name: str, dropout: str) -> None:
    """The gradient is the method's and the term's; random starts and dropout are what they are without it."""
    model, data = seeded(lambda: TinyModel("tfm", dropout=0.2)), batch()

    def closure() -> Any:
        return model(**data)

    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inner = HELD[name](model, embedding=model.word_embeddings, dropout=dropout)
    torch.manual_seed(5)
    if name == "freeat" or dropout == "fresh":  # the term's masks are those of one pass
        model.eval()
    inner.backward(closure, mask=data["attention_mask"])
    alone = gradients(model)
    state = torch.get_rng_state()
    inner.close()
    clear(model)
    held = HELD[name](model, embedding=model.word_embeddings, dropout=dropout)
    adv = BregmanProximal(model, 3.0, 0.5, method=held)
    with torch.no_grad():
        for key, p in teacher.named_parameters():
            adv.teacher[key].copy_(p)
    torch.manual_seed(5)
    adv.backward(closure, mask=data["attention_mask"])
    found = gradients(model)
    if model.training:
        assert torch.equal(torch.get_rng_state(), state)
    if not model.training:
        clear(model)
        (3.0 * symmetric_kl(closure().logits, teacher.eval()(**data).logits.detach())).backward()
        term = gradients(model)
        assert_gradients(found, {key: alone[key] + term[key] for key in alone}, 1e-9)
    assert float(adv.distance) > 0
    assert adv.attacked == held.attacked == 1


@pytest.mark.parametrize(("method", "extra"), [(fastadv.PGD, 1), (fastadv.SMART, 0), (fastadv.FreeLB, 1), (None, 0)])
def test_a_clean_pass_serves_where_there_is_one(method: Any, extra: int) -> None:
    """How often the model runs: the teacher's one look besides, and a pass where none is clean."""
    model, _, closure = ready()
    calls: list[bool] = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    inner = None if method is None else method(model, embedding=model.word_embeddings)
    if inner is not None:
        inner.backward(closure)
        clear(model)
    alone = len(calls) if method is not None else 1
    adv = BregmanProximal(model, method=inner)
    calls.clear()
    adv.backward(closure)
    assert (len(calls), calls.count(False)) == (alone + 1 + extra, 1)


def test_the_teachers_look_leaves_no_trace() -> None:
    """Running statistics, counters, modes, weights and the generator are those of plain training."""
    found = []
    for mine in (False, True):
        model, data = seeded(Stateful), batch()

        def closure() -> Any:
            return model(data["input_ids"], data["labels"])  # noqa: B023

        torch.manual_seed(3)
        if mine:
            versions = [p._version for p in model.parameters()]
            BregmanProximal(model, 1.0, 0.5).backward(closure)
            assert [p._version for p in model.parameters()] == versions
        else:
            closure().loss.backward()
        found.append([torch.get_rng_state(), *(b.clone() for b in model.buffers()), *gradients(model).values()])
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_a_fault_leaves_no_trace() -> None:
    model, data, _ = ready()
    adv = BregmanProximal(model, method=fastadv.SMART(model, embedding=model.word_embeddings))
    for fails_at in range(5):
        before, calls = snapshot(model), []

        def closure() -> Any:
            calls.append(1)  # noqa: B023
            if len(calls) > fails_at:  # noqa: B023
                raise KeyboardInterrupt
            return model(**data)

        if fails_at < 4:
            with pytest.raises(KeyboardInterrupt):
                adv.backward(closure)
            assert_unchanged(model, before)
    adv.backward(lambda: model(**data))


def test_a_checkpoint_has_the_teacher() -> None:
    found = []
    for resumed in (False, True):
        model, _, closure = ready()
        optimizer = trained(model)
        adv = BregmanProximal(model, 1.0, 0.5, method=fastadv.PGD(model, embedding=model.word_embeddings))
        adv.attach(optimizer)
        for step in range(4):
            if resumed and step == 2:
                weights, state = copy.deepcopy(model.state_dict()), adv.state_dict()
                state = {name: tensor.clone() for name, tensor in state.items()}
                adv.close()
                model, _, closure = ready()
                optimizer = trained(model)
                adv = BregmanProximal(model, 1.0, 0.5, method=fastadv.PGD(model, embedding=model.word_embeddings))
                adv.attach(optimizer)
                model.load_state_dict(weights)
                adv.load_state_dict(state)
            adv.backward(closure)
            optimizer.step()
            optimizer.zero_grad()
        assert adv.updates == 4
        assert adv.attacked == 4
        found.append([p.detach() for p in model.parameters()])
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_only_what_trains_has_a_teacher() -> None:
    """A frozen body (LoRA) is shared, not copied."""
    model, _, closure = ready()
    model.bert.requires_grad_(False)
    adv = BregmanProximal(model)
    assert set(adv.teacher) == {"classifier.weight", "classifier.bias"}
    adv.backward(closure)


def test_closing_takes_the_hook_off_the_optimizer() -> None:
    model, _, closure = ready()
    optimizer = trained(model)
    adv = BregmanProximal(model).attach(optimizer)
    adv.attach(optimizer)  # once, however often it is called
    adv.backward(closure)
    optimizer.step()
    assert adv.updates == 1
    adv.close()
    optimizer.step()
    assert adv.updates == 1
    assert not optimizer._optimizer_step_post_hooks
