"""`find` and `applied`: a perturbation is a value, which one holds and applies."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.every import EVERY, in_scopes
from tests.models import TinyModel
from tests.support import assert_close, assert_unchanged, batch, clear, ready, record, seeded, snapshot, two_calls

SCOPES = in_scopes("sample", "token", "table", "row")


def perturbation(model: TinyModel, data: dict[str, Tensor], block: Any = None) -> Tensor:
    """How far the model's embedding is from the plain one, inside `block`."""
    with torch.no_grad(), record(model) as plain:
        model(**data)
    with block, torch.no_grad(), record(model) as moved:
        model(**data)
    return moved[0] - plain[0]


@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_it_finds_what_perturbed_applies(name: str, scope: str) -> None:
    model, data, closure = ready()
    adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
    torch.manual_seed(3)
    one = perturbation(model, data, adv.perturbed(closure, data["attention_mask"]))
    torch.manual_seed(3)
    found = adv.find(closure, data["attention_mask"])
    assert one.abs().max() > 1e-4
    assert torch.equal(perturbation(model, data, found.applied()), one)
    assert torch.equal(perturbation(model, data, found.applied()), one)  # as often as one likes
    assert not one[data["attention_mask"] == 0].any()


@pytest.mark.parametrize("name", EVERY)
def test_it_leaves_no_trace(name: str) -> None:
    model, data, closure = ready(dropout=0.3)
    model(**data).loss.backward()
    adv = EVERY[name](model, embedding=model.word_embeddings)
    torch.manual_seed(5)
    model(**data)
    before = snapshot(model)
    found = adv.find(closure, data["attention_mask"])
    state = torch.get_rng_state()
    before["rng"] = state  # dropout has drawn, as in any pass
    assert_unchanged(model, before)
    with found.applied():
        pass
    assert_unchanged(model, before)


