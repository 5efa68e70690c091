"""csrc/*.cu for the emulator, where there is a compiler."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from fastadv.native import toolchain

if TYPE_CHECKING:
    from tests.csrc.emulator.build import Built


@pytest.fixture(scope="session")
def built() -> Built:
    """The extension and its kernels as they are in csrc/."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator is for Linux")
    try:
        toolchain.find_cxx()
    except toolchain.ToolchainError as missing:
        pytest.skip(str(missing))
    from tests.csrc.emulator.build import build

    return build()
