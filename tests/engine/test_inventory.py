"""The guard's lists: kept from step to step as long as nothing in the model is another, and no longer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.safety import inventory as inventory_module
from fastadv.engine.safety.inventory import Inventory
from tests.contracts.faults import Trap, prepare
from tests.models import Stateful


@pytest.fixture(params=["C++", "Python"], autouse=True)
def compared_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python":
        monkeypatch.setattr(inventory_module, "_in_cpp", lambda: None)
    elif inventory_module._in_cpp() is None:
        pytest.skip("the C++ extension is not built")


class Halves(nn.Module):
    """Several kinds of parts: nested modules, a shared one, an empty one, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2, bias=False))
        self.again = self.layers[0]
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("nothing", None)


def replace_a_module(model: Halves) -> None:
    model.layers[1] = nn.Identity()


def add_a_module(model: Halves) -> None:
    model.layers[1].inner = nn.Linear(1, 1)


def remove_a_module(model: Halves) -> None:
    del model.layers[1]  # Sequential makes a new dictionary


def replace_a_parameter(model: Halves) -> None:
    model.scale = nn.Parameter(torch.ones(1))  # of the same value


def add_a_parameter(model: Halves) -> None:
    model.layers[1].bias = nn.Parameter(torch.ones(1))


def behind_the_modules_back(model: Halves) -> None:
    model.layers[2]._parameters["weight"] = nn.Parameter(model.layers[2].weight.detach())


def remove_a_parameter(model: Halves) -> None:
    model.layers[0].bias = None


def replace_a_buffer(model: Halves) -> None:
    model.register_buffer("count", torch.zeros(1))


def rename_a_buffer(model: Halves) -> None:
    model._buffers = {"number": model._buffers["count"], "nothing": None}


def fill_a_buffer(model: Halves) -> None:
    model.nothing = torch.zeros(2)


CHANGES = [
    replace_a_module, add_a_module, remove_a_module, replace_a_parameter, add_a_parameter, behind_the_modules_back,
    remove_a_parameter, replace_a_buffer, rename_a_buffer, fill_a_buffer,
]  # fmt: skip


def listed(inventory: Inventory) -> list[list[object]]:
    """Identities, with names of buffers."""
    buffers = [(id(module), name, id(buffer)) for module, name, buffer in inventory.buffers]
    return [list(map(id, inventory.modules)), list(map(id, inventory.parameters)), buffers]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_noticed(change: Callable[[Halves], None]) -> None:
    model = Halves()
    inventory = Inventory(model)
    inventory.look()
    before = listed(inventory)
    change(model)
    inventory.look()
    fresh = Inventory(model)
    fresh.look()
    assert listed(inventory) == listed(fresh) != before
    assert [id(p) for p in dict.fromkeys(inventory.parameters)] == [id(p) for p in model.parameters()]
    assert [id(m) for m in inventory.modules] == [id(m) for m in model.modules()]


def test_without_a_change_nothing_is_listed_again() -> None:
    model = Halves()
    inventory = Inventory(model)
    inventory.look()
    modules, parameters, buffers = inventory.modules, inventory.parameters, inventory.buffers
    model.scale.data, model.scale.grad = torch.zeros(1), torch.ones(1)
    model.eval()
    inventory.look()
    assert inventory.modules is modules and inventory.parameters is parameters and inventory.buffers is buffers


def test_a_new_buffer_does_not_walk_the_model() -> None:
    """Some forwards put a new tensor in the place of a buffer in every pass."""
    model = Halves()
    inventory = Inventory(model)
    inventory.look()
    modules, before = inventory.modules, inventory.buffers
    model.count = model.count + 1
    inventory.look()
    assert inventory.modules is modules and inventory.buffers is not before
    assert inventory.buffers[0][2] is model.count


def test_who_holds_the_lists_keeps_them() -> None:
    model = Halves()
    inventory = Inventory(model)
    inventory.look()
    modules = inventory.modules
    count = len(modules)
    add_a_module(model)
    inventory.look()
    assert len(modules) == count == len(inventory.modules) - 1


class Property(nn.Module):
    """A module that keeps its mode elsewhere, as a compiled one does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    @property
    def training(self) -> bool:
        return self._modules["inner"].training if "_modules" in vars(self) and self._modules else True

    @training.setter
    def training(self, mode: bool) -> None: ...


@pytest.mark.parametrize("build", [Halves, Property, lambda: torch.jit.script(nn.Sequential(nn.Linear(1, 1)))])
def test_modes(build: Callable[[], nn.Module]) -> None:
    model = build()
    inventory = Inventory(model)
    inventory.look()
    for mode in (True, False):
        model.train(mode)
        assert inventory.modes() == [mode] * len(inventory.modules)


@pytest.mark.parametrize("index", range(4))
def test_a_fault_after_the_model_has_changed(index: int) -> None:
    """Whatever hangs in the model by then is put back, and not what hung there before."""
    model, data = prepare("some")
    adv = fastadv.PGD(model, embedding=model.embed)
    adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)
    change(model)
    expected = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    buffer = model.late

    class Moves(Trap):
        def __call__(self) -> Tensor:
            model.late, model.head.extra.training = torch.ones(2), False
            return super().__call__()

    with pytest.raises(RuntimeError, match="boom"):
        adv.backward(Moves(model, data, index, "after", RuntimeError("boom")))
    assert model.late is buffer and model.late.eq(0).all()
    assert [module.training for module in model.modules()] == modes
    for name, p in model.named_parameters():
        grad = expected[name]
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad)), name


def change(model: Stateful) -> None:
    """A parameter, a module and a buffer that the steps so far have not seen."""
    head = model.head
    head.weight = nn.Parameter(head.weight.detach().clone())
    head.extra = nn.Dropout()
    model.register_buffer("late", torch.zeros(2))
