"""Every kernel, compiled as its launcher would have it compiled, for GPUs that need not be there.

No register may spill, and where rows are whole multiples of 16 bytes they must be read and written 16 bytes at a time.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastadv import kernels
from fastadv.arguments.kinds import KINDS
from fastadv.arguments.lookup import Lookup, lookup_of
from fastadv.arguments.moments import Moments, planes
from fastadv.arguments.rule import BALLS, DIRECTIONS, MOMENT_BALLS, MOMENT_DIRECTIONS, Rule
from fastadv.ops import segments

pytest.importorskip("triton")
if kernels.interpreted():
    pytest.skip("compiles nothing: triton interprets", allow_module_level=True)

from bench.gpu.abroad import TOOLS, Compiled, compiling
from fastadv.kernels import ascend, divergence, gather_perturb, moment_step, segment_sum, table_step

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SLOW = [pytest.param(target, marks=pytest.mark.slow) for target in ("sm_80", "sm_100", "gfx942")]


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Iterator[list[Compiled]]:
    """What the launchers would have run, for the target that the test names."""
    with compiling(request.getfixturevalue("target")) as found:
        yield found


def in_place_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def lookups(dtype: torch.dtype, dim: int) -> None:
    """gather_perturb in its three forms, its backward of one and two passes, and segment_sum."""
    weight, ids = torch.zeros(50, dim, dtype=dtype), torch.arange(160).view(2, 80) % 50
    wide = in_place_of(dtype)
    gather_perturb.gather_perturb(weight, ids, None, None)
    gather_perturb.gather_perturb(weight, ids, torch.zeros(2, 80, dim, dtype=wide), None)
    gather_perturb.gather_perturb(weight, ids, torch.zeros(4, dim, dtype=wide), torch.zeros_like(ids))
    groups, grad = segments(ids, 50), torch.zeros(160, dim, dtype=dtype)
    segment_sum.segment_sum(grad, groups.order, groups.starts, groups.stops)
    for grads in ([grad], [grad, grad.to(wide)]):
        gather_perturb.gather_perturb_backward(weight, grads, ids.flatten(), groups.order, groups.starts, -1)


def step(dtype: torch.dtype, dim: int, group: int, direction: str, ball: str, masked: bool, embeds: bool) -> None:
    """ascend for groups of one or several rows."""
    delta, grad = torch.zeros(2, 16, dim, dtype=in_place_of(dtype)), torch.zeros(2, 16, dim, dtype=dtype)
    lookup: dict[str, Tensor] = {}
    if embeds:
        ids = torch.arange(32).view(2, 16)
        lookup = {"weight": torch.zeros(50, dim, dtype=dtype), "ids": ids, "embedded": torch.zeros_like(grad)}
    mask = torch.ones(2, 16, dtype=torch.bool) if masked else None
    rule = Rule(0.1, 1.0, direction, ball, group)
    ascend.ascend(delta, grad, mask, torch.tensor(0), rule, lookup_of(**lookup))


def runs_step(dtype: torch.dtype, dim: int, direction: str, ball: str) -> None:
    """ascend for runs of rows."""
    delta, grad = torch.zeros(2, 16, dim, dtype=in_place_of(dtype)), torch.zeros(2, 16, dim, dtype=dtype)
    lookup = Lookup(torch.zeros(50, dim, dtype=dtype), torch.arange(32).view(2, 16), None, torch.zeros_like(grad))
    mask, starts = torch.ones(2, 16, dtype=torch.bool), torch.tensor([0, 5, 32, 32])
    ascend.ascend(delta, grad, mask, torch.tensor(0), Rule(0.1, 1.0, direction, ball, 1), lookup, starts)


def by_moments(
    dtype: torch.dtype, dim: int, group: int, direction: str, ball: str, runs: bool = False, embeds: bool = True
) -> None:
    """moment_step for groups of one or several rows, or for runs of rows."""
    delta, grad = torch.zeros(2, 16, dim, dtype=in_place_of(dtype)), torch.zeros(2, 16, dim, dtype=dtype)
    lookup = Lookup(torch.zeros(50, dim, dtype=dtype), torch.arange(32).view(2, 16), None, torch.zeros_like(grad))
    mask, starts = torch.ones(2, 16, dtype=torch.bool), torch.tensor([0, 5, 32, 32]) if runs else None
    rule, moments = Rule(0.1, 1.0, direction, ball, group), delta.new_zeros(planes(direction), *delta.shape)
    given = (mask, torch.tensor(0), moments, rule, Moments.of(rule, 1), lookup if embeds else None, starts)
    moment_step.moment_step(delta, grad, *given)


def whole_table_step(dtype: torch.dtype, dim: int, group: int) -> None:
    ids = torch.arange(32)
    groups, delta = segments(ids, 50), torch.zeros(32, dim, dtype=in_place_of(dtype))
    weight, grad = torch.zeros(50, dim, dtype=dtype), torch.zeros(32, dim, dtype=dtype)
    rule, lookup = Rule(0.1, 1.0, "l2", "l2", group), Lookup(weight, ids, None, torch.zeros_like(grad))
    table_step.table_step(delta, grad, torch.tensor(0), rule, groups, lookup, torch.zeros_like(delta))


def compare(dtype: torch.dtype, classes: int, kind: str, both: bool = True) -> None:
    """divergence with one gradient or two."""
    logits, weights = torch.zeros(8, classes, dtype=dtype), torch.zeros(8, dtype=in_place_of(dtype))
    divergence.divergence(logits, logits.clone(), weights, kind, True, both)


def everything(dtype: torch.dtype, dim: int) -> Iterator[Callable[[], None]]:
    yield lambda: lookups(dtype, dim)
    for group, direction, ball in itertools.product((1, 2), DIRECTIONS, BALLS):
        for both in (False, True):
            yield lambda g=group, d=direction, b=ball, m=both: step(dtype, dim, g, d, b, masked=m, embeds=m)
    for direction, ball in itertools.product(DIRECTIONS, BALLS):
        yield lambda d=direction, b=ball: runs_step(dtype, dim, d, b)
    for group, direction, ball in itertools.product((1, 2), MOMENT_DIRECTIONS, MOMENT_BALLS):
        for embeds in (False, True):
            yield lambda g=group, d=direction, b=ball, e=embeds: by_moments(dtype, dim, g, d, b, embeds=e)
        yield lambda g=group, d=direction, b=ball: by_moments(dtype, dim, g, d, b, runs=True)
    for group in (0, 1):
        yield lambda g=group: whole_table_step(dtype, dim, g)
    for kind, both in itertools.product(KINDS, (False, True)):
        yield lambda k=kind, b=both: compare(dtype, dim, k, b)


@pytest.mark.parametrize("target", ["sm_90", *SLOW])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_methods_use(dtype: torch.dtype, target: str, compiled: list[Compiled], tmp_path: Path) -> None:
    """The usual steps, on rows of 768."""
    lookups(dtype, 768)
    for group, direction, ball in ((1, "l2", "l2"), (2, "l2", "l2"), (1, "max", "linf"), (2, "sign", "linf")):
        step(dtype, 768, group, direction, ball, masked=True, embeds=True)
    step(dtype, 768, 1, "l2", "unit", masked=False, embeds=True)
    runs_step(dtype, 768, "l2", "l2")
    for group, direction, ball in ((1, "adamw", "l2"), (2, "adamw", "l2"), (2, "rmsprop", "linf")):
        by_moments(dtype, 768, group, direction, ball)
    whole_table_step(dtype, 768, 0)
    compare(dtype, 4096, "symmetric_kl")
    assert {kernel.name for kernel in compiled} == {
        "gather_perturb_kernel", "gather_perturb_backward_kernel", "segments_kernel", "pieces_kernel",
        "rows_kernel", "sums_kernel", "unit_kernel", "move_kernel", "divergence_kernel",
        "moment_rows_kernel", "moment_sums_kernel", "moment_move_kernel",
    }  # fmt: skip
    for kernel in compiled:
        assert wide_accesses(inspect(kernel, target, tmp_path)), kernel.name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90"])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.float32, ascend.LONGEST_ROW // 4), (torch.float32, 33), (torch.float64, ascend.LONGEST_ROW // 8),
        (torch.bfloat16, 4096), (torch.float16, 20000),
    ],
    ids=str,
)  # fmt: skip
def test_every_variant(dtype: torch.dtype, dim: int, target: str, compiled: list[Compiled], tmp_path: Path) -> None:
    for call in everything(dtype, dim):
        call()
    assert len(compiled) > 50
    for kernel in {id(each.kernel): each for each in compiled}.values():
        inspect(kernel, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90"])
@pytest.mark.parametrize("dim", [1, 768])
def test_sizes_that_triton_takes_for_constants(dim: int, target: str, compiled: list[Compiled], tmp_path: Path) -> None:
    """A table of one word, a row of one column, one class: an argument that is 1 is compiled in."""
    weight, grad = (torch.zeros(size, dim, dtype=torch.bfloat16) for size in (1, 160))
    ids = torch.zeros(160, dtype=torch.int64)
    groups, rows = segments(ids, 1), torch.zeros(1, dim)
    segment_sum.segment_sum(grad, groups.order, groups.starts, groups.stops)
    for grads in ([grad], [grad, rows.expand(160, dim)]):
        gather_perturb.gather_perturb_backward(weight, grads, ids, groups.order, groups.starts, -1)
    rule, lookup = Rule(0.1, 1.0, "l2", "l2", 0), Lookup(weight, ids, None, torch.zeros_like(grad))
    table_step.table_step(rows, grad, torch.tensor(0), rule, groups, lookup, torch.zeros_like(rows))
    ascend.ascend(rows, grad[:1], None, torch.tensor(0), rule, None, torch.tensor([0, 1]))
    for kind in KINDS:
        compare(torch.bfloat16, dim, kind)
    for kernel in {id(each.kernel): each for each in compiled}.values():
        inspect(kernel, target, tmp_path)


def inspect(kernel: Compiled, target: str, folder: Path) -> str:
    """The kernel's machine code; fails where a register is kept in memory."""
    if target.startswith("gfx"):
        code: str = kernel.kernel.asm["amdgcn"]
        spilled = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", code)
        assert spilled == ["0", "0"], kernel.name  # scalar registers spill into vector registers, not to memory
        return code
    code = cuobjdump("-sass", kernel, folder)
    assert "EXIT" in code, kernel.name
    assert not re.findall(r"\b(?:LDL|STL)\b.*", code), kernel.name
    return code


def wide_accesses(code: str) -> bool:
    """Whether rows are read 16 bytes at a time (on AMD's GPUs, whose warps are twice as wide, 8)."""
    wide = r"\b(?:LDG|LDGSTS)\.E\.[\w.]*128|(?:global|buffer)_load_(?:dwordx[24]|b64|b128)"
    return re.search(wide, code) is not None


def cuobjdump(what: str, kernel: Compiled, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.kernel.asm["cubin"])
    return subprocess.run([TOOLS / "cuobjdump", what, path], check=True, capture_output=True, text=True).stdout
