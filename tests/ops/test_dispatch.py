"""Which backend is chosen, and what is said when one is missing."""

from __future__ import annotations

import pytest

from fastadv.ops import dispatch
from fastadv.ops.dispatch import OPS

pytestmark = pytest.mark.native


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_eager_on_request_and_a_reason_for_every_missing_backend(op: dispatch.Op) -> None:
    for device in ("cpu", "cuda"):
        assert op.choose(device, False) is op.eager
        if op.missing(device) is None:
            assert op.choose(device, None) is op.choose(device, True) is op.backends[device].function
            continue
        assert op.choose(device, None) is op.eager
        with pytest.raises(RuntimeError, match=f"fused=True: {op.name}: .+"):
            op.choose(device, True)


def test_report_has_every_op_and_says_why() -> None:
    rows = dispatch.report()
    named = {"ascend", "gather_perturb", "gather_perturb_backward", "segment_sum", "segments"}
    named |= {"table_step", "rows_touched", "rows_back_up", "rows_restore", "rows_step"}
    named |= {"grads_copy", "grads_accumulate", "grads_average"}
    assert {row.op for row in rows} == {op.name for op in OPS}
    assert named <= {op.name for op in OPS}
    assert all(row.available or row.reason for row in rows)
    assert all(row.available for row in rows if row.backend == "eager")


def test_require_names_every_op_that_is_missing() -> None:
    dispatch.require(None, "cuda")
    dispatch.require(False, "cuda")
    with pytest.raises(RuntimeError, match="not every op has a native backend on cuda") as caught:
        dispatch.require(True, "cuda")
    lacking = [op for op in OPS if op.missing("cuda") is not None]
    assert lacking
    assert all(f"{op.name}: " in str(caught.value) for op in lacking)
    with pytest.raises(RuntimeError, match="native backend on mps"):
        dispatch.require(True, "mps")
