"""What the compiled kernels keep in registers, how wide they read, and how they fill a GPU that is not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastadv import kernels

pytest.importorskip("triton")
if kernels.interpreted():
    pytest.skip("compiles nothing: triton interprets", allow_module_level=True)

from bench.gpu.occupancy import GPUS, Gpu, Row, accesses, named, resident, triton_rows

SLOW = [pytest.param(target, marks=pytest.mark.slow) for target in ("sm_80", "sm_100")]
FEWEST_WAVES = 2  # of a launch that needs more than one: of less, the last would leave much of the GPU idle
SMALL_LOOKUP = ("gather_perturb_kernel", "32 x 128 x 768")  # of 4 MB, in 4 microseconds


@pytest.mark.parametrize("target", ["sm_90", *SLOW])
def test_no_launch_leaves_a_gpu_half_idle_and_rows_are_read_16_bytes_at_a_time(target: str, tmp_path: Path) -> None:
    rows = list(triton_rows(target, tmp_path))
    assert {row.kernel for row in rows} >= {
        "segments_kernel",
        "pieces_kernel",
        "gather_perturb_backward_kernel",
        "sums_kernel",
        "move_kernel",
    }
    for row in rows:
        assert row.spills == 0, row
        assert row.waves <= 1 or row.waves > FEWEST_WAVES or small(row), row
        # Narrower ones are ids and sums; and the odd edges of a row of logits.
        assert max(row.accesses) == 16, row
        assert 2 not in row.accesses or row.kernel == "divergence_kernel", row
        assert row.waves <= 1 or row.kernel != "sums_kernel", row
        assert row.threads == 32 or row.kernel not in ("segments_kernel", "gather_perturb_backward_kernel"), row


def small(row: Row) -> bool:
    return row.kernel == SMALL_LOOKUP[0] and SMALL_LOOKUP[1] in row.case


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(32, 128, 0, 16), (72, 128, 0, 7), (96, 128, 0, 5), (64, 32, 0, 32), (32, 128, 100 << 10, 2), (255, 1024, 0, 0)],
)
def test_blocks_on_a_multiprocessor(registers: int, threads: int, shared: int, blocks: int) -> None:
    """The audit's figures: 72 registers, 7 blocks of 4 warps; 96, 5."""
    assert resident(GPUS["sm_90"], registers, threads, shared) == blocks


def test_a_gpu_is_described() -> None:
    assert GPUS["sm_90"] == Gpu("H100, H200", 132, 228 << 10)


def test_accesses_are_counted_by_their_bytes() -> None:
    code = "LDG.E.128 R4\n STG.E R1\n LDG.E.U16 R2\n LD.E.64 R3\n LDGSTS.E.BYPASS.128 [R4]\n LDS.128 R1\n"
    assert accesses(code) == {16: 2, 8: 1, 4: 1, 2: 1}


def test_a_cpp_kernel_is_named() -> None:
    move = "_ZN7fastadv45_GLOBAL__N__d5_12_rows_cuda_cu_9f11move_kernelINS_8BFloat16EEEvNS_4RowsIT_EElPKdPl"
    assert named(move) == ("move_kernel", ", bfloat16")
