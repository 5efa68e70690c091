"""The tokenizer that is trained, and the tokens that are written once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from fastadv.jobs.errors import UserError
from fastadv.pretrain import corpus as corpora
from fastadv.pretrain import tokenizer as tokenizers
from fastadv.pretrain.corpus import load_or_write
from fastadv.pretrain.tokenizer import EOS, encode, end_token, load_or_train
from tests.pretrain.texts import SMALL, counted, sentences, text

DOCUMENTS = sentences(200)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_or_train(SMALL, lambda: DOCUMENTS, tmp_path_factory.mktemp("trained") / "tokenizer")


def test_the_same_text_gives_the_same_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    again = load_or_train(SMALL, lambda: DOCUMENTS, tmp_path / "tokenizer")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(again) == 300
    other = load_or_train(SMALL, lambda: sentences(200, most=2, seed=1)[:3], tmp_path / "other")
    assert other.get_vocab() != again.get_vocab()


def test_a_folder_that_has_a_tokenizer_is_read_and_not_trained_for(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def refuse() -> list[str]:
        raise AssertionError("the text was read")

    assert load_or_train(SMALL, refuse, tmp_path / "tokenizer").get_vocab() == tokenizer.get_vocab()
    given = replace(SMALL, tokenizer=str(tmp_path / "tokenizer"))
    assert load_or_train(given, refuse, tmp_path / "run" / "tokenizer").get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file(), "a run holds its tokenizer"


def test_a_long_text_is_trained_on_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "MOST_TRAINED_ON", 100)
    read = []

    def documents() -> Any:
        for document in DOCUMENTS:
            read.append(len(document))
            yield document

    load_or_train(SMALL, documents, tmp_path / "tokenizer")
    assert sum(read[:-1]) < 100 <= sum(read)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_spelt(tokenizer: Any, written: str) -> None:
    (ids,) = encode(tokenizer, [written])
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == written
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer: Any) -> None:
    (ids,) = encode(tokenizer, [f"before {EOS} after"])
    assert end_token(tokenizer) not in ids
    assert tokenizer.decode(ids) == f"before {EOS} after"
    after = tokenizer.backend_tokenizer.encode(EOS, add_special_tokens=False)
    assert after.ids == [end_token(tokenizer)], "other callers have it as it was"


def test_a_given_tokenizer_must_have_what_is_needed(tokenizer: Any, tmp_path: Path) -> None:
    def load(objective: str, **without: None) -> Any:
        for name, value in without.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(tmp_path / "given")
        chosen = replace(SMALL, tokenizer=str(tmp_path / "given"), objective=objective)
        return load_or_train(chosen, list, tmp_path / "run")

    before = tokenizer.mask_token, tokenizer.eos_token
    try:
        with pytest.raises(UserError, match="no mask token"):
            load("masked", mask_token=None)
        with pytest.raises(UserError, match="no token that ends a text"):
            load("causal", eos_token=None)
        assert not (tmp_path / "run").exists()
    finally:
        tokenizer.mask_token, tokenizer.eos_token = before
    with pytest.raises(UserError, match="no tokenizer could be loaded from"):
        load_or_train(replace(SMALL, tokenizer=str(tmp_path)), list, tmp_path / "run")
    with pytest.raises(UserError, match="--vocab-size 258 cannot spell all bytes: give 259 or more"):
        load_or_train(replace(SMALL, vocab_size=258), lambda: DOCUMENTS, tmp_path / "run")
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        load_or_train(SMALL, list, tmp_path / "run")


def test_a_tokenizer_of_word_pieces_ends_a_text_with_sep(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\nfox", encoding="utf-8")
    given = BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=2)
    given.backend_tokenizer.enable_truncation(2)
    given.backend_tokenizer.enable_padding(length=5)
    given.save_pretrained(tmp_path / "given")
    loaded = load_or_train(replace(SMALL, tokenizer=str(tmp_path / "given")), list, tmp_path / "run")
    written = load_or_write(text(["red fox red", "\x00 \x01", "fox"]), loaded, tmp_path / "corpus")
    assert [one.tolist() for one in written] == [[5, 6, 5, 3], [6, 3]], "a text of no tokens is left out"


def test_the_corpus_holds_every_document_with_its_end(tokenizer: Any, tmp_path: Path) -> None:
    written = load_or_write(text(DOCUMENTS), tokenizer, tmp_path / "corpus")
    assert [one.tolist() for one in written] == [[*ids, end_token(tokenizer)] for ids in encode(tokenizer, DOCUMENTS)]
    assert written.tokens.dtype == np.uint16


def test_a_corpus_is_written_once_and_belongs_to_its_text_and_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    first = load_or_write(text(DOCUMENTS), tokenizer, tmp_path / "corpus")

    def refuse() -> Any:
        raise AssertionError("the text was read")

    again = load_or_write(text(DOCUMENTS)._replace(read=refuse), tokenizer, tmp_path / "corpus")
    assert (again.tokens == first.tokens).all() and (again.bounds == first.bounds).all()
    with pytest.raises(UserError, match="put the old text back, or start a new run"):
        load_or_write(text(DOCUMENTS[1:]), tokenizer, tmp_path / "corpus")
    other = load_or_train(replace(SMALL, vocab_size=280), lambda: DOCUMENTS, tmp_path / "other")
    with pytest.raises(UserError, match="put the old text back, or start a new run"):
        load_or_write(text(DOCUMENTS), other, tmp_path / "corpus")


@pytest.mark.parametrize("after", [0, 1, corpora.AT_ONCE + 1])
def test_what_was_not_finished_is_written_again(tokenizer: Any, tmp_path: Path, after: int) -> None:
    documents = sentences(2 * corpora.AT_ONCE, most=3)

    def broken() -> Any:
        yield from documents[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_write(text(documents)._replace(read=broken), tokenizer, tmp_path / "corpus")
    whole = load_or_write(text(documents), tokenizer, tmp_path / "corpus")
    assert len(whole) == len(documents)
    assert whole[after].tolist() == [*encode(tokenizer, [documents[after]])[0], end_token(tokenizer)]


def test_damaged_files_are_named(tokenizer: Any, tmp_path: Path) -> None:
    load_or_write(text(DOCUMENTS), tokenizer, tmp_path)
    tokens = (tmp_path / "tokens.bin").read_bytes()
    for damaged in (tokens[:-2], tokens[:-1], b""):
        (tmp_path / "tokens.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokens\.bin .*remove .*and run again"):
            load_or_write(text(DOCUMENTS), tokenizer, tmp_path)
    (tmp_path / "tokens.bin").write_bytes(tokens)
    (tmp_path / "documents.bin").unlink()
    with pytest.raises(UserError, match=r"documents\.bin cannot be read"):
        load_or_write(text(DOCUMENTS), tokenizer, tmp_path)


def test_a_text_without_a_token_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no text: check --data"):
        load_or_write(text(["", "  "]), tokenizer, tmp_path / "corpus")
    assert len(load_or_write(text(["one"]), tokenizer, tmp_path / "corpus")) == 1


def test_large_vocabularies_take_wider_tokens(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        """The tokenizer, with every token of a text moved up by 70,000."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def get_vocab(self) -> dict[str, int]:
            return {token: one + 70_000 for token, one in tokenizer.get_vocab().items()}

    monkeypatch.setattr(
        corpora, "encode", lambda _, batch: [[one + 70_000 for one in ids] for ids in encode(tokenizer, batch)]
    )
    written = load_or_write(text(["red fox"]), Large(), tmp_path)
    assert written[0].tolist() == [*(one + 70_000 for one in encode(tokenizer, ["red fox"])[0]), end_token(tokenizer)]
    assert json.loads((tmp_path / "corpus.json").read_text())["dtype"] == "<u4"


@given(st.integers(1, 400), st.floats(0, 0.99))
def test_a_split_is_whole_and_leaves_a_document_on_each_side(count: int, share: float) -> None:
    train, out = counted(*[1] * count).split(share)
    assert sorted([*train, *out]) == list(range(count))
    assert len(train) > 0
    assert len(out) > 0 if share and count > 1 else len(out) == 0


def test_a_split_has_its_share_and_moves_no_document_when_others_are_added() -> None:
    _, out = counted(*[1] * 100_000).split(0.02)
    assert abs(len(out) - 2000) < 5 * (2000 * 0.98) ** 0.5
    _, fewer = counted(*[1] * 50_000).split(0.02)
    assert fewer.tolist() == [one for one in out if one < 50_000]
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="--held-out is a share"):
            counted(1, 1).split(share)
