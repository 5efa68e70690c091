"""C++ and Python read the same table of an op's tensors, and must give the same answer for every one of them.

C++ says yes or no, and its yes is what an address is used on; Python says why not. After a good call as before any.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv import native, ops
from fastadv.arguments import signatures
from fastadv.arguments.moments import Moments
from fastadv.arguments.rule import Rule
from fastadv.arguments.signature import Signature
from fastadv.arguments.tensors import DTYPES
from fastadv.native import ascend, divergence, gather_perturb, moment_step, rows, segment_sum, table_step
from fastadv.native.launch import Launch, compiled, fitted

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}"),
]

RULE = Rule(0.3, 0.5, "l2", "l2", 0)
BY_MOMENTS = RULE._replace(direction="adamw")
MOMENTS = Moments.of(BY_MOMENTS, 2)
IDS, COUNT = torch.tensor([[3, 1, 3, 0], [1, 1, 4, 3]]), torch.zeros((), dtype=torch.int64)
GROUPS = ops.segments(IDS, 5, fused=False).trimmed()
W, R, POSITIONS = torch.zeros(5, 6), torch.zeros(4, 6), torch.zeros(2, 4, 6)
STEP = (POSITIONS, POSITIONS + 1, torch.ones(2, 4, dtype=torch.bool), COUNT, torch.tensor([0, 3, 8]))
SOME = torch.tensor([0, 2])
# What a launcher calls, with tensors that are good, and what else it is given.
GOOD: dict[str, tuple[Launch, tuple[Any, ...], tuple[Any, ...]]] = {
    "ascend": (ascend._RUN[signatures.ASCEND], STEP, (RULE,)),
    "ascend by position": (
        ascend._RUN[signatures.ASCEND_BY_POSITION], (*STEP, W, IDS, torch.zeros(2, 4, 6)), (RULE,),
    ),
    "ascend by slot": (
        ascend._RUN[signatures.ASCEND_BY_SLOT],
        (R, R + 1, torch.ones(4, dtype=torch.bool), COUNT, torch.tensor([0, 1, 4]), W, IDS, torch.zeros(2, 4, 6),
         GROUPS.slot.view(2, 4)),
        (RULE,),
    ),
    "moment_step": (
        moment_step._RUN[signatures.MOMENT_STEP], (*STEP, torch.zeros(2, 2, 4, 6)), (BY_MOMENTS, MOMENTS),
    ),
    "moment_step by position": (
        moment_step._RUN[signatures.MOMENT_STEP_BY_POSITION],
        (*STEP, W, IDS, torch.zeros(2, 4, 6), torch.zeros(2, 2, 4, 6)),
        (BY_MOMENTS, MOMENTS),
    ),
    "moment_step by slot": (
        moment_step._RUN[signatures.MOMENT_STEP_BY_SLOT],
        (R, R + 1, torch.ones(4, dtype=torch.bool), COUNT, torch.tensor([0, 1, 4]), W, IDS, torch.zeros(2, 4, 6),
         GROUPS.slot.view(2, 4), torch.zeros(2, 4, 6)),
        (BY_MOMENTS, MOMENTS),
    ),
    "table_step": (
        table_step._RUN, (R, R.clone(), COUNT, W, IDS, torch.zeros(2, 4, 6), torch.ones(8, 6), *GROUPS), (RULE,),
    ),
    "gather": (gather_perturb._RUN[signatures.GATHER], (W, IDS), ()),
    "gather by position": (gather_perturb._RUN[signatures.GATHER_BY_POSITION], (W, IDS, POSITIONS), ()),
    "gather by slot": (gather_perturb._RUN[signatures.GATHER_BY_SLOT], (W, IDS, R, GROUPS.slot.view(2, 4)), ()),
    "gather backward": (
        gather_perturb._BACKWARD,
        (W, IDS.flatten(), GROUPS.order, GROUPS.starts, torch.ones(8, 6), torch.ones(1, 6).expand(8, 6)),
        (-1,),
    ),
    "segments": (segment_sum._SEGMENTS, (IDS.flatten(), torch.ones(8, dtype=torch.bool)), (5,)),
    "segment_sum": (segment_sum._SUM, (torch.ones(8, 6), GROUPS.order, GROUPS.stops, GROUPS.starts), ()),
    "divergence": (divergence._RUN, (torch.ones(3, 5), torch.zeros(3, 5), torch.ones(3)), (0, True, True)),
    "touched": (rows._TOUCHED, (W,), ()),
    "back up": (rows._BACK_UP, (W, SOME), (None,)),
    "restore": (rows._RESTORE, (W, W + 1), (None,)),
    "restore some": (rows._RESTORE_SOME, (W, SOME, torch.ones(2, 6)), (None,)),
    "step": (rows._STEP, (W, W + 1, COUNT, W.clone()), (RULE, None)),
    "step some": (rows._STEP_SOME, (W, W + 1, COUNT, SOME, torch.zeros(2, 6)), (RULE, None)),
}  # fmt: skip


class Wrapper(Tensor):
    """A tensor without memory of its own, as a sharded one is."""

    @classmethod
    def of(cls, inner: Tensor) -> Any:
        kind = {"dtype": inner.dtype, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), **kind)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called on a tensor that is only looked at")


def apart(tensor: Tensor) -> Tensor:
    """The same numbers, each beside another one."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


