"""The Trainer against loops written by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import fastadv
from fastadv.engine.model import table_gradients
from fastadv.integrations.transformers import AdversarialMixin, AdversarialTrainer
from fastadv.methods.llr import along
from fastadv.native.flags import flag_on
from fastadv.ops import gather_perturb_backward
from tests.integrations.by_hand import (
    EPSILON,
    RATE,
    arguments,
    assert_same,
    bert,
    by_hand,
    classify,
    llama,
    sample_scope,
    samples,
    train,
)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_direction_per_micro_batch(tmp_path: Path, accumulate: int) -> None:
    """Ten rows are five micro-batches: with three a step, the second step has only two."""
    model, want = bert(), bert()
    trainer = train(model, tmp_path, samples(10), gradient_accumulation_steps=accumulate)
    history = by_hand(want, samples(10), classify, accumulate)
    assert_same(model, want)
    logged = [row["adv_loss"] for row in trainer.state.log_history if "adv_loss" in row]
    assert logged == pytest.approx(history, abs=2e-6)


def test_label_smoothing_takes_the_labels_in_every_pass(tmp_path: Path) -> None:
    model, want = bert(), bert()
    train(model, tmp_path, samples(8), label_smoothing_factor=0.2)
    by_hand(want, samples(8), lambda m, b, d: classify(m, b, d, smoothing=0.2))
    assert_same(model, want)


def test_loss_over_all_tokens_of_a_step(tmp_path: Path) -> None:
    """A causal model divides by `num_items_in_batch`: the tokens of all micro-batches, not each one's own."""

    def loss(model: Any, batch: dict[str, Tensor], divisor: int) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        shifted = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return F.cross_entropy(*shifted, ignore_index=-100, reduction="sum") / divisor

    model, want = llama(), llama()
    train(model, tmp_path, samples(8, language=True), gradient_accumulation_steps=2)
    by_hand(want, samples(8, language=True), loss, accumulate=2)
    assert_same(model, want)


def test_compute_loss_func(tmp_path: Path) -> None:
    def mine(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 3 * F.cross_entropy(outputs.logits, labels)

    model, want = bert(), bert()
    train(model, tmp_path, samples(8), gradient_accumulation_steps=2, compute_loss_func=mine)
    by_hand(want, samples(8), lambda m, b, d: 3 * classify(m, b, 1), accumulate=2)
    assert_same(model, want)


def test_bf16(tmp_path: Path) -> None:
    def loss(model: Any, batch: dict[str, Tensor], divisor: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.float(), batch["labels"]) / divisor

    model, want, full = bert(), bert(), bert()
    train(model, tmp_path, samples(4), bf16=True)
    by_hand(want, samples(4), loss)
    by_hand(full, samples(4), classify)
    assert_same(model, want, 2e-3)
    difference = (model.classifier.weight - full.classifier.weight).detach().abs().max()
    assert float(difference) > 1e-5, "autocast was off"


def test_start_step_counts_optimizer_steps(tmp_path: Path) -> None:
    model, want = bert(), bert()
    adversary = (fastadv.FGM, {"epsilon": EPSILON, "scope": "sample", "start_step": 1})
    trainer = train(model, tmp_path, samples(12), gradient_accumulation_steps=3, adversary=adversary)
    by_hand(want, samples(12), classify, accumulate=3, start=1)
    assert_same(model, want)
    assert trainer.adversary.attacked == 3
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["adv_loss" in row for row in rows] == [False, True]


def test_log(tmp_path: Path) -> None:
    trainer = train(bert(), tmp_path, samples(8), logging_steps=2)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["adv_loss"] > row["loss"]
        assert row["adv_norm"] == pytest.approx(EPSILON, rel=1e-5)
        assert row["adv_skipped"] == 0


def test_the_log_asks_whether_an_id_was_out_of_range(tmp_path: Path) -> None:
    flag_on(torch.device("cpu")).fill_(1)  # as a kernel leaves it on a GPU
    with pytest.raises(IndexError, match="out of range"):
        train(bert(), tmp_path, samples(8), logging_steps=2)
    train(bert(), tmp_path, samples(8), logging_steps=2)


def test_mixin_with_a_subclass_of_trainer(tmp_path: Path) -> None:
    class Doubled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, **kwargs)
            return (2 * loss, {}) if return_outputs else 2 * loss

    class Mine(AdversarialMixin, Doubled):
        pass

    model, want = bert(), bert()
    train(model, tmp_path, samples(6), kind=Mine)
    by_hand(want, samples(6), lambda m, b, d: 2 * classify(m, b, d))
    assert_same(model, want)


