"""What each of two gloo processes runs for docs/scale.md: a small Llama in bf16 under FSDP2, and what is counted."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastadv
from fastadv.engine.perturb.positions import PositionPerturbation
from tests.distributed import workers
from tests.distributed.sharding import CHOICES, GATHER, SCATTER

SHAPE = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 64, "vocabulary": 128}
REDUCE = "allreduce_"
OPS = (GATHER, SCATTER, REDUCE)
TOKENS = (2, 8)
RADII: dict[str, Any] = {"scope": "sample", "epsilon": 0.1}
METHODS: dict[str, Callable[..., fastadv.Method]] = {
    "NEFTune": fastadv.NEFTune,
    "FGM": lambda model, **options: fastadv.FGM(model, **RADII, **options),
    "PGD-3": lambda model, **options: fastadv.PGD(model, **RADII, step_size=0.1, **options),
    "FreeLB-3": fastadv.FreeLB,
    "YOPO-3-3": fastadv.YOPO,
    "SMART": fastadv.SMART,
    "VAT": fastadv.VAT,
}
MESHES = {"full": (2,), "replicas": (1, 2)}
Found = dict[str, Tensor]


class Sent(TorchDispatchMode):
    """Counts collectives that begin inside, and the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [args[0]] if isinstance(args[0], Tensor) else args[0]
        if func.namespace == "c10d" and not all(tensor.dtype == torch.int64 for tensor in tensors):  # these are votes
            self.counts[func._opname] += 1
            self.bytes[func._opname] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))

    def found(self) -> Found:
        return {
            "counts": torch.tensor([self.counts[op] for op in OPS]),
            "bytes": torch.tensor([self.bytes[op] for op in OPS]),
        }


def llama(mesh: str = "full", *, tied: bool = False, checkpointed: bool = True) -> Any:
    """Each block a unit, and the root as FSDP2 has it by default."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SHAPE["width"],
        intermediate_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        vocab_size=SHAPE["vocabulary"],
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shape = MESHES[mesh]
    on: Any = {
        "mesh": init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    }
    for block in model.model.layers:
        fully_shard(block, **on)
    return fully_shard(model, **on).train()


def closure_of(model: nn.Module) -> Callable[[], Any]:
    ids = torch.randint(SHAPE["vocabulary"], TOKENS)
    return lambda: model(input_ids=ids, labels=ids, use_cache=False)


def counted(rank: int, mesh: str, names: tuple[str, ...], tied: bool) -> Found:
    """By method and communication: a step's collectives and their bytes; with "each" the flops of weights' products."""
    model = llama(mesh, tied=tied)
    closure, found = closure_of(model), {}
    closure().loss.backward()  # the first pass of all shows FSDP2 which unit is the root
    for name in ("plain", *names):
        for choice in CHOICES if name != "plain" else CHOICES[:1]:
            adv = None if name == "plain" else METHODS[name](model, communication=choice)
            flops = FlopCounterMode(display=False)
            with flops if choice == "each" else contextlib.nullcontext(), Sent() as sent:
                closure().loss.backward() if adv is None else adv.backward(closure)
            if adv is not None:
                adv.close()
            found |= {f"{name} {choice} {key}": value for key, value in sent.found().items()}
            if choice == "each":
                found[f"{name} flops"] = torch.tensor(flops.get_flop_counts()["Global"][torch.ops.aten.mm])
    return {**found, "parameters": torch.tensor(sum(parameter.numel() for parameter in model.parameters()))}


def held(rank: int, communication: str) -> Found:
    """Bytes that a process has between two passes, and of the perturbation and its gradient at an ascent."""
    model = llama()
    closure, seen = closure_of(model), []
    units = [part._get_fsdp_state()._fsdp_param_group for part in (model, *model.model.layers)]

    def watched() -> Any:
        known = [one for unit in units for one in unit.fsdp_params if hasattr(one, "_unsharded_param")]
        weights = sum(one._unsharded_param.untyped_storage().size() for one in known)
        waiting = [(one.unsharded_accumulated_grad, one._unsharded_param.grad) for one in known]
        seen.append((weights, sum(grad.nbytes for pair in waiting for grad in pair if grad is not None)))
        return closure()

    ascend, deltas = PositionPerturbation.ascend, []

    def ascending(self: PositionPerturbation, rule: Any) -> None:
        deltas.append([one.delta.nbytes + one.grad.nbytes for one in self.lookups if one.grad is not None])
        ascend(self, rule)

    with METHODS["PGD-3"](model, communication=communication) as adv, pytest.MonkeyPatch.context() as patch:
        patch.setattr(PositionPerturbation, "ascend", ascending)
        adv.backward(watched)
    return {"between": torch.tensor(seen[1:]), "delta": torch.tensor(deltas)}


Cases = dict[str, tuple[Callable[..., Found], tuple[Any, ...]]]
CASES: Cases = {
    "full": (counted, ("full", tuple(METHODS), False)),
    "replicas": (counted, ("replicas", ("PGD-3", "SMART"), True)),
    **{f"held-{choice}": (held, (choice,)) for choice in CHOICES},
}


def run(rank: int, suite: str, folder: str) -> None:
    """All of them, in one of the processes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    workers.run_cases(rank, CASES, folder)
