"""The gradients of a whole model at once: copied, accumulated, averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import cases
from bench.cases import Gradients
from bench.contest import Field
from bench.race import LIMIT, Entry
from bench.workloads import Size

WHAT = {"copy": 2, "accumulate": 3, "average": 3}  # tensors read and written
NUMBER = 0.5


def gradients(size: Size, what: str, device: str) -> Field:
    """`reference`: tensor by tensor; `torch`: its multi-tensor functions."""
    work = Gradients(*size.gradients, device)
    pairs = list(zip(work.into, work.sources, strict=True))

    def one_by_one() -> list[torch.Tensor]:
        for into, source in pairs:
            if what == "copy":
                into.copy_(source)
            elif what == "accumulate":
                into.add_(source, alpha=NUMBER)
            else:
                into.mul_(NUMBER).add_(source, alpha=1 - NUMBER)
        return work.into

    def together() -> list[torch.Tensor]:
        if what == "copy":
            torch._foreach_copy_(work.into, work.sources)
        elif what == "accumulate":
            torch._foreach_add_(work.into, work.sources, alpha=NUMBER)
        else:
            torch._foreach_lerp_(work.into, work.sources, 1 - NUMBER)
        return work.into

    case = cases.gradients(what, WHAT[what])(work)
    entries = {
        "reference": Entry(work.reset, one_by_one),
        "torch": Entry(work.reset, together),
        "fused": case.entry(),
    }
    return Field(entries, case.moved, size.gradients, tolerance=1e-6)


@pytest.mark.parametrize("contestant", ["reference", "torch", "fused", LIMIT])
@pytest.mark.parametrize("what", WHAT)
def test_grads(contest: Any, size: Size, device: str, what: str, contestant: str) -> None:
    contest(f"grads, {what}", contestant, lambda: gradients(size, what, device))
