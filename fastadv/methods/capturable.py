"""A method's step as one CUDA graph, and what the graph must know of the method: its counters and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastadv.engine.capture import Captured
from fastadv.engine.passes import Engine


class Capturable:
    """The part of a method that counts its steps, and can have them captured."""

    model: nn.Module
    engine: Engine
    start_step: int
    every: int
    now: int  # the step that is running, or ran last
    attacked: int
    _calls: int

    def capture(self, fn: Callable[[Any], Any], example_batch: Any) -> Callable[[Any], Any]:
        """A step on batches of one shape as a CUDA graph: for small batches, where the host is slower than the device.

        Args:
            fn: the step. `fn(batch)` calls `backward`, and nothing in it waits for the device or changes a parameter:
                the optimizer stays outside.
            example_batch: a tensor, or a dict, tuple or list with tensors. `fn` is run on it a few times; the model,
                its gradients and the generators are then put back as they were.

        Returns:
            `step(batch)`, which copies the batch to the device, does what `fn` did and returns what it returned:
            single numbers to keep, larger tensors until the next step. Gradients are added to those that are there.
            Steps that `start_step` and `every` leave plain are a graph of their own.

        Raises:
            RuntimeError: the model is not on a CUDA device or is trained by several processes, or `fn` does what
                a graph cannot record.
            ValueError: from `step`, for a batch of another structure, shape or dtype.

        Example:
            >>> def training_step(batch):
            ...     return adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
            >>> step = adv.capture(training_step, next(iter(loader)))  # doctest: +SKIP
            >>> for batch in loader:  # doctest: +SKIP
            ...     loss = step(batch).loss
            ...     optimizer.step()
            ...     optimizer.zero_grad()
        """
        device, wrapping = self.engine.device, self.engine.wrapping
        if device.type != "cuda":
            raise RuntimeError(f"capture() records a CUDA graph, and the model is on the {device}: call backward()")
        if wrapping.reduces() or wrapping.sharded:
            raise RuntimeError("capture() serves one process: where several train a model, call backward()")
        return Captured(self, fn, example_batch, device)

    def enter(self, step: int | None = None) -> bool:
        """Go to a step, by default the next one. Returns whether it is attacked."""
        self.now = self._calls if step is None else step
        return self.now >= self.start_step and (self.now - self.start_step) % self.every == 0

    def count(self, attacked: bool) -> None:
        """The step is done."""
        self._calls += 1
        self.attacked += attacked

    def memory(self) -> list[Tensor]:
        """What outlives a step, and is written in it: a graph that writes it must keep it."""
        return self.engine.memory()

    def remember(self) -> Any:
        """The counters, for `rewind`."""
        return self._calls, self.attacked, self.engine.perturbation.skipped.clone()

    def rewind(self, state: Any) -> None:
        """Back to them, in the same memory."""
        self._calls, self.attacked, skipped = state
        self.engine.perturbation.skipped.copy_(skipped, non_blocking=True)
