"""A step that fails leaves no trace: bit for bit, everything is what it was, and the next step is as good as new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.frame import Frame
from tests.contracts.faults import PLACES, Trap, check_as_new, prepare
from tests.models import Stateful
from tests.support import assert_unchanged, batch, same_bits, seeded, snapshot

METHODS: dict[str, tuple[int, Callable[..., Any]]] = {
    "fgm-table": (2, lambda model, **o: fastadv.FGM(model, **o)),
    "fgm-sample": (2, lambda model, **o: fastadv.FGM(model, scope="sample", clean_weight=0, **o)),
    "pgd-table": (4, lambda model, **o: fastadv.PGD(model, **o)),
    "pgd-token": (4, lambda model, **o: fastadv.PGD(model, scope="token", clean_weight=0, random_start=True, **o)),
    "fgsm-row": (2, lambda model, **o: fastadv.FGSM(model, scope="row", random_start=True, clean_weight=0, **o)),
    "freeat-sample": (1, lambda model, **o: fastadv.FreeAT(model, **o)),
    "freelb-sample": (3, lambda model, **o: fastadv.FreeLB(model, **o)),
    "freelb-table": (3, lambda model, **o: fastadv.FreeLB(model, scope="table", norm="linf", **o)),
    "pgd-adamw": (4, lambda model, **o: fastadv.PGD(model, scope="token", direction="adamw", clamp="batch", **o)),
    "freelb-rmsprop": (3, lambda model, **o: fastadv.FreeLB(model, scope="row", direction="rmsprop", **o)),
}
PASSES = [(name, index) for name, (count, _) in METHODS.items() for index in range(count)]
EARLIER = ["none", "all", "some"]


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["RuntimeError", "KeyboardInterrupt"]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("method", "index"), PASSES)
def test_a_fault_in_any_pass(method: str, index: int, place: str, error: BaseException, earlier: str) -> None:
    model, data = prepare(earlier)
    make = METHODS[method][1]
    adv = make(model, embedding=model.embed)
    trap = Trap(model, data, index, place, error)
    before = snapshot(model)
    with pytest.raises(type(error)) as caught:
        adv.backward(trap)
    assert caught.value is error
    assert trap.passes == index + 1
    assert_unchanged(model, before)
    assert adv.attacked == 0
    check_as_new(adv, model, data, make)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dropout", ["same", "off"])
@pytest.mark.parametrize("index", range(4))
def test_a_fault_while_dropout_is_held(index: int, dropout: str, place: str) -> None:
    model, data = prepare("some")
    make = METHODS["pgd-table"][1]
    adv = make(model, embedding=model.embed, dropout=dropout)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(Trap(model, data, index, place, RuntimeError("boom")))
    assert_unchanged(model, before)
    check_as_new(adv, model, data, make, dropout=dropout)


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("index", range(2))
def test_a_fault_in_the_callers_backward(index: int, earlier: str) -> None:
    """Gradients have landed by then, and the caller's own code fails."""
    model, data = prepare(earlier)
    calls = []

    def backward(loss: Tensor) -> None:
        loss.backward()
        calls.append(loss)
        if len(calls) == index + 1:
            raise ZeroDivisionError

    adv = fastadv.PGD(model, embedding=model.embed, backward=backward)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)
    assert_unchanged(model, before)


@pytest.mark.parametrize("earlier", EARLIER)
def test_a_fault_in_the_random_start(earlier: str) -> None:
    model, data = prepare(earlier)

    def start(shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
        torch.rand(3)
        raise ZeroDivisionError

    adv = fastadv.PGD(model, embedding=model.embed, random_start=start, scope="sample", clean_weight=0)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)
    assert_unchanged(model, before)


@pytest.mark.parametrize("index", range(4))
def test_a_fault_in_an_attack_closure(index: int) -> None:
    """The second closure is guarded like the first."""
    model, data = prepare("some")
    adv = fastadv.PGD(model, embedding=model.embed, scope="sample")
    passes = []

    def count(sign: int) -> Tensor:
        passes.append(sign)
        if len(passes) == index + 1:
            raise ZeroDivisionError
        return sign * model(data["input_ids"], data["labels"]).loss

    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        adv.backward(lambda: count(1), attack=lambda: count(-1))
    assert_unchanged(model, before)


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_in_a_step_that_is_not_attacked(place: str) -> None:
    model, data = prepare("some")
    adv = fastadv.PGD(model, embedding=model.embed, start_step=1)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(Trap(model, data, 0, place, RuntimeError("boom")))
    assert_unchanged(model, before)
    assert adv.backward(lambda: model(data["input_ids"], data["labels"]).loss).adv_loss is None, (
        "the step was not taken"
    )


def test_faults_of_perturbed() -> None:
    """While the search runs and in the body: the perturbation is gone, and the model is what it was."""
    model, data = prepare("some")
    adv = fastadv.PGD(model, embedding=model.embed, scope="sample")
    model.eval()
    plain = model(data["input_ids"], data["labels"]).logits
    before = snapshot(model)
    for index in range(3):
        with (
            pytest.raises(RuntimeError, match="boom"),
            adv.perturbed(Trap(model, data, index, "after", RuntimeError("boom"))),
        ):
            pytest.fail("the body must not run")
        assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt), adv.perturbed(lambda: model(data["input_ids"], data["labels"]).loss):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[f"parameter {n}"]) for n, p in model.named_parameters())
    assert torch.equal(model(data["input_ids"], data["labels"]).logits, plain)


