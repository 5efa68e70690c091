"""What happens when memory ends in the middle of a parallel loop: a MemoryError, whatever thread meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastadv import native
from fastadv.native import toolchain

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.native

OUT_OF_MEMORY = """
import resource, torch
from fastadv import ops
torch.set_num_threads(2)
C = 2**23
logits, ids = torch.zeros(4, C, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
small = torch.ones(64, 4096)
rule = {"step_size": 1.0, "epsilon": 1.0, "direction": "l2", "ball": "l2", "group": 0}
ops.ascend(small, small.clone(), skipped=torch.zeros((), dtype=torch.int64), **rule)  # its threads are there
delta, room = torch.zeros(2, C), torch.zeros(1)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + MORE * 2**20,) * 2)
try:
    CALL
except MemoryError:
    print("MemoryError", end="")
"""
CALLS = {
    "divergence": ("ops.divergence(logits, logits, 'kl')", 60),  # 64 MiB for each thread
    "gather_perturb": ("ops.gather_perturb(logits, ids[:2], delta.detach(), added=delta, fused=True)", 40),
}


@pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("name", CALLS)
def test_no_memory_for_a_thread(name: str) -> None:
    call, more = CALLS[name]
    code = OUT_OF_MEMORY.replace("CALL", call).replace("MORE", str(more))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert (done.returncode, done.stdout) == (0, "MemoryError"), done.stderr


THROWS = """
#include <cstdio>
#include <stdexcept>
#include "parallel.h"
template <class F>
int thrown(const F& loop) {
  try {
    loop();
  } catch (const std::runtime_error& error) {
    return error.what()[0] == 'x' ? 1 : 0;
  }
  return 0;
}
int main() {
  std::atomic<int> parts{0};
  const auto body = [&](std::int64_t, std::int64_t) { ++parts, throw std::runtime_error("x"); };
  const int even = thrown([&] { fastadv::parallel(4, 100000, 4, body); }), seen = parts;
  const int uneven = thrown([&] { fastadv::parallel_uneven(40, 10, 100000, 4, body); });
  std::printf("%d %d %d", even, uneven, seen);
}
"""


def test_an_exception_of_any_thread_leaves_the_loop(tmp_path: Path) -> None:
    try:
        cxx = toolchain.find_cxx()
    except toolchain.ToolchainError as missing:
        pytest.skip(str(missing))
    if cxx.openmp_reason:
        pytest.skip(cxx.openmp_reason)
    (tmp_path / "throws.cpp").write_text(THROWS)
    program = str(tmp_path / "throws")
    flags = ["-std=c++17", "-O1", "-fopenmp", f"-I{ROOT / 'csrc'}"]
    toolchain.run([*cxx.command, *flags, str(tmp_path / "throws.cpp"), "-o", program])
    assert toolchain.run([program]) == "1 1 4"
