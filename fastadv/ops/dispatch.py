"""Pick the backend of an op.

Every op file builds one `Op`: the schema, the fake version, the eager version that runs on any device, and the faster
backends that may be there. `fused=None` takes the first backend that is there, `fused=True`
insists on one, `fused=False` is the eager version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.kernels import launcher
from fastadv.kernels import reason as no_triton

LIBRARY = torch.library.Library("fastadv", "DEF")  # type: ignore[no-untyped-call]


def there() -> None:
    """The reason of a backend that cannot be missing."""


def flat(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of an op whose backends take its schema as it is."""
    return arguments


class Backend(NamedTuple):
    """A faster way to run an op on one kind of device.

    `reason` says why it is missing, None if it is there. It is asked when the op is first wanted on that device, since
    the answer may start CUDA.
    """

    name: str
    device: str
    function: Callable[..., Any]
    reason: Callable[[], str | None] = there


def triton(file: str, op: str | None = None) -> Backend:
    """The Triton kernel of `op` in kernels/<file>.py."""
    return Backend("Triton", "cuda", launcher(file, op), no_triton)


class Status(NamedTuple):
    """One backend of one op, and why it is missing if it is."""

    op: str
    device: str
    backend: str
    available: bool
    reason: str


class Op:
    """An op's contract, and the backends that keep it."""

    _chosen: dict[tuple[str, bool | None], Callable[..., Any]]

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        eager: Callable[..., Any],
        fake: Callable[..., Any],
        backends: Sequence[Backend] = (),
        device_types: Sequence[str] = ("cpu", "cuda"),
        unpack: Callable[..., tuple[Any, ...]] = flat,
    ) -> None:
        self.name = name
        self.eager = eager
        self.device_types = tuple(device_types)
        self.backends: Mapping[str, Backend] = {backend.device: backend for backend in backends}
        self._unpack = unpack
        LIBRARY.define(f"{name}{schema}")  # type: ignore[no-untyped-call]
        LIBRARY.impl(name, self._impl(None), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        for device in self.backends:
            LIBRARY.impl(name, self._impl(device), device.upper())  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fastadv::{name}", fake, lib=LIBRARY)
        OPS.append(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Forget the functions that were chosen: a backend may be replaced."""
        super().__setattr__(name, value)
        super().__setattr__("_chosen", {})

    def on(self, tensor: Tensor, fused: bool | None) -> Callable[..., Any]:
        """The function that runs the op on the tensor's device, looked up once for each device and `fused`."""
        key = ("cpu" if tensor.is_cpu else tensor.device.type, fused)  # naming a device takes longer than all the rest
        function = self._chosen.get(key)
        if function is None:
            function = self._chosen[key] = self.choose(*key)
        return function

    def choose(self, device: str, fused: bool | None) -> Callable[..., Any]:
        """The function that runs the op on `device` ("cpu", "cuda"), by the rules above."""
        if fused is False:
            return self.eager
        missing = self.missing(device)
        if missing is None:
            return self.backends[device].function
        if fused:
            raise RuntimeError(f"fused=True: {self.name}: {missing}")
        return self.eager

    def missing(self, device: str) -> str | None:
        """Why there is nothing faster than the eager version on `device`; None if there is."""
        backend = self.backends.get(device)
        return f"no backend for {device}" if backend is None else backend.reason()

    def _impl(self, device: str | None) -> Callable[..., Any]:
        """A kernel for torch's dispatcher. It chooses when it is called; without a device, the eager version."""

        def run(*arguments: Any, **named: Any) -> Any:
            function = self.eager if device is None else self.choose(device, None)
            return function(*self._unpack(*arguments, **named))

        return run

    def status(self) -> list[Status]:
        """List the op's backends by device, the eager version last."""
        rows = []
        for device in self.device_types:
            missing = self.missing(device)
            name = self.backends[device].name if device in self.backends else "native"
            rows.append(Status(self.name, device, name, missing is None, missing or ""))
        rows.append(Status(self.name, "any", "eager", True, ""))
        return rows


OPS: list[Op] = []


def in_place(*arguments: Any) -> None:
    """The fake version of an op that returns nothing: there is nothing to say about shapes."""


def report() -> list[Status]:
    """List the backends of all ops."""
    return [row for op in OPS for row in op.status()]


def require(fused: bool | None, device: str) -> None:
    """Raise now, with every reason, if `fused=True` cannot be kept on `device`.

    Raises:
        RuntimeError: naming each op that has no backend there, and why.
    """
    if not fused:
        return
    lacking = [row for row in report() if row.device == device and not row.available]
    if lacking or device not in {name for op in OPS for name in op.device_types}:
        reasons = "; ".join(f"{row.op}: {row.reason}" for row in lacking)
        raise RuntimeError(
            f"fused=True, but not every op has a native backend on {device} ({reasons or 'none at all'}). "
            "Use fused=None to take what there is, or fused=False for the eager ops; "
            "`python -m fastadv` lists the backends."
        )
