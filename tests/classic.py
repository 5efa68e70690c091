"""The loops of the classic scripts, around any attacker with their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.support import same_bits


def fgm_step(fgm: Any, closure: Callable[[], Tensor], **arguments: Any) -> None:
    """The classic loop, around any attacker with its calls."""
    closure().backward()
    fgm.attack(**arguments)
    closure().backward()
    fgm.restore()


def pgd_step(pgd: Any, model: nn.Module, closure: Callable[[], Tensor], steps: int, **arguments: Any) -> None:
    closure().backward()
    pgd.backup_grad()
    for t in range(steps):
        pgd.attack(is_first_attack=t == 0, **arguments)
        if t != steps - 1:
            model.zero_grad()
        else:
            pgd.restore_grad()
        closure().backward()
    pgd.restore()


def method(kind: type, model: nn.Module, fused: bool | None = None, **arguments: Any) -> Any:
    return kind(model, embedding=model.word_embeddings, fused=fused, **arguments)


class Whole:
    """The bits, the memory and the version of every parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [(p, p.detach().clone(), p.data_ptr(), p._version) for p in model.parameters()]

    def unchanged(self) -> bool:
        return all(same_bits(p.detach(), copy) and p.data_ptr() == at for p, copy, at, _ in self.kept)

    def moved(self) -> list[bool]:
        return [p._version > version for p, _, _, version in self.kept]
