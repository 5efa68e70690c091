"""One step of each method: the eager reference's, plain PyTorch's by hand, fastadv's, and a peer's where there is one.

All on one small BERT without dropout. Random starts are given, so that every contestant has the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastadv
from bench import by_hand, peers, training
from bench.contest import Field
from bench.race import Run
from bench.workloads import PGD, Size, classifier, inputs, loss_closure
from fastadv import reference

Steps = dict[str, Run]
EPSILON, STEP, ALPHA, GAMMA, DECAY = 0.002, 0.1, 5.0, 0.01, 0.99
SIGNED = {"epsilon": EPSILON, "step_size": EPSILON}
XI = 0.5  # of VAT: long enough that the divergence is not lost in float32
PUBLIC = "SMART, the public codes' update"


class Bench:
    """The model, its batch, and what closures of it return."""

    def __init__(self, size: Size, device: str) -> None:
        vocabulary = size.steps[0][-1]
        self.model: Any = classifier(size.methods, vocabulary, device)
        self.batch = inputs(*size.small, vocabulary, device)
        self.ids, self.labels = self.batch["input_ids"], self.batch["labels"]
        self.loss = loss_closure(self.model, self.batch)
        self.embedding, self.first = self.model.get_input_embeddings(), self.model.bert.encoder.layer[0]
        self.hand = by_hand.ByHand(self.model)
        generator = torch.Generator().manual_seed(5)
        drawn = torch.randn(*self.ids.shape, self.embedding.embedding_dim, generator=generator).to(device)
        self.noise, self.zero = EPSILON * drawn, torch.zeros_like(drawn)
        self.direction = XI * drawn / drawn.flatten(1).norm(dim=1).view(-1, 1, 1)

    def answer(self, model: Any = None) -> tuple[Tensor, Tensor]:
        """The loss and the logits."""
        output = (model or self.model)(**self.batch)
        return output.loss, output.logits

    def losses(self) -> Tensor:
        """Of each sample."""
        return F.cross_entropy(self.model(input_ids=self.ids).logits, self.labels, reduction="none")


def _given(start: Tensor) -> Callable[..., Tensor]:
    return lambda *_: start


def fgsm(b: Bench) -> Steps:
    adv = fastadv.FGSM(b.model, epsilon=EPSILON)
    return {
        "reference": lambda: reference.fgsm(b.loss, b.embedding, b.zero, **SIGNED),
        "torch": b.hand.step(by_hand.fgsm, b.loss, EPSILON),
        "fused": lambda: adv.backward(b.loss),
    }


def table_scope(method: str) -> Callable[[Bench], Steps]:
    """FGM and PGD as the classic scripts have them."""
    return lambda b: {
        name: training.step(name, method, b.model, b.loss)
        for name in ("reference", "torch", peers.BERT4TORCH, "fused")
        if name != peers.BERT4TORCH or peers.installed(name)
    }


def sample_scope(b: Bench) -> Steps:
    """PGD with a ball for each sample, which no script has."""
    ball, steps = training.schedule("PGD-3")
    adv = fastadv.PGD(b.model, epsilon=ball.epsilon, step_size=ball.step_size, steps=steps, scope="sample")
    return {
        "torch": b.hand.step(by_hand.pgd, b.loss, steps, ball.step_size, ball.epsilon),
        "fused": lambda: adv.backward(b.loss),
    }


def freeat(b: Bench) -> Steps:
    buffer, adv = reference.FreeAT(b.embedding, *b.ids.shape), fastadv.FreeAT(b.model, epsilon=EPSILON)
    return {
        "reference": lambda: buffer.replay(b.loss, *b.ids.shape, **SIGNED),
        "torch": b.hand.step(by_hand.freeat, b.loss, EPSILON),
        "fused": lambda: adv.backward(b.loss),
    }


def yopo(b: Bench) -> Steps:
    layers, adv = by_hand.Layers(b.model, b.ids), fastadv.YOPO(b.model, step_size=STEP, random_start=False)
    return {
        "reference": lambda: reference.yopo(b.loss, b.embedding, b.first, b.zero),
        "torch": b.hand.step(by_hand.yopo, b.loss, layers, 3, 3, STEP),
        "fused": lambda: adv.backward(b.loss),
    }


def freelb(b: Bench) -> Steps:
    adv = fastadv.FreeLB(b.model, step_size=STEP, random_start=False)
    return {
        "reference": lambda: reference.freelb(b.loss, b.embedding, b.zero),
        "torch": b.hand.step(by_hand.freelb, b.loss, 3, STEP),
        "fused": lambda: adv.backward(b.loss),
    }


def smart(b: Bench) -> Steps:
    adv = fastadv.SMART(b.model, epsilon=EPSILON, random_start=_given(b.noise))
    return {
        "reference": lambda: reference.smart(b.answer, b.embedding, b.noise, **SIGNED),
        "torch": b.hand.step(by_hand.smart, b.answer, b.noise, EPSILON),
        "fused": lambda: adv.backward(b.answer),
    }


def public_smart(b: Bench) -> Steps:
    """The public codes' step, which leaves the noise random: smart-pytorch's, and fastadv's for those who want it."""
    noise = peers.smart_noise(b.ids.shape, b.zero.shape[-1]).to(b.zero.device)
    adv = fastadv.SMART(b.model, update="mt-dnn", search="symmetric_kl", random_start=_given(noise))
    steps: Steps = {"fused": lambda: adv.backward(b.answer)}
    if peers.installed(peers.SMART_PYTORCH):
        steps[peers.SMART_PYTORCH] = peers.smart_step(b.model, b.batch, by_hand.symmetric_kl)
    return steps


