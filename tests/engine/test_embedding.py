"""Finding the embedding, through wrappers, and saying what to do where it cannot be found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastadv.engine.model.find import find, is_compiled, is_plain_lookup, unwrap


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 3), nn.Embedding(5, 3)
        self.inner = nn.ModuleDict({"words": nn.Embedding(2, 3)})


class Asked(Two):
    def get_input_embeddings(self) -> nn.Module:
        return self.places


def test_the_model_is_asked_first() -> None:
    model = Asked()
    assert find(model, None) == [model.places]


def test_the_only_embedding() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1))
    assert find(model, None) == [model[0]]


def test_by_name_suffix_module_and_several() -> None:
    model = Two()
    assert find(model, "words") == [model.words]  # a full name comes before a suffix
    assert find(model, "inner.words") == [model.inner["words"]]
    assert find(model, model.places) == [model.places]
    assert find(model, ["words", model.places]) == [model.words, model.places]


def test_through_compile_and_data_parallel() -> None:
    model = Asked()
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    assert unwrap(compiled) is model
    assert find(compiled, None) == [model.places]
    assert is_compiled(compiled) and not is_compiled(model)


def test_a_module_called_module_is_no_wrapper() -> None:
    model = nn.ModuleDict({"module": nn.Embedding(3, 2), "base_model": nn.Linear(2, 2)})
    assert unwrap(model) is model


@pytest.mark.parametrize(
    ("model", "choice", "error", "phrases"),
    [
        (Two(), None, ValueError, ["several embeddings", "embedding=NAME", "words (7, 3)", "places (5, 3)"]),
        (nn.Linear(2, 2), None, ValueError, ["no nn.Embedding", "embedding=NAME", "none"]),
        (Two(), "wrods", ValueError, ["no module is called 'wrods'", "words (7, 3)"]),
        (nn.ModuleList([Two(), Two()]), "places", ValueError, ["several modules", "0.places, 1.places"]),
        (Two(), 3, TypeError, ["name, a module, or a sequence"]),
        (Two(), [3], TypeError, ["names and modules"]),
        (Two(), [], TypeError, ["name, a module, or a sequence"]),
    ],
)
def test_errors_say_what_to_do(model: nn.Module, choice: object, error: type[Exception], phrases: list[str]) -> None:
    with pytest.raises(error) as caught:
        find(model, choice)  # type: ignore[arg-type]
    assert all(phrase in str(caught.value) for phrase in phrases)


def test_a_shared_module_by_any_of_its_names_and_once() -> None:
    model = Two()
    model.alias = nn.ModuleDict({"tokens": model.words})
    assert find(model, "alias.tokens") == find(model, "tokens") == [model.words]
    assert find(model, ["words", "alias.tokens", model.words]) == [model.words]


def test_a_table_that_is_held_in_parts_is_no_plain_lookup() -> None:
    """DeepSpeed's ZeRO-3 marks such weights, and gathers them around the module's own forward alone."""
    module = nn.Embedding(5, 4)
    assert is_plain_lookup(module)
    module.weight.ds_id = 0
    assert not is_plain_lookup(module)
