"""The tokenizer of a pretraining: one that is given, or a byte-level BPE trained on the text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastadv.integrations import files
from fastadv.jobs.errors import UserError, loading, writing
from fastadv.pretrain.settings import Settings

EOS, PAD, MASK = "<|eos|>", "<|pad|>", "<|mask|>"
BYTES = 256
MOST_TRAINED_ON = 2**26  # characters: more text would hardly change a vocabulary, and training it takes its time


def load_or_train(settings: Settings, documents: Callable[[], Iterable[str]], folder: Path) -> Any:
    """Load the tokenizer of `folder`; where there is none yet, put the given one there, or train one.

    The trained one is a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of `settings.vocab_size` tokens at
    most, the special ones included: any text can be spelt, and the same text gives the same vocabulary. Of a long text
    the first 64 million characters are trained on.

    One process calls this first; then the others may, and load what it saved.

    Raises:
        UserError: the given tokenizer cannot be loaded, or lacks a token that the objective needs; the vocabulary is
            too small for the bytes; there is no text to train on.
    """
    if not folder.exists():
        made = _train(documents(), settings.vocab_size) if settings.tokenizer is None else _load(settings.tokenizer)
        _check(made, settings.tokenizer or "the trained one", settings.objective)
        with writing(folder.parent, "run the command again"):
            _save(made, folder)
    return _load(str(folder))


def end_token(tokenizer: Any) -> int:
    """Return the token that ends a document: `eos`, or `sep` where a tokenizer has no `eos`, as BERT's."""
    return int(tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id)


def vocabulary_size(tokenizer: Any) -> int:
    """Return the rows that a table of embeddings needs: some tokenizers leave out numbers, and have fewer tokens."""
    return int(max(tokenizer.get_vocab().values())) + 1


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Turn texts into tokens of text alone: none begins or ends them, and `<|eos|>` in a text is those characters."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def _train(documents: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [EOS, PAD, MASK]
    if vocab_size < BYTES + len(special):
        raise UserError(f"--vocab-size {vocab_size} cannot spell all bytes: give {BYTES + len(special)} or more")
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read: list[int] = []
    model.train_from_iterator(_first(documents, read), trainer)
    if not read:
        raise UserError("there is no text to train a tokenizer on: check --data and --text-column")
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=model, eos_token=EOS, pad_token=PAD, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def _first(documents: Iterable[str], read: list[int]) -> Iterator[str]:
    """Give the first documents, and note their lengths."""
    total = 0
    for document in documents:
        yield document
        read.append(len(document))
        total += len(document)
        if total >= MOST_TRAINED_ON:
            return


def _load(name: str) -> Any:
    from transformers import AutoTokenizer

    with loading(f"no tokenizer could be loaded from {name}", "give a folder or a name of the hub"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what its file may ask for
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _check(tokenizer: Any, name: str, objective: str) -> None:
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise UserError(f"the tokenizer {name} has no token that ends a text: set its eos_token, and save it again")
    if objective == "masked" and tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer {name} has no mask token: set its mask_token, or leave --tokenizer out")


def _save(tokenizer: Any, folder: Path) -> None:
    """Write the folder whole or not at all."""
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(aside)
    files.sync_tree(aside)
    aside.replace(folder)
    files.sync(folder.parent)
