"""The native launcher against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastadv import native
from fastadv.native.gather_perturb import gather_perturb
from tests.csrc.guards import guards_stand, untouched, watched

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    rows = weight[ids.long()]
    if delta is None:
        return rows
    if slot is None:
        return (rows.to(delta.dtype) + delta).to(weight.dtype)
    out = rows.clone()
    there = slot >= 0  # -1: nothing is added here
    out[there] = (rows[there].to(delta.dtype) + delta[slot[there]]).to(weight.dtype)
    return out


def table(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, dim, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "delta", "slot"])
@pytest.mark.parametrize(
    ("shape", "rows", "dim"),
    [((3, 5), 11, 7), ((1,), 1, 1), ((2, 3, 4), 9, 33), ((17, 31), 101, 129), ((), 4, 8)],
    ids=str,
)
def test_agrees_with_pytorch(shape: tuple[int, ...], rows: int, dim: int, form: str, dtype: torch.dtype) -> None:
    weight, ids = table(rows, dim, dtype), torch.randint(rows, shape)
    slot = torch.randint(-1, 5, shape) if form == "slot" else None
    leading = (5,) if form == "slot" else shape
    delta = None if form == "plain" else torch.randn(*leading, dim, dtype=sum_dtype(dtype))
    got = gather_perturb(weight, ids, delta, slot)
    want = plain(weight, ids, delta, slot)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    weight, ids = table(50, 300, dtype), torch.randint(50, (7, 53))
    delta = torch.randn(7, 53, 300, dtype=sum_dtype(dtype))
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(gather_perturb(weight, ids, delta, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], plain(weight, ids, delta, None))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


@pytest.mark.parametrize(
    ("shape", "rows", "dim"), [((0,), 3, 4), ((2, 0), 3, 4), ((0,), 0, 4), ((2, 3), 5, 0)], ids=str
)
def test_empty(shape: tuple[int, ...], rows: int, dim: int) -> None:
    weight, ids = torch.randn(rows, dim), torch.zeros(shape, dtype=torch.int64)
    got = gather_perturb(weight, ids, torch.randn(*shape, dim), None)
    assert got.shape == (*shape, dim)


def test_rows_may_be_strided_and_nothing_between_them_is_read() -> None:
    storage = torch.full((9, 20), math.nan)
    weight = storage[2:7, 3:13]
    weight.copy_(torch.randn(5, 10))
    ids = torch.tensor([[4, 0, 4], [3, 2, 1]])
    got = gather_perturb(weight, ids, torch.zeros(2, 3, 10), None)
    assert torch.equal(got, weight[ids])
    assert torch.equal(gather_perturb(weight[:, :1], ids, None, None), weight[:, :1][ids])
    one_row = torch.randn(10).expand(5, 10)
    assert torch.equal(gather_perturb(one_row, ids, None, None), one_row[ids])


def test_int32_and_strided_ids() -> None:
    weight, ids = torch.randn(13, 6), torch.randint(13, (4, 8), dtype=torch.int32)
    delta = torch.randn(8, 4, 6)
    assert torch.equal(gather_perturb(weight, ids.T, delta, None), plain(weight, ids.T, delta, None))


def test_a_lookup_keeps_bits_and_a_sum_keeps_nan() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
        ids = torch.arange(256)
        looked_up = gather_perturb(weight, ids, None, None)
        assert torch.equal(looked_up.view(torch.int16), weight.view(torch.int16))
        summed = gather_perturb(weight, ids, torch.zeros(256, 256), None)
        assert_same_bits(summed, (weight.float() + 0).to(dtype))


def edge_values(dtype: torch.dtype) -> Tensor:
    """Floats around everything that rounding to 16 bits can get wrong, and random bit patterns."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    finite = narrow[narrow.isfinite()].sort().values
    between = (finite[1:].double() + finite[:-1].double()) / 2  # the ties
    ties = between.float()
    away = torch.full_like(ties, math.inf)
    beside = [torch.nextafter(ties, away), torch.nextafter(ties, -away)]
    patterns = torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32).view(torch.float32)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 65504.0, 65519.996, 65520.0, 1e-45]
    special += [3.4028235e38, -3.4028235e38, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0000001, 2.0**-126]
    return torch.cat([narrow, ties, *beside, patterns, torch.tensor(special)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    values = edge_values(dtype).view(1, -1)
    weight = torch.zeros(1, values.shape[1], dtype=dtype)
    got = gather_perturb(weight, torch.tensor([0]), values, None)
    assert_same_bits(got, (values + 0).to(dtype))


def test_half_denormals_survive_flush_to_zero() -> None:
    """They are ordinary float32 numbers, so a mode that flushes float32's own denormals must not touch them."""
    weight = torch.arange(0x400, dtype=torch.int16).view(torch.float16).view(1, -1)
    want = weight.float() * 2
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode")
    try:
        got = gather_perturb(weight, torch.tensor([0]), want / 2, None)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want.half())


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bits, except that one NaN is as good as another."""
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(torch.int16)[~nan], want.view(torch.int16)[~nan])


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
def test_an_id_out_of_range_is_named(bad: int) -> None:
    ids = torch.tensor([[0, 4], [bad, 1]])
    with pytest.raises(IndexError, match=rf"id {bad} at position 2 .* table of 5 rows"):
        gather_perturb(torch.randn(5, 3), ids, None, None)


def test_a_slot_of_minus_one_moves_bits_and_reads_no_row() -> None:
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    ids, slot = torch.arange(256), torch.full((256,), -1)
    for delta in (torch.full((1, 256), math.nan), torch.zeros(0, 256)):
        got = gather_perturb(weight, ids, delta, slot)
        assert torch.equal(got.view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("bad", [-2, 2, -(2**63)])
def test_a_slot_out_of_range_is_named(bad: int) -> None:
    slot = torch.tensor([0, 1, bad])
    with pytest.raises(IndexError, match=rf"slot {bad} at position 2 .* perturbation of 2 rows"):
        gather_perturb(torch.randn(5, 3), torch.tensor([0, 1, 2]), torch.randn(2, 3), slot)


def test_an_empty_table_has_no_rows() -> None:
    with pytest.raises(IndexError, match="table of 0 rows"):
        gather_perturb(torch.randn(0, 3), torch.tensor([0]), None, None)


def test_nothing_is_written_when_an_id_is_out_of_range() -> None:
    weight = watched(torch.randn(5, 3))
    with pytest.raises(IndexError):
        gather_perturb(weight, torch.tensor([0, 1, 2, 99]), None, None)
    [room] = weight.rooms
    assert untouched(room)
    gather_perturb(weight, torch.tensor([0, 1, 2, 4]), None, None)
    assert guards_stand(weight.rooms[1])


W, IDS, DELTA = torch.zeros(5, 3), torch.tensor([0, 1]), torch.zeros(2, 3)
REFUSED = {
    "weight inner stride": ((torch.zeros(3, 5).T, IDS, None, None), ValueError, "inner stride 1"),
    "weight not a table": ((torch.zeros(5), IDS, None, None), ValueError, r"shape \[V, D\]"),
    "weight dtype": ((W.int(), IDS, None, None), TypeError, "float32, float64, bfloat16, float16"),
    "weight sparse": ((W.to_sparse(), IDS, None, None), TypeError, "no plain memory"),
    "weight device": ((W.to("meta"), IDS.to("meta"), None, None), RuntimeError, "meta"),
    "ids dtype": ((W, IDS.float(), None, None), TypeError, "int64 or int32"),
    "ids device": ((W, IDS.to("meta"), None, None), ValueError, "ids is on meta"),
    "delta dtype": ((W, IDS, DELTA.double(), None), TypeError, "must be torch.float32"),
    "delta double": ((W.double(), IDS, DELTA, None), TypeError, "must be torch.float64"),
    "delta shape": ((W, IDS, torch.zeros(2, 4), None), ValueError, r"shape \(2, 3\)"),
    "delta strides": ((W, IDS, torch.zeros(3, 2).T, None), ValueError, r"delta\.contiguous\(\)"),
    "delta expanded": ((W, IDS, torch.zeros(3).expand(2, 3), None), ValueError, "contiguous"),
    "delta device": ((W, IDS, DELTA.to("meta"), None), ValueError, "delta is on meta"),
    "slot without delta": ((W, IDS, None, IDS), ValueError, "delta is None"),
    "slot dtype": ((W, IDS, DELTA, IDS.int()), TypeError, "int64"),
    "slot shape": ((W, IDS, DELTA, torch.tensor([0])), ValueError, r"has \(1,\)"),
    "slot and delta": ((W, IDS, torch.zeros(2, 3, 1), IDS), ValueError, r"\[R, 3\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_an_address_is_taken(name: str) -> None:
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        gather_perturb(*arguments)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_fake_tensors_have_no_address() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight, ids = torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises((TypeError, RuntimeError)):
        gather_perturb(weight, ids, None, None)


def test_nothing_is_mutated() -> None:
    weight, ids, delta = torch.randn(5, 3), torch.tensor([4, 0]), torch.randn(2, 3)
    before = [t.clone() for t in (weight, ids, delta)]
    gather_perturb(weight, ids, delta, None)
    for now, then in zip((weight, ids, delta), before, strict=True):
        assert torch.equal(now, then)
        assert now._version == 0
