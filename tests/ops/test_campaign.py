"""A part of the two campaigns against the ops, and that each of them finds what is planted."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastadv import native, ops
from tests.campaigns import fuzz_ops, hostile_calls

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}"),
]


@pytest.mark.parametrize("cases", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_the_ops_agree_with_numpy(cases: int) -> None:
    found = fuzz_ops.fuzz_ops(cases, seed=20)
    assert found["cases"] == 10 * cases
    assert found["wrong"] == 0, found["ops"]


@pytest.mark.parametrize("calls", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_no_call_ends_the_process(calls: int) -> None:
    found = hostile_calls.hostile_calls(calls, seed=21)
    assert not found["wrong"], found["details"]
    assert sum(found["outcomes"].values()) == calls
    assert found["outcomes"]["answered"] < calls / 2


PLANTED: dict[str, Callable[[Any], Any]] = {
    "segment_sum": lambda out: out.mul_(1 + 2e-7),
    "gather_perturb": lambda out: out.data.nan_to_num_(3.0, 3.0, 3.0),
    "segments": lambda out: out.starts.clamp_(max=2),
    "divergence": lambda out: out.data.mul_(1.001),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_result_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, name)

    def wrong(*given: Any, **named: Any) -> Any:
        out = right(*given, **named)
        PLANTED[name](out)
        return out

    monkeypatch.setattr(ops, name, wrong)
    monkeypatch.setattr(fuzz_ops, "OPS", {name: fuzz_ops.OPS[name]})
    assert fuzz_ops.fuzz_ops(60, seed=20)["wrong"] > 0


def test_a_crash_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = hostile_calls.Target(
        "planted", lambda number: ctypes.string_at(0) if number is None else None, lambda: {"number": 1}
    )
    monkeypatch.setattr(hostile_calls, "targets", lambda: [crash])
    found = hostile_calls.hostile_calls(60, seed=1)
    assert found["wrong"]["SIGSEGV"] > 0
    assert sum(found["wrong"].values()) + sum(found["outcomes"].values()) == 60
    assert "planted, seed [1, " in found["details"][0]


@pytest.mark.parametrize("name", ["ascend_cpu", "rows_restore", "divergence_cpu"])
def test_a_refusal_prints_no_tensor_whose_memory_is_gone(name: str) -> None:
    target = next(one for one in hostile_calls.targets() if one.name == f"_C.{name}")

    def call(number: Any) -> None:
        given = target.arguments()
        given["t0"] = hostile_calls.freed(given["t0"])
        given[list(given)[-1]] = "a word"
        target.call(**given)

    refused = hostile_calls.Target("refused", call, lambda: {"number": 1})
    assert hostile_calls.batch([[1, 0]], [refused]) == (["TypeError"], 0)


def test_every_exported_function_is_a_target() -> None:
    exported = {f"_C.{name}" for name in dir(native.extension()) if callable(getattr(native.extension(), name))}
    on_a_gpu = {"_C.OnDevice", "_C.grads_cuda", "_C.cuda_problem"}  # the first is but numbers
    named = {name for name in exported - on_a_gpu if not name.startswith("_C.__")}
    assert named <= {target.name for target in hostile_calls.targets()}
    assert torch.get_num_threads() == 1
