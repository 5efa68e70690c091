"""All that a step could leave a trace in: what it is now, and how two states differ."""

from __future__ import annotations

import random
import signal
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

WEIGHT = "parameter "
SIGNALS = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1")
ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


class State(NamedTuple):
    """`values` can be compared with another model's of the same history, `places` with the same model's alone.

    `kept` are the objects whose identity `places` has, so that no other object takes their address.
    """

    values: dict[str, Any]
    places: dict[str, Any]
    kept: list[Any]


def state(model: nn.Module) -> State:
    """Of the model, of the generators, and of what torch and Python keep for the thread."""
    found = State({}, {}, [])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        _add_parameter(found, name, parameter)
    for name, module in model.named_modules():
        _add_module(found, name, module)
    found.values["generator of torch"] = torch.get_rng_state()
    found.values["generator of Python"] = random.getstate()
    kind, words, *rest = np.random.get_state()  # noqa: NPY002 - the global one
    found.values["generator of numpy"] = (kind, words.tobytes(), *rest)
    found.values.update(surroundings())
    return found


def _add_parameter(found: State, name: str, parameter: nn.Parameter) -> None:
    values, places, kept = found
    grad = parameter.grad
    kept += [parameter, grad]
    values[WEIGHT + name] = bits(parameter)
    places[WEIGHT + name] = (id(parameter), parameter.data_ptr(), parameter.stride())
    values[f"flags of {name}"] = (parameter.requires_grad, parameter.is_leaf, _hooks(parameter))
    values[f"gradient {name}"] = None if grad is None else bits(grad)
    places[f"gradient {name}"] = None if grad is None else (id(grad), grad.data_ptr(), grad.stride())


def _add_module(found: State, name: str, module: nn.Module) -> None:
    values, places, kept = found
    kept.append(module)
    values[f"mode of {name}"] = module.training
    places[f"module {name}"] = (id(module), sorted(vars(module)), type(module), module.__dict__.get("forward"))
    for kind in ("_parameters", "_modules", "_buffers"):
        places[f"{kind} of {name}"] = list(getattr(module, kind))
    places[f"hooks of {name}"] = {kind: list(value) for kind, value in vars(module).items() if kind.endswith("hooks")}
    for key, buffer in module._buffers.items():
        kept.append(buffer)
        values[f"buffer {name}.{key}"] = None if buffer is None else bits(buffer)
        places[f"buffer {name}.{key}"] = None if buffer is None else (id(buffer), buffer.data_ptr(), buffer.stride())


def surroundings() -> dict[str, Any]:
    """What a thread has of its own, or a process."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    stance = torch._dynamo.eval_frame._stance.stance
    return {
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            nesting,
        ),
        "attention": [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ATTENTION],
        "default dtype": (torch.get_default_dtype(), torch.get_num_threads()),
        "signal handlers": [id(signal.getsignal(getattr(signal, name))) for name in SIGNALS],
        "compiler's stance": stance,
        "torch's modes": (len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())),
    }


def put_right() -> None:
    """After a violation: what a thread has of its own, as it is at the beginning."""
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_cache_enabled(True)
    while torch.autocast_increment_nesting() > 1:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    for kind in ATTENTION:
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(True)


def bits(tensor: Tensor) -> Tensor:
    """Its bytes, with dtype and shape told apart by their number."""
    plain = tensor.detach()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return plain.contiguous().view(-1).view(torch.uint8).clone()


def _hooks(tensor: Tensor) -> tuple[int, int]:
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    first, second = (len(getattr(tensor, kind, None) or ()) for kind in kinds)
    return first, second


def differences(before: State, after: State, *, places: bool = True) -> list[str]:
    """The names of what is not as it was: bit for bit, and with `places` the same objects in the same memory."""
    found = _unequal(before.values, after.values)
    return sorted({*found, *(_unequal(before.places, after.places) if places else ())})


def _unequal(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {key for key in {*before, *after} if not _same(before.get(key, _ABSENT), after.get(key, _ABSENT))}


_ABSENT = object()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
