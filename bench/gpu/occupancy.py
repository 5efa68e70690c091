"""What a GPU makes of every kernel, read from the compiled code: `python -m bench.gpu.occupancy`, with no GPU needed.

Registers, spills, the bytes of the accesses to memory, how many blocks a multiprocessor holds, and in how many waves a
launch of gpu-check's size runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu.abroad import TOOLS, compiling
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.moments import Moments
from fastadv.arguments.rule import Rule
from fastadv.arguments.segments import Segments
from fastadv.kernels import ascend, divergence, gather_perturb, moment_step, segment_sum, table_step
from fastadv.native import toolchain

ROOT = Path(__file__).parents[2]
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
GRANULE = 256  # registers are given to a warp in so many


class Gpu(NamedTuple):
    """A multiprocessor's limits (CUDA C++ Programming Guide, "Compute Capabilities"), and how many there are."""

    name: str
    multiprocessors: int
    shared: int  # bytes
    registers: int = 65_536
    threads: int = 2_048
    blocks: int = 32


GPUS = {
    "sm_80": Gpu("A100", 108, 164 << 10),
    "sm_90": Gpu("H100, H200", 132, 228 << 10),
    "sm_100": Gpu("B200", 148, 228 << 10),
}


class Row(NamedTuple):
    """One kernel of one case."""

    case: str
    kernel: str
    registers: int
    spills: int  # accesses to local memory
    accesses: dict[int, int]  # instructions that load or store globally, by their bytes
    threads: int
    shared: int
    resident: int  # blocks on a multiprocessor
    programs: int
    waves: float


class Block(NamedTuple):
    """How a kernel is launched."""

    threads: int
    programs: int
    shared: int = 0  # bytes, beside what the code itself has


def resident(gpu: Gpu, registers: int, threads: int, shared: int) -> int:
    """The blocks that a multiprocessor holds at a time."""
    warps = threads // 32
    per_warp = -(-registers * 32 // GRANULE) * GRANULE
    by_registers = gpu.registers // per_warp // warps
    by_shared = gpu.shared // (shared + 1024)  # the system's own part of a block
    return min(gpu.blocks, gpu.threads // threads, by_registers, by_shared)


def row(case: str, kernel: str, target: str, cubin: Path, block: Block, function: str = "") -> Row:
    """What the compiled code says."""
    usage = [line for line in tool("cuobjdump", "-res-usage", str(cubin)).split(" Function ") if function in line]
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage[-1])
    assert found is not None, usage
    registers, _, static, _ = map(int, found.groups())
    code = tool("cuobjdump", "-sass", *(["-fun", function] if function else []), str(cubin))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    shared = max(static, block.shared)
    held = resident(GPUS[target], registers, block.threads, shared)
    waves = round(block.programs / (held * GPUS[target].multiprocessors), 3)
    return Row(case, kernel, registers, spills, accesses(code), block.threads, shared, held, block.programs, waves)


def accesses(code: str) -> dict[int, int]:
    """How many instructions there are for each number of bytes."""
    widths: Counter[int] = Counter()
    for modifiers in re.findall(r"\b(?:LDG?|STG?|LDGSTS)\.E([\w.]*)", code):
        named = [size for part, size in WIDTHS.items() if part in modifiers.split(".")]
        widths[named[0] if named else 4] += 1
    return dict(sorted(widths.items(), reverse=True))


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


# What is compiled

Launches = Callable[[], None]
NARROW, WIDE = torch.bfloat16, torch.float32


class Sizes(NamedTuple):
    batch: int
    length: int
    dim: int
    vocabulary: int = 30_522

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.length} x {self.dim}"


LARGE, SMALL = Sizes(256, 512, 1024), Sizes(32, 128, 768)


def empty(*shape: int, dtype: torch.dtype = NARROW) -> torch.Tensor:
    """Memory that nobody reads or writes: the compiler sees its shape and alignment."""
    return torch.empty(shape, dtype=dtype)


def cases(size: Sizes) -> Iterator[tuple[str, Launches]]:
    """The ops of an attacked step, with bfloat16 words and a float32 perturbation."""
    count, dim = size.batch * size.length, size.dim
    index = {"dtype": torch.int64}
    ids, weight = empty(size.batch, size.length, **index), empty(size.vocabulary, dim)
    delta, grad = (empty(size.batch, size.length, dim, dtype=dtype) for dtype in (WIDE, NARROW))
    room = min(count, size.vocabulary)
    groups = Segments(*(empty(length, **index) for length in (count, count, room + 1, room)))
    rows, flat, skipped = empty(room, dim, dtype=WIDE), empty(count, dim), empty(**index)
    lookup = Lookup(weight, ids, None, empty(size.batch, size.length, dim))

    def backward(grads: list[torch.Tensor]) -> Launches:
        plan = (ids.flatten(), groups.order, groups.starts, -1)
        return lambda: gather_perturb.gather_perturb_backward(weight, grads, *plan)

    def step(group: int, words: bool) -> Launches:
        rule, given = Rule(0.1, 1.0, "l2", "l2", group), lookup if words else None
        return lambda: ascend.ascend(delta, grad, None, skipped, rule, given)

    def by_moments(group: int) -> Launches:
        rule, moments = Rule(0.1, 1.0, "adamw", "l2", group), empty(2, *delta.shape, dtype=WIDE)
        return lambda: moment_step.moment_step(delta, grad, None, skipped, moments, rule, Moments.of(rule, 1), lookup)

    yield "gather_perturb", lambda: gather_perturb.gather_perturb(weight, ids, delta, None)
    yield "gather_perturb by slot", lambda: gather_perturb.gather_perturb(weight, ids, rows, groups.slot.view_as(ids))
    yield "backward", backward([flat])
    yield "backward of two passes", backward([flat, empty(count, dim, dtype=WIDE)])
    yield "segment_sum", lambda: segment_sum.segment_sum(flat, groups.order, groups.starts, groups.stops)
    for name, group in {"token": 2, "sample": 1, "batch": 0}.items():
        yield f"ascend, {name}", step(group, words=False)
        yield f"ascend, {name}, and the words", step(group, words=True)
        yield f"moment_step, {name}, and the words", by_moments(group)
    rule, into = Rule(0.1, 1.0, "l2", "l2", 0), lookup._replace(ids=ids.flatten(), embedded=empty(count, dim))
    yield "table_step", lambda: table_step.table_step(rows, flat, skipped, rule, groups, into, torch.empty_like(rows))


