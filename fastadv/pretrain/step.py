"""One optimizer step: the micro-batches of this process, attacked or plain, and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.perturb.start import drawing_from
from fastadv.methods import EmbeddingMethod, Method
from fastadv.pretrain.clock import Clock
from fastadv.pretrain.draws import ByRow
from fastadv.pretrain.inputs import Inputs, predicted
from fastadv.pretrain.optimizer import clip, update
from fastadv.pretrain.processes import Processes
from fastadv.pretrain.schedule import rate
from fastadv.pretrain.settings import Settings

RENEWED = 100  # steps between two looks at how long the embedding's rows are, by which radii are measured


@dataclass
class Training:
    """What one training consists of, on this process.

    Attributes:
        method: None: plain training.
        late: gradients are summed over processes at a step's last micro-batch alone, and held whole until then.
    """

    settings: Settings
    processes: Processes
    model: nn.Module
    method: Method | None
    optimizer: torch.optim.Optimizer
    inputs: Inputs
    clock: Clock
    late: bool = False


class Figures(NamedTuple):
    """What a step was: on the device, whatever is computed there.

    Attributes:
        sums: [2]: the loss and the adversarial loss, this process's part of their means.
        norm: of the gradient before it was clipped, over all processes.
        tokens: that all processes predicted.
        rate: the learning rate.
        stop: one of the processes has been asked to end.
    """

    sums: Tensor
    norm: Tensor
    tokens: int
    rate: float
    stop: bool


class Weights(NamedTuple):
    """What each token's loss counts, so that gradients are those of the mean over a step's tokens, of all processes.

    FSDP2 takes the mean over R processes of their gradients: the sum of a process's losses counts R / tokens, and a
    term that is a mean over m of the step's M positions counts R m / M.
    """

    token: float
    position: float


def train_step(training: Training, step: int, micro_batches: Sequence[Any], *, stop: bool = False) -> Figures:
    """Train on one step's rows. `stop`: this process has been asked to end, which the others are told."""
    settings, processes = training.settings, training.processes
    counted = _count(micro_batches, causal=training.inputs.causal)
    tokens, positions, stops = processes.sums(*counted, int(stop))
    weights = Weights(processes.world / max(1, tokens), processes.world / max(1, positions))
    if isinstance(training.method, EmbeddingMethod) and step % RENEWED == 0:
        training.method.renew_unit()
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
    for index, batch in enumerate(micro_batches):
        _hold_back(training, index + 1 < len(micro_batches))
        with training.clock.around("batch"), drawing_from(ByRow(settings.seed, step, _rows(batch))):
            sums += _backward(training, step, _placed(batch, processes.device), weights)
    norm = clip(training.optimizer, settings.max_grad_norm)
    learning_rate = rate(settings, step)
    update(training.optimizer, norm, learning_rate)
    return Figures(sums, norm, tokens, learning_rate, stops > 0)


def _backward(training: Training, step: int, batch: Any, weights: Weights) -> Tensor:
    """Accumulate the gradient of one micro-batch; its loss and adversarial loss, [2]."""
    closure, method = training.inputs.closure(batch, weights.token), training.method
    if method is None:
        loss = closure()["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach(), loss.detach()])
    inside = batch.groups >= 0
    method.share = inside.sum() * weights.position
    result = method.backward(closure, mask=inside, groups=batch.groups, step=step)
    return torch.stack([result.loss, result.loss if result.adv_loss is None else result.adv_loss])


def _count(micro_batches: Sequence[Any], *, causal: bool) -> tuple[int, int]:
    """Count the tokens that are predicted and those that are there, on the CPU, before the device has them."""
    tokens = [predicted(batch.labels, causal=causal) for batch in micro_batches]
    positions = [(batch.groups >= 0).sum() for batch in micro_batches]
    found: list[list[int]] = torch.stack([torch.stack(tokens), torch.stack(positions)]).tolist()
    return sum(found[0]), sum(found[1])


def _rows(batch: Any) -> list[int]:
    """Read the rows' numbers, on the CPU too."""
    found: list[int] = batch.rows.tolist()
    return found


def _hold_back(training: Training, more: bool) -> None:
    """Under FSDP2, leave the reduction of gradients to the last micro-batch, if that is asked for."""
    if training.late:
        sharded: Any = training.model
        sharded.set_requires_gradient_sync(not more)


def _placed(batch: Any, device: torch.device) -> Any:
    return type(batch)(*(one.to(device, non_blocking=True) for one in batch))
