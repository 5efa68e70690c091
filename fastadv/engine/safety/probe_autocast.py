"""Autocast for probes, which look for a direction and train nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

CHOICES = (torch.bfloat16, torch.float16)
NOT_ONE = "probe_dtype must be torch.bfloat16, torch.float16 or None (probes as all passes are), not {value!r}"
FLOAT64 = (
    "autocast leaves float64 as it is, and every parameter of the model is float64: probe_dtype={value} would change "
    "nothing. Leave it out, or train in float32"
)


class ProbeAutocast:
    """Autocast for probes, or nothing.

    Raises:
        TypeError, ValueError: `dtype` is none that probes can have, or none that autocast gives this model.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        if dtype is None:
            return
        if not isinstance(dtype, torch.dtype):
            raise TypeError(NOT_ONE.format(value=dtype))
        if dtype not in CHOICES:
            raise ValueError(NOT_ONE.format(value=dtype))
        if {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {torch.float64}:
            raise ValueError(FLOAT64.format(value=dtype))

    def lowered(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """For a probe's forward; its backward follows the forward's dtypes by itself."""
        if self.dtype is None or _is_on(device.type, self.dtype):
            return contextlib.nullcontext()
        # Autocast keeps its casts by tensor, whatever their dtype: with no cache a probe neither takes a cast that an
        # autocast around the step has kept, nor leaves one to it.
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=False)


def _is_on(device_type: str, dtype: torch.dtype) -> bool:
    """Whether all passes run under that autocast already."""
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == dtype
