"""A model and a batch for the regularisers: as closures, and as the functions that the papers' formulas take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastadv
from tests.models import TinyModel
from tests.oracles import regularisers as papers
from tests.support import assert_close, assert_gradients, batch, gradients, record, seeded


class Setting:
    """A model, a batch, and the batch as functions of what was looked up. No attention mask: padding is read."""

    def __init__(self, masked: bool = False, classes: int = 3) -> None:
        self.model, self.data = seeded(lambda: TinyModel("tfm", classes=classes), seed=3), batch()
        self.ids = self.data["input_ids"]
        self.labels = self.data["labels"] if classes > 1 else torch.randn(4).double()
        self.mask = self.data["attention_mask"] if masked else None
        keep = torch.ones_like(self.ids) if self.mask is None else self.mask
        self.keep = keep.unsqueeze(-1).double()
        noise = torch.randn(*self.ids.shape, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        self.noise = noise * self.keep

    @property
    def words(self) -> Tensor:
        return self.model.word_embeddings(self.ids)

    def answer_at(self, words: Tensor) -> Tensor:
        return self.model(None, inputs_embeds=words).logits

    def losses_at(self, words: Tensor) -> Tensor:
        return F.cross_entropy(self.answer_at(words), self.labels, reduction="none")

    def loss_at(self, words: Tensor) -> Tensor:
        return self.model(None, None, self.labels, words).loss

    def output(self) -> Any:
        return self.model(self.ids, None, self.labels)

    def pair(self) -> tuple[Tensor, Tensor]:
        output = self.output()
        return output.loss, output.logits

    def losses(self) -> Tensor:
        return self.losses_at(self.model.word_embeddings(self.ids))

    def make(self, method: Any, start: Tensor | None = None, **options: Any) -> Any:
        where = {} if method is fastadv.AWP else {"embedding": self.model.word_embeddings}
        if start is not None:
            where["random_start"] = lambda shape, mask: start
        return method(self.model, **where, **options)

    def check(self, adv: Any, closure: Any, want: papers.Found, passes: int, tolerance: float = 1e-9) -> Any:
        """Gradients, the penalty, the perturbation of the last pass, and how many passes there were."""
        plain = self.words.detach()
        with record(self.model) as seen:
            result = adv.backward(closure, mask=self.mask)
        assert_gradients(gradients(self.model), want.gradients, tolerance)
        assert_close(result.adv_loss, want.penalty, tolerance, "penalty")
        assert_close(seen[-1] - plain, want.perturbation, tolerance, "perturbation")
        assert len(seen) == passes
        assert int(adv.skipped) == 0
        return result


FUSED = [pytest.param(None, id="fused"), pytest.param(False, id="eager")]
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
EVERYWHERE = pytest.mark.parametrize("fused", FUSED)
