r"""The calls of the classic scripts, on the methods of the same name: a script changes one import and nothing else.

.. math:: E \leftarrow E + \epsilon \, G / \lVert G \rVert_F \quad\text{(FGM)}, \qquad
    E \leftarrow E_0 + \Pi_\epsilon\big(E + \alpha \, G / \lVert G \rVert_F - E_0\big) \quad\text{(PGD)}

The constructors take what those classes take: `emb_name` and `epsilon`, by name or by position, PGD `alpha` as well.
The calls move the weights in place: every parameter that requires a gradient and whose name contains `emb_name`, each
with a norm of its own. G is whatever lies in `.grad`: under gradient accumulation that is the sum over the earlier
micro-batches too, as in the scripts. `backward` does not mix them, moves no weight and costs fewer passes.

Where a gradient has rows of zeros (the words that are in no batch), only the other rows can move, and only they are
copied, moved and put back. What `restore` puts back is bit for bit what was there, in the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastadv.engine.engine import Engine
from fastadv.engine.model import find
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.table_rollback import TableRollback
from fastadv.engine.safety.surroundings import grad_mode_kept
from fastadv.ops.grads import Backup

EMB_NAME = "word_embeddings"
ALIASES = {"alpha": "step_size"}


class _Calls:
    """The part of both methods' calls that is the same. `EmbeddingMethod` makes the attributes."""

    model: nn.Module
    scope: Any
    _emb_name: str | None
    _engine: Engine
    _moved: dict[nn.Parameter, TableRollback] | None = None  # None: nothing is attacked
    _classic: ClassVar[tuple[str, ...]] = ("emb_name",)  # options that only the scripts call so
    _numbers: ClassVar[tuple[str, ...]] = ("epsilon",)  # what numbers by position are

    if TYPE_CHECKING:

        @property
        def rule(self) -> Rule:
            """Of `EmbeddingMethod`."""

    else:

        def __new__(cls, *args: Any, **options: Any) -> Any:
            by_name = [ALIASES.get(name, name) for name in options]
            twice = {name for name in by_name if by_name.count(name) > 1} | by_position(cls, args[1:]).keys() & by_name
            if twice:
                raise TypeError(f"{cls.__name__} was given {', '.join(sorted(twice))} twice: give it once")
            return super().__new__(cls, *args, **options)

    @grad_mode_kept
    def restore(self, emb_name: str | None = None) -> None:  # noqa: ARG002
        """Put back everything that was attacked, bit for bit and in the same memory; also after an error.

        `emb_name` is accepted, as in the scripts, and not needed.

        Raises:
            RuntimeError: nothing is attacked.
        """
        if self._moved is None:
            raise RuntimeError("restore() without attack(): there is nothing to put back")
        for table in self._moved.values():
            table.restore()
        self._moved = None

    @grad_mode_kept
    def _move(self, emb_name: str | None, rule: Rule) -> None:
        """One step of every parameter that `emb_name` names, by default the constructor's."""
        torch.set_grad_enabled(False)
        if self.scope not in ("table", "row"):
            raise ValueError(f"attack() moves the table itself: scope must be 'table' or 'row', not {self.scope!r}")
        moving = _named(self.model, emb_name or self._emb_name or EMB_NAME)
        if self._moved is None:
            self._moved = {}
        for parameter in moving:
            if parameter.grad is not None:
                table = self._moved.setdefault(parameter, TableRollback(parameter, self._fused))
                self._step(table, parameter.grad, rule)

    def _step(self, table: TableRollback, grad: Tensor, rule: Rule) -> None:
        dense = grad if grad.layout == torch.strided else grad.to_dense()  # nn.Embedding(sparse=True)
        table.step(dense, rule, int(self.scope == "row"), self._engine.buffers.skipped_on(grad.device))

    @property
    def _fused(self) -> bool | None:
        return self._engine.places.fused


class ClassicFGM(_Calls):
    """`attack` and `restore`, as the classic script's FGM has them."""

    def attack(self, epsilon: float | str | None = None, emb_name: str | None = None) -> None:
        """Move every parameter whose name contains `emb_name` by `epsilon` along its gradient, in place.

        A parameter without a gradient stays, as does one whose gradient is zero or not finite. A second attack moves
        on from the first; `restore` still goes back to before both.

        Args:
            epsilon: the length of the step. Default: the method's own, which is 1.0 unless it was given another. A
                string here is `emb_name`.
            emb_name: part of the names of the parameters to move. Default: the constructor's, or "word_embeddings".

        Raises:
            ValueError: no parameter is named so, or all that are, are frozen; nothing has moved then.
            TypeError: a parameter is sharded (FSDP2) or not contiguous; nothing has moved then.

        Examples:
            >>> import fastadv, torch
            >>> model = torch.nn.ModuleDict({"word_embeddings": torch.nn.Embedding(10, 4)})
            >>> fgm, ids = fastadv.FGM(model), torch.tensor([1, 2])
            >>> loss = lambda: model["word_embeddings"](ids).square().sum()
            >>> loss().backward()
            >>> fgm.attack()
            >>> loss().backward()  # the adversarial gradient, on top of the clean one
            >>> fgm.restore()
        """
        if isinstance(epsilon, str):
            epsilon, emb_name = None, epsilon
        step_size = self.rule.step_size if epsilon is None else epsilon
        self._move(emb_name, self.rule._replace(step_size=step_size, epsilon=None, ball="none"))


