"""How many kernels of ours a step launches on a GPU, and how many calls to torch a plan takes: counted without a GPU.

The engine's own arguments go through Triton, compiled for sm_90, to a driver that launches nothing (`bench.nowhere`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from fastadv import kernels, native
from fastadv.native import grads as native_grads
from fastadv.ops import dispatch, segments
from tests.every import EVERY, in_scopes
from tests.support import batch, ready

pytest.importorskip("triton")
if kernels.interpreted():
    pytest.skip("launches nothing: triton interprets", allow_module_level=True)

from bench import nowhere
from fastadv.kernels import common

SCOPES = ("table", "row", "batch", "sample", "token")

# What an op launches. These are the numbers to change when a kernel is split or joined.
LOOKUP, SUM, BACKWARD = ("gather_perturb_kernel",), ("segments_kernel",), ("gather_perturb_backward_kernel",)
GROUPS, ROWS, COMPARE = ("sums_kernel", "move_kernel"), ("rows_kernel",), ("divergence_kernel",)

# What an ascent launches, by scope.
BY_NORM = {
    "table": SUM + GROUPS + LOOKUP,
    "row": SUM + ROWS + LOOKUP,
    "batch": GROUPS,
    "sample": GROUPS,
    "token": ROWS,
}
BY_SIGN = {**BY_NORM, "token": GROUPS}  # no norm is taken: a sample stands or falls by itself


def step(ascents: int, by: dict[str, Sequence[str]] = BY_NORM, lookups: int = 1) -> dict[str, Sequence[str]]:
    """A first lookup, ascents that also write the next one, and the table's gradient once."""
    return {scope: (*LOOKUP * lookups, *tuple(by[scope]) * ascents, *BACKWARD) for scope in SCOPES}


def comparing(by: dict[str, Sequence[str]] = BY_NORM) -> dict[str, Sequence[str]]:
    """A clean pass, a start that is looked up, and a divergence behind the probe and behind the last pass."""
    return {scope: (*LOOKUP * 2, *COMPARE, *by[scope], *COMPARE, *BACKWARD) for scope in SCOPES}


LAUNCHES = {  # by method and scope; PGD-3, FreeLB-3, YOPO-3-3 and so on: the methods' defaults
    "fgsm": step(1, BY_SIGN),
    "fgm": step(1),
    "pgd": step(3),
    "freeat": step(1, BY_SIGN),
    "yopo": step(6),
    "freelb": step(2),
    "neftune": step(0),
    "llr": step(3, BY_SIGN, lookups=2),
    "smart": comparing(),
    "vat": comparing(),
}
PGD_3 = {"table": 14, "row": 11, "batch": 8, "sample": 8, "token": 5}  # as docs/kernels.md says
_ASCENT = ["rows_touched", "rows_step"]
ROWS_3 = ["rows_touched", "rows_back_up", "rows_step", *_ASCENT, *_ASCENT, "rows_restore"]  # PGD-3 with tied="both"
CALLS = {False: 12, True: 18}  # to torch's ops, for where equal ids lie; with a mask or without


def launched(method: Callable[..., Any], size: tuple[int, int] = (4, 7), **options: Any) -> list[str]:
    """The kernels of a method's second step, in order; the first one launches the same."""
    model, data = ready(torch.float32)[0], batch(*size)
    steps: list[list[str]] = []

    def note(kernel: Any) -> contextlib.AbstractContextManager[None]:
        steps[-1].append(kernel.__name__)
        return contextlib.nullcontext()

    with nowhere.on_the_cpu(note):
        adv = method(model, embedding=model.word_embeddings, **options)
        for number in range(2):
            steps.append([])
            model.zero_grad()
            adv.backward(lambda: model(**data), mask=data["attention_mask"], step=number)
            with torch.no_grad():
                model.word_embeddings.weight += 0  # as an optimizer does
    assert steps[0] == steps[1]
    return steps[1]


@pytest.mark.native
@pytest.mark.parametrize(("name", "scope"), in_scopes(*SCOPES))
def test_launches_of_a_step(name: str, scope: str) -> None:
    found = launched(EVERY[name], scope=scope)
    assert found == list(LAUNCHES[name][scope])
    assert name != "pgd" or len(found) == PGD_3[scope]


@pytest.mark.native
def test_long_segments_take_a_launch_more() -> None:
    """Where a batch has more positions than a chunk, one of its words may have so many."""
    found = launched(fastadv.PGD, (20, 7), scope="table")
    without = [kernel for kernel in found if kernel != "pieces_kernel"]
    assert without == list(LAUNCHES["pgd"]["table"])
    before = [found[index + 1] for index, kernel in enumerate(found) if kernel == "pieces_kernel"]
    assert before == [*SUM * 3, *BACKWARD]


class Counted(TorchDispatchMode):
    """The calls to torch's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", CALLS)
def test_a_plan_takes_few_calls_and_reads_nothing_back(masked: bool) -> None:
    """On tensors that have no values: reading one would be an error."""
    ids, mask = torch.empty(40, dtype=torch.int64, device="meta"), torch.empty(40, dtype=torch.bool, device="meta")
    with Counted() as counted:
        found = segments(ids, 1000, mask=mask if masked else None)
    assert [tuple(tensor.shape) for tensor in found] == [(40,), (40,), (41,), (40,)]
    assert len(counted.names) == CALLS[masked], counted.names


needs_native = pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")


@needs_native
@pytest.mark.parametrize("there", [False, True])
def test_gradients_that_are_there_are_copied_in_one_launch(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, closure = ready(torch.float32)
    runs: list[int] = []
    run = native_grads.run_cpu

    def noted(into: Any, sources: Any, kind: int, number: float) -> bool:
        runs.append(kind)
        return run(into, sources, kind, number)

    monkeypatch.setattr(native_grads, "run_cpu", noted)
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    if there:
        closure().loss.backward()
    adv.backward(closure, mask=data["attention_mask"])
    assert runs == [native_grads.COPY] * there


@needs_native
def test_calls_for_a_table_that_moves() -> None:
    """tied="both": the rows that the first gradient touches are backed up; later ones touch no others here."""
    model, _, closure = ready(torch.float32)
    called: list[str] = []

    def noted(op: dispatch.Op) -> Callable[..., Any] | None:
        known = op.backends.get("cpu")
        if not op.name.startswith("rows") or known is None:
            return None

        def run(*given: Any) -> Any:
            called.append(op.name)
            return known.function(*given)

        return run

    with nowhere.running(noted):
        fastadv.PGD(model, embedding=model.word_embeddings, tied="both").backward(closure)
    assert called == ROWS_3


def test_nothing_stays_behind() -> None:
    """Ops run as before when the driver has gone, after an error as well."""
    before = [op.backends for op in dispatch.OPS]

    def fail() -> None:
        with nowhere.on_the_cpu(lambda kernel: contextlib.nullcontext()):
            assert [op.backends for op in dispatch.OPS] != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(op.backends is known for op, known in zip(dispatch.OPS, before, strict=True))
    assert all(module.launch is common.launch for module in nowhere.LAUNCHERS)