BROKEN: dict[str, Callable[[Tensor], Any]] = {
    **{str(dtype): lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in DTYPES},
    "complex": lambda tensor: tensor.to(torch.complex64),
    "one more": lambda tensor: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor.view(1),
    "one less": lambda tensor: tensor[1:] if tensor.dim() else tensor.expand(2),
    "another dimension": lambda tensor: tensor.unsqueeze(0),
    "flat": lambda tensor: tensor.reshape(-1),
    "empty": lambda tensor: tensor.new_empty((0, *tensor.shape[1:])),
    "elements apart": apart,
    "rows apart": lambda tensor: torch.cat([tensor, tensor], dim=-1).narrow(-1, 0, tensor.shape[-1]),
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape) if tensor.dim() else tensor,
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse() if tensor.dim() else tensor.view(1).to_sparse(),
    "negated": torch._neg_view,
    "sharded": Wrapper.of,
    "None": lambda tensor: None,
}  # fmt: skip


@pytest.fixture(params=[True, False], ids=["exchange", "attributes"])
def reader(request: pytest.FixtureRequest) -> Iterator[None]:
    """How C++ reads a tensor: the second is for a torch that has no exchange."""
    native.extension().connect(torch.Tensor, list(DTYPES), request.param)
    yield
    native.extension().connect(torch.Tensor, list(DTYPES), True)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


def agree(signature: Signature, tensors: tuple[Any, ...]) -> Any:
    """Asks both; returns what Python has to say."""
    yes, found = compiled(signature).takes(tensors), outcome(lambda: signature.fitted(tensors))
    refused = isinstance(found[0], type)
    if yes:
        assert not refused, found
        assert all(one is other for one, other in zip(found, tensors, strict=True))
    elif not refused:  # a copy has been made
        assert any(one is not other for one, other in zip(found, tensors, strict=True))
        assert compiled(signature).takes(found)
    return found


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("name", GOOD)
def test_a_good_call_and_then_each_argument_broken(name: str) -> None:
    launch, good, numbers = GOOD[name]
    assert agree(launch.signature, good) == good
    launch(tuple(tensor.clone() for tensor in good), *numbers)
    for place, how in ((place, how) for place in range(len(good)) for how in BROKEN):
        tensors = [tensor.clone() for tensor in good]
        try:
            tensors[place] = BROKEN[how](tensors[place])
        except (RuntimeError, IndexError):
            continue  # torch has no such tensor
        before = [None if tensor is None else tensor._version for tensor in tensors]
        found = agree(launch.signature, tuple(tensors))
        if isinstance(found[0], type) and tensors[0] is not None:
            error, message = outcome(lambda given=tensors: launch(tuple(given), *numbers))
            on_the_cpu_alone = place == 0 and how == "meta"
            assert (error, message) == found or (on_the_cpu_alone and error is RuntimeError), (place, how, message)
            assert [None if tensor is None else tensor._version for tensor in tensors] == before
    launch(tuple(tensor.clone() for tensor in good), *numbers)


