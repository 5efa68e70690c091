"""The interception: idle it is invisible, copies do not carry it, `close()` removes it, two methods take turns."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.native.flags import flag_on
from tests.every import EVERY
from tests.models import TinyModel
from tests.support import (
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    ready,
    refused,
    same_bits,
    snapshot,
    with_gradients,
)

PAIR = [fastadv.FGM, fastadv.PGD]
PLAIN = "bert.embeddings.word_embeddings"
GENERAL = "bert.embeddings"  # not an nn.Embedding: intercepted by a hook


def traces(model: nn.Module) -> dict[str, object]:
    """What sits in and on every module."""
    return {key: value for key, value in snapshot(model).items() if key.startswith("module")}


@pytest.mark.parametrize("name", [PLAIN, GENERAL])
@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
class TestInterception:
    def test_idle_it_changes_nothing(self, method: type[fastadv.Method], name: str) -> None:
        model, _, closure = ready()
        before = closure().loss
        before.backward()
        plain = gradients(model)
        clear(model)
        adv = method(model, embedding=name, scope="sample")
        adv.backward(closure)
        clear(model)
        after = closure().loss
        after.backward()
        assert same_bits(before.detach(), after.detach())
        assert all(same_bits(grad, plain[key]) for key, grad in gradients(model).items())
        with torch.no_grad():
            assert same_bits(closure().loss, before.detach())

    def test_close_removes_it(self, method: type[fastadv.Method], name: str) -> None:
        model, _, closure = ready()
        before = traces(model)
        adv = method(model, embedding=name, scope="sample")
        assert traces(model) != before
        adv.backward(closure)
        adv.close()
        assert traces(model) == before
        adv.close()  # a second time it has nothing to do
        assert traces(model) == before

    def test_a_step_leaves_weights_and_hooks(self, method: type[fastadv.Method], name: str) -> None:
        model, _, closure = ready()
        adv = method(model, embedding=name, scope="sample")
        before = snapshot(model)
        adv.backward(closure)
        clear(model)
        if adv._start is not None:  # its seed is the one number that a step draws
            torch.set_rng_state(before["rng"])
        assert_unchanged(model, before)

    def test_a_deep_copy_does_not_carry_it(self, method: type[fastadv.Method], name: str) -> None:
        model, data, closure = ready()
        adv = method(model, embedding=name, scope="sample")
        adv.backward(closure)
        twin = copy.deepcopy(model)
        clear(twin)
        check_untouched(twin, model, data, adv)
        again = method(twin, embedding=name, scope="sample")
        again.backward(lambda: twin(**data))
        assert_gradients(gradients(twin), gradients(model), 1e-12)

    def test_a_pickle_does_not_carry_it(self, method: type[fastadv.Method], name: str) -> None:
        model, data, closure = ready()
        adv = method(model, embedding=name, scope="sample")
        adv.backward(closure)
        pickled = pickle.dumps(model)
        assert b"fastadv" not in pickled, "a saved model must load without this package"
        twin = pickle.loads(pickled)
        clear(twin)
        check_untouched(twin, model, data, adv)
        again = method(twin, embedding=name, scope="sample")
        again.backward(lambda: twin(**data))
        assert_gradients(gradients(twin), gradients(model), 1e-12)

    def test_torch_save_of_the_whole_model(self, method: type[fastadv.Method], name: str) -> None:
        model, data, _ = ready()
        adv = method(model, embedding=name, scope="sample")
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        check_untouched(twin, model, data, adv)

    def test_the_state_dict_does_not_carry_it(self, method: type[fastadv.Method], name: str) -> None:
        model, _, closure = ready()
        before = model.state_dict()
        adv = method(model, embedding=name, scope="sample")
        adv.backward(closure)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(same_bits(after[key], before[key]) for key in before)
        model.load_state_dict(before)
        adv.backward(closure)


def check_untouched(twin: TinyModel, model: TinyModel, data: dict[str, Tensor], adv: fastadv.Method) -> None:
    """The copy computes what the model does, and is no part of a step on it."""
    assert same_bits(twin(**data).logits.detach(), model(**data).logits.detach())
    with pytest.raises(RuntimeError, match="never ran"):
        adv.backward(lambda: twin(**data))
    with adv.perturbed(lambda: model(**data)):
        plain = twin(**data).logits.detach()
        assert same_bits(copy.deepcopy(model)(**data).logits.detach(), plain)
        assert not torch.equal(model(**data).logits, plain)


def test_hooks_on_the_embedding_still_run() -> None:
    model, _, closure = ready()
    seen: list[str] = []
    model.word_embeddings.register_forward_pre_hook(lambda module, inputs: seen.append("pre"))
    adv = fastadv.FGM(model, embedding=PLAIN)
    model.word_embeddings.register_forward_hook(lambda module, inputs, output: seen.append("post"))
    adv.backward(closure)
    assert seen == ["pre", "post"] * 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_methods_on_one_model(order: tuple[int, int]) -> None:
    """They take turns, each as if alone, and may be closed in any order."""
    model, _, closure = ready()
    alone = []
    for method in PAIR:
        adv = method(model, embedding=PLAIN)
        adv.backward(closure)
        alone.append(gradients(model))
        clear(model)
        adv.close()
    before = traces(model)
    both = [method(model, embedding=PLAIN) for method in PAIR]
    for _ in range(2):
        for adv, want in zip(both, alone, strict=True):
            adv.backward(closure)
            assert_gradients(gradients(model), want, 1e-12)
            clear(model)
    both[order[0]].close()
    both[order[1]].backward(closure)
    assert_gradients(gradients(model), alone[order[1]], 1e-12)
    both[order[1]].close()
    assert traces(model) == before


def test_check_raises_once_for_what_a_kernel_has_left_out() -> None:
    model, _, closure = ready()
    adv = fastadv.FGM(model, embedding=PLAIN)
    adv.backward(closure)
    adv.check()
    flag_on(torch.device("cpu")).fill_(1)  # as a kernel leaves it on a GPU
    with pytest.raises(IndexError, match="out of range on cpu, and was left out"):
        adv.check()
    adv.check()


def test_after_close() -> None:
    model, data = with_gradients(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    adv.close()
    refused(model, lambda: adv.backward(lambda: model(**data)), RuntimeError, "never ran", "closed")