def logits(classes: int) -> Launches:
    a, b, weights = empty(2_048, classes), empty(2_048, classes), empty(2_048, dtype=WIDE)
    return lambda: divergence.divergence(a, b, weights, "symmetric_kl", True, True)


def triton_rows(target: str, folder: Path) -> Iterator[Row]:
    """The kernels of kernels/."""
    made = {f"{name}, {size.name}": run for size in (LARGE, SMALL) for name, run in cases(size)}
    made |= {f"divergence, 2,048 x {classes:,}": logits(classes) for classes in (30_522, 151_936)}
    cubin = folder / "kernel.cubin"
    for case, run in made.items():
        with compiling(target) as compiled:
            run()
        for name, kernel, grid in compiled:
            cubin.write_bytes(kernel.asm["cubin"])
            block = Block(32 * kernel.metadata.num_warps, torch.Size(grid).numel(), kernel.metadata.shared)
            yield row(case, name, target, cubin, block)


THREADS = {"rows": 128, "grads": 256}  # of a block: kThreads in csrc/
PROGRAMS = {
    "copy_kernel": 131_072,
    "by_row_kernel": 131_072,
    "grads_kernel": 7_400,
}  # any other: kRowsParts


def cuda_rows(target: str, folder: Path) -> Iterator[Row]:
    """The kernels of csrc/, at 131,072 rows or gpu-check's gradients; nothing where there is no nvcc."""
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.ToolchainError:
        return
    for op, threads in THREADS.items():
        cubin = folder / f"{op}.cubin"
        flags = ["-std=c++17", "-O3", "-DFASTADV_WITH_CUDA", "-cubin", f"-arch={target}"]
        toolchain.run([nvcc.command, *flags, str(ROOT / "csrc" / f"{op}_cuda.cu"), "-o", str(cubin)])
        for function in re.findall(r"Function (\S+):", tool("cuobjdump", "-res-usage", str(cubin))):
            name, kind = named(function)
            yield row(f"{op}{kind}", name, target, cubin, Block(threads, PROGRAMS.get(name, 768)), function)


def named(function: str) -> tuple[str, str]:
    """The name of a C++ kernel, and for what type it is."""
    name = re.search(r"(?:copy|by_row|sums|size|move|grads)_kernel(?:I(.*?)E)?", function)
    assert name is not None, function
    types = {"f": "float32", "d": "float64", "8BFloat16": "bfloat16", "7Float16": "float16", "4int4": "16 bytes"}
    types |= {"l": "8 bytes", "i": "4 bytes", "s": "2 bytes"}
    kind = next((shown for code, shown in types.items() if (name[1] or "").endswith(code)), "")
    return name[0].split("_kernel")[0] + "_kernel", f", {kind}" if kind else ""


HEAD = ("case", "kernel", "registers", "shared", "bytes x accesses", "blocks", "waves")
RENAMED = {"segments_kernel": "segment_sum_kernel"}  # since the first figures


def table(rows: list[Row], before: list[Row] | None = None) -> str:
    """Markdown; with the figures from before, where they were others."""
    known = {(one.case, one.kernel): one for one in before or []}
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for one in rows:
        now, name = cells(one), RENAMED.get(one.kernel, one.kernel)
        then = known.get((one.case, one.kernel)) or known.get((one.case, name))
        shown = now if then is None else [a if a == b else f"{b} → {a}" for a, b in zip(now, cells(then), strict=True)]
        lines.append(f"| {one.case} | `{one.kernel}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def cells(one: Row) -> list[str]:
    """A row's figures. A spill is an error, and is shown beside the registers."""
    widths = ", ".join(f"{size} x {count}" for size, count in one.accesses.items())
    spilled = f" ({one.spills} spilled)" if one.spills else ""
    return [f"{one.registers}{spilled}", f"{one.shared:,}", widths, f"{one.resident}", f"{one.waves:,.2f}"]


def read(path: Path) -> dict[str, list[Row]]:
    """What `--output` wrote."""
    found: dict[str, list[Row]] = {}
    for target, one in json.loads(path.read_text(encoding="utf-8")):
        widths = {int(size): count for size, count in one["accesses"].items()}
        found.setdefault(target, []).append(Row(**{**one, "accesses": widths}))
    return found


def keep(found: dict[str, list[Row]], path: Path) -> None:
    """As JSON, a kernel a line."""
    lines = [json.dumps([target, one._asdict()]) for target, rows in found.items() for one in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.occupancy", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--output", type=Path, help="also as JSON, in this file")
    parser.add_argument("--before", type=Path, help="such a file of another revision, to show beside")
    options = parser.parse_args()
    before = {} if options.before is None else read(options.before)
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in options.targets:
            rows = found[target] = [*triton_rows(target, Path(folder)), *cuda_rows(target, Path(folder))]
            gpu = GPUS[target]
            print(f"\n{target} ({gpu.name}, {gpu.multiprocessors} multiprocessors)\n")
            print(table(rows, before.get(target)), flush=True)
    if options.output is not None:
        keep(found, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
