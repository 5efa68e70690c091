"""Tiny decoders of transformers in float64, a left-padded batch, and a LoRA of the recorded kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

V = 40
BODY: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 4},
    "Gemma": {"head_dim": 4},
    "Gemma2": {"head_dim": 4, "final_logit_softcapping": 0.3, "query_pre_attn_scalar": 4, "sliding_window": 4},
    "Gemma3": {"head_dim": 4, "final_logit_softcapping": 0.3, "query_pre_attn_scalar": 4, "sliding_window": 4},
    "SmolLM3": {},
    "Granite": {"logits_scaling": 7.0, "embedding_multiplier": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "GPT2": {},
}


def decoder(kind: str) -> nn.Module:
    """With random weights of a size at which soft-capping and scales show."""
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1)
    else:
        name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
        config = getattr(transformers, name)(**{**BODY, **KINDS[kind]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.3)
    return model.double().eval()


def batch(samples: int = 3, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Left padded by 0, 1, 2, ...; the last tokens of each sample are targets, token id 0 among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (samples, length), generator=generator)
    place, padded = torch.arange(length), torch.arange(samples).unsqueeze(1)
    attended = place >= padded
    targets = place >= length - 2 - padded
    ids[0, length - 1] = 0
    ids = ids.where(attended, 0)
    return {"input_ids": ids, "attention_mask": attended.long(), "labels": ids.where(targets, -100)}


def lora(model: nn.Module, targets: list[str] | str = "all-linear", seed: int = 5, **options: Any) -> nn.Module:
    """With adapters that are not zero."""
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return adapted.to(next(model.parameters()).dtype)


def full_logits(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """[N, V]: all positions' logits, cut to those before the targets, sample by sample."""
    inputs = {name: value for name, value in data.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits[:, :-1][data["labels"][:, 1:] != -100]


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of every weight that trains, by the loss."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), found, strict=True)}
