"""FreeAT, adversarial training for free (Shafahi et al. 2019, https://arxiv.org/abs/1904.12843)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastadv.engine.perturb.scopes import TABLE_SCOPES
from fastadv.engine.perturb.start import Draw, RandomStart
from fastadv.engine.results import StepResult
from fastadv.engine.step import Step
from fastadv.methods.carry_buffer import CarryBuffer
from fastadv.methods.embedding_method import EmbeddingMethod
from fastadv.methods.options import EmbeddingOptions, Norm, Scope, number, whole
from fastadv.methods.weight_changes import WeightChanges

NO_STEP = (
    "FreeAT: no parameter has changed since the last replay. One backward is one replay, and optimizer.step() belongs "
    "after each (fastadv.repeat(loader, adv.replays) yields every batch that often). Where several micro-batches make "
    "one optimizer step, say which: backward(closure, step=NUMBER_OF_THE_OPTIMIZER_STEP)"
)


class FreeAT(EmbeddingMethod):
    r"""One pass a step, whose gradient trains the model and moves the perturbation for the next step on the same batch.

    .. math:: \nabla = w_{adv} \nabla L(x + \delta), \qquad \delta \leftarrow \Pi\big(\delta + \alpha \, d(g)\big)

    Every batch is trained on `replays` times in a row, each replay with one `backward` and one optimizer step, so that
    an epoch is as long as `replays` plain ones: train for that many fewer. `fastadv.repeat` replays batches;
    `fastadv.integrations.transformers` does so by itself and divides the epochs.

    The perturbation lives on across batches, by batch slot and position (`carry=True`, the paper's way: a batch
    begins with what another one left), or begins anew with every batch (`carry=False`). A smaller batch uses the
    first slots; a longer one finds zeros at its new positions; what is masked leaves its slot alone.

    Perturbations are float32 (float64 for a float64 model), [B, T, D], in the embedding's own units.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: radius of the ball that holds the perturbation after each step; None: no ball. The default is the one
            that the sweep in docs/training.md found to help.
        step_size: length of one step, alpha; None: epsilon.
        replays: how often each batch is trained on, m.
        norm: "linf" (steps by alpha * sign(g)) or "l2".
        scope: what the norm is over: "sample", "token" or "batch".
        carry: whether a batch begins with the perturbation that the last one left.
        random_start: with `carry=False`, where a batch begins. See `fastadv.PGD`.
        dropout: the "same" masks in all passes of a step (it has one, or two with `attack=`), "fresh" ones, or "off".
            Every replay draws its own.
        direction, ball: "l2", "sign" or "max" for a step; "l2", "linf" or None for the ball. Default: as `norm` says.
        clamp: "batch": perturbed activations stay in the range of the clean batch's; see docs/concepts.md.
        relative: epsilon, step_size and start in units of the mean norm of the embedding's rows, taken at construction.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding.
        process_group: the ranks that each hold a part of what a norm is over: see docs/integrations.md.
        adv_weight: weight of the gradient.
        start_step, every: attack from this step on, and each so many steps; the others are plain training.
        fused: None: the fastest backend there is; True: insist on native ops; False: eager ops.
        backward, scaler: who takes a full pass's loss (`accelerator.backward`), and a `torch.amp.GradScaler`.
        atomic: copy gradients that were there before, and put them back if the step fails.
        probe_dtype: torch.bfloat16 or torch.float16: probes (there is one with `attack=`) run under autocast to it.
        communication: "each", "last" or "keep": what FSDP2 sends between passes; see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an embedding that cannot be found.
        RuntimeError: `fused=True` where not every op has a native backend. In a step: a batch larger than any before
            while a CUDA graph is captured.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> adv = fastadv.FreeAT(model, epsilon=0.001, replays=4)
        >>> for ids in fastadv.repeat([torch.tensor([[1, 2, 3]])], adv.replays):
        ...     result = adv.backward(lambda: model(ids).square().mean())  # instead of loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(float(adv.perturbation_norm), 4)
        0.001
    """

    replays: int = 4

    _no_moments = "begins anew with each replay, where one step says no more than the sign: use 'l2', 'sign' or 'max'"
    _dropout = "same"

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float | None = 0.001,
        step_size: float | None = None,
        replays: int = 4,
        norm: Norm = "linf",
        scope: Scope = "sample",
        carry: bool = True,
        random_start: RandomStart = False,
        adv_weight: float = 1.0,
        **options: Unpack[EmbeddingOptions],
    ) -> None:
        if carry and random_start:
            raise ValueError("carry=True begins where the last batch ended: random_start needs carry=False")
        if scope in TABLE_SCOPES:
            raise ValueError(
                f"FreeAT keeps a perturbation per batch slot and position, and scope={scope!r} has one per token id: "
                "use scope='sample', 'batch' or 'token'"
            )
        if step_size is None:
            if epsilon is None:
                raise ValueError("FreeAT's step_size is epsilon, which is None: give a step_size")
            step_size = epsilon
        self.adv_weight = number("adv_weight", adv_weight)
        self.replays = whole("replays", replays, 1)
        self.carry = carry
        super().__init__(
            model,
            epsilon=epsilon,
            step_size=step_size,
            steps=1,
            norm=norm,
            scope=scope,
            random_start=random_start,
            **options,
        )
        self._slots = CarryBuffer()
        self._changes = WeightChanges(model)
        self._micro = 0  # which micro-batch of the optimizer step
        self._last: int | None = None  # the last attacked step
        self._trained = -1  # how far the parameters had changed by then

    def run(self, step: Step) -> StepResult:
        """One replay: a pass at the perturbation as it is, and the perturbation's next step."""
        step.start()
        done = step.descend(self.adv_weight)
        self.search(step)
        self._keep(step)
        return step.result(None, done)

    def search(self, step: Step) -> None:
        """The one ascent of a replay."""
        step.ascend(self.rule)

    def _draw(self) -> Draw | None:
        """The perturbation as the last replay left it; where nothing is left, a new start."""
        now = self._schedule.now
        if now != self._last:
            self._check_trained()
        if not self.carry and self._last is not None and now // self.replays != self._last // self.replays:
            self._slots.clear()  # another batch
        micro = self._next_micro()
        if (micro, 0) not in self._slots:
            return self._start
        return Draw(lambda shape, mask, call, _: self._slots.at((micro, call), shape, mask.device), random=False)

    def _keep(self, step: Step) -> None:
        step.undo.append(self._slots.remember())
        micro = self._next_micro()
        for index, lookup in enumerate(step.lookups):
            self._slots.keep((micro, index), lookup)

    def _next_micro(self) -> int:
        return self._micro + 1 if self._schedule.now == self._last else 0

    def close(self) -> None:
        """Take the method out of the model."""
        super().close()
        self._changes.close()

    # For a captured step

    def capture(self, fn: Callable[[Any], Any], example_batch: Any) -> Callable[[Any], Any]:
        """As for every method. With `carry=False` the first replay of a batch is another step than the others.

        Raises:
            ValueError: `carry=False`.
        """
        if not self.carry:
            raise ValueError("capture() needs FreeAT(carry=True): a graph does the same in every replay of a batch")
        return super().capture(fn, example_batch)

    def _recall(self) -> Callable[[], None]:
        counters, place = super()._recall(), (self._micro, self._last, self._trained)

        def put_back() -> None:
            counters()
            self._micro, self._last, self._trained = place

        return put_back

    def _count(self, attacked: bool) -> None:
        super()._count(attacked)
        if attacked:
            trained = self._changes.count()
            self._micro, self._last, self._trained = self._next_micro(), self._schedule.now, trained

    def _memory(self) -> list[Tensor]:
        return [*super()._memory(), *self._slots.buffers.values()]

    def _remember(self) -> Any:
        return super()._remember(), (self._micro, self._last, self._trained), self._slots.copies()

    def _rewind(self, state: Any) -> None:
        counters, (self._micro, self._last, self._trained), copies = state
        super()._rewind(counters)
        self._slots.take_back(copies)

    # Wrong use

    def _check_trained(self) -> None:
        """A scaler skips optimizer steps, and an owner may step in its backward: with one there is no telling."""
        owner = self._engine.owner
        if owner.scaler is None and not owner.steps and self._trained == self._changes.count():
            warnings.warn(NO_STEP, stacklevel=7)

    # For a checkpoint

    def state_dict(self) -> dict[str, Tensor]:
        """The counters, where the replays stand, and the perturbation at every slot."""
        place = {"last": torch.tensor(-1 if self._last is None else self._last), "micro": torch.tensor(self._micro)}
        return {**super().state_dict(), **place, **self._slots.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another run was when `state_dict` was called."""
        super().load_state_dict(state)
        last = int(state["last"])
        self._last, self._micro, self._trained = None if last < 0 else last, int(state["micro"]), -1
        self._slots.load_state_dict(state, self._engine.device)
