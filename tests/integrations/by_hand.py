"""Tiny models, a Trainer for them, and the same training written by hand, which knows nothing of fastadv."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

import fastadv
from fastadv.integrations.transformers import AdversarialTrainer

EPSILON, RATE = 0.7, 0.1
Loss = Callable[[nn.Module, dict[str, Tensor], int], Tensor]


class Classifier(BertForSequenceClassification):
    """Takes no **kwargs, so that the Trainer does the scaling for gradient accumulation."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def bert() -> Classifier:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        initializer_range=0.2,
    )
    return Classifier(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def samples(count: int, *, language: bool = False) -> list[dict[str, Tensor]]:
    """Padded rows of 9 tokens, of which 4 to 9 are real."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        real = 4 + index % 6
        mask = (torch.arange(9) < real).long()
        ids = torch.randint(1, 40, (9,), generator=generator) * mask
        labels = torch.where(mask.bool(), ids, -100) if language else torch.tensor(index % 3)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def settings(folder: Path) -> dict[str, Any]:
    """SGD on two rows a batch in the given order, so that a hand-written loop sees the same."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**{**settings(folder), **changes})


def sample_scope(model: Any) -> fastadv.Method:
    return fastadv.FGM(model, epsilon=EPSILON, scope="sample")


TRAINERS = ("adversary", "compute_loss_func", "callbacks", "data_collator")  # what else is given is an argument


def train(model: nn.Module, folder: Path, data: list[Any], *, kind: Any = AdversarialTrainer, **changes: Any) -> Any:
    named = {name: changes.pop(name) for name in TRAINERS if name in changes}
    named.setdefault("adversary", sample_scope)
    trainer = kind(model=model, args=arguments(folder, **changes), train_dataset=data, **named)
    trainer.train()
    return trainer


def by_hand(model: Any, rows: list[dict[str, Tensor]], loss: Loss, accumulate: int = 1, start: int = 0) -> list[float]:
    """FGM as the paper writes it, one direction per micro-batch; returns the adversarial loss of each step."""
    table, added = model.get_input_embeddings(), {"delta": None}
    handle = table.register_forward_hook(
        lambda module, inputs, output: output if added["delta"] is None else output + added["delta"]
    )
    batches = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    history = []
    model.train()
    for number, begin in enumerate(range(0, len(batches), accumulate)):
        micro = [
            {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
            for batch in batches[begin : begin + accumulate]
        ]
        count = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in micro if batch["labels"].dim() == 2)
        total = 0.0
        for batch in micro:
            divisor = count or len(micro)
            delta = torch.zeros(*batch["input_ids"].shape, 32, requires_grad=True)
            added["delta"] = delta
            loss(model, batch, divisor).backward()
            if number >= start:
                gradient = delta.grad * batch["attention_mask"].unsqueeze(-1)
                norms = gradient.flatten(1).norm(dim=1)[:, None, None]
                added["delta"] = EPSILON * gradient / norms
                adversarial = loss(model, batch, divisor)
                adversarial.backward()
                total += adversarial.item()
        added["delta"] = None
        history.append(total)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        model.zero_grad()
    handle.remove()
    return history


def classify(model: Any, batch: dict[str, Tensor], divisor: int, smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy over a micro-batch, divided by the number of micro-batches."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing) / divisor


def assert_same(got: nn.Module, want: nn.Module, tolerance: float = 2e-6) -> None:
    start = bert().state_dict()
    for (name, a), b in zip(got.state_dict().items(), want.state_dict().values(), strict=True):
        assert float((a - b).abs().max()) <= tolerance, name
        if name == "classifier.weight":
            assert float((a - start[name]).abs().max()) > 1e-3, "nothing was trained"
