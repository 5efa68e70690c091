"""`gather_perturb`: the op's contract, its gradients, and every backend there is against the eager version."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastadv.ops import segments
from fastadv.ops.gather_perturb import OP, _left_out, gather_perturb, gather_perturb_backward

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
        return gather_perturb(w, ids, d, added=d, padding_idx=padding_idx, fused=fused)

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
    gather_perturb(weight, torch.tensor([1, 4]), delta, added=delta).sum().backward()
    assert weight.grad is None
    assert torch.equal(delta.grad, torch.ones(2, 3))


@pytest.mark.parametrize("ids", [[5], [-1]])
def test_ids_outside_the_table(ids: list[int]) -> None:
    with pytest.raises(IndexError):
        gather_perturb(torch.randn(5, 3), torch.tensor(ids), torch.zeros(1, 3), added=None)


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


def forms(dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """How the added value may be given, for 2 x 4 positions and 3 columns."""
    slot = torch.tensor([[0, -1, 1, 0], [-1, 1, 1, 0]])
    rows, positions = torch.randn(2, 3, dtype=wide(dtype)), torch.randn(2, 4, 3, dtype=wide(dtype))
    return {
        "nothing": {"added": None},
        "positions": {"added": positions},
        "rows": {"added": rows, "slot": slot},
        "ready": {"added": None, "ready": torch.randn(2, 4, 3).to(dtype)},
    }


FORMS = ["nothing", "positions", "rows", "ready"]
WORDS = torch.tensor([[0, 2, 2, 4], [1, 1, 2, 0]])


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_weight_and_leaf_the_gradient_of_the_output(form: str, fused: bool | None) -> None:
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    leaf = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    options = forms(torch.float64)[form]
    out = gather_perturb(weight, WORDS, leaf, fused=fused, **options)
    by, second = torch.randn_like(out), torch.randn_like(out)
    got = torch.autograd.grad(out, (weight, leaf), by, create_graph=False, retain_graph=True)
    want = torch.autograd.grad(F.embedding(WORDS, weight), weight, by)[0]
    assert torch.allclose(got[0], want, rtol=0, atol=1e-14)
    assert torch.equal(got[1], by)
    # Twice: the gradient is linear in what comes in, and that is what is differentiated.
    by.requires_grad_()
    g_weight, g_leaf = torch.autograd.grad(out, (weight, leaf), by, create_graph=True)
    (back,) = torch.autograd.grad((g_leaf * second).sum() + g_weight.sum(), by)
    assert torch.allclose(back, second + 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("form", ["nothing", "positions", "rows"])
def test_gradcheck_of_every_form_that_computes(form: str, fused: bool | None) -> None:
    """The leaf stands for what is added: the derivative is that of W[ids] + leaf."""
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    leaf = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    options = forms(torch.float64)[form]

    def of_weight(w: torch.Tensor) -> torch.Tensor:
        return gather_perturb(w, WORDS, leaf.detach(), fused=fused, **options)

    assert torch.autograd.gradcheck(of_weight, (weight,))
    assert torch.autograd.gradgradcheck(lambda w: of_weight(w).pow(3), (weight,))
    if form == "positions":
        run = lambda w, d: gather_perturb(w, WORDS, d, added=d, fused=fused)  # noqa: E731
        assert torch.autograd.gradcheck(run, (weight, leaf))
        assert torch.autograd.gradgradcheck(lambda w, d: run(w, d).pow(3), (weight, leaf))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leaf_dtype", ["weight's", "wide"])
def test_the_leaf_may_be_one_expanded_number(dtype: torch.dtype, leaf_dtype: str, fused: bool | None) -> None:
    weight = torch.randn(5, 3).to(dtype)
    kind = dtype if leaf_dtype == "weight's" else wide(dtype)
    for form, options in forms(dtype).items():
        leaf = torch.zeros((), dtype=kind).expand(2, 4, 3).detach().requires_grad_()
        out = gather_perturb(weight, WORDS, leaf, fused=fused, **options)
        rows = weight[WORDS].to(wide(dtype))
        if form == "ready":
            want = options["ready"]
        elif form == "rows":
            there = (options["slot"] >= 0).unsqueeze(-1)
            want = torch.where(there, (rows + options["added"][options["slot"]]).to(dtype), weight[WORDS])
        else:
            want = weight[WORDS] if form == "nothing" else (rows + options["added"]).to(dtype)
        assert out.dtype == dtype
        assert torch.equal(out, want)
        (grad,) = torch.autograd.grad(out.float().sum(), leaf)
        assert grad.dtype == kind
        assert torch.equal(grad, torch.ones(2, 4, 3, dtype=kind))


def test_ready_is_passed_on_and_stays_free_of_the_graph() -> None:
    weight, leaf = torch.randn(5, 3, requires_grad=True), torch.zeros(2, 4, 3, requires_grad=True)
    ready = torch.randn(2, 4, 3)
    for _ in range(2):
        out = gather_perturb(weight, WORDS, leaf, added=None, ready=ready)
        assert out.data_ptr() == ready.data_ptr()
        assert out is not ready
        assert out.grad_fn is not None
        assert ready.grad_fn is None
        assert not ready.requires_grad
        out.sum().backward()
        with torch.no_grad():
            ready.add_(1)  # the next step's result, in the same buffer
    assert torch.equal(leaf.grad, torch.full((2, 4, 3), 2.0))


def test_a_buffer_that_is_overwritten_before_the_backward_is_noticed() -> None:
    weight, leaf, ready = torch.randn(5, 3), torch.zeros(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    squared = gather_perturb(weight, WORDS, leaf, added=None, ready=ready).pow(2)
    ready.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_bad_arguments() -> None:
    weight, leaf = torch.randn(5, 3), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="leaf has shape"):
        gather_perturb(weight, WORDS, leaf[:1], added=leaf)
    with pytest.raises(ValueError, match="added is None"):
        gather_perturb(weight, WORDS, leaf, added=None, slot=WORDS)
    for ready in (leaf[:1], leaf.double()):
        with pytest.raises(ValueError, match=r"ready must be torch\.float32"):
            gather_perturb(weight, WORDS, leaf, added=None, ready=ready)
    for fused in (None, False):
        for slot in (WORDS - 2, WORDS):
            with pytest.raises(IndexError):
                gather_perturb(weight, WORDS, leaf, added=torch.zeros(2, 3), slot=slot, fused=fused)
        with pytest.raises(IndexError):
            gather_perturb(weight, WORDS, leaf, added=torch.zeros(0, 3), slot=WORDS * 0, fused=fused)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_backward_adds_to_touched_rows(padding_idx: int | None, dtype: torch.dtype, fused: bool | None) -> None:
    table = torch.randn(7, 3).to(dtype)
    before = table.clone()
    grads = [torch.randn(2, 4, 3).to(dtype), torch.ones((), dtype=wide(dtype)).expand(2, 4, 3)]
    groups = segments(WORDS, 7, mask=WORDS != 1)
    gather_perturb_backward(table, grads, WORDS, groups, padding_idx=padding_idx, fused=fused)
    padding = -1 if padding_idx is None else padding_idx
    total = sum(grad.double() for grad in grads)
    dense = torch.ops.aten.embedding_dense_backward(total, WORDS, 7, padding, False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    assert torch.allclose(table.double(), before.double() + dense, rtol=tolerance, atol=tolerance)
    assert torch.equal(table[[3, 5, 6]], before[[3, 5, 6]])


@pytest.mark.native  # a kernel leaves the word out and tells later
@pytest.mark.parametrize("fused", [None, False])
def test_backward_with_an_id_outside_the_table(fused: bool | None) -> None:
    table = torch.zeros(4, 3)
    with pytest.raises(IndexError):
        gather_perturb_backward(table, [torch.ones(2, 4, 3)], WORDS, segments(WORDS, 5), fused=fused)
    assert not table.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_opcheck(dtype: torch.dtype) -> None:
    ids = torch.tensor([1, 4, 1])
    groups, grad = segments(ids, 5), torch.randn(3, 2).to(dtype)
    arguments = (torch.zeros(5, 2, dtype=dtype), [grad, grad.float()], ids, groups.order, groups.starts, 2)
    torch.library.opcheck(torch.ops.fastadv.gather_perturb_backward.default, arguments)


def test_opcheck_with_slots_that_add_nothing() -> None:
    arguments = (torch.randn(5, 3), torch.tensor([[1, 4]]), torch.randn(2, 3), torch.tensor([[-1, 0]]))
    torch.library.opcheck(torch.ops.fastadv.gather_perturb.default, arguments)


def test_what_a_gpu_left_out_gets_no_gradient() -> None:
    """Torch's backward skips the padding, and on a GPU it checks nothing else."""
    ids, grad = torch.tensor([1, -1, 2, 7, 5]), torch.ones(5, 2)
    for padding, want in ((-1, [0, 1, 1, 0, 0]), (2, [0, 1, 0, 0, 0])):
        rows = _left_out(ids, 5, padding)
        assert rows.tolist() == [1, padding, 2, padding, padding]
        found = torch.ops.aten.embedding_dense_backward(grad, rows, 5, padding, False)
        assert found[:, 0].tolist() == want
