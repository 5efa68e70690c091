"""FreeAT: plain training where it has no radius, what `attack` moves, `repeat`, and what is told who forgets a step."""

from __future__ import annotations

import gc
import importlib
import warnings
from typing import Any

import pytest
import torch

import fastadv
from tests.bert import text, tiny_bert
from tests.methods.replays import Run
from tests.models import TinyModel
from tests.support import assert_gradients, batch, clear, gradients, ready, refused, seeded, with_gradients


@pytest.mark.parametrize("replays", [1, 3])
def test_freeat_without_a_radius_is_plain_training_on_each_batch_so_often(replays: int) -> None:
    """replays=1: plain training."""
    loader, found = [batch(seed=seed) for seed in range(4)], []
    for adversarial in (True, False):
        model, _, _ = ready()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        adv = fastadv.FreeAT(model, embedding=model.word_embeddings, epsilon=0.0, replays=replays)
        for data in fastadv.repeat(loader, replays):
            optimizer.zero_grad()
            if adversarial:
                adv.backward(lambda: model(**data).loss)  # noqa: B023
            else:
                model(**data).loss.backward()
            optimizer.step()
        found.append({name: p.detach() for name, p in model.named_parameters()})
    assert_gradients(*found, 1e-12)


class TestNoOptimizerStep:
    def test_is_told_once_there_is_a_second_replay(self) -> None:
        run, data = Run(), batch()
        run.adv.backward(lambda: run.model(**data).loss)
        with pytest.warns(UserWarning, match=r"optimizer.step\(\) belongs") as caught:
            run.adv.backward(lambda: run.model(**data).loss)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("silent", ["fused", "foreach", "by-hand", "accumulates", "scaled"])
    def test_is_not_told(self, silent: str) -> None:
        """A step was taken, whoever takes it; the micro-batches are one step; a scaler may have skipped it."""
        run, data = Run(scaler=torch.amp.GradScaler("cpu") if silent == "scaled" else None), batch()
        optimizer = None
        if silent in ("fused", "foreach"):
            optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.0, **{silent: True})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                run.adv.backward(lambda: run.model(**data).loss, step=0 if silent == "accumulates" else None)
                if optimizer is not None:
                    optimizer.step()
                if silent == "by-hand":
                    with torch.no_grad():
                        run.model.classifier.weight -= run.model.classifier.weight.grad

    def test_optimizers_forget_a_closed_method(self) -> None:
        hooks = importlib.import_module("torch.optim.optimizer")._global_optimizer_post_hooks
        gc.collect()
        before = len(hooks)
        closed, dropped = Run(), Run()
        assert len(hooks) == before + 2
        closed.adv.close()
        assert len(hooks) == before + 1
        del dropped
        gc.collect()
        assert len(hooks) == before


def test_with_no_radius_one_replay_is_plain_training_with_dropout_too() -> None:
    """The slots are no random start: torch's generator is moved by the model alone."""
    found = []
    for adversarial in (False, True):
        model = seeded(lambda: TinyModel("tfm", dropout=0.3), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        adv = fastadv.FreeAT(model, embedding="word_embeddings", epsilon=0.0, replays=1) if adversarial else None
        torch.manual_seed(4)
        for seed in range(4):
            data = batch(seed=seed)
            optimizer.zero_grad()
            if adv is None:
                model(**data).loss.backward()
            else:
                adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])  # noqa: B023
            optimizer.step()
        found.append(({name: p.detach() for name, p in model.named_parameters()}, torch.get_rng_state()))
    (plain, rng), (mine, my_rng) = found
    assert all(torch.allclose(mine[name], plain[name], rtol=1e-6, atol=1e-7) for name in plain)
    assert torch.equal(rng, my_rng)


def test_attack_moves_the_perturbation_and_not_the_gradient() -> None:
    """The replay trains on the loss; the slot follows what `attack` returns."""
    run, data = Run(step_size=0.1), batch()
    other = {**data, "labels": (data["labels"] + 1) % 3}
    plain, _, _ = ready()
    plain(**data).loss.backward()
    run.adv.backward(
        lambda: run.model(**data).loss, mask=data["attention_mask"], attack=lambda: run.model(**other).loss
    )
    for name, gradient in gradients(run.model).items():
        assert torch.allclose(gradient, gradients(plain)[name], atol=1e-12), name
    delta = torch.zeros(4, 7, 16, dtype=torch.float64, requires_grad=True)
    embeds = plain.word_embeddings.weight.detach()[data["input_ids"]] + delta
    loss = plain(None, data["attention_mask"], other["labels"], embeds).loss
    sign = torch.autograd.grad(loss, delta)[0].sign() * data["attention_mask"].unsqueeze(-1)
    assert torch.allclose(run.adv.state_dict()["slots.0.0"], 0.1 * sign, atol=1e-12)


def test_repeat() -> None:
    loader = torch.utils.data.DataLoader(list(range(7)), batch_size=2)
    replayed = fastadv.repeat(loader, 3)
    assert len(replayed) == 12
    assert [one.tolist() for one in replayed] == [one.tolist() for one in loader for _ in range(3)]
    assert replayed.batch_size == 2
    assert replayed.dataset is loader.dataset
    assert list(fastadv.repeat(iter("abc"), 2, group=2)) == list("ababcc")
    with pytest.raises(TypeError):
        len(fastadv.repeat(iter("abc"), 2))
    with pytest.raises(ValueError, match="replays must be at least 1"):
        fastadv.repeat(loader, 0)
    with pytest.raises(TypeError, match="group must be a whole number"):
        fastadv.repeat(loader, 2, group=1.5)  # type: ignore[arg-type]
    for _ in range(2):  # a second epoch
        assert sum(1 for _ in replayed) == 12


def test_every_replay_of_freeat_draws_its_own() -> None:
    model, data, losses = tiny_bert(0.3), text(), []
    adv = fastadv.FreeAT(model, epsilon=0.0)
    for step in range(3):
        losses.append(adv.backward(lambda: model(**data), mask=data["attention_mask"], step=step).loss)
        clear(model)
        with torch.no_grad():
            model.classifier.bias += 0.0
    assert len({float(loss) for loss in losses}) == 3


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"replays": 0}, ValueError, ["replays", "at least 1"]),
        ({"replays": 2.5}, TypeError, ["replays", "whole number"]),
        ({"epsilon": None}, ValueError, ["step_size", "epsilon"]),
        ({"scope": "table"}, ValueError, ["scope='table'", "scope='sample'"]),
        ({"scope": "row"}, ValueError, ["scope='row'", "scope='sample'"]),
        ({"random_start": 0.1}, ValueError, ["carry=False", "random_start"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients()
    refused(model, lambda: fastadv.FreeAT(model, embedding=model.word_embeddings, **options), error, *phrases)