class ClassicPGD(_Calls):
    """`attack`, `restore`, `backup_grad` and `restore_grad`, as the classic script's PGD has them."""

    _classic = ("emb_name", "alpha")
    _numbers = ("epsilon", "step_size", "steps")
    _backup: Backup | None = None

    def attack(
        self,
        epsilon: float | str | bool | None = None,
        alpha: float | bool | None = None,
        emb_name: str | None = None,
        is_first_attack: bool = False,
    ) -> None:
        """Move every parameter whose name contains `emb_name` by `alpha` along its gradient, then onto the ball.

        The ball is around what the first attack since `restore` found. A parameter without a gradient stays, as does
        one whose gradient is zero or not finite.

        Args:
            epsilon: radius of the ball. Default: the method's own, which is 1.0 unless it was given another. A string
                here is `emb_name`, a bool `is_first_attack`.
            alpha: the length of the step. Default: the method's `step_size`, which is 0.3 unless it was given another.
                A bool here is `is_first_attack`.
            emb_name: part of the names of the parameters to move. Default: the constructor's, or "word_embeddings".
            is_first_attack: whether this is the first attack since `restore`.

        Raises:
            ValueError: no parameter is named so, or all that are, are frozen; nothing has moved then.
            TypeError: a parameter is sharded (FSDP2) or not contiguous; nothing has moved then.
            RuntimeError: the first attack did not say that it is.

        Examples:
            >>> import fastadv, torch
            >>> model = torch.nn.ModuleDict({"word_embeddings": torch.nn.Embedding(10, 4)})
            >>> pgd, ids = fastadv.PGD(model), torch.tensor([1, 2])
            >>> loss = lambda: model["word_embeddings"](ids).square().sum()
            >>> loss().backward()
            >>> pgd.backup_grad()
            >>> for t in range(3):
            ...     pgd.attack(is_first_attack=t == 0)
            ...     model.zero_grad() if t < 2 else pgd.restore_grad()
            ...     loss().backward()
            >>> pgd.restore()
        """
        for first in (epsilon, alpha):  # attack(t == 0), attack("emb", t == 0)
            is_first_attack = first if isinstance(first, bool) else is_first_attack
        emb_name = epsilon if isinstance(epsilon, str) else emb_name
        if self._moved is None and not is_first_attack:
            raise RuntimeError("the first attack of a step must say is_first_attack=True")
        rule = self.rule
        step_size = rule.step_size if alpha is None or isinstance(alpha, bool) else alpha
        radius = rule.epsilon if epsilon is None or isinstance(epsilon, (bool, str)) else epsilon
        self._move(emb_name, rule._replace(step_size=step_size, epsilon=radius))

    @grad_mode_kept
    def backup_grad(self) -> None:
        """Copy every gradient there is (the script fails where one is None)."""
        parameters = list(self.model.parameters())
        if self._backup is None or not self._backup.is_of(parameters):  # the model may have got new ones
            self._backup = Backup(parameters, fused=self._fused)
        self._backup.save()

    @grad_mode_kept
    def restore_grad(self) -> None:
        """Put the copies back, in place where there is a gradient; a parameter that had none has none again.

        Raises:
            RuntimeError: there was no `backup_grad()`.
        """
        if self._backup is None:
            raise RuntimeError("restore_grad() without backup_grad(): there is nothing to put back")
        self._backup.restore()


def by_position(method: type[_Calls], values: Sequence[object]) -> dict[str, Any]:
    """The constructor's arguments after the model: a string is `emb_name`, numbers are what the scripts have there.

    Raises:
        TypeError: something else, or too many.
    """
    found: dict[str, Any] = {}
    names = list(method._numbers)
    for value in values:
        text = isinstance(value, str)
        if (text and "emb_name" in found) or not (text or (names and isinstance(value, (int, float, type(None))))):
            raise TypeError(
                f"{method.__name__} takes emb_name (a string) and {', '.join(method._numbers)} (numbers) after the "
                f"model, in this order, and {value!r} is none of these: give it by name"
            )
        found["emb_name" if text else names.pop(0)] = value
    return found


def places(model: nn.Module, emb_name: str | None) -> dict[str, Any]:
    """What `backward` perturbs: the embedding that `emb_name` names, where that is one.

    Of several it is the model's input embedding. Otherwise the calls work all the same, and `backward` refuses.
    """
    if emb_name is None:
        return {}
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    named = {name: part for name, part in parts if emb_name in f"{name}.weight"}
    if len({id(part.weight) for part in named.values()}) == 1:
        return {"embedding": list(named.values())}
    try:
        own = find.find(model, None)
    except ValueError:
        own = []
    if any(part is one for part in named.values() for one in own):
        return {"embedding": own}
    candidates = ", ".join(named or dict(parts)) or "none"
    return {
        "perturbs": False,
        "refusal": f"emb_name={emb_name!r} names {len(named) or 'no'} embeddings, so only attack() and restore() know "
        f"what to move: say which one backward() perturbs, embedding=NAME. Candidates: {candidates}.",
    }


def _named(model: nn.Module, emb_name: str) -> list[nn.Parameter]:
    """The parameters that require a gradient and whose name contains `emb_name`; a shared one is there once."""
    named = {name: parameter for name, parameter in model.named_parameters() if emb_name in name}
    moving = [parameter for parameter in named.values() if parameter.requires_grad]
    if not named:
        tables = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
        raise ValueError(
            f"no parameter's name contains {emb_name!r}: pass emb_name=, part of the name of what is to move. "
            f"Embeddings: {', '.join(tables) or 'none'}"
        )
    if not moving:
        raise ValueError(
            f"every parameter whose name contains {emb_name!r} is frozen ({', '.join(named)}): it has no gradient to "
            "follow. Unfreeze it, or use backward(), which perturbs frozen embeddings as well"
        )
    for name, parameter in named.items():
        if parameter.requires_grad and (hasattr(parameter, "to_local") or not parameter.is_contiguous()):
            raise TypeError(f"{name} is sharded or strided, and cannot be moved in place: use backward()")
    return moving
