"""What each of two gloo processes runs where a model is sharded: late, by FSDP1, and with less communication."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastadv
from tests.distributed import workers
from tests.models import TinyModel
from tests.support import gradients

GATHER, SCATTER, REDUCE = "_allgather_base_", "_reduce_scatter_base_", "allreduce_coalesced_"
UNITS = ("bert.embeddings", "bert.ff1", "bert", "")
CHOICES = ("each", "last", "keep")
COUNTED = ("fgm-sample", "pgd-sample", "freelb-sample", "pgd-last", "yopo-sample", "smart", "vat", "neftune")
COMPILED = ("pgd-sample", "pgd-last")
FLAT = ("pgd-sample", "fgm-table", "pgd-table", "pgd-last", "freelb-sample", "yopo-sample", "smart", "vat", "neftune")
LATE = ("fgm-table", "pgd-sample", "yopo-table")
MICRO = ("pgd-sample", "pgd-last", "smart")
REFUSED: dict[str, Callable[[nn.Module], fastadv.Method]] = {
    "awp": fastadv.AWP,
    "bregman": fastadv.BregmanProximal,
    "tied": lambda model: fastadv.PGD(model, embedding="word_embeddings", scope="table", tied="both"),
    "relative": lambda model: fastadv.PGD(model, embedding="word_embeddings", relative=True),
    "llr": lambda model: fastadv.LLR(model, embedding="word_embeddings", epsilon=0.1),
}
Found = dict[str, Tensor]


class Collectives(TorchDispatchMode):
    """Counts those that begin inside, by the name of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))

    def found(self) -> Found:
        return {name: torch.tensor(self.counts[name]) for name in (GATHER, SCATTER)}


def made(name: str, model: nn.Module, **options: Any) -> fastadv.Method:
    make, given = workers.METHODS[name]
    return make(model, embedding="word_embeddings", **given, **options)


# FSDP2


def units(
    model: nn.Module, shape: tuple[int, ...] = (workers.WORLD,), *, compiled: bool = False, anew: bool | None = True
) -> nn.Module:
    """Four, each gathered anew for its backward; on a mesh of two dimensions FSDP2 replicates over the first.

    Where `anew` is None, FSDP2 finds out in the first forward which is the root, and keeps that gathered.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard") if len(shape) > 1 else None
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for unit in UNITS:
        part = model.get_submodule(unit)
        if compiled and unit == "bert.ff1":
            part.compile(backend="aot_eager")
        fully_shard(part, mesh=mesh, reshard_after_forward=anew)
    return model


def whole_gradients(model: nn.Module) -> Found:
    return {name: workers.whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def plain(rank: int) -> Found:
    """The collectives of plain training."""
    model = units(workers.build())
    model(**workers.half(rank)).loss.backward()
    with Collectives() as counted:
        model(**workers.half(rank)).loss.backward()
    return counted.found()


def communicated(rank: int, name: str, communication: str, shape: tuple[int, ...]) -> Found:
    """Two steps, the collectives of the second; weights and switches are then what they were."""
    model = units(workers.build(), shape)
    adv = made(name, model, communication=communication)
    workers.step(adv, model, workers.half(rank))
    model.zero_grad()
    before, weights = switches(model), {key: workers.whole(p).clone() for key, p in model.named_parameters()}
    with Collectives() as counted:
        workers.step(adv, model, workers.half(rank))
    assert switches(model) == before
    for key, p in model.named_parameters():
        assert torch.equal(workers.whole(p), weights[key]), key
    return {**whole_gradients(model), **counted.found()}


def switches(model: nn.Module) -> list[Any]:
    """What FSDP2 is told to do after a forward and a backward, and that nothing is gathered or left to reduce."""
    groups = [part._get_fsdp_state()._fsdp_param_group for part in map(model.get_submodule, UNITS)]  # type: ignore[operator]
    assert all(group.is_sharded for group in groups)
    for parameter in (parameter for group in groups for parameter in group.fsdp_params):
        assert parameter.unsharded_accumulated_grad is None and parameter._unsharded_param.grad is None
    return [(g.reduce_grads, g.all_reduce_grads, g.reshard_after_backward, g.post_forward_mesh_info) for g in groups]


def held(rank: int, communication: str) -> Found:
    """Between the passes of a step: how many elements of weights, and of gradients, each process has beside its shards.

    A whole model's count is `all`.
    """
    model, data = units(workers.build()), workers.half(rank)
    adv, seen = made("pgd-sample", model, communication=communication), []

    def closure() -> Tensor:
        groups = [part._get_fsdp_state()._fsdp_param_group for part in map(model.get_submodule, UNITS)]  # type: ignore[operator]
        known = [one for group in groups for one in group.fsdp_params if hasattr(one, "_unsharded_param")]
        weights = sum(one._unsharded_param.untyped_storage().size() // one._unsharded_param.itemsize for one in known)
        gradients = [one._unsharded_param.grad for one in known if one._unsharded_param.grad is not None]
        seen.append((weights, sum(gradient.numel() for gradient in gradients)))
        return model(**data).loss

    adv.backward(closure, data["attention_mask"])
    count = sum(p.numel() for p in model.parameters())
    return {"all": torch.tensor(count), "between": torch.tensor(seen[1:])}


def rooted(rank: int, communication: str) -> Found:
    """Which units plain training would keep gathered for a backward, after a first step of each kind."""
    model = units(workers.build(), anew=None)
    data = workers.half(rank)
    if communication == "plain":
        model(**data).loss.backward()
    else:
        workers.step(made("pgd-sample", model, communication=communication), model, data)
    return {"kept": torch.tensor([mesh is None for *_, mesh in switches(model)])}


def trained(rank: int, communication: str) -> Found:
    """Three optimizer steps of two micro-batches each, of which the first reduces nothing; gathered weights are new."""
    model = units(workers.build())
    adv = made("pgd-sample", model, communication=communication)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number in range(3):
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)  # type: ignore[operator]
            workers.step(adv, model, workers.half(rank, 2 * number + micro))
        optimizer.step()
        optimizer.zero_grad()
    return {name: workers.whole(p.detach()) for name, p in model.named_parameters()}


def compiled(rank: int, name: str, communication: str) -> Found:
    """One unit's forward is a graph of its own, whose parameters are frozen in probes."""
    torch._dynamo.reset()
    model = units(workers.build(), compiled=True)
    adv = made(name, model, communication=communication)
    workers.step(adv, model, workers.half(rank))
    return whole_gradients(model)


