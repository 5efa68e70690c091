"""`grads`: the ops' contract, the plan that notices what has changed, and the backup of a model's gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv.ops.grads import ACCUMULATE, AVERAGE, COPY, Backup, Plan
from tests.support import same_bits

FUSED = [None, False]
OPS: dict[str, tuple[Any, tuple[float, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "copy": (COPY, (), lambda a, b: b),
    "accumulate": (ACCUMULATE, (0.25,), lambda a, b: a + 0.25 * b),
    "average": (AVERAGE, (0.75,), lambda a, b: 0.75 * a + 0.25 * b),
}


def pair(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    into = [torch.randn(3, 5).to(dtype), torch.randn(7).to(dtype), torch.zeros(0, dtype=dtype)]
    return into, [torch.randn_like(tensor) for tensor in into]


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_computes_wide_and_rounds_once(name: str, dtype: torch.dtype, fused: bool | None) -> None:
    op, numbers, formula = OPS[name]
    into, sources = pair(dtype)
    want = [formula(a.double(), b.double()).to(dtype) for a, b in zip(into, sources, strict=True)]
    op.choose("cpu", fused)(into, sources, *numbers)
    for got, exact in zip(into, want, strict=True):
        assert ((got.double() - exact.double()).abs() <= torch.finfo(dtype).eps * (exact.double().abs() + 0.5)).all()


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    op, numbers, _ = OPS[name]
    into, sources = pair(torch.float32)
    torch.library.opcheck(getattr(torch.ops.fastadv, op.name).default, (into, sources, *numbers))


@pytest.mark.parametrize("fused", FUSED)
def test_a_plan_does_what_the_ops_do(fused: bool | None) -> None:
    for name, (op, numbers, _) in OPS.items():
        into, sources = pair()
        want = [tensor.clone() for tensor in into]
        plan = Plan(into, sources, fused)
        for _ in range(3):
            versions = [tensor._version for tensor in into]
            getattr(plan, name)(*numbers)
            op.eager(want, sources, *numbers)
            assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(into, want, strict=True))
            assert all(tensor._version > v for tensor, v in zip(into, versions, strict=True))


@pytest.mark.parametrize("fused", FUSED)
def test_a_plan_notices_what_has_changed(fused: bool | None) -> None:
    into, sources = [torch.zeros(4), torch.zeros(2, 2)], [torch.ones(4), torch.ones(2, 2)]
    plan = Plan(into, sources, fused)
    plan.copy()
    sources[0].data = torch.full((4,), 2.0)  # moved
    plan.copy()
    assert into[0].tolist() == [2.0] * 4
    for one, other in zip(into, sources, strict=True):  # another dtype
        one.data, other.data = one.data.bfloat16(), (3 * torch.ones_like(other)).bfloat16()
    plan.copy()
    assert into[1].tolist() == [[3.0, 3.0]] * 2
    into[0].resize_(2), sources[0].resize_(2)  # smaller
    into[1].data, sources[1].data = torch.zeros(4, 4).T[:2], torch.ones(4, 4)[:2]  # strided
    plan.copy()
    assert into[1].eq(1).all()
    sources[0].resize_(3)
    with pytest.raises(ValueError, match="one shape"):
        plan.copy()
    sources[0].data = torch.ones(2).double()
    with pytest.raises(TypeError, match="one dtype"):
        plan.copy()
    with pytest.raises(ValueError, match="taken in pairs"):
        plan.rebind(into, sources[:1])


def model() -> nn.Module:
    parts = [nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(2, 2).bfloat16(), nn.Linear(5, 1)]
    return nn.ModuleList(parts)


def fill(parameters: list[nn.Parameter]) -> None:
    """A gradient for all but the last layer: one is transposed, one sparse, one holds odd bits."""
    for p in parameters[:-2]:
        p.grad = torch.randn(p.shape).to(p.dtype)
    parameters[0].grad = torch.randn(3, 4).T
    parameters[1].grad = torch.tensor([0.0, -0.0, float("nan"), float("inf")])


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("how", ["kept", "zeroed", "dropped", "others"])
def test_a_backup_puts_back_every_bit(how: str, fused: bool | None) -> None:
    net = model()
    parameters = list(net.parameters())
    backup = Backup(net.parameters(), fused)
    for _ in range(3):
        net.zero_grad()
        fill(parameters)
        copies = [None if p.grad is None else p.grad.clone() for p in parameters]
        backup.save()
        if how == "dropped":
            net.zero_grad(set_to_none=True)
        if how == "zeroed":
            net.zero_grad(set_to_none=False)
        if how == "others":
            for p in parameters:
                p.grad = torch.ones_like(p)
        places = [None if p.grad is None else (p.grad, p.grad.data_ptr(), p.grad._version) for p in parameters]
        backup.restore()
        for p, copy, place in zip(parameters, copies, places, strict=True):
            if copy is None:
                assert p.grad is None
                continue
            assert p.grad is not None
            assert same_bits(p.grad, copy)
            if place is not None:
                assert p.grad is place[0]
                assert p.grad.data_ptr() == place[1]
                assert p.grad._version > place[2]


def test_restored_gradients_are_no_part_of_the_backup() -> None:
    layer = nn.Linear(2, 1)
    backup = Backup(list(layer.parameters()))
    layer.weight.grad = torch.ones(1, 2)
    backup.save()
    for _ in range(2):
        layer.weight.grad = None
        backup.restore()
        assert layer.weight.grad.tolist() == [[1.0, 1.0]]
        layer.weight.grad.add_(1)


def test_sparse_gradients() -> None:
    words = nn.Embedding(6, 2, sparse=True)
    backup = Backup(list(words.parameters()))
    for ids in ([1, 2], [3], [0, 0, 5]):
        words.zero_grad()
        words(torch.tensor(ids)).sum().backward()
        want = words.weight.grad.to_dense().clone()
        backup.save()
        words.weight.grad = None
        words(torch.tensor([4])).sum().backward()
        backup.restore()
        assert torch.equal(words.weight.grad.to_dense(), want)


def test_memory_serves_again_and_gradients_are_not_held() -> None:
    layer = nn.Linear(4, 4)
    backup = Backup(list(layer.parameters()))
    layer(torch.ones(4)).sum().backward()
    backup.save()
    room = backup._copies[0]
    held = weakref.ref(layer.weight.grad)
    layer.zero_grad()
    gc.collect()
    assert held() is None
    layer(torch.ones(4)).sum().backward()
    backup.save()
    assert backup._copies[0] is room


def test_restore_needs_a_save() -> None:
    with pytest.raises(RuntimeError, match="without save"):
        Backup([nn.Parameter(torch.zeros(1))]).restore()


@pytest.mark.parametrize("freed", [0, 1])
@pytest.mark.parametrize("fused", [None, False])
def test_a_tensor_without_its_memory_is_refused(fused: bool | None, freed: int) -> None:
    """PyTorch's own ops read it all the same, and the process ends."""
    pair = [torch.ones(3), torch.ones(3)]
    pair[freed].untyped_storage().resize_(0)
    for call in ("copy", "accumulate", "average"):
        with pytest.raises(ValueError, match="has been freed"):
            getattr(Plan([pair[0]], [pair[1]], fused), call)(*([] if call == "copy" else [0.5]))
