"""What others have published, where it is installed (the extra `bench`): contestants as their users run them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.race import Run

BERT4TORCH, SMART_PYTORCH, TRANSFORMERS = "bert4torch", "smart-pytorch", "transformers"
MODULES = {BERT4TORCH: "bert4torch", SMART_PYTORCH: "smart_pytorch", TRANSFORMERS: "transformers"}

Closure = Callable[[], Tensor]


def installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def bert4torch_step(method: str, model: nn.Module, closure: Closure, alpha: float, epsilon: float, steps: int) -> Run:
    """The loop of its documentation around its FGM or PGD. Both find the table by its name."""
    from bert4torch import callbacks

    name = "word_embeddings"
    attacker: Any = callbacks.FGM(model) if method == "FGM" else callbacks.PGD(model)

    def fgm() -> None:
        closure().backward()  # type: ignore[no-untyped-call]
        attacker.attack(alpha, name)
        closure().backward()  # type: ignore[no-untyped-call]
        attacker.restore(name)

    def pgd() -> None:
        closure().backward()  # type: ignore[no-untyped-call]
        attacker.backup_grad()
        for t in range(steps):
            attacker.attack(epsilon, alpha, name, is_first_attack=t == 0)
            (attacker.restore_grad if t == steps - 1 else model.zero_grad)()
            closure().backward()  # type: ignore[no-untyped-call]
        attacker.restore(name)

    return fgm if method == "FGM" else pgd


SEED, DEVIATION = 7, 1e-5  # of smart-pytorch's noise


def smart_noise(ids: torch.Size, dimension: int) -> Tensor:
    """What it draws after `manual_seed(SEED)`."""
    generator = torch.Generator().manual_seed(SEED)
    return DEVIATION * torch.randn(*ids, dimension, generator=generator)


def smart_step(model: Any, batch: dict[str, Tensor], divergence: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Its loss beside the task's, as its README has it: it begins behind the word embedding."""
    from smart_pytorch import SMARTLoss

    labels, ids = batch["labels"], batch["input_ids"]

    def answer(embed: Tensor) -> Any:
        return model(inputs_embeds=embed).logits

    regulariser = SMARTLoss(answer, divergence, noise_var=DEVIATION)

    def step() -> None:
        torch.manual_seed(SEED)
        embed = model.get_input_embeddings()(ids)
        state = answer(embed)
        loss = torch.nn.functional.cross_entropy(state, labels) + regulariser(embed, state)
        loss.backward()

    return step


def neftune_step(model: Any, closure: Closure, alpha: float) -> Run:
    """Its hook, in place for the step alone: other contestants use the same model."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    embedding = model.get_input_embeddings()

    def step() -> None:
        embedding.neftune_noise_alpha = alpha
        handle = embedding.register_forward_hook(neftune_post_forward_hook)
        try:
            closure().backward()  # type: ignore[no-untyped-call]
        finally:
            handle.remove()

    return step
