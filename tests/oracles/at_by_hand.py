"""Several texts under one perturbation, in plain loops: no index arithmetic, a vector written to one position after the
other, and autograd by what was written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Vectors = dict[str, list[list[Tensor]]]  # by site: of each sample, of each of its positions


class ByHand:
    """PGD on vectors that lie at masked positions of the outputs (or inputs) of named modules.

    Args:
        model: perturbed by forward hooks that are there inside of `at` alone.
        sites: module names; "input:NAME" for what goes into it.
        counts: how many positions each sample has.
        dim: of a vector.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], counts: Sequence[int], dim: int) -> None:
        self.model, self.sites = model, list(sites)
        dtype = next(model.parameters()).dtype
        self.vectors: Vectors = {
            site: [[torch.zeros(dim, dtype=dtype) for _ in range(count)] for count in counts] for site in sites
        }

    def every(self) -> list[Tensor]:
        return [vector for site in self.sites for sample in self.vectors[site] for vector in sample]

    @contextlib.contextmanager
    def at(self, mask: Tensor) -> Iterator[None]:
        handles = [self._hook(site, mask) for site in self.sites]
        yield
        for handle in handles:
            handle.remove()

    def _hook(self, site: str, mask: Tensor) -> Any:
        module = self.model.get_submodule(site.removeprefix("input:"))
        if site.startswith("input:"):
            return module.register_forward_pre_hook(lambda _, args: (self._moved(site, mask, args[0]), *args[1:]))

        def output(module: nn.Module, args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (self._moved(site, mask, out[0]), *out[1:])
            return self._moved(site, mask, out)

        return module.register_forward_hook(output)

    def _moved(self, site: str, mask: Tensor, hidden: Tensor) -> Tensor:
        rows = []
        for sample in range(len(hidden)):
            left = iter(self.vectors[site][sample])
            places = [
                hidden[sample, place] + next(left) if mask[sample, place] else hidden[sample, place]
                for place in range(hidden.shape[1])
            ]
            assert next(left, None) is None
            rows.append(torch.stack(places))
        return torch.stack(rows)

    def attack(
        self,
        loss: Callable[[Any], Tensor],
        *,
        steps: int,
        step_size: dict[str, float],
        epsilon: dict[str, float],
        scope: str,
        sign: bool = False,
    ) -> None:
        """Steps of l2 (or sign) up the loss, then onto the l2 ball; norms over a token, a sample or the batch."""
        for _ in range(steps):
            for vector in self.every():
                vector.requires_grad_()
            grads = iter(torch.autograd.grad(loss(self.at), self.every()))
            for site in self.sites:
                moved = [[(vector.detach(), next(grads)) for vector in sample] for sample in self.vectors[site]]
                groups = {
                    "token": [[pair] for sample in moved for pair in sample],
                    "sample": moved,
                    "batch": [[pair for sample in moved for pair in sample]],
                }[scope]
                self._step(groups, step_size[site], epsilon[site], sign)
                self.vectors[site] = [[pair[0] for pair in sample] for sample in moved]

    def _step(self, groups: list[Any], step_size: float, epsilon: float, sign: bool) -> None:
        for group in groups:
            if not group:
                continue
            size = torch.stack([g.square().sum() for _, g in group]).sum().sqrt()
            for vector, g in group:
                vector += step_size * (g.sign() if sign else g / size)
            length = torch.stack([v.square().sum() for v, _ in group]).sum().sqrt()
            if length > epsilon:
                for vector, _ in group:
                    vector *= epsilon / length

    def values(self, site: str, room: int) -> Tensor:
        """[B, N, D], zero where a sample has fewer vectors."""
        dim = self.every()[0].shape[0]
        return torch.stack(
            [
                torch.stack([*sample, *[torch.zeros(dim, dtype=torch.float64)] * (room - len(sample))])
                for sample in self.vectors[site]
            ]
        ).detach()
