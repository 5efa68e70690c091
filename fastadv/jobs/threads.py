"""Let OpenMP's threads sleep while they wait, so that a training shares its cores with other work.

By default a thread that waits for the others spins, for milliseconds and before every operation. On cores that other
processes want too, it takes the core from the very thread that it waits for. On idle cores sleeping costs a few
microseconds per operation (docs/training.md has both measurements).
"""

from __future__ import annotations

import os
import sys

# Of GNU's libgomp, which PyTorch's own wheels bring; of LLVM's and Intel's libomp.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
SETTINGS = (*PASSIVE, "GOMP_SPINCOUNT", "KMP_LIBRARY")


def wait_passively() -> None:
    """Choose passive waiting for this process and those that it starts.

    The runtimes read their settings when they are loaded, which is with torch: afterwards this changes nothing, and
    leaves the environment alone. So it does where the user has set how threads wait.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS):
        os.environ.update(PASSIVE)
