# mypy: disable-error-code="no-untyped-call"
"""What a job was: its command, the versions and the hardware; and the libraries around it, quiet."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import fastadv


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Spell the command as its user typed it."""
    return "fastadv " + shlex.join(sys.argv[1:] if arguments is None else arguments)


def versions() -> dict[str, str]:
    """List the versions of the packages that compute the numbers."""
    found = {"python": platform.python_version(), "fastadv": fastadv.__version__}
    for package in ("torch", "transformers", "accelerate", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: str) -> str:
    """Name the hardware."""
    import torch

    from fastadv.jobs.conditions import processor

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def quiet(offline: bool = False) -> None:
    """Silence transformers. `offline`: model and data are local, so do not ask the network."""
    from transformers.utils import logging as transformers_logging

    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