def vat(b: Bench) -> Steps:
    adv = fastadv.VAT(b.model, epsilon=STEP, xi=XI, random_start=_given(b.direction))
    return {
        "reference": lambda: reference.vat(b.answer, b.embedding, b.direction, epsilon=STEP),
        "torch": b.hand.step(by_hand.vat, b.answer, b.direction, STEP),
        "fused": lambda: adv.backward(b.answer),
    }


def llr(b: Bench) -> Steps:
    adv = fastadv.LLR(b.model, epsilon=EPSILON, random_start=_given(b.noise))
    twice = sdpa_kernel([SDPBackend.MATH])  # the other kernels have no second derivative; fastadv chooses by itself
    return {
        "reference": twice(
            lambda: reference.llr(b.losses, b.embedding, b.noise, epsilon=EPSILON, step_size=EPSILON / 4)
        ),
        "torch": twice(b.hand.step(by_hand.llr, b.losses, b.noise, EPSILON, 3)),
        "fused": lambda: adv.backward(b.losses),
    }


def awp(b: Bench) -> Steps:
    adv, hand = fastadv.AWP(b.model, gamma=GAMMA), by_hand.AWP(b.model, GAMMA)
    return {
        "reference": lambda: reference.awp(b.model, b.loss, gamma=GAMMA),
        "torch": lambda: hand.step(b.loss),
        "fused": lambda: adv.backward(b.loss),
    }


def proximal(b: Bench) -> Steps:
    """The teacher's average with it, which fastadv leaves to the optimizer's step."""
    theirs, teacher = reference.BregmanProximal(b.model, 1.0, DECAY), copy.deepcopy(b.model)
    hand, adv = by_hand.Proximal(b.model, teacher, DECAY), fastadv.BregmanProximal(b.model, 1.0, DECAY)
    return {
        "reference": lambda: (theirs.step(b.answer), theirs.update()),
        "torch": lambda: hand.step(b.answer, lambda: b.answer(teacher)),
        "fused": lambda: (adv.backward(b.answer), adv.update()),
    }


def neftune(b: Bench) -> Steps:
    """Drawn anew in every step."""
    mask, dimension = torch.ones_like(b.ids), b.embedding.embedding_dim
    size = ALPHA / (b.ids.shape[1] * dimension) ** 0.5
    adv = fastadv.NEFTune(b.model, alpha=ALPHA)

    def classic() -> None:
        uniform = 2 * torch.rand_like(b.zero) - 1
        reference.neftune(b.loss, b.embedding, uniform * mask.unsqueeze(-1) * size)

    return {
        "reference": classic,
        "torch": b.hand.step(by_hand.neftune, b.loss, lambda: torch.empty_like(b.zero).uniform_(-size, size)),
        "transformers": peers.neftune_step(b.model, b.loss, ALPHA),
        "fused": lambda: adv.backward(b.loss),
    }


MAKERS: dict[str, Callable[[Bench], Steps]] = {
    "FGSM": fgsm,
    "FGM": table_scope("FGM"),
    "PGD-3": table_scope("PGD-3"),
    "PGD-3, sample scope": sample_scope,
    "FreeAT, one replay": freeat,
    "YOPO-3-3": yopo,
    "FreeLB-3": freelb,
    "SMART": smart,
    PUBLIC: public_smart,
    "BregmanProximal": proximal,
    "VAT": vat,
    "LLR": llr,
    "AWP": awp,
    "NEFTune": neftune,
}
CONTESTANTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MAKERS, PGD),
    "FGM": (*PGD, peers.BERT4TORCH),
    "PGD-3": (*PGD, peers.BERT4TORCH),
    "PGD-3, sample scope": ("plain", "torch", "fused"),
    "NEFTune": (*PGD, peers.TRANSFORMERS),
    PUBLIC: ("plain", peers.SMART_PYTORCH, "fused"),
}


def field(method: str, size: Size, device: str) -> Field:
    """All gradients are compared, but for NEFTune's, whose draws differ: there the noise is, in its size."""
    bench = Bench(size, device)
    steps: Steps = {"plain": lambda: bench.loss().backward(), **MAKERS[method](bench)}  # type: ignore[no-untyped-call]
    shape = (*size.small, size.steps[0][-1], size.methods[0])
    if method == "NEFTune":
        return training.field(bench.model, steps, shape, 5e-2, partial(_noise, bench))
    if method.startswith("FreeAT"):  # the first replay is not perturbed, the second is
        return training.field(bench.model, steps, shape, 1e-3, partial(_second, bench))
    return training.field(bench.model, steps, shape, 1e-3)


def _second(bench: Bench, run: Run) -> list[Tensor]:
    """The gradients of the second replay."""
    for _ in range(2):
        bench.model.zero_grad()
        run()
    return training.gradients(bench.model)


def _noise(bench: Bench, run: Run) -> Tensor:
    """How much a step has added to the words: its deviation, and its largest."""
    seen: list[Tensor] = []
    handle = bench.model.bert.embeddings.LayerNorm.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    bench.loss()
    run()
    handle.remove()
    added = seen[1] - seen[0]
    return torch.stack([added.std(), added.abs().max()])