def test_without_atomic_parameters_hooks_and_generator_are_still_restored() -> None:
    """`atomic=False` gives up the copy of earlier gradients, and nothing else."""
    model, data = prepare("all")
    adv = fastadv.PGD(model, embedding=model.embed, atomic=False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(Trap(model, data, 3, "backward", RuntimeError("boom")))
    for key in [key for key in before if key.startswith("gradient ")]:
        del before[key]
    after = snapshot(model)
    for key, want in before.items():
        assert same_bits(after[key], want) if isinstance(want, Tensor) else after[key] == want, key


def test_the_memory_for_copies_serves_while_gradients_accumulate() -> None:
    model, data = prepare("none")
    adv = fastadv.FGM(model, embedding=model.embed)
    kept = []
    for micro in range(5):
        if micro == 4:
            model.zero_grad()
        adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)
        kept.append(adv._engine.guard._backup)
    assert kept[0] is None and kept[4] is None
    assert kept[1] is not None and kept[1] is kept[2] is kept[3]


class Shares(Stateful):
    """A buffer of twelve elements in one place of memory, as `expand` makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shared", torch.zeros(1, 1, dtype=torch.int64).expand(3, 4))
        self.register_buffer("nothing", None)


class Replaces(Stateful):
    """The forward puts other tensors in the place of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        self.count, self.total = self.count + 1, self.total + 1
        return super().forward(ids, labels)


class Uncounted(Stateful):
    """The forward writes where the version counter does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        output = super().forward(ids, labels)
        self.average.data += output.logits.detach().mean(0)
        return output


class Written(Stateful):
    """Buffers that are no floats, written through `.data` and numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool))

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        self.whole.numpy()[1] += 1
        self.flag.data[0] = ~self.flag.data[0]
        return super().forward(ids, labels)


class Lazy(Stateful):
    """The forward makes what it needs: a buffer, a module, a buffer that was None; and drops one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)
        self.register_buffer("once", torch.zeros(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(2), persistent=False)
            self.cache, self.extra = torch.ones(3), nn.Dropout()
            del self.once
        return super().forward(ids, labels)


class Freezes(Stateful):
    """The forward freezes a parameter, and puts another one in the place of a second."""

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        self.unused.weight.requires_grad_(False)
        self.unused.bias = nn.Parameter(self.unused.bias.detach() + 1)
        return super().forward(ids, labels)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("kind", [Lazy, Freezes])
def test_what_hangs_in_the_model_after_a_first_step_that_failed(kind: type[Stateful], index: int) -> None:
    model, data = seeded(kind, dtype=torch.float32), batch()
    adv = fastadv.PGD(model, embedding=model.embed)
    before, passing = snapshot(model), set(model._non_persistent_buffers_set)
    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(Trap(model, data, index, "after", RuntimeError("boom")))
    assert_unchanged(model, before)
    assert model._non_persistent_buffers_set == passing
    adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)


@pytest.mark.parametrize("index", range(4))
def test_numpys_generator(index: int) -> None:
    """Models mask spans with it."""
    model, data = prepare("none")
    adv = fastadv.PGD(model, embedding=model.embed)
    generator = vars(np.random)  # the one that models draw from, and no other
    before = generator["get_state"]()[1].copy()
    model.head.register_forward_pre_hook(lambda *_: generator["rand"]() and None)
    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(Trap(model, data, index, "after", RuntimeError("boom")))
    assert (generator["get_state"]()[1] == before).all()


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("kind", [Shares, Replaces, Uncounted, Written])
def test_buffers_of_every_kind(kind: type[Stateful], index: int, steps: int) -> None:
    """Also after steps that went well, from which copies may have been kept."""
    model, data = seeded(kind, dtype=torch.float32), batch()
    adv = fastadv.PGD(model, embedding=model.embed)
    for _ in range(steps):
        adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(Trap(model, data, index, "after", RuntimeError("boom")))
    assert_unchanged(model, before)
    assert int(model.calls) == 4 * steps


@pytest.mark.parametrize("place", ["before", "after", "backward"])
@pytest.mark.parametrize("index", range(4))
def test_a_fault_in_a_compiled_model(index: int, place: str) -> None:
    """Probes of a compiled model freeze its parameters: they must thaw."""
    model, data = prepare("some")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    adv = fastadv.PGD(compiled, embedding=model.embed)
    trap = Trap(model, data, index, place, RuntimeError("boom"))
    trap.model = compiled
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(trap, mask=data["attention_mask"])
    assert_unchanged(model, before)
    adv.backward(lambda: compiled(data["input_ids"], data["labels"]).loss, mask=data["attention_mask"])
    assert adv.attacked == 1


@pytest.mark.parametrize("kind", ["pgd", "freeat", "bregman"])
def test_the_methods_own_state_after_a_fault_at_the_very_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the step had never been: counters, what is carried, the teacher and its distance."""
    model, data = prepare("none")
    make = {
        "pgd": lambda: fastadv.PGD(model, embedding=model.embed, every=2),
        "freeat": lambda: fastadv.FreeAT(model, embedding=model.embed, epsilon=0.1),
        "bregman": lambda: fastadv.BregmanProximal(model, method=fastadv.SMART(model, embedding=model.embed)),
    }
    adv = make[kind]()
    overflow = [False]

    def closure() -> Any:
        output = model(data["input_ids"], data["labels"])
        if output.logits.requires_grad:  # the teacher's have none
            output.logits.register_hook(lambda grad: grad * float("nan") if overflow[0] else None)
        return output

    adv.backward(closure)
    overflow[0], skipped = True, int(adv.skipped)
    before = {name: tensor.clone() for name, tensor in adv.state_dict().items()}
    distance = getattr(adv, "distance", None)

    def fails(frame: Frame) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Frame, "end", fails)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                adv.backward(closure)
    after = adv.state_dict()
    assert after.keys() == before.keys()
    for name, want in before.items():
        assert same_bits(after[name], want), name
    assert getattr(adv, "distance", None) is distance
    assert int(adv.skipped) == skipped