def failed(rank: int, communication: str, index: int, place: str) -> Found:
    """Every process fails in pass `index`, before the forward or in the midst of it; the next step is right."""
    model, data = units(workers.build()), workers.half(rank)
    adv, passes = made("pgd-sample", model, communication=communication), []
    workers.step(adv, model, data)
    model.zero_grad()
    before = switches(model)

    def now(*_: Any) -> None:
        if len(passes) == index + 1:
            raise ZeroDivisionError

    def closure() -> Tensor:
        passes.append(1)
        if place == "before":
            now()
        return model(**data).loss

    handle = model.get_submodule("bert.ff2").register_forward_pre_hook(now) if place == "inside" else None
    with contextlib.suppress(ZeroDivisionError):
        adv.backward(closure)
    if handle is not None:
        handle.remove()
    assert len(passes) == index + 1
    assert not whole_gradients(model)
    assert switches(model) == before
    workers.step(adv, model, data)
    return whole_gradients(model)


def searched(rank: int) -> Found:
    """`find` gathers once and reduces nothing."""
    model, data = units(workers.build()), workers.half(rank)
    adv = made("pgd-sample", model, communication="keep")
    workers.step(adv, model, data)
    before = switches(model)
    with Collectives() as counted:
        adv.find(lambda: model(**data), data["attention_mask"])
    assert switches(model) == before
    return counted.found()


def last_without_a_loss(rank: int) -> Found:
    model = units(workers.build())
    adv = fastadv.PGD(model, embedding="word_embeddings", adv_weight=0, communication="last")
    try:
        workers.step(adv, model, workers.half(rank))
    except RuntimeError as error:
        switches(model)
        return {"told": torch.tensor("give the last pass a loss" in str(error))}
    return {}


def late(rank: int, name: str) -> Found:
    """The method is made, and has taken a step, before FSDP2 shards the model."""
    model = workers.build()
    adv = made(name, model)
    with torch.random.fork_rng():
        adv.find(lambda: model(**workers.half(rank)))
    units(model)
    workers.step(adv, model, workers.half(rank))
    return whole_gradients(model)


# FSDP1


def flat(model: TinyModel, orig: bool) -> nn.Module:
    """The encoder, and the rest."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy, device = ModuleWrapPolicy({type(model.bert)}), torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=orig, auto_wrap_policy=policy, device_id=device)


def flat_gradients(model: nn.Module) -> Found:
    """Of all processes' parts, by the parameters' own names."""
    found: Found = {}
    for name, part in model.named_modules():
        handle = getattr(part, "_handle", None)
        if handle is None:
            continue
        mine = handle.flat_param.grad
        parts = [torch.empty_like(mine) for _ in range(workers.WORLD)]
        torch.distributed.all_gather(parts, mine)
        inside = [word for word in name.split(".") if word and word != "_fsdp_wrapped_module"]
        sizes = [shape.numel() for shape in handle.flat_param._shapes]
        pieces = torch.cat(parts)[: sum(sizes)].split(sizes)
        for key, shape, piece in zip(handle.flat_param._fqns, handle.flat_param._shapes, pieces, strict=True):
            found[".".join([*inside, key])] = piece.view(shape)
    return found


def flattened(rank: int, name: str, orig: bool, when: str) -> Found:
    model = workers.build()
    adv = made(name, model) if when == "late" else None
    wrapped = flat(model, orig)
    workers.step(adv or made(name, wrapped), wrapped, workers.half(rank))
    return flat_gradients(wrapped)


def flat_accumulation(rank: int, name: str, orig: bool, synchronised: bool) -> Found:
    """Two micro-batches, the first in FSDP1's no_sync or not."""
    model = flat(workers.build(), orig)
    adv = made(name, model)
    for micro in range(2):
        quiet = micro == 0 and not synchronised
        with model.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            workers.step(adv, model, workers.half(rank, micro))
    return flat_gradients(model)


