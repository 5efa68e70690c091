"""The report's examples: what the attack moved, and what the models answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastadv.train import examples, model
from fastadv.train.data import Sample
from fastadv.train.tokens import Tokens
from fastadv.train.words import words_of
from tests.train.conftest import texts

LABELS = ["bad", "good"]


@pytest.fixture
def tokenizer(encoder: Path) -> Any:
    return model.tokenizer_of(str(encoder))


@pytest.fixture
def found(encoder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    network = model.build(str(encoder), LABELS, 0.1)
    samples = [Sample(text, LABELS.index(label)) for text, label in texts(6)]
    return examples.attack(network, tokenizer, Tokens(samples, tokenizer, 64).items, 0.3, 4)


def test_the_words_of_each_sample_share_its_radius(found: list[dict[str, Any]]) -> None:
    for (text, _), one in zip(texts(6), found, strict=True):
        words = one["words"]
        assert [word["word"] for word in words] == ["[CLS]", *text.split(), "[SEP]"]
        assert [word.get("special", False) for word in words] == [True, *[False] * len(text.split()), True]
        inside = sum(word["share"] ** 2 for word in words)
        assert 0.8 < inside <= 1.001, "four steps of a quarter of the radius"


def test_the_attack_lowers_the_probability_of_the_right_class(found: list[dict[str, Any]]) -> None:
    for (_, label), one in zip(texts(6), found, strict=True):
        before, after = (
            answer["probability"] if answer["answer"] == label else 1 - answer["probability"]
            for answer in (one["clean"], one["attacked"])
        )
        assert after < before


def test_nearest() -> None:
    table = nn.Embedding(5, 2)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [9, 9]]))
    ids = torch.tensor([0, 0, 3])
    moved = torch.tensor([[0.4, 0.0], [0.6, 0.1], [0.0, 0.0]])
    assert examples.nearest(table, ids, moved).tolist() == [0, 1, 3]


def test_pieces_make_words(tokenizer: Any) -> None:
    ids = tokenizer("the film")["input_ids"]
    assert [(word.text, word.start, word.end) for word in words_of(tokenizer, ids)] == [
        ("[CLS]", 0, 1),
        ("the", 1, 2),
        ("film", 2, 3),
        ("[SEP]", 3, 4),
    ]


class Pieces:
    """A tokenizer, as far as words need it."""

    all_special_ids = (0,)

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[index] for index in ids]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[index] for index in ids).replace("##", "").replace("▁", " ").replace("Ġ", " ")


@pytest.mark.parametrize(
    "tokens",
    [["<s>", "un", "##like", "##ly", "so"], ["<s>", "▁un", "like", "ly", "▁so"], ["<s>", "un", "like", "ly", "Ġso"]],
)
def test_pieces_of_every_kind(tokens: list[str]) -> None:
    found = words_of(Pieces(tokens), [0, 1, 2, 3, 4, 0])
    assert [(word.text, word.special) for word in found] == [
        ("<s>", True),
        ("unlikely", False),
        ("so", False),
        ("<s>", True),
    ]


def test_kinds_and_the_first_of_each() -> None:
    clean, attacked = ("11111101", "11111111"), ("01001", "01110")  # plain and adversarial; five are attacked
    cells = [[{"right": clean[model_]}, {"radius": 0.1, "right": attacked[model_]}] for model_ in (0, 1)]
    kinds = list(examples._kinds(*cells))
    assert kinds == ["both", "neither", "plain alone", "plain alone", "adversarial alone"]
    assert examples._first(kinds) == [2, 3, 4, 0, 1]
    assert examples._first([*kinds, *kinds]) == [2, 3, 4, 0, 1], "no more than the page has room for"
