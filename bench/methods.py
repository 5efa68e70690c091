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

    def second(self, run: Run) -> list[Tensor]:
        """The gradients of FreeAT's second replay: the first is not perturbed."""
        for _ in range(2):
            self.model.zero_grad()
            run()
        return training.gradients(self.model)

    def noise_of(self, run: Run) -> Tensor:
        """How much a step has added to the words: its deviation, and its largest."""
        seen: list[Tensor] = []
        norm = self.model.bert.embeddings.LayerNorm
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        self.loss()
        run()
        handle.remove()
        added = seen[1] - seen[0]
        return torch.stack([added.std(), added.abs().max()])


def given(start: Tensor) -> Callable[..., Tensor]:
    """A random start that is always this one."""
    return lambda *_: start


def three(eager: Run, hand: Run, fused: Run) -> Steps:
    return {"reference": eager, "torch": hand, "fused": fused}


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
    hand = b.hand.step(by_hand.pgd, b.loss, steps, ball.step_size, ball.epsilon)
    return {"torch": hand, "fused": partial(adv.backward, b.loss)}


def public_smart(b: Bench) -> Steps:
    """The public codes' step, which leaves the noise random: smart-pytorch's, and fastadv's for those who want it."""
    noise = peers.smart_noise(b.ids.shape, b.zero.shape[-1]).to(b.zero.device)
    adv = fastadv.SMART(b.model, update="mt-dnn", search="symmetric_kl", random_start=given(noise))
    steps: Steps = {"fused": partial(adv.backward, b.answer)}
    if peers.installed(peers.SMART_PYTORCH):
        steps[peers.SMART_PYTORCH] = peers.smart_step(b.model, b.batch, by_hand.symmetric_kl)
    return steps


def llr(b: Bench) -> Steps:
    adv = fastadv.LLR(b.model, epsilon=EPSILON, random_start=given(b.noise))
    eager = partial(reference.llr, b.losses, b.embedding, b.noise, epsilon=EPSILON, step_size=EPSILON / 4)
    twice = sdpa_kernel([SDPBackend.MATH])  # the other kernels have no second derivative; fastadv chooses by itself
    hand = b.hand.step(by_hand.llr, b.losses, b.noise, EPSILON, 3)
    return three(twice(eager), twice(hand), partial(adv.backward, b.losses))


def proximal(b: Bench) -> Steps:
    """The teacher's average with it, which fastadv leaves to the optimizer's step."""
    theirs, teacher = reference.BregmanProximal(b.model, 1.0, DECAY), copy.deepcopy(b.model)
    hand, adv = by_hand.Proximal(b.model, teacher, DECAY), fastadv.BregmanProximal(b.model, 1.0, DECAY)
    adv.update()
    with torch.no_grad():
        torch._foreach_mul_(list(b.model.parameters()), 1.1)  # away from the teachers, or there is nothing to find
    return three(
        lambda: (theirs.step(b.answer), theirs.update()),
        lambda: hand.step(b.answer, lambda: b.answer(teacher)),
        lambda: (adv.backward(b.answer), adv.update()),
    )


def neftune(b: Bench) -> Steps:
    """Drawn anew in every step."""
    size = ALPHA / (b.ids.shape[1] * b.embedding.embedding_dim) ** 0.5
    mask, adv = torch.ones_like(b.ids).unsqueeze(-1), fastadv.NEFTune(b.model, alpha=ALPHA)
    steps = three(
        lambda: reference.neftune(b.loss, b.embedding, (2 * torch.rand_like(b.zero) - 1) * mask * size),
        b.hand.step(by_hand.neftune, b.loss, lambda: torch.empty_like(b.zero).uniform_(-size, size)),
        partial(adv.backward, b.loss),
    )
    return {**steps, peers.TRANSFORMERS: peers.neftune_step(b.model, b.loss, ALPHA)}


MAKERS: dict[str, Callable[[Bench], Steps]] = {
    "FGSM": lambda b: three(
        partial(reference.fgsm, b.loss, b.embedding, b.zero, **SIGNED),
        b.hand.step(by_hand.fgsm, b.loss, EPSILON),
        partial(fastadv.FGSM(b.model, epsilon=EPSILON).backward, b.loss),
    ),
    "FGM": table_scope("FGM"),
    "PGD-3": table_scope("PGD-3"),
    "PGD-3, sample scope": sample_scope,
    "FreeAT, one replay": lambda b: three(
        partial(reference.FreeAT(b.embedding, *b.ids.shape).replay, b.loss, *b.ids.shape, **SIGNED),
        b.hand.step(by_hand.freeat, b.loss, EPSILON),
        partial(fastadv.FreeAT(b.model, epsilon=EPSILON).backward, b.loss),
    ),
    "YOPO-3-3": lambda b: three(
        partial(reference.yopo, b.loss, b.embedding, b.first, b.zero),
        b.hand.step(by_hand.yopo, b.loss, by_hand.Layers(b.model, b.ids), 3, 3, STEP),
        partial(fastadv.YOPO(b.model, step_size=STEP, random_start=False).backward, b.loss),
    ),
    "FreeLB-3": lambda b: three(
        partial(reference.freelb, b.loss, b.embedding, b.zero),
        b.hand.step(by_hand.freelb, b.loss, 3, STEP),
        partial(fastadv.FreeLB(b.model, step_size=STEP, random_start=False).backward, b.loss),
    ),
    "SMART": lambda b: three(
        partial(reference.smart, b.answer, b.embedding, b.noise, **SIGNED),
        b.hand.step(by_hand.smart, b.answer, b.noise, EPSILON),
        partial(fastadv.SMART(b.model, epsilon=EPSILON, random_start=given(b.noise)).backward, b.answer),
    ),
    PUBLIC: public_smart,
    "BregmanProximal": proximal,
    "VAT": lambda b: three(
        partial(reference.vat, b.answer, b.embedding, b.direction, epsilon=STEP),
        b.hand.step(by_hand.vat, b.answer, b.direction, STEP),
        partial(fastadv.VAT(b.model, epsilon=STEP, xi=XI, random_start=given(b.direction)).backward, b.answer),
    ),
    "LLR": llr,
    "AWP": lambda b: three(
        partial(reference.awp, b.model, b.loss, gamma=GAMMA),
        partial(by_hand.AWP(b.model, GAMMA).step, b.loss),
        partial(fastadv.AWP(b.model, gamma=GAMMA).backward, b.loss),
    ),
    "NEFTune": neftune,
}
CONTESTANTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MAKERS, PGD),
    **dict.fromkeys(("FGM", "PGD-3"), (*PGD, peers.BERT4TORCH)),
    "PGD-3, sample scope": ("plain", "torch", "fused"),
    "NEFTune": (*PGD, peers.TRANSFORMERS),
    PUBLIC: ("plain", peers.SMART_PYTORCH, "fused"),
}


def field(method: str, size: Size, device: str) -> Field:
    """All gradients are compared, but for NEFTune's, whose draws differ: there the noise is, in its size."""
    bench = Bench(size, device)
    steps: Steps = {"plain": lambda: bench.loss().backward(), **MAKERS[method](bench)}
    tolerance, answer = (5e-2, bench.noise_of) if method == "NEFTune" else (1e-3, None)
    if method.startswith("FreeAT"):
        answer = bench.second
    return training.field(bench.model, steps, (*size.small, size.steps[0][-1], size.methods[0]), tolerance, answer)
