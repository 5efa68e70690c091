"""What the model was before its adapters: the reference of KL, IPO and DPO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.safety.dropout import Evaluated
from fastadv.llm.scores import Scores, score
from fastadv.llm.targets import Targets


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run a PEFT model as its base, through PEFT's `disable_adapter`.

    PEFT makes every active adapter trainable when it comes back; here a weight that was frozen, as all are while an
    attack searches, stays frozen. Modes and gradients are left alone.

    Args:
        model: a PeftModel, or what wraps one (DDP, torch.compile).

    Raises:
        TypeError: there is no PeftModel in it.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> plain = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> before = plain(ids).logits
        >>> model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        >>> with adapters_off(model):
        ...     torch.equal(model(ids).logits, before)
        True
        >>> torch.equal(model(ids).logits, before)
        False
    """
    adapted: Any = next((one for one in model.modules() if hasattr(type(one), "disable_adapter")), None)
    if adapted is None:
        raise TypeError(
            f"{type(model).__name__} has no adapters to turn off: give reference=, the model to compare with"
        )
    trains = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with adapted.disable_adapter():
            yield
    finally:
        for weight, needed in trains:
            weight.requires_grad_(needed)


@torch.no_grad()
def base_score(
    model: nn.Module, *, labels: Tensor | Targets, reference: nn.Module | None = None, **inputs: Any
) -> Scores:
    """Score a batch by the base model: without a graph, in eval mode.

    Call it outside of an attack's closure: there, the base would see the perturbation as well.

    Args:
        model: a PEFT model, whose adapters are turned off for it; see `adapters_off`.
        labels: as `score` takes them.
        reference: another model to score by; it needs no adapters, and `model` then neither.
        **inputs: as `score` takes them.

    Raises:
        TypeError: the model has no adapters, and no reference is given.
        TypeError, ValueError: as `score` does.

    Examples:
        >>> class Plain(nn.Module):
        ...     def forward(self, input_ids):
        ...         return torch.zeros(*input_ids.shape, 4)
        >>> ids = torch.tensor([[0, 1, 2]])
        >>> base_score(nn.Identity(), reference=Plain(), input_ids=ids, labels=ids).means()
        tensor([-1.3863])
    """
    off = adapters_off(model) if reference is None else contextlib.nullcontext()
    base = model if reference is None else reference
    with off, Evaluated(contextlib.nullcontext(), base.modules()):
        return score(base, labels=labels, **inputs)
