"""The Bregman proximal point in use: what it refuses and how it says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.methods.proximal import BregmanProximal
from tests.models import TinyModel
from tests.support import batch, ready, refused, seeded


class TestWrongUse:
    def test_a_teacher_that_is_never_updated(self) -> None:
        model, _, closure = ready()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        adv = BregmanProximal(model)
        adv.backward(closure)
        adv.backward(closure)  # a second micro-batch
        optimizer.step()
        refused(model, lambda: adv.backward(closure), RuntimeError, "never been updated", "attach(optimizer)")
        adv.update()
        adv.backward(closure)

    def test_attached_to_another_optimizer(self) -> None:
        model, _, closure = ready()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        adv = BregmanProximal(model).attach(torch.optim.SGD(model.parameters(), lr=0.1))
        adv.backward(closure)
        optimizer.step()
        refused(model, lambda: adv.backward(closure), RuntimeError, "never been updated")

    def test_attached_to_an_optimizer_of_copies(self) -> None:
        """As DeepSpeed makes them: they are stepped before the weights are."""
        model, _, _ = ready()
        copies = torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in model.parameters()], lr=0.1)
        adv = BregmanProximal(model)
        refused(model, lambda: adv.attach(copies), ValueError, "steps none of the model's weights")

    def test_weights_that_are_loaded_before_the_first_step(self) -> None:
        """The teacher begins where training does."""
        model, _, closure = ready()
        adv = BregmanProximal(model).attach(torch.optim.SGD(model.parameters(), lr=0.5))
        model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
        assert adv.backward(closure).adv_loss.item() == 0

    def test_awp_moves_weights_and_is_not_mistaken_for_training(self) -> None:
        model, _, closure = ready()
        adv = BregmanProximal(model, method=fastadv.AWP(model))
        for _ in range(2):
            adv.backward(closure)

    def test_closures_without_logits(self) -> None:
        model, _, closure = ready()
        adv = BregmanProximal(model)
        refused(model, lambda: adv.backward(lambda: closure().loss), TypeError, "BregmanProximal", "only a loss")

    @pytest.mark.parametrize(
        ("options", "error", "phrases"),
        [
            ({"decay": 1.5}, ValueError, ["at most 1"]),
            ({"decay": -0.1}, ValueError, ["decay"]),
            ({"weight": "1"}, TypeError, ["weight"]),
            ({"divergence": "l2"}, ValueError, ["divergence", "'symmetric_kl'"]),
            ({"method": fastadv.PGD}, TypeError, ["method="]),
        ],
        ids=str,
    )
    def test_arguments(self, options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
        model, _, _ = ready()
        refused(model, lambda: BregmanProximal(model, **options), error, *phrases)

    def test_a_method_of_another_model_or_with_arguments_of_its_own(self) -> None:
        model, _, _ = ready()
        other, _, _ = ready()
        method = fastadv.PGD(other, embedding=other.word_embeddings)
        refused(model, lambda: BregmanProximal(model, method=method), ValueError, "another model")
        inner = fastadv.PGD(model, embedding=model.word_embeddings)
        refused(model, lambda: BregmanProximal(model, method=inner, every=2), TypeError, "every belong", "PGD")
        adv = BregmanProximal(model, method=inner)
        refused(model, lambda: BregmanProximal(model, method=adv), TypeError, "another method")
        refused(model, lambda: BregmanProximal(model, method=inner), ValueError, "held by")

    def test_an_average_that_could_not_move(self) -> None:
        model = seeded(TinyModel, dtype=torch.bfloat16)
        refused(model, lambda: BregmanProximal(model, decay=0.999), ValueError, "would never move", "autocast")
        BregmanProximal(model, decay=0.9)
        BregmanProximal(model, decay=1.0)

    def test_attack_with_nothing_to_attack(self) -> None:
        model, _, closure = ready()
        adv = BregmanProximal(model)
        refused(model, lambda: adv.backward(closure, attack=closure), ValueError, "attack=")


def test_a_module_that_has_two_names_gets_its_weights_back() -> None:
    """As Fabric wraps a model: the model, and what wraps it, side by side."""

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = seeded(lambda: TinyModel("tfm"))
            self.original = self.wrapped

        def forward(self, **data: Tensor) -> Any:
            return self.wrapped(**data)

    model, data = Wrapping(), batch()
    before = list(model.parameters())
    adv = fastadv.BregmanProximal(model, 2.0, 0.5)
    for tensor in adv.teacher.values():
        tensor.mul_(0.9)
    adv.backward(lambda: model(**data))
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    assert float(adv.distance) > 0
