"""What the methods share that perturb embeddings: a rule to ascend by, a start, and `find`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastadv.arguments.rule import MOMENT_DIRECTIONS
from fastadv.engine.at import At
from fastadv.engine.found import Found
from fastadv.engine.lookups import Masks
from fastadv.engine.model.find import mean_row_norm
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.perturb.ranks import Ranks
from fastadv.engine.perturb.rule import BySite, Rule
from fastadv.engine.perturb.scopes import SCOPES, TABLE_SCOPES
from fastadv.engine.perturb.start import Draw, RandomStart, Total, resolve, uniform
from fastadv.engine.results import Closure
from fastadv.engine.step import Step
from fastadv.methods.base import Method
from fastadv.methods.options import BALLS, CLAMPS, DIRECTIONS, Norm, Scope, TiedOptions, number, one_of, whole
from fastadv.methods.radii import ONE_TABLE, Radius, Size, by_site, listed, together

LENGTHS = (
    "a random start is scaled by each sample's length, and with scope='batch' a sample may lie on one rank of "
    "process_group= or on several: use scope='sample' for sequence shards, or random_start=False or a callable"
)
ONE_RANGE = (
    "clamp='batch' takes the range of one module's activations of a whole batch: use scope='sample', 'token' or "
    "'batch', one module as embedding=, and no process_group="
)


class EmbeddingMethod(Method):
    """A method that perturbs embeddings. A subclass writes `run` and `search`; see docs/your-own-method.md.

    Args:
        model: the model to train, wrapped (DDP, torch.compile, PEFT) or not.
        epsilon: radius of the ball; None: no ball. One for all perturbed modules, or one for each: a sequence in the
            order of `embedding`, or a dict by name.
        step_size: length of one ascent step; one for all, or one for each.
        steps: number of ascent steps.
        norm: "l2" or "linf": the direction of a step and the ball together.
        scope: what the norm is over: "table", "row" (per word), "batch", "sample", "token".
        random_start: False; True (magnitude epsilon); a magnitude; or a callable `(shape, mask) -> tensor`.
        direction, ball: "l2", "sign", "max", or "adam", "adamw", "rmsprop" for the step (see docs/concepts.md); "l2",
            "linf" or None for the ball. Default: as `norm` says.
        clamp: "batch": perturbed activations stay in the range of the clean batch's (one module, position scopes).
        relative: epsilon, step_size and the magnitude of the start are in units of the mean norm of the embedding's
            rows, taken once, when the method is made. A callable start is not scaled.
        embedding: the module whose output is perturbed, its name, or several; None: the model's input embedding. A name
            may hold alternatives, "layers.{8,16}.mlp"; ("layers.8", "input") perturbs what a module is given. Each has
            a perturbation, a ball and a norm of its own.
        tied, attack_mode: see `fastadv.PGD`.
        process_group: a ProcessGroup or DeviceMesh dimension whose ranks each hold a part of what a norm is over: of
            every sample (sequence shards), or for scope "batch", "table" and "row" of the batch.
        start_step, every, dropout, fused, backward, scaler, atomic, probe_dtype, communication: see `fastadv.PGD`.

    Raises:
        TypeError, ValueError: an argument that cannot be, or an embedding that cannot be found.
        RuntimeError: `fused=True` where not every op has a native backend.
    """

    _places: Mapping[str, Any] = MappingProxyType({})
    _norms: ClassVar[dict[str, tuple[str, str]]] = {"l2": ("l2", "l2"), "linf": ("sign", "linf")}  # direction, ball
    _one_radius: ClassVar[bool] = False  # whether it reckons with epsilon, so that this is one for all modules
    _no_moments: ClassVar[str] = ""  # why its search cannot step by moments

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: Radius = 1.0,
        step_size: Size = 0.3,
        steps: int = 3,
        norm: Norm = "l2",
        scope: Scope = "sample",
        random_start: RandomStart = False,
        **options: Unpack[TiedOptions],
    ) -> None:
        one_of("norm", norm, self._norms)
        one_of("scope", scope, SCOPES)
        tied, embedding = options.pop("tied", "lookup"), options.pop("embedding", None)
        embedding = self._places.get("embedding", embedding)
        one_of("tied", tied, ("lookup", "both"))
        if tied == "both" and (scope not in TABLE_SCOPES or random_start is not False):
            raise ValueError(
                "tied='both' moves the table itself, from where it is: it needs scope='table' or 'row' and "
                "random_start=False; tied='lookup' perturbs the lookups alone"
            )
        if self._one_radius:
            epsilon, step_size = None if epsilon is None else number("epsilon", epsilon), number("step_size", step_size)
        self.epsilon: Any = by_site("epsilon", epsilon, model, embedding)
        self.step_size: Any = by_site("step_size", step_size, model, embedding)
        if scope in TABLE_SCOPES and (isinstance(self.epsilon, list) or isinstance(self.step_size, list)):
            raise ValueError(ONE_TABLE.format(scope=scope))
        self.steps = whole("steps", steps, 1)
        self.scope = scope
        self._ranks = Ranks.of(options.pop("process_group", None))
        if tied == "both" and self._ranks is not None:
            raise ValueError("tied='both' moves each rank's own table: process_group= needs tied='lookup'")
        self._direction, self._ball = self._directed(norm, options)
        if tied == "both" and self._direction in MOMENT_DIRECTIONS:
            raise ValueError(f"direction={self._direction!r} keeps no moments of a table: use tied='lookup'")
        self._relative, self._random_start = options.pop("relative", False), random_start
        self._unit = mean_row_norm(model, embedding) if self._relative else 1.0
        self._start = self._resolve(random_start)
        self._check_lengths()
        attack_mode = options.pop("attack_mode", None)
        one_of("attack_mode", attack_mode, (None, "eval"))
        where = {"embedding": embedding, "scope": scope, "tied": tied}
        self._places = {**where, "ranks": self._ranks, "attack_mode": attack_mode, **self._places}
        clamp = options.pop("clamp", None)
        super().__init__(model, **options)  # type: ignore[misc]  # the others have been taken out
        if clamp is not None:
            self._clamp(clamp)

    def _directed(self, norm: Norm, options: TiedOptions) -> tuple[str, str]:
        """Direction and ball: each as given, or as `norm` says."""
        direction, ball = self._norms[norm]
        chosen = options.pop("ball", ball if ball != "none" else None)
        if chosen is not None:
            one_of("ball", chosen, BALLS)
        direction = options.pop("direction", cast(Any, direction))
        one_of("direction", direction, DIRECTIONS)
        if direction in MOMENT_DIRECTIONS and self._no_moments:
            raise ValueError(f"{type(self).__name__}: direction={direction!r} {self._no_moments}")
        return direction, chosen or "none"

    def _clamp(self, clamp: str) -> None:
        """From now on perturbed activations stay within the clean batch's."""
        try:
            one_of("clamp", clamp, CLAMPS)
            if self.scope in TABLE_SCOPES or self._ranks is not None or len(self._engine.modules) > 1:
                raise ValueError(ONE_RANGE)
        except ValueError:
            self.close()
            raise
        self._engine.places = self._engine.places._replace(clamps=True)

    # The user's calls

    def at(self, mask: Tensor) -> contextlib.AbstractContextManager[None]:
        r"""Inside a closure: the forwards in this block carry the perturbation at the positions of `mask`.

        .. math:: h_{b,t} \leftarrow h_{b,t} + \delta_{b,n} \quad \text{at the n-th true position t of sample b}

        So several forwards share one perturbation, whatever their texts, lengths and padding sides: [B, N, D] for each
        perturbed module, N the largest number of positions of a sample. Their gradients add up. Forwards outside of
        the block are the plain model's. A closure that never uses `at` perturbs every forward, each by itself.

        The closure of the loss and that of the attack may run other texts and other numbers of forwards. Leave `mask=`
        and `groups=` out of the call. Where no step runs (a plain step, an evaluation) the block does nothing; inside
        `found.applied()` it says where what was found lies.

        Args:
            mask: [B, T] of that forward, bool or zeros and ones: true where it carries the perturbation. In every mask
                of a step a sample has as many true positions; it may have none.

        Raises:
            ValueError: `scope="table"` or `"row"`, `process_group=` or `clamp=`. Inside of a step: a mask of another
                shape than the forwards, with other values or other numbers of positions, or `mask=` besides.
            RuntimeError: a block in a block; a first pass that had none; YOPO, whose partial passes end early.

        Examples:
            >>> import fastadv, torch
            >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 1))
            >>> adv = fastadv.PGD(model, epsilon=0.1, step_size=0.05, scope="token", clean_weight=0)
            >>> left, right = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 2, 5]])
            >>> def closure():
            ...     with adv.at(torch.tensor([[0, 1, 1, 0]])):
            ...         loss = model(left).square().mean()
            ...     with adv.at(torch.tensor([[1, 1, 0]])):
            ...         loss = loss + model(right).square().mean()
            ...     return loss + model(left).mean()  # plain
            >>> result = adv.backward(closure)
            >>> round(float(adv.perturbation_norm), 4)
            0.1
        """
        return At(self._engine, mask)

    def find(self, closure: Closure, mask: Masks = None, groups: Groups = None) -> Found:
        """Search for the perturbation of one batch, by probes and ascents alone: no `.grad` is touched.

        Args:
            closure: as for `backward`, of the batch that is to be perturbed.
            mask: as for `backward`.
            groups: as for `backward`.

        Returns:
            The perturbation, to hold and to apply: `with found.applied():`.

        Raises:
            As `backward` does. The model is left as it was.

        Examples:
            >>> found = adv.find(lambda: model(ids, labels=labels).loss)  # doctest: +SKIP
            >>> with found.applied():  # doctest: +SKIP
            ...     logits = model(ids).logits
        """
        return self._engine.run(self._found, closure, mask, groups=groups, start=lambda: self._start)

    def _found(self, step: Step) -> Found:
        self._aim(step)
        self.search(step)
        if step.first is None:  # no pass has shown yet what is perturbed
            step.probe()
        return Found(self._engine, step)

    def perturbed(
        self, closure: Closure, mask: Masks = None, groups: Groups = None
    ) -> contextlib.AbstractContextManager[None]:
        """Find the perturbation of one batch and apply it to every forward inside the block: `find` and `applied`."""
        return self.find(closure, mask, groups).applied()

    def state_dict(self) -> dict[str, Tensor]:
        """The method's state, and the unit of relative radii."""
        unit = {"unit": torch.tensor(self._unit, dtype=torch.float64)} if self._relative else {}
        return {**super().state_dict(), **unit}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another run was when `state_dict` was called."""
        super().load_state_dict(state)
        if self._relative and "unit" in state:
            self._unit = float(state["unit"])
            self._start = self._resolve(self._random_start)

    def renew_unit(self) -> None:
        """Take the unit of relative radii anew, from the embedding's rows as they are now: they grow in pretraining.

        Waits for the device, and for the other processes where the table is sharded. Other radii stay as they are.
        """
        if self._relative:
            self._unit = mean_row_norm(self.model, self._places["embedding"])
            self._start = self._resolve(self._random_start)

    @property
    def rule(self) -> Rule:
        """How one step ascends, in the embedding's own units."""
        unit, course = self._unit, (self._direction, self._ball)
        each = together(self.step_size, self.epsilon)
        return BySite.made([Rule(a * unit, None if r is None else r * unit, *course) for a, r in each])

    @property
    def perturbation_norm(self) -> Tensor:
        """The last perturbation's norm, the mean over its groups: 0-d, on the device."""
        return self._engine.norm(self._kind)

    @property
    def perturbation_norms(self) -> dict[str, Tensor]:
        """The last perturbation's norm at each perturbed module, by name: 0-d, on the device.

        Table scopes have one perturbation for all tables, and its norm here at each. With `process_group=` these are
        of this rank's part.
        """
        return self._engine.norms(self._kind)

    # A subclass's part

    def search(self, step: Step) -> None:
        """From the first gradient to the perturbation: by ascents, with a probe between each two."""
        raise NotImplementedError

    def _aim(self, step: Step) -> None:
        """Before a search without training: let it `maximise` what it does in training."""

    def _resolve(self, random_start: RandomStart) -> Draw | None:
        """The start that the argument stands for."""
        drawn = uniform(self._kind, self._lengths)
        by_sample = self._kind == "l2"
        return Draw.by_site(
            [
                resolve(random_start, epsilon, lambda size: drawn(size * self._unit), by_sample=by_sample)
                for epsilon in listed(self.epsilon)
            ]
        )

    def _check_lengths(self) -> None:
        if self._lengths is not None and self.scope == "batch" and self._start is not None and self._start.by_sample:
            raise ValueError(LENGTHS)

    @property
    def _lengths(self) -> Total | None:
        """What adds up the parts of a sample that other ranks hold; a table's rows are known to all of them."""
        return None if self._ranks is None or self.scope in TABLE_SCOPES else self._ranks.total

    def _draw(self) -> Draw | None:
        return self._start

    @property
    def _kind(self) -> str:
        """The norm in which perturbations are measured: the ball's; without one, the direction's."""
        ball = self._ball if self._ball != "none" else self._direction
        return "l2" if ball == "l2" else "linf"
