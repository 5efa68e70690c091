"""The registry: every case by its name. The benchmarks, `compare` and `gpu-check` take theirs from here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from bench import attack_steps, divergences, methods, ops, training
from bench.attack_steps import INSIDE, SAMPLE, TABLE, TABLE_ON_GPU
from bench.contest import Case, Field
from bench.race import LIMIT
from bench.workloads import MAIN, PGD, Shape, Size, Workload, workload

Cases = dict[str, Case]
PLAIN, ALL = ("reference", "torch", "fused"), ("reference", "torch", "compiled", "fused", LIMIT)
COPIES = ("torch", "fused", LIMIT)


class Op(NamedTuple):
    """What makes its contest, who takes part, and on how many models."""

    make: Callable[[Workload], Field]
    who: tuple[str, ...] = ALL
    models: int | None = 1  # None: all of them; 0: one, whose name the group does not have
    rounds: int = 15
    brief: bool = False  # on the users' heap alone, and not in `-m quick`


OPS: dict[str, Op] = {
    **{f"ascend, {scope} scope": Op(partial(ops.ascend, scope=scope)) for scope in ops.DIMS},
    "ascend, token scope, and the words": Op(partial(ops.ascend, scope="token", words=True), brief=True),
    **{
        f"moment_step, {scope} scope": Op(partial(ops.moment_step, scope=scope), brief=True)
        for scope in ("sample", "token")
    },
    "gather_perturb": Op(ops.gather, models=None),
    "gather_perturb's backward": Op(ops.backward, (*PLAIN, LIMIT), 2),
    "gather_perturb's backward, fresh pages": Op(partial(ops.backward, fresh=True), PLAIN, 0, brief=True),
    "segments": Op(ops.segments, PLAIN, 2),
    "segment_sum": Op(ops.segment_sum, models=2),
    "rows, touched": Op(ops.touched, COPIES, 0, brief=True),
    **{
        f"rows, {what}{', every third' if some else ''}": Op(partial(ops.rows, what=what, some=some), who, 0, 15, some)
        for what, who in {"back_up": COPIES, "restore": COPIES, "step": ALL}.items()
        for some in (False, True)
    },
    "attack step, sample scope": Op(attack_steps.sample_scope, (*SAMPLE, LIMIT), None, 21),
}


def group(name: str) -> str:
    """What the report calls a case."""
    return name.replace("segments", "a batch's sort")


def cases(size: Size, device: str = "cpu") -> Cases:
    """All of them; what takes part in one is made when it is run."""
    steps = {**pgd_cases(size, device), **method_cases(size, device), **growth(size, device)}
    return {**op_cases(size, device), **steps}


def op_cases(size: Size, device: str) -> Cases:
    """With attack steps: from dE, the gradient at the embedding's output, to the next forward's E, the second step."""
    every = {name: op for name, op in OPS.items() if device == "cpu" or "fresh pages" not in name}
    steps = TABLE if device == "cpu" else TABLE_ON_GPU
    table = Op(partial(attack_steps.table_scope, table=steps), (*steps, LIMIT), None, 21)
    every["attack step, table scope"] = table
    first, found = next(iter(size.shapes)), {}
    for name, op in every.items():
        for model in list(size.shapes)[: 1 if op.models == 0 else op.models]:
            found[name if op.models == 0 else f"{name}, {model}"] = _op(op, size, device, model)
    inside = table._replace(make=partial(table.make, ball=INSIDE))
    found[f"attack step, table scope, {first}, inside the ball"] = _op(inside, size, device, first)
    for what in ("copy", "accumulate", "average"):
        build = partial(ops.grads, what, *size.gradients, device)
        found[f"grads, {what}"] = Case(build, (*PLAIN, LIMIT), retained=15, quick=True)
    for rows, classes in size.logits:
        build = partial(divergences.field, rows, classes, device, size.dtype)
        name = f"symmetric KL and gradients, {rows} x {classes:,} logits"
        found[name] = Case(build, (*divergences.CONTESTANTS, LIMIT), retained=15, quick=True)
    build, who = partial(build, constant=True), (*divergences.TO_A_CONSTANT, LIMIT)
    return {**found, f"{name}, from a constant": Case(build, who)}


def _op(op: Op, size: Size, device: str, model: str) -> Case:
    make = partial(_on, op.make, size.shapes[model], device, size.dtype)
    retained, quick = op.rounds * (model in MAIN and not op.brief), model == next(iter(size.shapes)) and not op.brief
    return Case(make, op.who, op.rounds, retained, quick=quick)


def _on(make: Callable[[Workload], Field], *place: object) -> Field:
    return make(workload(*place))


def pgd_cases(size: Size, device: str) -> Cases:
    """Whole steps: all contestants' gradients must be the script's."""
    found = {}
    for work in size.steps:
        batch, length, vocabulary = work
        build = partial(training.pgd, size.pgd, work, size.network, device, 3, size.dtype, 1e-4)
        shown = "" if work[:2] == size.steps[0][:2] else f", {batch} x {length}"
        name = f"training step, PGD-3, V {vocabulary:,}{shown}"
        found[name] = Case(build, size.pgd, rounds=7, retained=2, warmup=0, budget=90)
    return found


def method_cases(size: Size, device: str) -> Cases:
    """Every method, with plain training beside it for scale; and a model under torch.compile."""
    build, who = partial(training.compiled, size, device), ("plain", "compiled", "fused")
    found = {"training step, PGD-3, a compiled model": Case(build, who, rounds=5, warmup=1)}
    for name, who in methods.CONTESTANTS.items():
        found[f"step of a method, {name}"] = Case(partial(methods.field, name, size, device), who, rounds=5, warmup=0)
    return found


def growth(size: Size, device: str) -> Cases:
    """How cost grows. Table scope should not notice the vocabulary; tokens and dimension are linear.

    PGD-K needs a pass more for the script and a probe more for the others; V is what a small network's step notices.
    """
    base, found = next(iter(size.shapes.values())), {}
    hidden, _, heads, inner = size.network
    attacks: dict[str, Callable[[int], tuple[str, Shape]]] = {
        "vocabulary": lambda value: (f"vocabulary {value:,}", base._replace(vocabulary=value)),
        "tokens": lambda value: (f"{value:,} tokens", base._replace(batch=value // base.length)),
        "dimension": lambda value: (f"D {value:,}", base._replace(dimension=value)),
    }
    for axis, value in ((axis, value) for axis, values in size.growth.items() for value in values):
        if axis in attacks:
            name, shape = attacks[axis](value)
            build = partial(_on, _attack, shape, device, size.dtype)
            found[f"attack step, {name}"] = Case(build, PLAIN, budget=2, extra={"axis": axis, "value": value})
            continue
        vocabulary, steps = (size.steps[0][-1], value) if axis == "steps" else (value, 3)
        small = (*size.small, vocabulary), (hidden, 2, heads, inner)
        build = partial(training.pgd, PGD, *small, device, steps, size.dtype, 1e-3)
        name = f"PGD-{value}" if axis == "steps" else f"PGD-3, small network, V {value:,}"
        found[f"training step, {name}"] = Case(build, PGD, 5, warmup=0, extra={"axis": axis, "value": value})
    return found


def _attack(work: Workload) -> Field:
    """Without what is compiled: a graph for every size takes longer than the size says.

    The script's r is what its table has moved by, and so has the table's rounding: the more rows share the step, the
    shorter each one's part of it.
    """
    return attack_steps.table_scope(work, table={name: TABLE[name] for name in PLAIN})._replace(tolerance=5e-4)
