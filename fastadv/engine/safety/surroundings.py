"""What torch keeps per thread and a forward may change: grad mode, autocast, the kernels that attention may use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Surroundings(NamedTuple):
    """As a step found them. A context manager that an interrupt left half way has put nothing back."""

    grad: bool
    autocast: dict[str, tuple[bool, torch.dtype]]  # by device type
    cache: bool
    nesting: int
    attention: dict[str, bool]  # by kernel


ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
READ = {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled") for kind in ATTENTION}
SWITCH = {kind: getattr(torch.backends.cuda, f"enable_{kind}_sdp") for kind in ATTENTION}


def attention() -> dict[str, bool]:
    """Which kernels attention may use."""
    return {kind: read() for kind, read in READ.items()}


def use_attention(**kinds: bool) -> None:
    """Let attention use these kernels, and no others."""
    for kind, switch in SWITCH.items():
        switch(kinds.get(kind, False))


def look(device: torch.device) -> Surroundings:
    """As they are."""
    kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(kind)]
    try:
        nesting = torch.autocast_increment_nesting() - 1
    finally:
        torch.autocast_decrement_nesting()
    return Surroundings(
        torch.is_grad_enabled(),
        {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
        torch.is_autocast_cache_enabled(),
        nesting,
        attention(),
    )


def put_back(found: Surroundings) -> None:
    """As they were. What autocast has cast is forgotten: of a failed step it may be casts of moved weights."""
    torch.set_grad_enabled(found.grad)
    for kind, (enabled, dtype) in found.autocast.items():
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(found.cache)
    while torch.autocast_increment_nesting() > found.nesting + 1:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    use_attention(**found.attention)


def grad_mode_kept(call: Callable[P, T]) -> Callable[P, T]:
    """Outside of a step: grad mode is as before, even if an interrupt cuts off a `no_grad` inside on its way out."""

    @functools.wraps(call)
    def kept(*args: P.args, **options: P.kwargs) -> T:
        grad = torch.is_grad_enabled()
        try:
            return call(*args, **options)
        finally:
            torch._C._set_grad_enabled(grad)  # one call, which nothing cuts in two

    return kept
