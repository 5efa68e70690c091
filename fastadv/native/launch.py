"""Call a C++ op.

The op reads the tensors, checks them by their signature (csrc/signature.h), and runs, or returns None. Only then Python
checks them: it raises the error that says why, or copies the tensors that are laid out otherwise or misaligned, and
calls again; a copy that the op has written to is copied back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastadv import native
from fastadv.arguments.signature import Signature, Tensors


class Launch:
    """A function of the extension, for tensors of one signature; `check` raises what is wrong with all else."""

    def __init__(self, function: str, signature: Signature, check: Callable[..., None] | None = None) -> None:
        self.signature = signature
        self._function, self._check = function, check
        self._run: Callable[..., Any] | None = None

    def __call__(self, tensors: Tensors, *numbers: Any) -> Any:
        """Run the op on these tensors.

        Raises:
            TypeError, ValueError: the tensors are not what the signature says.
            IndexError: an index points outside; nothing has been written then.
            RuntimeError: the extension is not there, or it does not run on the tensors' device.
        """
        run = self._run
        if run is None:
            run = self._run = functools.partial(getattr(native.extension(), self._function), compiled(self.signature))
        found = run(tensors, *numbers, torch.get_num_threads())
        if found is None:
            self._check_device(tensors)
            if self._check is not None:
                self._check(tensors, *numbers)
            fit = self.signature.fitted(tensors)
            found = run(fit, *numbers, torch.get_num_threads())
            self._copy_back(fit, tensors)
        if found is None:
            raise RuntimeError(f"{self.signature.op}: the arguments were checked and are refused all the same")
        return found

    @torch.no_grad()
    def _copy_back(self, fit: Tensors, tensors: Tensors) -> None:
        """Put what was written where it belongs."""
        for copy, tensor in zip(self.signature.written(fit), self.signature.written(tensors), strict=True):
            if copy is not None and tensor is not None and copy is not tensor:
                tensor.copy_(copy)

    def _check_device(self, tensors: Tensors) -> None:
        first = tensors[0]
        if first is None or first.is_cpu:
            return
        if self._function.endswith("_cpu"):
            op = self.signature.op
            raise RuntimeError(f"{op}: the C++ op is for the CPU alone, and a tensor is on {first.device}")
        require_device(self.signature.op, first.device)


@functools.cache
def compiled(signature: Signature) -> Any:
    """The signature in C++."""
    return native.extension().Signature(signature.op, signature.encoded(), signature.repeats)


def fitted(signature: Signature, tensors: Tensors) -> tuple[Any, ...]:
    """`signature.fitted` for a launcher of kernels, which is quicker where the extension is there.

    Raises:
        TypeError, ValueError: the tensors are not what the signature says.
    """
    if native.available() and compiled(signature).takes(tensors):
        return tensors
    fit = signature.fitted(tensors)
    for copy, tensor in zip(signature.written(fit), signature.written(tensors), strict=True):
        if copy is not tensor:
            raise ValueError(f"{signature.op}: a tensor that is written in place is misaligned; pass a clone() of it")
    return fit


def require_device(op: str, device: torch.device) -> None:
    """Raises RuntimeError if the extension has nothing for tensors on `device`."""
    if device.type == "cpu":
        native.extension()
        return
    why = native.cuda_reason() if device.type == "cuda" else "only cpu and cuda tensors are served"
    if why is not None:
        raise RuntimeError(f"{op}: no native backend for {device.type}: {why}")
