"""Adversarial training inside of `transformers.Trainer`.

>>> from fastadv.integrations.transformers import AdversarialTrainer  # doctest: +SKIP
>>> trainer = AdversarialTrainer(  # doctest: +SKIP
...     model=model,
...     args=args,
...     train_dataset=data,
...     adversary=(fastadv.PGD, {"epsilon": 0.1, "step_size": 0.05, "scope": "sample"}),
... )
>>> trainer.train()  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import DistributedType  # type: ignore[import-untyped, unused-ignore]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped, unused-ignore]
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from fastadv.integrations.replay_loader import ReplayLoader
from fastadv.integrations.tally import Tally
from fastadv.methods import Method

Adversary = Callable[[nn.Module], Method] | tuple[Callable[..., Method], Mapping[str, Any]]
Masks = Tensor | list[Tensor | None] | None

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class AdversarialMixin(_Trainer):
    """Trains adversarially what a Trainer or a subclass of it trains: `class T(AdversarialMixin, SomeTrainer)`.

    Every micro-batch is attacked by itself, so gradient accumulation changes no direction. `start_step` and `every`
    count optimizer steps (`state.global_step`). The method is made when training begins, around the wrapped model (DDP,
    torch.compile, PEFT), and taken out of the model when training ends, with an error or without.

    A method that trains on each batch several times in a row (`fastadv.FreeAT`) gets its replays: whole groups of
    micro-batches, loaded once, come again for so many optimizer steps, and `num_train_epochs` counts replays, so that
    the number of optimizer steps stays what it is without a method. Give such a method as a class with its arguments.
    What a method knows of earlier steps is saved with every checkpoint (adversary.safetensors) and read when training
    resumes from it.

    The Trainer's log gets `adv_loss` (scaled as `loss` is), `adv_norm` (mean norm of the perturbations) and
    `adv_skipped` (groups that took no step, since the start), read from the device once per logging interval.

    Args:
        adversary: a method class and its arguments, `(fastadv.FGM, {"epsilon": 0.1})`, or a callable that takes the
            model and returns the method.
        *args, **kwargs: what the Trainer takes.

    Attributes:
        adversary: the method, from the beginning of `train()` on; closed when `train()` has ended.

    Raises:
        TypeError: `adversary` is neither.
        ValueError: at the beginning of `train()`, where the backward cannot be run twice in a step (DeepSpeed, LOMO),
            the model is replicated in threads (`nn.DataParallel`), batches are to be replayed by a method that was
            given as a callable, or there are fewer of them than one optimizer step accumulates.
    """

    adversary: Method | None = None

    def __init__(self, *args: Any, adversary: Adversary, **kwargs: Any) -> None:
        self._make_adversary, self._replays = _factory(adversary)
        self._tally = Tally()
        self._adversarial_steps = 0
        self._attacking = False
        self._resumed: Path | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Events(self))

    # The method's life

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; the model is left without an interception whatever happens."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call, unused-ignore]
        self._resumed = Path(folder) if folder else None
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._warn_if_idle()
            return output
        finally:
            self._attacking = False
            if self.adversary is not None:
                self.adversary.close()

    def begin_adversary(self) -> None:
        """Make the method, now that the model is wrapped and has not run yet."""
        _refuse(self)
        if self.adversary is not None:  # an earlier train(), or a smaller batch size after running out of memory
            self.adversary.close()
        method = self._make_adversary(self.model_wrapped)
        owner = method._engine.owner
        owner.function = owner.function or self.accelerator.backward
        owner.scaler = owner.scaler or getattr(self.accelerator, "scaler", None)
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
        state = self._state_file(self._resumed)
        if state is not None and state.exists():
            method.load_state_dict(load_file(state))
        self._tally = Tally()
        self._adversarial_steps = 0
        self._attacking = True

    def save_adversary(self) -> None:
        """Put what the method knows of earlier steps beside the checkpoint that was just saved."""
        checkpoint = Path(self._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        state = self._state_file(checkpoint)
        if self.adversary is not None and state is not None:
            state.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.adversary.state_dict(), state)

    def _state_file(self, checkpoint: Path | None) -> Path | None:
        """Each process has its own part of every batch, and so its own state."""
        process = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        return None if checkpoint is None else checkpoint / f"adversary{process}.safetensors"

    def _warn_if_idle(self) -> None:
        if self._adversarial_steps and self.adversary is not None and not self.adversary.attacked:
            warnings.warn(
                f"{type(self.adversary).__name__} attacked none of the {self.state.global_step} steps: "
                f"start_step={self.adversary._schedule.start_step} is not reached. This was plain training.",
                stacklevel=3,
            )

    # Replays

    def get_train_dataloader(self) -> DataLoader[Any]:
        """`Trainer.get_train_dataloader`, whose batches come as often as the method trains on each."""
        loader = super().get_train_dataloader()
        if self._replays == 1:
            return loader
        return ReplayLoader(loader, self._replays, self.args.gradient_accumulation_steps)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """`Trainer.set_initial_training_values`, of as many epochs as the replays leave."""
        if self._replays > 1:
            args = copy.copy(args)
            args.num_train_epochs /= self._replays
        return super().set_initial_training_values(args, dataloader)

    def num_examples(self, dataloader: Any) -> int:
        """`Trainer.num_examples`; a replayed batch counts each time."""
        if isinstance(dataloader, ReplayLoader):
            return self._replays * super().num_examples(dataloader.dataset.loader)
        return super().num_examples(dataloader)

    def begin_epoch(self) -> None:
        """Tell the loader inside, which draws its order by the epoch."""
        loader = self.callback_handler.train_dataloader
        if isinstance(loader, ReplayLoader):
            loader.dataset.set_epoch(math.floor(self.state.epoch or 0))

    # The step

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """`Trainer.training_step`, with the method's passes in place of the one forward and backward."""
        if not self._attacking or self.adversary is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            cast(Any, self.optimizer).train()
        inputs = cast("dict[str, Any]", self._prepare_inputs(inputs))

        def closure() -> dict[str, Any]:
            return self._adversarial_pass(model, inputs, num_items_in_batch)

        self.adversary.share = 1 / self.current_gradient_accumulation_steps
        step = self.state.global_step
        result = self.adversary.backward(closure, mask=self.adversarial_mask(inputs), step=step)
        self._adversarial_steps += 1
        self._tally.add(result, self.adversary, step)
        every = self.args.torch_empty_cache_steps
        if every is not None and step % every == 0:
            clear_device_cache()
        return result.loss

    def _adversarial_pass(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> dict[str, Any]:
        # A copy: label smoothing and compute_loss_func take the labels out of what they are given.
        with self.compute_loss_context_manager():
            computed = self.compute_loss(
                model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        loss, output = computed if isinstance(computed, tuple) else (computed, None)
        passed = {"loss": self._scaled(loss, num_items_in_batch), "logits": _field(output, "logits")}
        losses = _field(output, "losses")  # of single samples, for LLR
        return passed if losses is None else {**passed, "losses": self._scaled(losses, num_items_in_batch)}

    def _scaled(self, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Divided by the micro-batches of the step, unless it was normalised over all of them already."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return loss if scaled else loss / self.current_gradient_accumulation_steps

    def adversarial_mask(self, inputs: Mapping[str, Any]) -> Masks:
        """The mask of a batch: [B, T], 1 where a token is; a list of them, one per call, for an encoder and a decoder.

        Override it where the batch names its mask otherwise.
        """
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return [mask, inputs.get("decoder_attention_mask")]
        return mask

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with the adversarial numbers of the interval."""
        if "loss" in logs and self.adversary is not None and self._tally.steps:
            logs.update(self._tally.read(self.accelerator, self.adversary))
            self._tally = Tally()
        super().log(logs, start_time)


class AdversarialTrainer(AdversarialMixin, Trainer):
    """`transformers.Trainer` that trains adversarially; see `AdversarialMixin` for `adversary=`."""


class _Events(TrainerCallback):
    """What the mixin has to know of the training's course."""

    def __init__(self, trainer: AdversarialMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The one event between the wrapping of the model and its first call."""
        self.trainer.begin_adversary()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin_epoch()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.trainer.save_adversary()


def _factory(adversary: Adversary) -> tuple[Callable[[nn.Module], Method], int]:
    """What makes the method, and how often it trains on each batch in a row."""
    if callable(adversary) and not isinstance(adversary, tuple):
        return adversary, getattr(adversary, "replays", 1)
    if isinstance(adversary, tuple) and len(adversary) == 2 and callable(adversary[0]):
        build, arguments = adversary
        return lambda model: build(model, **arguments), arguments.get("replays", getattr(build, "replays", 1))
    raise TypeError(
        "adversary= takes a method class with its arguments, (fastadv.FGM, {'epsilon': 0.1}), "
        f"or a callable that takes the model and returns a method, not {adversary!r}"
    )


def _field(output: Any, name: str) -> Any:
    """One field of a model's output, which may be a dict; None where it has none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _refuse(trainer: Trainer) -> None:
    """Where a step cannot have two backward passes, say so before the first."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed steps its optimizer in every backward: adversarial passes are not supported under it"
        )
    if str(getattr(trainer.args.optim, "value", trainer.args.optim)) in ("lomo", "adalomo"):
        raise ValueError(
            "LOMO optimizers update weights during backward, so a step cannot have two: choose another --optim"
        )
    if isinstance(trainer.model_wrapped, nn.DataParallel):
        raise ValueError(  # noqa: TRY004 - the way of launching is wrong, not a type
            "nn.DataParallel runs the embedding in several threads at once: launch one process per GPU with torchrun, "
            "or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
