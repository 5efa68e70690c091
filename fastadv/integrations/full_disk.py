"""Tell a full disk from other failures: torch and safetensors each say it in their own way."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

ERRNOS = {errno.ENOSPC, errno.EDQUOT}
SAID = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
WRITING = ("iostream error", "inline_container", "PytorchStreamWriter")  # torch.save, which gives no reason
NEXT_TO_NOTHING = 1 << 16  # bytes


def is_full(error: BaseException, folder: Path) -> bool:
    """Judge whether an error came from a full disk. `folder`: where it was written to, as the failure left it."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if getattr(cause, "errno", None) in ERRNOS or any(words in text for words in SAID):
            return True
        if any(words in text for words in WRITING) and _free(folder) < NEXT_TO_NOTHING:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
