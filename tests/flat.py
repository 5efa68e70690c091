"""The backends of an op, called with the flat list of its schema: tests vary one argument of it at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastadv.arguments.lookup import Lookup, lookup_of
from fastadv.arguments.rule import Rule
from fastadv.arguments.segments import Segments

Step = Callable[..., None]


def ascends(run: Step) -> Step:
    """A backend of ascend."""

    def ascend(
        delta: Tensor,
        grad: Tensor,
        mask: Tensor | None,
        skipped: Tensor,
        step_size: float,
        epsilon: float | None,
        direction: str,
        ball: str,
        group: int,
        weight: Tensor | None = None,
        ids: Tensor | None = None,
        slot: Tensor | None = None,
        embedded: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> None:
        rule = Rule(step_size, epsilon, direction, ball, group)
        run(delta, grad, mask, skipped, rule, lookup_of(weight, ids, slot, embedded), starts)

    return ascend


def table_steps(run: Step) -> Step:
    """A backend of table_step."""

    def table_step(
        delta: Tensor,
        grad: Tensor,
        skipped: Tensor,
        step_size: float,
        epsilon: float | None,
        direction: str,
        ball: str,
        group: int,
        slot: Tensor,
        order: Tensor,
        starts: Tensor,
        stops: Tensor,
        weight: Tensor,
        ids: Tensor,
        embedded: Tensor,
        room: Tensor,
    ) -> None:
        rule, groups = Rule(step_size, epsilon, direction, ball, group), Segments(slot, order, starts, stops)
        run(delta, grad, skipped, rule, groups, Lookup(weight, ids, None, embedded), room)

    return table_step


def row_steps(run: Step) -> Step:
    """A backend of rows_step."""

    def rows_step(
        table: Tensor,
        grad: Tensor,
        saved: Tensor | None,
        rows: Tensor | None,
        skipped: Tensor,
        *rule: Any,
        **named: Any,
    ) -> None:
        run(table, grad, saved, rows, skipped, Rule(*rule, **named))

    return rows_step
