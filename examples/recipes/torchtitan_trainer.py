"""torchtitan 0.3: a step of fastadv in the place of each micro-batch's forward and backward, under FSDP2.

`torchrun --nproc_per_node 8 -m torchtitan.train --module torchtitan_trainer --config debugmodel`, in this folder. The
loss is the one inside of `ChunkedLossWrapper`, whose own backwards fastadv refuses. CUDA graphs are off. The method is
made in the first step, when a checkpoint's weights are there. SMART and VAT compare logits: let the closure return
`loss, logits`. Not for tensor, context and pipeline parallelism.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

import fastadv
from fastadv.packed import from_position_ids


class AdversarialTrainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        epsilon: float = 0.1  # in units of the mean norm of the table's rows
        step_size: float = 0.05

    @cached_property
    def adv(self) -> fastadv.Method:
        options = {"embedding": "tok_embeddings", "scope": "sample", "relative": True, "communication": "keep"}
        config = self.config
        return fastadv.PGD(self.model_parts[0], epsilon=config.epsilon, step_size=config.step_size, **options)

    def _forward_backward_body(self, inputs: Tensor, labels: Tensor, tokens: Tensor, others: dict[str, Any]) -> Tensor:
        def closure() -> Any:
            logits = self.model_parts[0](inputs, **others)
            loss, _ = self.loss_fn(logits, labels, tokens)
            return loss

        learnt = labels != IGNORE_INDEX
        self.adv.share = learnt.sum() / tokens  # gradients are summed over ranks and micro-batches
        groups = from_position_ids(others["positions"]) if "positions" in others else None  # a document, a sample
        with self.train_context():
            return self.adv.backward(closure, mask=learnt, groups=groups).loss


def debugmodel() -> AdversarialTrainer.Config:
    plain = llama3_debugmodel()
    plain.loss, plain.training.disable_cuda_graphs = plain.loss.loss_fn, True  # whole logits; a graph records one pass
    return AdversarialTrainer.Config(**{field.name: getattr(plain, field.name) for field in fields(plain)})