def test_compiled_model_that_was_evaluated_before(tmp_path: Path) -> None:
    model, want = bert(), bert()
    args = arguments(tmp_path, torch_compile_backend="aot_eager", remove_unused_columns=False)
    trainer = AdversarialTrainer(
        model=model, args=args, train_dataset=samples(6), eval_dataset=samples(2), adversary=sample_scope
    )
    try:
        trainer.evaluate()
        trainer.train()
    finally:
        torch.compiler.reset()
    by_hand(want, samples(6), classify)
    assert_same(model, want, 1e-5)


def test_pgd_keeps_inside_its_ball(tmp_path: Path) -> None:
    adversary = (fastadv.PGD, {"epsilon": 0.5, "step_size": 0.3, "steps": 3, "scope": "sample"})
    trainer = train(bert(), tmp_path, samples(4), adversary=adversary)
    norms = [row["adv_norm"] for row in trainer.state.log_history if "adv_norm" in row]
    assert len(norms) == 2
    assert all(0.3 < norm <= 0.5 + 1e-5 for norm in norms)


class Broken(TrainerCallback):
    """Fails in the middle of a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("no more")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_without_interception(tmp_path: Path, fails: bool) -> None:
    model = bert()
    outcome = pytest.raises(RuntimeError, match="no more") if fails else contextlib.nullcontext()
    with outcome:
        train(model, tmp_path, samples(8), callbacks=[Broken()] if fails else [])
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_run_without_an_attack_warns(tmp_path: Path) -> None:
    adversary = (fastadv.FGM, {"start_step": 100})
    with pytest.warns(UserWarning, match="start_step=100"):
        train(bert(), tmp_path, samples(4), adversary=adversary)


def test_attach_gets_the_optimizer(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Attached(fastadv.FGM):
        def attach(self, optimizer: Any) -> None:
            seen.append(optimizer)

    trainer = train(bert(), tmp_path, samples(4), adversary=(Attached, {"epsilon": 0.1}))
    assert seen == [trainer.optimizer]


@pytest.mark.parametrize("scope", ["table", "sample"])
def test_the_tables_gradient_goes_to_touched_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    """The Trainer's own backward looks at no gradient, so that autograd need not bring the table's."""
    added: list[tuple[int, ...]] = []

    def counted(into: Tensor, grads: list[Tensor], *rest: Any, **options: Any) -> None:
        added.append((len(into), len(grads)))
        gather_perturb_backward(into, grads, *rest, **options)

    monkeypatch.setattr(table_gradients, "gather_perturb_backward", counted)
    adversary = (fastadv.PGD, {"epsilon": EPSILON, "scope": scope, "steps": 2})
    train(bert(), tmp_path, samples(8), gradient_accumulation_steps=2, adversary=adversary)
    assert added == [(40, 2)] * 4  # four micro-batches, each with the gradients of two full passes at once


def test_training_twice_starts_a_method_each_time(tmp_path: Path) -> None:
    model, want = bert(), bert()
    trainer = train(model, tmp_path, samples(4))
    first = trainer.adversary
    trainer.train()
    assert trainer.adversary is not first
    by_hand(want, samples(4), classify)
    by_hand(want, samples(4), classify)
    assert_same(model, want)


@pytest.mark.parametrize("adversary", ["fgm", (fastadv.FGM,), None, (fastadv.FGM, {}, {})])
def test_what_is_no_adversary(tmp_path: Path, adversary: Any) -> None:
    with pytest.raises(TypeError, match="a method class with its arguments"):
        AdversarialTrainer(model=bert(), args=arguments(tmp_path), adversary=adversary)


def test_lomo_and_data_parallel_are_refused(tmp_path: Path) -> None:
    trainer = AdversarialTrainer(model=bert(), args=arguments(tmp_path), adversary=sample_scope)
    trainer.args.optim = "adalomo"
    with pytest.raises(ValueError, match="during backward"):
        trainer.begin_adversary()
    trainer.args.optim = "sgd"
    trainer.model_wrapped = nn.DataParallel(trainer.model)
    with pytest.raises(ValueError, match="torchrun"):
        trainer.begin_adversary()
    assert "forward" not in vars(trainer.model.get_input_embeddings())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_regularisers_and_a_teacher(tmp_path: Path, accumulate: int) -> None:
    """SMART near a teacher: the terms are scaled as the loss is, and the teacher moves with the optimizer's steps."""

    def adversary(model: nn.Module) -> fastadv.Method:
        start = {"random_start": lambda shape, _: 0.01 * torch.sin(torch.arange(shape[2])).expand(shape)}
        return fastadv.BregmanProximal(model, 2.0, 0.5, method=fastadv.SMART(model, epsilon=0.1, weight=3.0, **start))

    model, want = bert(), bert()
    trainer = train(model, tmp_path, samples(8), adversary=adversary, gradient_accumulation_steps=accumulate)
    adv, optimizer = adversary(want), torch.optim.SGD(want.parameters(), lr=RATE)
    adv.attach(optimizer)
    adv.share = 1 / accumulate
    rows = samples(8)
    for first in range(0, 8, 2):
        data = {key: torch.stack([row[key] for row in rows[first : first + 2]]) for key in rows[0]}

        def closure(data: dict[str, Tensor] = data) -> tuple[Tensor, Tensor]:
            output = want(**data)
            return output.loss / accumulate, output.logits

        adv.backward(closure, mask=data["attention_mask"])
        if (first // 2 + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, want)
    assert trainer.adversary.updates == adv.updates == 4 // accumulate
    assert float(adv.distance) > 0
    for name, tensor in trainer.adversary.teacher.items():
        assert torch.allclose(tensor, adv.teacher[name], atol=1e-6), name


def test_a_teacher_is_in_the_checkpoint(tmp_path: Path) -> None:
    def adversary(model: nn.Module) -> fastadv.Method:
        return fastadv.BregmanProximal(model, 2.0, 0.5, method=fastadv.FGM(model, epsilon=0.1))

    whole = train(bert(), tmp_path / "whole", samples(8), adversary=adversary, save_strategy="steps", save_steps=2)
    again = AdversarialTrainer(
        model=bert(), args=arguments(tmp_path / "again"), train_dataset=samples(8), adversary=adversary
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.adversary.updates == whole.adversary.updates == 4
    for (name, got), want in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want), name
    for name, tensor in again.adversary.teacher.items():
        assert torch.equal(tensor, whole.adversary.teacher[name]), name


def test_samples_losses_reach_llr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose output has `losses`: each sample has a gap of its own."""
    seen: list[int] = []

    def counted(step: fastadv.Step, deltas: Any, slope: Any, losses: Tensor) -> Tensor:
        seen.append(len(losses))
        return along(step, deltas, slope, losses)

    monkeypatch.setattr("fastadv.methods.llr.along", counted)

    class Tells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.inner(input_ids, attention_mask).logits
            losses = F.cross_entropy(logits, labels, reduction="none")
            return {"loss": losses.mean(), "logits": logits, "losses": losses}

    train(Tells(), tmp_path, samples(4), adversary=(fastadv.LLR, {"embedding": "word_embeddings"}))
    assert set(seen) == {2}
