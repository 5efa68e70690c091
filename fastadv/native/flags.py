"""The flag that a kernel sets for an index out of range, where it masks the access, and the target of a launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_flags: dict[torch.device, Tensor] = {}


def flag_on(device: torch.device) -> Tensor:
    """The device's flag: int32, 0 as long as every index was in range."""
    if device not in _flags:
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def destination(extension: Any, device: torch.device) -> Any:
    """The target of a CUDA launch: the device, torch's current stream there, and its flag."""
    stream = torch.cuda.current_stream(device).cuda_stream
    return extension.OnDevice(device.index, stream, flag_on(device).data_ptr())


def check(device: torch.device) -> None:
    """Wait for `device`, and clear its flag.

    Raises:
        IndexError: a kernel there has met an index out of range. (On the CPU a call raises at once.)
    """
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    flag = _flags.get(device)
    if flag is not None and flag.item():
        flag.zero_()
        raise IndexError(f"an index (an id, a slot, a row of a table) was out of range on {device}, and was left out")
