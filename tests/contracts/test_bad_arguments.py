"""Bad arguments get an error that says what to do, and nothing changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

import fastadv
from fastadv.jobs.method_options import parameters
from tests.every import EVERY
from tests.support import batch, refused, snapshot, with_gradients

NUMBERS = [
    pytest.param({"epsilon": -1.0}, ValueError, ["epsilon", "at least 0", "-1"], id="epsilon-negative"),
    pytest.param({"epsilon": math.nan}, ValueError, ["epsilon", "finite"], id="epsilon-nan"),
    pytest.param({"epsilon": math.inf}, ValueError, ["epsilon", "finite"], id="epsilon-inf"),
    pytest.param({"epsilon": "1"}, TypeError, ["epsilon", "number"], id="epsilon-str"),
    pytest.param({"epsilon": True}, TypeError, ["epsilon", "number"], id="epsilon-bool"),
    pytest.param({"norm": "l1"}, ValueError, ["norm", "'linf'", "'l1'"], id="norm"),
    pytest.param({"scope": "sentence"}, ValueError, ["scope", "'table'", "'token'", "'sentence'"], id="scope"),
    pytest.param({"dropout": "none"}, ValueError, ["dropout", "'fresh'", "'same'", "'off'"], id="dropout"),
    pytest.param({"tied": "head"}, ValueError, ["tied", "'lookup'", "'both'"], id="tied"),
    pytest.param({"tied": "both", "scope": "sample"}, ValueError, ["tied='lookup'"], id="tied-both"),
    pytest.param({"adv_weight": math.inf}, ValueError, ["adv_weight", "finite"], id="adv-weight-inf"),
    pytest.param({"every": 0}, ValueError, ["every", "at least 1"], id="every"),
    pytest.param({"start_step": -1}, ValueError, ["start_step", "at least 0"], id="start-step"),
]
STARTS = [
    pytest.param({"random_start": -0.1}, ValueError, ["random_start", "at least 0"], id="start-negative"),
    pytest.param({"random_start": math.nan}, ValueError, ["random_start", "finite"], id="start-nan"),
    pytest.param({"random_start": "yes"}, TypeError, ["random_start", "callable"], id="start-str"),
]
CLEAN = [
    pytest.param({"clean_weight": -0.5}, ValueError, ["clean_weight", "at least 0"], id="clean-weight"),
    pytest.param({"clean_weight": math.nan}, ValueError, ["clean_weight", "finite"], id="clean-weight-nan"),
]
EACH = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)


@pytest.mark.parametrize(("options", "error", "phrases"), NUMBERS)
@EACH
def test_arguments(method: Any, options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model, known = with_gradients(), parameters(getattr(method, "func", method))
    if not options.keys() <= known.keys():  # an argument that this method does not have
        error, phrases = TypeError, []
    refused(model, lambda: method(model, embedding=model.word_embeddings, **options), error, *phrases)


@pytest.mark.parametrize(("options", "error", "phrases"), STARTS)
@pytest.mark.parametrize("name", EVERY)
def test_starts(name: str, options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model, more = with_gradients(), {"carry": False} if name == "freeat" else {}
    refused(model, lambda: EVERY[name](model, embedding=model.word_embeddings, **more, **options), error, *phrases)


@pytest.mark.parametrize(("options", "error", "phrases"), CLEAN)
@pytest.mark.parametrize("method", [fastadv.FGSM, fastadv.FGM, fastadv.PGD])
def test_clean_weights(method: Any, options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients()
    refused(model, lambda: method(model, embedding=model.word_embeddings, **options), error, *phrases)


@EACH
def test_an_unknown_argument_is_an_error(method: Any) -> None:
    model = with_gradients()
    refused(model, lambda: method(model, embedding=model.word_embeddings, radium=1.0), TypeError, "radium")


@EACH
class TestEmbedding:
    """None, several, or not the one that was named: the candidates are listed."""

    def test_several(self, method: Any) -> None:
        model = with_gradients()
        names = ["bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"]
        refused(model, lambda: method(model), ValueError, "embedding=", *names)

    def test_none(self, method: Any) -> None:
        model = nn.Sequential(nn.Linear(3, 3))
        refused(model, lambda: method(model), ValueError, "no nn.Embedding", "embedding=")

    def test_no_such_name(self, method: Any) -> None:
        model = with_gradients()
        refused(
            model, lambda: method(model, embedding="words"), ValueError, "'words'", "bert.embeddings.word_embeddings"
        )

    def test_an_ambiguous_name(self, method: Any) -> None:
        model = nn.ModuleDict(
            {"a": nn.ModuleDict({"e": nn.Embedding(3, 2)}), "b": nn.ModuleDict({"e": nn.Embedding(3, 2)})}
        )
        refused(model, lambda: method(model, embedding="e"), ValueError, "a.e", "b.e")

    @pytest.mark.parametrize("choice", [7, [], [3]], ids=str)
    def test_something_else(self, method: Any, choice: Any) -> None:
        model = with_gradients()
        refused(model, lambda: method(model, embedding=choice), TypeError, "embedding=", "name")

    def test_a_module_of_another_model(self, method: Any) -> None:
        model, other = with_gradients(), with_gradients()

        def step() -> None:
            adv = method(model, embedding=other.word_embeddings)
            adv.backward(lambda: model(**batch()).loss)

        before = snapshot(other)
        with pytest.raises((ValueError, RuntimeError), match="embedding"):
            step()
        assert before.keys() == snapshot(other).keys()

    @pytest.mark.parametrize("scope", ["table", "row"])
    def test_a_table_scope_without_a_table(self, method: Any, scope: str) -> None:
        model = with_gradients()
        refused(
            model,
            lambda: method(model, embedding="bert.embeddings.LayerNorm", scope=scope),
            ValueError,
            scope,
            "'sample'",
        )