@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_it_is_held_over_optimizer_steps(name: str, scope: str) -> None:
    """The model trains under it as a model would whose embedding has the perturbation added by hand."""
    model, data, closure = ready()
    adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
    found = adv.find(closure, data["attention_mask"])
    delta = perturbation(model, data, found.applied())
    twin = copy.deepcopy(model)
    twin.word_embeddings.register_forward_hook(lambda module, args, output: output + delta)
    for net, block in ((model, found.applied), (twin, contextlib.nullcontext)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with block():
            for _ in range(2):
                optimizer.zero_grad()
                net(**data).loss.backward()
                optimizer.step()
    for (key, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(mine, theirs, 1e-12, key)


@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_later_steps_do_not_change_it(name: str, scope: str) -> None:
    """It owns its memory: what the method trains on afterwards leaves it alone."""
    model, data, closure = ready()
    adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
    found = adv.find(closure, data["attention_mask"])
    values = [value.clone() for value in found.values]
    other = batch(seed=9)
    adv.backward(lambda: model(**other), mask=other["attention_mask"])
    adv.find(lambda: model(**other), other["attention_mask"])
    assert values
    assert all(map(torch.equal, values, found.values))
    clear(model)
    with found.applied():
        assert model(**data).loss.isfinite()


@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_another_batch_is_refused(name: str, scope: str) -> None:
    model, data, closure = ready()
    adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
    found = adv.find(closure, data["attention_mask"])
    ids = data["input_ids"].clone()
    ids[0, 0] += 1
    with found.applied():
        with pytest.raises(RuntimeError, match="other token ids"):
            model(**{**data, "input_ids": ids})
        with pytest.raises(
            RuntimeError, match=r"no perturbation was found for an embedding call of shape \(4, 5, 16\)"
        ):
            model(**batch(4, 5))
        model(**{key: value.clone() for key, value in data.items()})  # the same ids elsewhere are the same batch
    model(**batch(4, 5))  # outside, any batch


def test_one_at_a_time() -> None:
    model, data, closure = ready()
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope="sample")
    found, mask = adv.find(closure, data["attention_mask"]), data["attention_mask"]
    with found.applied():
        for wrong in (lambda: adv.backward(closure, mask=mask), lambda: adv.find(closure, mask)):
            with pytest.raises(RuntimeError, match="applied to this model already"):
                wrong()
        with pytest.raises(RuntimeError, match="applied to this model already"), found.applied():
            pass
        assert perturbation_is_there(model, data)
    assert not perturbation_is_there(model, data)
    adv.close()
    with pytest.raises(RuntimeError, match="closed"), found.applied():
        pass


def perturbation_is_there(model: TinyModel, data: dict[str, Tensor]) -> bool:
    with torch.no_grad(), record(model) as seen:
        model(**data)
    return not torch.equal(seen[0], model.word_embeddings.weight[data["input_ids"]])


@pytest.mark.parametrize("error", [ValueError("a closure's"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("name", EVERY)
def test_exceptions_leave_no_trace(name: str, error: BaseException) -> None:
    model, data, closure = ready()
    adv = EVERY[name](model, embedding=model.word_embeddings)
    found = adv.find(closure, data["attention_mask"])
    with pytest.raises(type(error)), found.applied():
        raise error
    assert not perturbation_is_there(model, data)
    before = snapshot(model)
    passes = []

    def failing() -> Any:
        passes.append(closure())
        raise error

    with pytest.raises(type(error)):
        adv.find(failing, data["attention_mask"])
    assert passes
    assert_unchanged(model, before)
    assert adv.backward(closure, mask=data["attention_mask"]).loss.isfinite()


@pytest.mark.parametrize("method", [fastadv.FGM, fastadv.PGD])
def test_a_table_that_moves_itself(method: Callable[..., Any]) -> None:
    """tied="both" moves the weights: they are put back, and an optimizer's steps inside are kept."""
    model, _, closure = ready()
    adv = method(model, embedding=model.word_embeddings, tied="both")
    weight, before = model.word_embeddings.weight, model.word_embeddings.weight.detach().clone()
    found = adv.find(closure)
    assert torch.equal(weight, before)
    with found.applied():
        moved = weight.detach().clone()
        assert_close((moved - before).norm(), torch.tensor(adv.epsilon, dtype=before.dtype), 0.15, "its length")
    assert torch.equal(weight, before)
    with found.applied(), torch.no_grad():
        weight.mul_(0.5)
    assert_close(weight.detach(), before - 0.5 * moved, 1e-12, "the trained table, less the perturbation")


def test_every_call_has_its_own() -> None:
    model, (source, target, labels) = two_calls()
    adv = fastadv.PGD(model, scope="sample")
    found = adv.find(lambda: model(source, target, labels))
    assert [tuple(value.shape[:2]) for value in found.values] == [tuple(source.shape), tuple(target.shape)]
    with found.applied(), torch.no_grad():
        first = [model(source, target, labels).loss for _ in range(2)]
    assert torch.equal(*first)
    assert first[0] > model(source, target, labels).loss


def test_a_layers_output() -> None:
    """Any module's output: there are no ids to compare, the shape must fit."""
    model, data, closure = ready()
    layer = model.bert.ff1
    adv = fastadv.PGD(model, embedding=layer, scope="sample", epsilon=0.5)
    found = adv.find(closure, data["attention_mask"])
    with torch.no_grad():
        clean = closure().loss
        with found.applied():
            assert closure().loss > clean


def test_a_compiled_model() -> None:
    model, data, _ = ready()
    compiled = torch.compile(model, backend="aot_eager")
    adv = fastadv.PGD(compiled, embedding=model.word_embeddings, scope="sample")
    found = adv.find(lambda: compiled(**data), data["attention_mask"])
    other = fastadv.PGD(seeded(lambda: TinyModel("tfm")), embedding="word_embeddings", scope="sample")
    eager = other.find(lambda: other.model(**data), data["attention_mask"])
    assert_close(found.values[0], eager.values[0], 1e-12, "the perturbation")
    with torch.no_grad(), found.applied(), eager.applied():
        assert_close(compiled(**data).loss, other.model(**data).loss, 1e-12, "the loss under it")


def test_under_no_grad_and_in_eval() -> None:
    model, data, closure = ready(dropout=0.5)
    model.eval()
    adv = fastadv.FGM(model, embedding=model.word_embeddings, scope="sample")
    found = adv.find(closure, data["attention_mask"])
    with torch.inference_mode(), found.applied():
        inside = model(**data).loss
    assert inside > closure().loss


def test_a_method_held_by_a_teacher() -> None:
    model, data, closure = ready()
    inner = fastadv.SMART(model, embedding=model.word_embeddings, epsilon=0.3)
    fastadv.BregmanProximal(model, method=inner)
    found = inner.find(closure, data["attention_mask"])
    assert nn.utils.parameters_to_vector(model.parameters()).isfinite().all()
    with found.applied():
        assert perturbation_is_there(model, data)
