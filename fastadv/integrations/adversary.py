"""Read the `adversary=` of a Trainer, and see to it that a step can have several backward passes, or refuse it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate.utils import DistributedType  # type: ignore[import-untyped, unused-ignore]
from torch import nn
from transformers import Trainer

from fastadv.engine.owner import Unowned
from fastadv.integrations.accelerate import AccelerateOwner
from fastadv.integrations.stepping_engine import SteppingEngine
from fastadv.methods import AWP, FGM, FGSM, LLR, PGD, YOPO, FreeAT, FreeLB, Method, NEFTune

LOSS_ALONE = (AWP, FGM, FGSM, FreeAT, FreeLB, NEFTune, PGD, YOPO)

Adversary = Callable[[nn.Module], Method] | tuple[Callable[..., Method], Mapping[str, Any]]


def factory(adversary: Adversary) -> tuple[Callable[[nn.Module], Method], int]:
    """Return what makes the method, and how often it trains on each batch in a row.

    Raises:
        TypeError: `adversary` is neither a class with its options nor a callable.
    """
    if callable(adversary) and not isinstance(adversary, tuple):
        return adversary, getattr(adversary, "replays", 1)
    if isinstance(adversary, tuple) and len(adversary) == 2 and callable(adversary[0]):
        build, arguments = adversary
        return lambda model: build(model, **arguments), arguments.get("replays", getattr(build, "replays", 1))
    raise TypeError(
        "adversary= takes a method class with its arguments, (fastadv.FGM, {'epsilon': 0.1}), "
        f"or a callable that takes the model and returns a method, not {adversary!r}"
    )


def reads_outputs(method: Method) -> bool:
    """Whether a method may look at more than the loss: LLR at losses, others at logits, and methods of users."""
    return type(method) not in LOSS_ALONE


def reads_logits(method: Method) -> bool:
    """Whether a method may compare logits: SMART, VAT and the Bregman teacher do, and methods of users."""
    return reads_outputs(method) and type(method) is not LLR


def own(method: Method, trainer: Trainer) -> None:
    """Let the Trainer's framework run the backward, unless the method was made with somebody who does.

    Raises:
        ValueError: it was, and under DeepSpeed the optimizer would never step.
    """
    given, accelerator = not isinstance(method._engine.owner, Unowned), trainer.accelerator
    engine = accelerator.distributed_type == DistributedType.DEEPSPEED
    if engine and given:
        raise ValueError("with DeepSpeed the Trainer leaves the optimizer's step to the backward: leave backward= out")
    if not given:
        # The Trainer divides by the micro-batches itself.
        method._engine.owner = SteppingEngine(accelerator, divides=False) if engine else AccelerateOwner(accelerator)


def followed_by_another(method: Method, following: bool) -> None:
    """Tell an owner that steps the optimizer whether another step of the method is in this micro-batch."""
    owner = method._engine.owner
    if isinstance(owner, SteppingEngine):
        owner.more = following


def refuse(trainer: Trainer) -> None:
    """Refuse to train where a step cannot have two backward passes.

    Raises:
        ValueError: with a LOMO optimizer, or in `nn.DataParallel`.
    """
    if str(getattr(trainer.args.optim, "value", trainer.args.optim)) in ("lomo", "adalomo"):
        raise ValueError(
            "LOMO optimizers update weights during backward, so a step cannot have two: choose another --optim"
        )
    if isinstance(trainer.model_wrapped, nn.DataParallel):
        raise ValueError(  # noqa: TRY004 - the way of launching is wrong, not a type
            "nn.DataParallel runs the embedding in several threads at once: launch one process per GPU with torchrun, "
            "or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
