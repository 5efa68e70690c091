"""FGM, the fast gradient method (Miyato et al. 2017, https://arxiv.org/abs/1605.07725)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastadv.classic import ClassicFGM
from fastadv.engine.passes import Closure
from fastadv.engine.start import RandomStart
from fastadv.methods.two_pass import TwoPass


class FGM(ClassicFGM, TwoPass):
    r"""One step of length `epsilon` up the gradient, and training on what is found there.

    .. math:: r = \epsilon \, g / \lVert g \rVert, \qquad
        \nabla = w_{clean} \nabla L(x) + w_{adv} \nabla L(x + r)

    Two full passes a step. `norm="linf"` takes r = epsilon * sign(g). The default is what the classic scripts do: the
    norm is over the whole table, so all samples of a batch share one budget, and both gradients are summed. With
    `scope="sample", clean_weight=0` it is the paper's adversarial loss by itself.

    `attack` and `restore` are the classic script's calls: see `fastadv.classic`.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: length of the perturbation; in the embedding's own units.
        norm: "l2" or "linf".
        scope: what the norm is over: "table", "row" (per word), "batch", "sample", "token".
        random_start: begin elsewhere than at zero; then epsilon is also the radius of the ball. See `fastadv.PGD`.
        **common: the arguments that all methods take; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an embedding that cannot be found.
        RuntimeError: `fused=True` where not every op has a native backend.

    Example:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> adv = fastadv.FGM(model, epsilon=0.5, scope="sample")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        >>> bool(result.adv_loss > result.loss)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float = 1.0,
        norm: str = "l2",
        scope: str = "table",
        random_start: RandomStart = False,
        **common: Any,
    ) -> None:
        if epsilon is None:
            raise ValueError("FGM's step has length epsilon: it cannot be None")
        super().__init__(
            model,
            epsilon=epsilon,
            step_size=epsilon,
            steps=1,
            norm=norm,
            scope=scope,
            random_start=random_start,
            **common,
        )

    def climb(self, target: Closure) -> None:  # noqa: ARG002
        """The one ascent: r = epsilon g / |g|."""
        self.ascend()
