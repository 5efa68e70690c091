"""`gather_perturb`: the op's contract, its gradients, and every backend there is against the eager version."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastadv.ops.gather_perturb import OP, gather_perturb

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 3), (5,), (), (0, 3), (2, 1, 3)]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fused", [None, False])
def test_adds_in_the_wide_dtype_and_rounds_once(shape: tuple[int, ...], dtype: torch.dtype, fused: bool | None) -> None:
    weight, ids = torch.randn(11, 17).to(dtype), torch.randint(0, 11, shape)
    delta = torch.randn((*shape, 17), dtype=wide(dtype))
    run = OP.choose("cpu", fused)
    assert torch.equal(run(weight, ids, delta, None), (weight[ids].to(delta.dtype) + delta).to(dtype))
    rows, slot = torch.randn(4, 17, dtype=wide(dtype)), torch.randint(0, 4, shape)
    assert torch.equal(run(weight, ids, rows, slot), (weight[ids].to(delta.dtype) + rows[slot]).to(dtype))
    assert torch.equal(run(weight, ids, None, None), weight[ids])


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradients_once_and_twice(padding_idx: int | None, fused: bool | None) -> None:
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 2, 2, 4], [1, 1, 2, 0]])

    def run(w: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return gather_perturb(w, ids, d, padding_idx=padding_idx, fused=fused)

    if padding_idx is None:  # with one, the weight's gradient is not the derivative, by definition
        assert torch.autograd.gradcheck(run, (weight, delta))
        assert torch.autograd.gradgradcheck(lambda w, d: run(w, d).pow(3), (weight, delta))
    got = torch.autograd.grad(run(weight, delta).pow(2).sum(), (weight, delta))
    want = torch.autograd.grad(
        (F.embedding(ids, weight, padding_idx=padding_idx) + delta).pow(2).sum(), (weight, delta)
    )
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(got, want, strict=True))


def test_frozen_weight_gets_no_gradient() -> None:
    weight, delta = torch.randn(5, 3), torch.zeros(2, 3, requires_grad=True)
    gather_perturb(weight, torch.tensor([1, 4]), delta).sum().backward()
    assert weight.grad is None
    assert torch.equal(delta.grad, torch.ones(2, 3))


@pytest.mark.parametrize("ids", [[5], [-1]])
def test_ids_outside_the_table(ids: list[int]) -> None:
    with pytest.raises(IndexError):
        gather_perturb(torch.randn(5, 3), torch.tensor(ids), torch.zeros(1, 3))


@pytest.mark.parametrize("with_slot", [False, True])
def test_opcheck(with_slot: bool) -> None:
    weight, ids = torch.randn(5, 3), torch.tensor([[1, 4]])
    delta, slot = (torch.randn(2, 3), torch.tensor([[1, 0]])) if with_slot else (torch.randn(1, 2, 3), None)
    torch.library.opcheck(torch.ops.fastadv.gather_perturb.default, (weight, ids, delta, slot))


def test_traces_into_one_graph() -> None:
    weight, ids, delta = torch.randn(5, 3), torch.tensor([[1, 4]]), torch.randn(1, 2, 3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(w: torch.Tensor, i: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastadv.gather_perturb(w, i, d, None) * 2

    assert torch.equal(run(weight, ids, delta), (weight[ids] + delta) * 2)
