"""What an adversarial step of pretraining costs at least: the passes of its schedule, and no method that asks for them.

Nothing is perturbed, drawn or projected here. A full pass is a forward and a backward; a probe takes the gradient of
the embedding's output and of nothing else; a partial pass ends behind the first layer. The model, the micro-batches,
the divergence (which is SMART's and VAT's loss), clipping and AdamW are those of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastadv.ops import divergence
from fastadv.pretrain.blocks import blocks
from fastadv.pretrain.inputs import predicted
from fastadv.pretrain.optimizer import clip, update
from fastadv.pretrain.schedule import rate
from fastadv.pretrain.step import Training

Forward = Callable[[], dict[str, Tensor]]
Passes = Callable[["Bare", Forward], None]


class ReachedError(Exception):
    """A partial pass is at its end."""


class Bare:
    """Trains a model of its own by passes alone.

    Args:
        training: plain; its model, optimizer, inputs and settings are taken.
        batches: of a loader of its own.
        passes: of an attacked step.
        every: which steps are attacked; the others are one full pass.
    """

    def __init__(self, training: Training, batches: Iterator[Any], passes: Passes, every: int = 1) -> None:
        self.training, self.batches, self.passes, self.every = training, batches, passes, every
        self.done, self.stops = 0, False
        self.words: Any = None  # the embedding's output
        self.hidden: Any = None  # the first layer's
        self.slope: Any = None  # the gradient that the last full pass brought there
        model: Any = training.model
        model.get_input_embeddings().register_forward_hook(self._see_words)
        if passes is yopo:
            blocks(model)[0].register_forward_hook(self._see_hidden)

    def step(self) -> None:
        """One optimizer step."""
        training, micro_batches = self.training, next(self.batches)
        tokens = sum(int(predicted(batch.labels, causal=training.inputs.causal)) for batch in micro_batches)
        passes = full if self.done % self.every else self.passes
        for batch in micro_batches:
            passes(self, training.inputs.closure(batch, 1 / tokens))
        norm = clip(training.optimizer, training.settings.max_grad_norm)
        update(training.optimizer, norm, rate(training.settings, self.done))
        self.done += 1

    def probe(self, value: Tensor) -> None:
        torch.autograd.grad(value, self.words)

    def partial(self, forward: Forward) -> None:
        self.stops = True
        try:
            forward()
        except ReachedError:
            torch.autograd.grad(self.hidden, self.words, self.slope)
        finally:
            self.stops = False

    def _see_words(self, *call: Any) -> None:
        self.words = call[-1]

    def _see_hidden(self, *call: Any) -> None:
        output = call[-1]
        self.hidden = output[0] if isinstance(output, tuple) else output
        if self.stops:
            raise ReachedError
        self.hidden.register_hook(self._keep)

    def _keep(self, slope: Tensor) -> None:
        self.slope = slope


def full(_: Bare, forward: Forward) -> None:
    """Plain training, and NEFTune."""
    backward(forward()["loss"])


def full_twice(bare: Bare, forward: Forward) -> None:
    """FGM; FreeLB of two steps."""
    full(bare, forward)
    full(bare, forward)


def pgd(bare: Bare, forward: Forward) -> None:
    """Two steps from the clean pass: one probe between two full ones."""
    full(bare, forward)
    bare.probe(forward()["loss"])
    full(bare, forward)


def pgd_adversarial(bare: Bare, forward: Forward) -> None:
    """Two steps without a clean pass."""
    bare.probe(forward()["loss"])
    bare.probe(forward()["loss"])
    full(bare, forward)


def yopo(bare: Bare, forward: Forward) -> None:
    """Two full passes, one through the first layer between them."""
    full(bare, forward)
    bare.partial(forward)
    full(bare, forward)


def smart(bare: Bare, forward: Forward) -> None:
    """One step; the clean forward's graph waits for the backward through both."""
    clean = forward()
    bare.probe(divergence(forward()["logits"], clean["logits"].detach()))
    backward(clean["loss"] + divergence(forward()["logits"], clean["logits"]))


def vat(bare: Bare, forward: Forward) -> None:
    """One power iteration. The clean answer is a constant."""
    clean = forward()
    answer = clean["logits"].detach()
    backward(clean["loss"])
    bare.probe(divergence(forward()["logits"], answer, "kl"))
    backward(divergence(forward()["logits"], answer, "kl"))


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