# What is refused


SHARDS: dict[str, Callable[[TinyModel], nn.Module]] = {
    "units": units,
    "flat-True": lambda model: flat(model, True),
    "flat-False": lambda model: flat(model, False),
}


def refused(rank: int, kind: str, when: str) -> Found:
    """Which say that the model is sharded."""
    found = {}
    shard = SHARDS[kind]
    names = [name for name in REFUSED if shard is not units or name != "llr"]
    for name, make in ((name, REFUSED[name]) for name in names):
        model = workers.build()
        data = workers.half(rank)
        try:
            adv = make(model) if when == "late" else None
            wrapped = shard(model)
            adv = adv or make(wrapped)
            workers.step(adv, wrapped, data)
        except ValueError as error:
            found[name] = torch.tensor("shard" in str(error).lower() or "FSDP" in str(error))
    return found


Cases = dict[str, tuple[Callable[..., Found], tuple[Any, ...]]]
ONE = (workers.WORLD,)
MESHES = {"replicated": (2, 1), "both": (1, 2)}
ORIG = (True, False)
FAST: Cases = {
    "plain": (plain, ()),
    **{f"{choice}-{name}": (communicated, (name, choice, ONE)) for choice in CHOICES for name in COUNTED[:3]},
    **{f"held-{choice}": (held, (choice,)) for choice in CHOICES},
    **{f"rooted-{choice}": (rooted, (choice,)) for choice in ("plain", "keep")},
    "searched": (searched, ()),
    "no-loss": (last_without_a_loss, ()),
    "trained-keep": (trained, ("keep",)),
    "failed-keep-2-inside": (failed, ("keep", 2, "inside")),
    "late-fgm-table": (late, ("fgm-table",)),
    **{f"flat-pgd-sample-{orig}-early": (flattened, ("pgd-sample", orig, "early")) for orig in ORIG},
    **{f"flat-fgm-table-{orig}-late": (flattened, ("fgm-table", orig, "late")) for orig in ORIG},
    "refused-units-late": (refused, ("units", "late")),
    "refused-flat-False-early": (refused, ("flat-False", "early")),
}
SLOW: Cases = {
    **{f"{choice}-{name}": (communicated, (name, choice, ONE)) for choice in CHOICES for name in COUNTED[3:]},
    **{
        f"{choice}-{mesh}": (communicated, ("pgd-sample", choice, MESHES[mesh]))
        for choice in CHOICES
        for mesh in MESHES
    },
    **{f"trained-{choice}": (trained, (choice,)) for choice in CHOICES[:2]},
    **{f"compiled-{name}-{choice}": (compiled, (name, choice)) for choice in CHOICES for name in COMPILED},
    **{
        f"failed-{choice}-{index}-before": (failed, (choice, index, "before")) for choice in CHOICES for index in (1, 3)
    },
    **{f"failed-{choice}-1-inside": (failed, (choice, 1, "inside")) for choice in CHOICES},
    **{f"late-{name}": (late, (name,)) for name in LATE[1:]},
    **{f"flat-{name}-{orig}-early": (flattened, (name, orig, "early")) for orig in ORIG for name in FLAT[1:]},
    **{f"flat-{name}-{orig}-late": (flattened, (name, orig, "late")) for orig in ORIG for name in LATE[1:]},
    **{
        f"flat-micro-{name}-{orig}-{reduces}": (flat_accumulation, (name, orig, reduces))
        for name in MICRO
        for orig in ORIG
        for reduces in (True, False)
    },
    "refused-units-early": (refused, ("units", "early")),
    "refused-flat-True-early": (refused, ("flat-True", "early")),
    **{f"refused-flat-{orig}-late": (refused, (f"flat-{orig}", "late")) for orig in ORIG},
}


def alone(name: str, rank: int, seed: int = 1) -> Found:
    """The gradients of one process on one half."""
    model = workers.build()
    adv = made(name, model)
    workers.step(adv, model, workers.half(rank, seed))
    adv.close()
    return gradients(model)
