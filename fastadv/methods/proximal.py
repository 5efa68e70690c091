"""The Bregman proximal point, the other half of SMART (Jiang et al. 2020, https://arxiv.org/abs/1911.03437)."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self, Unpack

from fastadv.engine.lookups import Masks
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.results import Closure, StepResult
from fastadv.engine.step import Step
from fastadv.methods.base import Method
from fastadv.methods.comparison import Comparison, Divergence
from fastadv.methods.options import StepOptions, number
from fastadv.methods.teacher import Teacher
from fastadv.methods.teacher_term import TeacherTerm
from fastadv.methods.weight_changes import WeightChanges
from fastadv.methods.who_steps import updates, who_steps

NEVER_UPDATED = (
    "the model's weights have changed, and its teacher has never been updated: it would hold the model to where it "
    "began. Call attach(optimizer) once, or update() after every optimizer.step()"
)
SHARDED = (
    "BregmanProximal cannot call a model with a teacher's weights where FSDP or DeepSpeed's ZeRO-3 shards it: train "
    "with DDP, with the optimizer alone sharded (ZeRO-1 or 2), or without"
)


class BregmanProximal(Method):
    r"""Holds the model near a moving average of itself: small steps in what it answers, not in its weights.

    .. math:: \nabla = \nabla \Big( F(\theta) + w \, D\big(f(x; \theta), f(x; \bar\theta)\big) \Big), \qquad
        \bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta \ \text{after each step of the optimizer}

    F is the loss, or whatever `method` trains: SMART with this is the paper's algorithm. D compares clean answers. It
    is found in the clean pass of plain training, SMART, VAT and LLR; elsewhere it costs a full pass of its own, since
    an ascent follows the clean pass's gradient (FGM, PGD, AWP), or there is no such pass (FreeLB, NEFTune). Besides,
    the teacher answers once per step: a forward without a gradient, with the same dropout masks. For the length of that
    call the teacher's tensors hang in the model (`torch.func.functional_call`); nothing is copied, and the model's own
    are there again when the step ends, however it ends.

    Teacher memory: a copy of every parameter that requires a gradient, in its dtype. One native call averages them all.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        weight: of the proximal term, w.
        decay: of the average, beta: 0 follows the weights exactly, 1 never moves.
        method: the method that it holds, made with the same model; None: plain training.
        divergence: "symmetric_kl", "kl" (from the teacher's answer), "js", "mse" for regression, "symmetric_bernoulli"
            or "bernoulli" for several labels at once, or a callable `(logits, teacher_logits) -> 0-d tensor`. None: by
            the model's `config.problem_type`, as for `fastadv.SMART`.
        start_step, every, dropout, fused, backward, scaler, atomic, probe_dtype, communication: without a method, as
            plain training takes them; with one they are the method's, and must not be given here.

    Raises:
        TypeError, ValueError: an argument that cannot be; in a step, a closure that returns no logits.
        RuntimeError: in a step, when the weights have changed and the teacher was never updated.

    Examples:
        >>> import fastadv, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> adv = fastadv.BregmanProximal(model, 1.0, 0.99, method=fastadv.SMART(model)).attach(optimizer)
        >>> ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([1])
        >>> def closure():
        ...     logits = model(ids)
        ...     return torch.nn.functional.cross_entropy(logits, labels), logits
        >>> for _ in range(2):
        ...     result = adv.backward(closure)  # instead of loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> bool(adv.distance > 0)
        True
    """

    replays: int = 1  # how many steps in a row see the same batch

    def __init__(
        self,
        model: nn.Module,
        weight: float = 1.0,
        decay: float = 0.999,
        *,
        method: Method | None = None,
        divergence: Divergence | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        self.weight = number("weight", weight)
        self.decay = number("decay", decay)
        if self.decay > 1:
            raise ValueError(f"decay is a share of the old average, at most 1, not {decay}")
        self.compare = Comparison(divergence, "BregmanProximal", model)
        self.method = _held(model, method, options)
        self.model, self._engine, self._schedule = model, self.method._engine, self.method._schedule
        if self._engine.new_term is not None:
            raise ValueError("this method is held by a BregmanProximal already")
        self._engine.refuse(sharded=SHARDED)
        self._check_resolution()
        self._teacher = Teacher(model, self._engine.inventory, self._engine.places.fused)
        self._changes = WeightChanges(model)
        self._changed = self._changes.count()
        self.updates = 0
        self.distance = torch.zeros((), device=self._engine.device)  # D of the last step
        self._attached: Any = None
        self.replays = getattr(self.method, "replays", 1)  # more than one with FreeAT
        self._takes_unlabelled = self.method._takes_unlabelled
        self._engine.new_term = lambda step: TeacherTerm(_Asked(self), step)

    def _check_resolution(self) -> None:
        least = max((torch.finfo(p.dtype).eps for p in self.model.parameters() if p.requires_grad), default=0.0)
        if 0 < 1 - self.decay < least:
            raise ValueError(
                f"with decay={self.decay} an average in the precision of these weights (1 + {least:.2g} is the next "
                "number) would never move: keep the weights in float32 under autocast, or take a smaller decay"
            )

    # The teacher

    @property
    def teacher(self) -> dict[str, Tensor]:
        """The teacher's weights, by name."""
        return self._teacher.weights

    def attach(self, optimizer: Optimizer) -> Self:
        """Update the teacher after every step of `optimizer` (of accelerate's wrapper: of what is inside).

        Where the owner of the backward steps the optimizer (accelerate under DeepSpeed), after every step of its.

        Raises:
            ValueError: the optimizer steps none of the model's weights.
        """
        self._detach()
        stepping = who_steps(self._teacher.students.values(), optimizer, self._engine.owner)
        self._attached = stepping.register_step_post_hook(updates(weakref.ref(self)))
        weakref.finalize(self, self._attached.remove)
        return self

    def update(self) -> None:
        """Move the teacher towards the weights: on the device, in one call, without synchronising."""
        self._teacher.average(self.decay)
        self.updates += 1

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    # A step: the method's, and the term

    def backward(
        self,
        closure: Closure,
        mask: Masks = None,
        attack: Closure | None = None,
        step: int | None = None,
        groups: Groups = None,
    ) -> StepResult:
        """The method's step, or plain training's, and the term."""
        self._engine.look()
        self._look_at_the_weights()
        result = self.method.backward(closure, mask, attack, step, groups)
        if not self._engine.owner.steps:  # otherwise weights may have been trained in it
            self._changed = self._changes.count()
        return result if not isinstance(self.method, Plain) else result._replace(adv_loss=self.distance)

    def _look_at_the_weights(self) -> None:
        """A teacher that is never updated is a mistake; weights that were loaded before the first step are none."""
        self._teacher.follow()
        if self.updates or self._changes.count() == self._changed:
            return
        if self._attached is None or self._changes.steps:
            raise RuntimeError(NEVER_UPDATED)
        self._teacher.copy()

    def run(self, step: Step) -> StepResult:
        """The method's."""
        return self.method.run(step)

    def perturbed(
        self, closure: Closure, mask: Masks = None, groups: Groups = None
    ) -> contextlib.AbstractContextManager[None]:
        """The method's; without one, the plain model."""
        return self.method.perturbed(closure, mask, groups)

    @property
    def skipped(self) -> Tensor:
        """The method's."""
        return self.method.skipped

    @property
    def perturbation_norm(self) -> Tensor:
        """The method's; without one, zero."""
        return self.method.perturbation_norm

    def close(self) -> None:
        """Take the method out of the model, and the hook off the optimizer."""
        self._detach()
        self._changes.close()
        self._engine.new_term = None
        self.method.close()

    def capture(self, fn: Callable[[Any], Any], example_batch: Any) -> Callable[[Any], Any]:
        """As for every method; the teacher is updated outside, by the optimizer's hook.

        Raises:
            ValueError: with dropout="fresh", where the teacher's masks would not be the model's.
        """
        if self._engine.dropout == "fresh":
            raise ValueError("capture() needs dropout='same' or 'off' here: the teacher sees the clean pass's masks")
        return self.method.capture(fn, example_batch)

    # For a checkpoint

    def state_dict(self) -> dict[str, Tensor]:
        """The method's state, and the teacher."""
        return {
            **self.method.state_dict(),
            **self._teacher.state_dict(),
            "updates": torch.tensor(self.updates, device="cpu"),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another run was when `state_dict` was called."""
        self.method.load_state_dict(state)
        self._teacher.load_state_dict(state)
        self.updates = int(state["updates"])


class Plain(Method):
    """Plain training: the method where none is given."""

    def backward(
        self,
        closure: Closure,
        mask: Masks = None,
        attack: Closure | None = None,
        step: int | None = None,
        groups: Groups = None,
    ) -> StepResult:
        """As for every method; there is no attack."""
        if attack is not None:
            raise ValueError("BregmanProximal without a method attacks nothing: leave attack= out, or give it a method")
        return super().backward(closure, mask, None, step, groups)

    def run(self, step: Step) -> StepResult:
        """One plain pass."""
        return self._plain(step)

    def perturbed(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """The model as it is."""
        return contextlib.nullcontext()

    @property
    def perturbation_norm(self) -> Tensor:
        """Zero."""
        return torch.zeros((), device=self._engine.device)


class _Asked:
    """The teacher of one method, as its term asks it."""

    def __init__(self, method: BregmanProximal) -> None:
        self._method = method

    def answer(self, closure: Closure) -> Tensor:
        """The teacher's logits."""
        return self._method.compare.logits(self._method._teacher.answer(closure))

    def distance(self, output: Any, answer: Tensor, step: Step) -> Tensor:
        """The weighted divergence, for the backward."""
        method = self._method
        term = method.compare(method.compare.logits(output), answer, step, method.weight * step.share)
        step.undo.append(functools.partial(setattr, method, "distance", method.distance))
        method.distance = term.detach() / (method.weight or 1)
        return term


def _held(model: nn.Module, method: Method | None, options: StepOptions) -> Method:
    """The method that a BregmanProximal holds; plain training where none is given."""
    if method is None:
        return Plain(model, **options)
    if not isinstance(method, Method) or isinstance(method, BregmanProximal):
        raise TypeError(f"method= takes another method of fastadv, not {type(method).__name__}")
    if options:
        raise TypeError(f"{', '.join(options)} belong to the method: give them to {type(method).__name__}")
    if method.model is not model:
        raise ValueError("method= was made with another model: make both with the same one")
    return method
