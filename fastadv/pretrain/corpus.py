"""The tokens of a finite text, written once and mapped into memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from fastadv.integrations import files
from fastadv.jobs.errors import UserError, writing
from fastadv.jobs.json_file import read_json, write_json
from fastadv.pretrain.keyed import Purpose, numbers
from fastadv.pretrain.source import Text
from fastadv.pretrain.tokenizer import encode, end_token, vocabulary_size

TOKENS, DOCUMENTS, ABOUT = "tokens.bin", "documents.bin", "corpus.json"
SPLIT_SEED = 0  # of every run: runs of other seeds are measured on the same documents
SAMPLE = "Sixty-four Ångström; 1,024 tokens (naïve, UPPER):\n\tx = y**2  # 日本"
AT_ONCE = 512  # documents that are tokenised together


@dataclass(frozen=True)
class Corpus:
    """Hold documents of tokens, each ended by the tokenizer's end token.

    Attributes:
        tokens: [all tokens], the documents one after another, uint16 or uint32.
        bounds: [documents + 1] int64: document i is `tokens[bounds[i]:bounds[i + 1]]`.
    """

    tokens: NDArray[Any]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, document: int) -> NDArray[Any]:
        return self.tokens[self.bounds[document] : self.bounds[document + 1]]

    def split(self, held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the documents to train on and of those held out, a share `held_out` of them.

        A document's side follows from its number alone. Of two documents or more, one at least is on each side.

        Raises:
            UserError: the share is not from 0 up to 1, 1 not included.
        """
        if not 0 <= held_out < 1:
            raise UserError(f"--held-out is a share of the documents, from 0 to below 1, not {held_out}")
        place = numbers(SPLIT_SEED, Purpose.HELD_OUT, 0, len(self))
        out = place < np.uint64(int(held_out * 2**64))
        if held_out and len(self) > 1:
            out[place.argmin()] = True
            out[place.argmax()] = False
        if len(self) == 1:
            out[:] = False
        return np.flatnonzero(~out), np.flatnonzero(out)


def load_or_write(text: Text, tokenizer: Any, folder: Path, *, progress: bool = False) -> Corpus:
    """Open the corpus of `folder`; where there is none, or one that was not finished, tokenise the text into it.

    One process calls this first; then the others may, and open what it wrote.

    Raises:
        UserError: the folder's corpus is of another text or tokenizer; the text has no token; the disk is full.
    """
    fingerprint = hashlib.sha256(f"{text.fingerprint} {_fingerprint(tokenizer)}".encode()).hexdigest()[:32]
    about = read_json(folder / ABOUT)
    if about is None:
        with writing(folder, "run the command again"):
            about = _write(text, tokenizer, folder, progress) | {"fingerprint": fingerprint}
            write_json(folder / ABOUT, about)
    elif about["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder} holds the tokens of {about['text']}, and {text.what} or its tokenizer is another one by now: "
            "put the old text back, or start a new run"
        )
    return _open(folder, about)


def _fingerprint(tokenizer: Any) -> str:
    """Hash a vocabulary and how it spells a sample."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    spelt = f"{vocabulary} {encode(tokenizer, [SAMPLE])} {end_token(tokenizer)}"
    return hashlib.sha256(spelt.encode("utf-8", "backslashreplace")).hexdigest()


def _write(text: Text, tokenizer: Any, folder: Path, progress: bool) -> dict[str, Any]:
    """Write both files. They count once ABOUT is there, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2**16 else "<u4")
    total = count = 0
    with (folder / TOKENS).open("wb") as tokens, (folder / DOCUMENTS).open("wb") as bounds:
        bounds.write(np.zeros(1, "<i8").tobytes())
        for document in _encoded(text, tokenizer, progress):
            tokens.write(np.array(document, kind).tobytes())
            total, count = total + len(document), count + 1
            bounds.write(np.array(total, "<i8").tobytes())
        _sync(tokens, bounds)
    if not total:
        raise UserError(f"{text.what} has no text: check --data and --text-column")
    return {"text": text.what, "documents": count, "tokens": total, "dtype": kind.str}


def _sync(*opened: IO[bytes]) -> None:
    for file in opened:
        file.flush()
        files.sync(Path(file.name))


def _encoded(text: Text, tokenizer: Any, progress: bool) -> Iterator[list[int]]:
    """Give the documents that have a token, each with the end token after it."""
    end = end_token(tokenizer)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    shown = {"unit": "token", "unit_scale": True, "mininterval": interval, "delay": 2, "leave": False}
    with tqdm(desc="  tokens", disable=not progress, **shown) as bar:
        for batch in _batches(text.documents(), AT_ONCE):
            for ids in encode(tokenizer, batch):
                if ids:
                    yield [*ids, end]
                    bar.update(len(ids) + 1)


def _batches(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(documents)
    while batch := list(islice(rest, size)):
        yield batch


def _open(folder: Path, about: dict[str, Any]) -> Corpus:
    found = []
    for name, dtype, size in (
        (TOKENS, about["dtype"], about["tokens"]),
        (DOCUMENTS, "<i8", about["documents"] + 1),
    ):
        try:
            found.append(np.memmap(folder / name, dtype, "r").view(np.ndarray))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}): remove {folder}, and run again") from None
        if len(found[-1]) != size:
            raise UserError(f"{folder / name} is damaged: remove {folder}, and run again")
    return Corpus(*found)
