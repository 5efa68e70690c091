"""torchtitan's Trainer on the CPU, with the recipe's step, against a plain loop over whole batches: run by torchrun.

What of torchtitan asks for a GPU is replaced, before it is imported. The model is a small Llama of its own.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.packed import from_position_ids
from tests.distributed.workers import waves

RECIPE = Path(__file__).parents[2] / "examples/recipes/torchtitan_trainer.py"
LENGTH, ROWS, STEPS, MICRO, RATE = 12, 4, 3, 2, 1.0  # rows of a micro-batch, on all ranks together
IGNORED = -100
CASES: dict[str, dict[str, str]] = {  # what differs from the recipe as it is
    "pgd": {},
    "smart": {
        "fastadv.PGD(": "fastadv.SMART(",
        "return loss\n": "return loss, logits\n",
        '"scope": "sample"': '"scope": "sample", "random_start": waves',
    },
}
DEVICE = SimpleNamespace(  # what of torch.cuda is not in torch.cpu
    set_device=lambda device: None,
    current_device=lambda: 0,
    device_count=lambda: 1,
    synchronize=lambda: None,
    get_device_name=lambda device: "cpu",
    get_device_properties=lambda device: SimpleNamespace(total_memory=1),
    reset_peak_memory_stats=lambda: None,
    empty_cache=lambda: None,
    memory_stats=lambda device: {},
)


def prepare() -> None:
    """The device; time-outs, which gloo groups have not; the sum that gloo reduces by; no sleep at the end."""
    import torch._utils

    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda kind: DEVICE
    import torchtitan.distributed.fsdp
    import torchtitan.distributed.utils
    import torchtitan.trainer

    torchtitan.distributed.utils.set_pg_timeouts = lambda **groups: None
    torchtitan.distributed.fsdp.disable_fsdp_gradient_division = sum_gradients
    torchtitan.trainer.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)


def sum_gradients(model: nn.Module) -> None:
    """What it stands for, by a plain sum: gloo has none that multiplies first."""
    for module in model.modules():
        if isinstance(module, dist.fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def micro_batches(rows: slice) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Packed rows of one or two documents each, some of whose labels do not count; the rows asked for."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS * MICRO):
        ids = torch.randint(0, 2048, (ROWS, LENGTH + 1), generator=generator)
        first = torch.randint(3, LENGTH + 1, (ROWS, 1), generator=generator)
        place = torch.arange(LENGTH).expand(ROWS, LENGTH)
        positions = torch.where(place < first, place, place - first)
        ignored = torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0, 0.6, ROWS).unsqueeze(1)
        labels = ids[:, 1:].masked_fill(ignored, IGNORED)
        yield {"input": ids[rows, :-1], "positions": positions[rows]}, labels[rows]


def model() -> Any:
    """torchtitan's debugging Llama: two of its layers, and the attention that has a backward on the CPU."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    found = model_registry("debugmodel")
    found.model.layers = found.model.layers[:2]
    for layer in found.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return found


def config(kind: Any, folder: Path) -> Any:
    """Of a Trainer: three steps of two micro-batches; eps so large that Adam does not blow noise up."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.distributed.activation_checkpoint import SelectiveAC

    class Words(BaseTokenizer):
        def __init__(self, config: Any, **unused: Any) -> None:
            super().__init__()

        encode = decode = get_vocab_size = None

        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

    class Batches(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, dp_rank: int, dp_world_size: int, **unused: Any) -> None:
            size = ROWS // dp_world_size
            self.rows = slice(dp_rank * size, (dp_rank + 1) * size)

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            return micro_batches(self.rows)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    size = dist.get_world_size()
    return kind.Config(
        model_spec=model(),
        loss=CrossEntropyLoss.Config(),
        dump_folder=str(folder),
        tokenizer=Words.Config(),
        dataloader=Batches.Config(),
        optimizer=default_adamw(lr=RATE, eps=1.0, weight_decay=0.0),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=ROWS // size,
            global_batch_size=ROWS * MICRO,
            seq_len=LENGTH,
            steps=STEPS,
            max_norm=1e9,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        activation_checkpoint=SelectiveAC.Config(),
    )


def recipe(case: str) -> Any:
    """The recipe's module, with the changes of that case in its text."""
    source = RECIPE.read_text()
    for old, new in CASES[case].items():
        assert old in source, old
        source = source.replace(old, new)
    module = types.ModuleType("torchtitan_recipe")
    module.__dict__["waves"] = waves
    sys.modules[module.__name__] = module  # where dataclasses look names up
    exec(compile(source, str(RECIPE), "exec"), module.__dict__)
    return module


def named(built: Any) -> Iterator[tuple[str, Any]]:
    """Parameters by the names that they have without checkpointing."""
    for name, parameter in built.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def started(built: nn.Module) -> dict[str, Tensor]:
    """Weights that every process draws alike."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in named(built)}
    return {name: 0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1) for name, shape in shapes.items()}


def by_trainer(kind: Any, folder: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    trainer = config(kind, folder).build()
    built = trainer.model_parts[0]
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(built, started(built), options=options)
    trainer.train()
    assert trainer.step == STEPS
    trainer.close()
    return {name: parameter.detach().full_tensor() for name, parameter in named(built)}


def by_loop(kind: Any, folder: Path) -> dict[str, Tensor]:
    """The model by itself, unsharded, and the whole of every batch."""
    settings = config(kind, folder)
    settings.model_spec.model.update_from_config(config=settings)
    built = settings.model_spec.model.build()
    built.init_weights(buffer_device=None)
    built.load_state_dict(started(built), strict=False)
    adv = kind.adv.func(SimpleNamespace(model_parts=[built], config=settings))
    optimizer = torch.optim.AdamW(built.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    batches = list(micro_batches(slice(None)))
    for begin in range(0, len(batches), MICRO):
        step = batches[begin : begin + MICRO]
        tokens = sum((labels != IGNORED).sum() for _, labels in step)
        for row, labels in step:

            def closure(row: Any = row, labels: Tensor = labels, tokens: Any = tokens) -> tuple[Tensor, Tensor]:
                logits = built(row["input"], positions=row["positions"])
                return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens, logits

            adv.share = (labels != IGNORED).sum() / tokens
            adv.backward(closure, mask=labels != IGNORED, groups=from_position_ids(row["positions"]))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in built.named_parameters()}


def refused(folder: Path) -> None:
    """torchtitan's default loss, whose forward runs the head's backward."""
    from torchtitan.components.loss import ChunkedLossWrapper

    settings = config(recipe("pgd").AdversarialTrainer, folder)
    settings.loss = ChunkedLossWrapper.Config(num_chunks=2)
    trainer = settings.build()
    with pytest.raises(RuntimeError, match="the closure called backward, or its loss did"):
        trainer.train()


def compared(case: str, folder: Path) -> None:
    """The weights at the end, by the size of what they moved; float32, as torchtitan's loss is."""
    kind = recipe(case).AdversarialTrainer
    got, want = by_trainer(kind, folder), by_loop(kind, folder)
    start = started(SimpleNamespace(named_parameters=want.items))
    for name, target in want.items():
        moved = float((target - start[name]).abs().max())
        wrong = float((got[name] - target).abs().max())
        print(f"{case} {name}: {wrong:.1e} of {moved:.1e}")
        assert moved > 1e-4, name
        assert wrong <= 2e-5 * moved, name


def main(folder: Path) -> None:
    prepare()
    dist.init_process_group("gloo")
    for case in CASES:
        compared(case, folder)
    refused(folder)
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
