"""The divergences that there are: see `fastadv.ops.divergence`."""

from __future__ import annotations

# csrc/divergence.h has the same codes.
KINDS = {"symmetric_kl": 0, "kl": 1, "js": 2, "mse": 3}


def kind_code(kind: str) -> int:
    """The code of a kind.

    Raises:
        ValueError: there is none of that name.
    """
    code = KINDS.get(kind)
    if code is None:
        raise ValueError(f"divergence: kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    return code