SIGNATURES = {f"{i} {found.op}": found for i, found in enumerate(launch.signature for launch, _, _ in GOOD.values())}


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Signature, tuple[Any, ...]]:
    """Tensors of a signature's shapes, most of them good; then some are replaced by others."""
    signature = SIGNATURES[draw(st.sampled_from(list(SIGNATURES)))]
    chance = random.Random(draw(st.integers(0, 2**31)))
    size, many = {}, {}
    for symbol in "DVRNSCK":
        size[symbol] = chance.choice([0, 1, 2, 3])
    for symbol in "PI":
        many[symbol] = tuple(chance.choice([1, 2, 3]) for _ in range(chance.choice([0, 1, 2])))
    dtypes: dict[str, torch.dtype] = {}
    tensors = []
    for argument in signature.arguments:
        shape: list[int] = []
        for kind, symbol in argument.shape:
            product = torch.Size(many.get(symbol, ())).numel()
            shape += {"": [size.get(symbol, 1)], "*": list(many.get(symbol, ())), "#": [product],
                      "+1": [size.get(symbol, 1) + 1], ">=": [size.get(symbol, 1)]}[kind]  # fmt: skip
        dtype = {"int64": torch.int64, "index": torch.int64, "bool": torch.bool, "mask": torch.bool}.get(argument.dtype)
        dtype = dtype or dtypes.get(argument.of) or chance.choice(DTYPES[:2])
        dtypes[argument.name] = dtype
        tensors.append(torch.zeros(shape, dtype=dtype))
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        place, how = chance.randrange(len(tensors)), chance.choice(list(BROKEN))
        if type(tensors[place]) is Tensor:
            try:
                tensors[place] = BROKEN[how](tensors[place])
            except (RuntimeError, IndexError):
                continue
    return signature, tuple(tensors)


@settings(max_examples=1500)
@given(drawn())
def test_both_readers_agree_on_anything(case: tuple[Signature, tuple[Any, ...]]) -> None:
    agree(*case)


@pytest.mark.usefixtures("reader")
def test_what_is_not_a_tensor() -> None:
    for wrong in (3, "table", [1.0], object()):
        assert not compiled(signatures.ROWS_TOUCHED).takes((wrong,))
    for tensors in ((), (W, W)):
        assert not compiled(signatures.ROWS_TOUCHED).takes(tensors)
        with pytest.raises(TypeError, match=r"rows_touched: \d tensors for 1 arguments"):
            signatures.ROWS_TOUCHED.fitted(tensors)


@pytest.mark.usefixtures("reader")
def test_kernels_are_checked_by_the_same_table() -> None:
    weight, ids = torch.zeros(5, 3), torch.tensor([0, 1])
    assert fitted(signatures.GATHER, (weight, ids)) == (weight, ids)
    copied = fitted(signatures.GATHER, (weight, ids.int()))
    assert copied[0] is weight
    assert copied[1].dtype == torch.int64
    with pytest.raises(ValueError, match=r"ids is on meta"):
        fitted(signatures.GATHER, (weight, ids.to("meta")))


def test_good_and_bad_calls_in_turns() -> None:
    """Through the public functions: what was refused stays refused, and what is good stays good."""
    delta, grad, count = torch.zeros(2, 4, 6), torch.ones(2, 4, 6), torch.tensor(0)
    embedded, rule = torch.zeros(2, 4, 6), RULE._replace(group=1)._asdict()
    good = {"grad": grad, "skipped": count, "weight": torch.randn(5, 6), "ids": IDS, "embedded": embedded, **rule}
    bad: dict[str, tuple[Any, type[Exception], str]] = {
        "grad": (grad.double(), TypeError, "does not go with"),
        "skipped": (count.int(), TypeError, "int64"),
        "weight": (torch.zeros(5, 6).double(), TypeError, "does not go with"),
        "ids": (IDS + 3, IndexError, "id 6 at position 0"),
        "embedded": (embedded.mT, ValueError, "embedded must have shape"),
        "direction": ("l1", ValueError, "direction must be one of"),
        "ball": ("l1", ValueError, "ball must be one of"),
        "group": (3, ValueError, "group must be from 0 to 2"),
        "step_size": ("much", TypeError, "step_size must be a number"),
        "epsilon": ("far", TypeError, "epsilon must be a number"),
    }
    for _ in range(2):
        for name, (value, error, message) in bad.items():
            before, version = delta.clone(), delta._version
            with pytest.raises(error, match=message):
                ops.ascend(delta, **{**good, name: value})
            assert torch.equal(delta, before)
            assert delta._version == version
            ops.ascend(delta, **good)
            assert delta._version == version + 1
    want = embedded.clone()
    ops.ascend(delta, **{**good, "step_size": 0, "ids": IDS.int()})
    assert torch.allclose(embedded, want)
