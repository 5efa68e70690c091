"""TRL's SFTTrainer, whose loss needs no logits, against the same training by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastadv
from fastadv.integrations.transformers import AdversarialMixin
from tests.integrations.by_hand import RATE, llama, samples, settings

trl = pytest.importorskip("trl")


def waves(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    return 0.05 * torch.sin(torch.arange(shape[1] * shape[2])).view(shape[1:]).expand(shape)


METHODS: dict[str, Callable[[Any], fastadv.Method]] = {
    "pgd": lambda model: fastadv.PGD(model, epsilon=0.5, step_size=0.3, scope="sample"),
    "smart": lambda model: fastadv.SMART(model, epsilon=0.1, random_start=waves),
    "vat": lambda model: fastadv.VAT(model, epsilon=0.3, xi=0.1, random_start=waves),
    "bregman": lambda model: fastadv.BregmanProximal(model, 2.0, 0.5, method=fastadv.FGM(model, epsilon=0.1)),
}
FORWARDS = {"pgd": 4, "smart": 2 * 3, "vat": 2 * 3, "bregman": 2 * 4}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {**{f"w{index}": index for index in range(1, 39)}, "<pad>": 0, "<eos>": 39}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w1")), pad_token="<pad>", eos_token="<eos>"
    )


class Adversarial(AdversarialMixin, trl.SFTTrainer):
    pass


def rows(count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": row["input_ids"][row["attention_mask"].bool()].tolist()} for row in samples(count)]


def sft(folder: Path, name: str, **changes: Any) -> Any:
    from datasets import Dataset

    own: dict[str, Any] = {
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 16,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return Adversarial(
        model=llama(),
        args=trl.SFTConfig(**{**settings(folder), **own, **changes}),
        train_dataset=Dataset.from_list(rows(8)),
        processing_class=tokenizer(),
        adversary=METHODS[name],
    )


def by_hand(model: Any, name: str, accumulate: int) -> None:
    """The same training in a loop of one's own, whose closure returns the loss with the logits that it is made of."""
    adv, optimizer = METHODS[name](model.train()), torch.optim.SGD(model.parameters(), lr=RATE)
    if hasattr(adv, "attach"):
        adv.attach(optimizer)
    every = [{**row, "learnt": (row["labels"][1:] != -100).long()} for row in samples(8, language=True)]
    batches = [{key: torch.stack([row[key] for row in every[i : i + 2]]) for key in every[0]} for i in range(0, 8, 2)]
    for first in range(0, len(batches), accumulate):
        step = batches[first : first + accumulate]
        tokens, positions = (sum(int(data[key].sum()) for data in step) for key in ("learnt", "attention_mask"))
        for data in step:

            def closure(data: dict[str, Tensor] = data, tokens: int = tokens) -> tuple[Tensor, Tensor]:
                logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
                shifted = logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten()
                return F.cross_entropy(*shifted, ignore_index=-100, reduction="sum") / tokens, logits

            adv.share = int(data["attention_mask"].sum()) / positions
            adv.backward(closure, mask=data["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_as_by_hand(tmp_path: Path, name: str, accumulate: int) -> None:
    """Batches of different lengths: each micro-batch's term weighs as its tokens do."""
    trainer, want = sft(tmp_path, name, gradient_accumulation_steps=accumulate), llama()
    trainer.train()
    by_hand(want, name, accumulate)
    start = llama().state_dict()
    for (key, mine), other in zip(trainer.model.state_dict().items(), want.state_dict().values(), strict=True):
        assert float((mine - other).abs().max()) < 2e-5, key
        assert float((other - start[key]).abs().max()) > 1e-3, key


@pytest.mark.parametrize("name", FORWARDS)
def test_as_many_forwards_as_the_method_needs(tmp_path: Path, name: str) -> None:
    """One a pass, and one more where logits are compared; tokens count once."""
    trainer = sft(tmp_path, name)
    forwards: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: forwards.append(trainer.state.global_step))
    trainer.train()
    assert [forwards.count(step) for step in (1, 2, 3)] == [FORWARDS[name]] * 3
    rows = [row for row in trainer.state.log_history if "num_tokens" in row]
    assert rows[-1]["num_tokens"] == sum(int(row["attention_mask"].sum()) for row in samples(8))


@pytest.mark.parametrize(
    "changes", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packing", "padding-free"]
)
def test_packed(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = sft(tmp_path, "smart", **changes)
    trainer.train()
    assert trainer.adversary.attacked == trainer.state.global_step > 0
