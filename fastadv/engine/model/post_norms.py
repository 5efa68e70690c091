"""A norm after a perturbed module, as Gemma 2 and 3 and OLMo 2 have it, changes the perturbation's length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from fastadv.engine.model.find import Site, unwrap

RENORMALISED = (
    "what {name} returns is normalised ({norm}) before it joins the residual stream, so that a perturbation there does "
    "not keep its length, and epsilon is not what the layer sees: perturb the layer ({layer}), or that norm"
)
AFTER = {
    "mlp": ("post_feedforward_layernorm", "post_mlp_layernorm"),
    "feed_forward": ("post_feedforward_layernorm", "post_mlp_layernorm"),
    "self_attn": ("post_self_attn_layernorm", "post_attention_layernorm"),
}


def warn_of_norms(model: nn.Module, sites: Sequence[Site], names: Sequence[str]) -> None:
    """Warn of every perturbed output that a norm of its own layer follows."""
    inside = dict(unwrap(model).named_modules())
    for site, name in zip(sites, names, strict=True):
        layer, _, part = name.rpartition(".")
        norm = None if site.side == "input" or layer not in inside else _norm_after(inside[layer], part)
        if norm is not None:
            warnings.warn(
                RENORMALISED.format(name=name, norm=norm, layer=layer), stacklevel=6
            )  # whoever makes the method


def _norm_after(layer: nn.Module, part: str) -> str | None:
    """The norm that `layer` applies to what `part` returns. Llama's post_attention_layernorm comes after the sum."""
    sandwiched = any(hasattr(layer, name) for name in AFTER["mlp"])
    return next((name for name in AFTER.get(part, ()) if sandwiched and hasattr(layer, name)), None)
