"""Which part of a forward activation checkpointing recomputes.

torch's checkpoint (`use_reentrant=False`) keeps a frame per checkpointed call, and stands with it in the hooks for
saved tensors: in the forward and again in the backward, when the call is recomputed. So the frame tells which call
it is that runs again, where shapes and ids would not.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch


class Here(NamedTuple):
    """The innermost checkpoint that the program is in; no frame: none."""

    frame: Any
    again: bool  # it is recomputed


NOWHERE = Here(None, False)
FRAME = "_CheckpointFrame"


def here() -> Here:
    """The checkpoint in which a module runs now. Where torch keeps frames elsewhere, none is found."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    try:
        hooks = None if top is None else top(False)
    except TypeError:  # of another torch, which takes something else
        hooks = None
    if hooks is None:
        return NOWHERE
    for cell in _cells(hooks[0]):
        again = isinstance(cell, weakref.ReferenceType)
        frame = cell() if again else cell
        if type(frame).__name__ == FRAME:
            return Here(frame, again)
    return NOWHERE


def in_backward() -> bool:
    """Whether autograd runs a backward now, on this thread."""
    return torch._C._current_graph_task_id() != -1


def _cells(function: Any) -> list[Any]:
    """What a function closes over; under torch's own decorators too."""
    inner = getattr(function, "_torchdynamo_orig_callable", None) or getattr(function, "__wrapped__", function)
    found: list[Any] = []
    for cell in getattr(inner, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a cell that is empty yet
            continue
    return found
