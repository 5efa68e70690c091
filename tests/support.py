"""Helpers that the tests share: deterministic models and batches, recorders, comparisons, snapshots."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models import CLASSES, TinyModel, TwoCalls, V

GOLDENS = Path(__file__).parent / "goldens"
M = TypeVar("M", bound=nn.Module)
PGD3: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 3}


def seeded(build: Callable[[], M], seed: int = 0, dtype: torch.dtype = torch.float64) -> M:
    """Build a model from a seed of its own, without disturbing torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().to(dtype)


def batch(rows: int = 4, length: int = 7, seed: int = 1, pad: int = 0) -> dict[str, Tensor]:
    """Ids with repeats, the padding mask and labels; the first row has no padding, others lose one to three places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V // 2, (rows, length), generator=generator)
    lengths = torch.tensor([length - row % 4 for row in range(rows)])
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    ids = torch.where(mask.bool(), ids, pad)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ready(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[TinyModel, dict[str, Tensor], Callable[[], Any]]:
    """A model with attention, its batch and a closure."""
    model, data = seeded(lambda: TinyModel("tfm", **options), dtype=dtype), batch()
    return model, data, lambda: model(**data)


def two_calls() -> tuple[TwoCalls, tuple[Tensor, Tensor, Tensor]]:
    """A model that looks words up twice, and what it takes: ids of two lengths and labels."""
    data = batch()
    return seeded(TwoCalls), (data["input_ids"], batch(4, 5, seed=6)["input_ids"], data["labels"])


def with_gradients(kind: str = "mlp") -> TinyModel:
    """A model with gradients from before, so that a change to them shows."""
    model = seeded(lambda: TinyModel(kind))
    model(**batch()).loss.backward()
    return model


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what passes the model's `tap`: the embedding as the model sees it, one entry per call."""
    seen: list[Tensor] = []
    handle = model.tap.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }


def clear(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def one_step(
    model: TinyModel, method: Any, data: dict[str, Tensor], **options: Any
) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """A step from one state of torch's generator: its result, gradients, and what the model saw."""
    clear(model)
    torch.manual_seed(7)
    adv = method(model, embedding=model.word_embeddings, **options)
    with record(model) as seen:
        result = adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    adv.close()
    return result, gradients(model), seen


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, and the absolute norm where `want` is zero."""
    difference = torch.linalg.vector_norm((got - want).detach().double())
    size = torch.linalg.vector_norm(want.detach().double())
    return float(difference / size) if size > 0 else float(difference)


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    error = relative(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


def assert_gradients(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, floor: float = 1e-6, absolute: float = 0.0
) -> None:
    """Every parameter by itself, so that a large one hides no small one.

    A gradient below `floor` of the whole is compared with that size instead of its own: the bias of an attention key
    has the gradient zero, since softmax does not see it, and what computes to it is rounding. `absolute` is an error
    that any parameter may have besides.
    """
    assert got.keys() == want.keys()
    least = floor * total_norm(want)
    for name, target in want.items():
        error = float((got[name] - target).double().norm())
        size = max(float(target.double().norm()), least)
        found = f"gradient of {name}: relative error {error / size:.3g} > {tolerance:.3g}"
        assert error <= tolerance * size + absolute, found


def total_norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors.values()]).norm())


def golden(name: str) -> dict[str, Any]:
    """A recorded run: tensors by name, and the dictionaries `w` (weights) and `g` (final gradients)."""
    run: dict[str, Any] = {"w": {}, "g": {}}
    with np.load(GOLDENS / f"{name}.npz") as recorded:
        for key in recorded.files:
            group, _, parameter = key.partition("::")
            value = torch.from_numpy(recorded[key])
            if parameter:
                run.setdefault(group, {})[parameter] = value
            else:
                run[key] = value
    return run


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a step must not leave a trace in; compare two with `assert_unchanged`."""
    state: dict[str, Any] = {"rng": torch.get_rng_state()}
    for name, p in model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = p.detach().clone()
        state[f"parameter {name}, as"] = (id(p), p.data_ptr(), p.requires_grad, id(p.grad))
        state[f"gradient {name}"] = None if p.grad is None else p.grad.detach().clone()
        state[f"tensor hooks {name}"] = (_keys(p, "_backward_hooks"), _keys(p, "_post_accumulate_grad_hooks"))
    for name, b in model.named_buffers():
        state[f"buffer {name}"] = b.clone()
        state[f"buffer {name}, as"] = (id(b), b.data_ptr())
    for name, module in model.named_modules():
        state[f"module {name}"] = (module.training, sorted(vars(module)))
        hooks = [key for key in vars(module) if key.endswith("hooks")]
        state[f"module hooks {name}"] = {key: _keys(module, key) for key in hooks}
    return state


def _keys(owner: object, name: str) -> list[Any]:
    return list(getattr(owner, name, None) or {})


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Bit for bit what it was: values, identities, flags, hooks, torch's generator."""
    after = snapshot(model)
    assert after.keys() == before.keys()
    for key, want in before.items():
        got = after[key]
        if isinstance(want, Tensor):
            same = got is not None and got.dtype == want.dtype and same_bits(got, want)
            assert same, f"{key} has changed"
        else:
            assert got == want, f"{key} has changed: {got}, it was {want}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bytes: NaN equals itself, and -0.0 differs from 0.0."""
    bytes_a, bytes_b = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and torch.equal(bytes_a, bytes_b)


def refused(model: nn.Module, call: Callable[[], Any], error: type[BaseException], *phrases: str) -> str:
    """`call` raises exactly `error`, its message has every phrase, and the model is what it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    for phrase in phrases:
        assert phrase in message, f"{phrase!r} is not in {message!r}"
    assert_unchanged(model, before)
    return message
