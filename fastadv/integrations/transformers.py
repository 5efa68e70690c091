"""Train adversarially inside `transformers.Trainer`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from fastadv import packed
from fastadv.integrations import method_state
from fastadv.integrations.adversary import Adversary, factory, followed_by_another, own, reads_logits, refuse
from fastadv.integrations.collapse import Collapse
from fastadv.integrations.counters import Counters
from fastadv.integrations.events import Events
from fastadv.integrations.loss_pass import LossPass
from fastadv.integrations.replay_loader import ReplayLoader
from fastadv.integrations.shares import Shares
from fastadv.integrations.tally import Tally
from fastadv.integrations.unlabelled import KEY as SEEN
from fastadv.integrations.unlabelled import Unlabelled
from fastadv.integrations.whole_checkpoints import WholeCheckpoints
from fastadv.methods import Method

Masks = Tensor | list[Tensor | None] | None


class AdversarialMixin(WholeCheckpoints):
    """Make a Trainer or a subclass of it adversarial: `class T(AdversarialMixin, SomeTrainer)`.

    It takes `adversary=` besides what the Trainer takes: see `AdversarialTrainer`. Override `adversarial_mask` where
    the batch calls its mask otherwise, `adversarial_groups` where it tells otherwise what its rows are packed of.

    Examples:
        >>> from fastadv.integrations.transformers import AdversarialMixin
        >>> from transformers import Seq2SeqTrainer
        >>> class AdversarialSeq2SeqTrainer(AdversarialMixin, Seq2SeqTrainer):
        ...     pass
    """

    adversary: Method | None = None
    warnings: list[str]

    def __init__(self, *args: Any, adversary: Adversary, unlabelled: Any = None, **kwargs: Any) -> None:
        self._make_adversary, self._replays = factory(adversary)
        self._unlabelled_data = unlabelled
        self._unlabelled: Unlabelled | None = None
        self._tally = Tally()
        self.warnings = []
        self._adversarial_steps = 0
        self._attacking = False
        self._shares, self._pass = Shares(self), LossPass(self)
        super().__init__(*args, **kwargs)
        self.add_callback(Events(self))

    # The method's life

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; the method leaves the model whatever happens.

        Raises:
            CheckpointError: a ValueError; the checkpoint to resume from is not whole, or not of this method.
        """
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._warn_if_idle()
            return output
        finally:
            self._attacking = False
            if self.adversary is not None:
                self.adversary.close()

    def begin_adversary(self) -> None:
        """Make the method around the wrapped model, before its first call."""
        refuse(self)
        if self.adversary is not None:  # an earlier train(), or a smaller batch size after running out of memory
            self.adversary.close()
        method = self._make_adversary(self.model_wrapped)
        own(method, self)
        if hasattr(method, "attach"):
            method.attach(self.optimizer)
        self.adversary = method
        replays = getattr(method, "replays", 1)
        if replays != self._replays:
            raise ValueError(
                f"{type(method).__name__} trains on each batch {replays} times in a row, which the Trainer "
                f"must know before it counts its steps: give adversary=(fastadv.{type(method).__name__}, {{...}}), "
                "not a callable"
            )
        self._tally = Tally()
        self._collapse = Collapse()
        self.warnings = []
        self._adversarial_steps = 0
        self._attacking = True
        state = method_state.loaded(method, self.resumed, self.args)
        if state is not None:
            self.warnings = list(state.notes.get("warnings", []))
            self._collapse.load_state(state.tensors, state.notes)
        if self._unlabelled_data is not None:
            seen = 0 if state is None else int(state.tensors.get(SEEN, 0))
            self._unlabelled = Unlabelled(self, self._unlabelled_data, method, seen)

    def flaw(self, checkpoint: Path) -> str | None:
        """Say why training cannot go on from a checkpoint; the method's state is a part of it."""
        return super().flaw(checkpoint) or method_state.flaw(method_state.file_of(checkpoint, self.args))

    def save_more(self, checkpoint: Path) -> None:
        """Save the method's state of this process, and what was counted and told of the training."""
        if self.adversary is not None:
            seen = {} if self._unlabelled is None else self._unlabelled.state()
            notes = {"warnings": self.warnings, **self._collapse.notes()}
            file = method_state.file_of(checkpoint, self.args)
            method_state.save(self.adversary, {**seen, **self._collapse.state()}, notes, file)

    def _warn_if_idle(self) -> None:
        if self._adversarial_steps and self.adversary is not None and not self.adversary.attacked:
            warnings.warn(
                f"{type(self.adversary).__name__} attacked none of the {self.state.global_step} steps: "
                f"start_step={self.adversary._schedule.start_step} is not reached. This was plain training.",
                stacklevel=3,
            )

    # Replays

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Repeat the batches of `Trainer.get_train_dataloader` as often as the method trains on each."""
        loader = super().get_train_dataloader()
        if self._replays == 1:
            return loader
        return ReplayLoader(loader, self._replays, self.args.gradient_accumulation_steps)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Plan `Trainer.set_initial_training_values` for the epochs that the replays leave."""
        if self._replays > 1:
            args = copy.copy(args)
            args.num_train_epochs /= self._replays
        return super().set_initial_training_values(args, dataloader)

    def num_examples(self, dataloader: Any) -> int:
        """Count examples as `Trainer.num_examples` does; a replayed batch counts each time."""
        if isinstance(dataloader, ReplayLoader):
            return self._replays * super().num_examples(dataloader.dataset.loader)
        return super().num_examples(dataloader)

    def begin_epoch(self) -> None:
        """Tell the repeated loader the epoch, which its order follows from."""
        loader = self.callback_handler.train_dataloader
        if isinstance(loader, ReplayLoader):
            loader.dataset.set_epoch(math.floor(self.state.epoch or 0))

    # The step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Take a step's micro-batches as `Trainer.get_batch_samples` does, and count what each of them weighs."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if items is not None and self._attacking and self.adversary is not None and reads_logits(self.adversary):
            self._shares.count(batches, device)
        else:
            self._shares.forget()
        return batches, items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run the method's passes in place of the one forward and backward of `Trainer.training_step`."""
        if not self._attacking or self.adversary is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            cast(Any, self.optimizer).train()
        inputs, counters = cast("dict[str, Any]", self._prepare_inputs(inputs)), Counters(self)

        def closure() -> dict[str, Any]:
            with counters.one_pass():
                return self._pass(model, inputs, num_items_in_batch)

        self.adversary.share = self._shares.of(inputs)
        step = self.state.global_step
        mask, groups = self.adversarial_mask(inputs), self.adversarial_groups(inputs)
        followed_by_another(self.adversary, self._unlabelled is not None and self.adversary._enter(step))
        result = self.adversary.backward(closure, mask=mask, step=step, groups=groups)
        self._adversarial_steps += 1
        self._tally.add(result, self.adversary, step)
        self._collapse.add(result.output, inputs.get("labels"), result.loss)
        if self._unlabelled is not None and result.adv_loss is not None:
            self.adversary.share = 1 / self.current_gradient_accumulation_steps
            followed_by_another(self.adversary, False)
            self._tally.add(self._unlabelled.train(self.adversary, model, step), self.adversary, step)
        every = self.args.torch_empty_cache_steps
        if every is not None and step % every == 0:
            clear_device_cache()
        return result.loss

    def adversarial_mask(self, inputs: Mapping[str, Any]) -> Masks:
        """Return the mask of a batch: [B, T], 1 where a token is; for an encoder and a decoder, a list of both.

        Override it where the batch calls its mask otherwise.
        """
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return [mask, inputs.get("decoder_attention_mask")]
        return mask

    def adversarial_groups(self, inputs: Mapping[str, Any]) -> Masks:
        """Return the documents of packed rows, by `fastadv.packed.from_batch`; None: a row is a sample."""
        return packed.from_batch(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does, with the adversarial numbers of the interval."""
        if "loss" in logs and self.adversary is not None and self._tally.steps:
            logs.update(self._tally.read(self.accelerator, self.adversary))
            self._tally = Tally()
            for message in self._collapse.read(self.adversary, self.state.global_step / max(1, self.state.max_steps)):
                self.warnings.append(message)
                warnings.warn(message, stacklevel=2)
        super().log(logs, start_time)


class AdversarialTrainer(AdversarialMixin, Trainer):
    """Train adversarially with `transformers.Trainer`: every batch is attacked by a method of fastadv.

    Each micro-batch is attacked by itself, so gradient accumulation changes no direction. Its `attention_mask` keeps
    padding unperturbed. Without one, `seq_idx`, `position_ids` or `cu_seq_lens_q` tell the documents that rows are
    packed of, and each document is a sample. `start_step` and `every` of the method count optimizer steps
    (`state.global_step`). The method is made when `train()` begins, around the wrapped model (DDP, torch.compile,
    PEFT), and leaves the model when it ends, with an error or without.

    The log gets three numbers, read from the device once per logging interval: `adv_loss` (scaled like `loss`),
    `adv_norm` (mean norm of the perturbations) and `adv_skipped` (norm groups that took no step because their gradient
    was not finite, since the start).

    A method that trains on each batch several times (`fastadv.FreeAT`) gets its replays: batches are loaded once and
    repeated, group by group under gradient accumulation. `num_train_epochs` counts replays, so the number of optimizer
    steps stays the same. Every checkpoint holds the method's state (adversary.safetensors), and resuming reads it.

    With `unlabelled` every attacked micro-batch is followed by one of unlabelled samples, whose divergence is added:
    L(labelled) + w D(labelled) + w D(unlabelled) for `fastadv.VAT`.

    The figures that a Trainer keeps as attributes (numbers, lists, dicts: a subclass's metrics and token counts) count
    each batch once: what `compute_loss` writes to them in the passes after the first is taken back.

    Args:
        adversary: a method class with its options, `(fastadv.FGM, {"epsilon": 0.1})`, or a callable that takes the
            model and returns the method.
        unlabelled: a data set without labels, or whose labels are not to be looked at; for `fastadv.VAT`, alone or in a
            `fastadv.BregmanProximal`. Its loader has the Trainer's collator, batch size and seed, begins again in
            another order when it is through, and goes on where it was when training is resumed.
        *args: what `Trainer` takes.
        **kwargs: what `Trainer` takes.

    A classifier that gives one answer to everything, or whose loss stays that of guessing, is told while it trains,
    with what to change.

    Attributes:
        adversary: the method, once `train()` has begun; closed when `train()` has ended.
        warnings: what was told so.

    Raises:
        TypeError: `adversary` is neither.
        ValueError: from `train()`, before the first step: the backward cannot run twice in a step (LOMO); the model
            runs in several threads (`nn.DataParallel`); the method was made with `backward=` under DeepSpeed; a method
            with replays was given as a callable; an epoch has fewer batches than `gradient_accumulation_steps`, so none
            can be replayed; or `unlabelled` was given with a method that needs a loss.

    Examples:
        >>> import fastadv
        >>> from fastadv.integrations.transformers import AdversarialTrainer
        >>> trainer = AdversarialTrainer(  # doctest: +SKIP
        ...     model=model,
        ...     args=args,
        ...     train_dataset=data,
        ...     adversary=(fastadv.PGD, {"epsilon": 0.1, "step_size": 0.05, "scope": "sample"}),
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """
