"""The figures as pictures: SVG, of the heap as users have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.condense import OURS, Rows
from fastadv.train.plots import svg

COLOURS = {
    "plain": "#9ca3af",
    "reference": "#6b7280",
    "torch, index_add": "#0e7490",
    "torch, autograd": "#0e7490",
    "torch": "#c2410c",
    "compiled": "#a16207",
    "bert4torch": "#7e22ce",
    "smart-pytorch": "#7e22ce",
    "transformers": "#7e22ce",
    OURS: "#1d5fbf",
}
MEANING = {"reference": "reference (script, or paper)", "torch": "torch (best plain PyTorch)", OURS: "fastadv"}
METHOD = "step of a method, "
AXES = {  # of test_scaling: what the panel shows, and its unit
    "vocabulary": ("attack step", "vocabulary"),
    "tokens": ("attack step", "tokens in the batch"),
    "dimension": ("attack step", "dimension of the embeddings"),
    "steps": ("training step, PGD-K", "steps K"),
    "whole step": ("training step, PGD-3", "vocabulary"),
}


def every(condensed: Mapping[str, Any]) -> dict[str, str]:
    """By file name: those for which there are figures."""
    users = {name: heaps["users"] for name, heaps in condensed["groups"].items() if "users" in heaps}
    methods = {name.removeprefix(METHOD): rows for name, rows in users.items() if name.startswith(METHOD)}
    growth = {axis: found for axis in AXES if (found := along(users, axis))}
    cost = {axis: found for axis, found in growth.items() if axis == "vocabulary"}
    made = {"step_time.svg": (step_time, methods), "attack_cost.svg": (lines, cost), "scaling.svg": (lines, growth)}
    drawn: dict[str, str] = {name: draw(figures) for name, (draw, figures) in made.items() if figures}  # type: ignore[operator]
    return {"benchmarks.svg": ratios(users), **drawn}


def along(users: Mapping[str, Rows], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Points (value, median) of every contestant."""
    found: dict[str, list[tuple[float, float]]] = {}
    for rows in users.values():
        for name, row in rows.items():
            if row.get("axis") == axis:
                found.setdefault(name, []).append((row["value"], row["median"]))
    return {name: sorted(points) for name, points in found.items()}


def ratios(users: Mapping[str, Rows]) -> str:
    """Every contestant's time over fastadv's, group by group."""
    shown = {name: rows for name, rows in users.items() if OURS in rows and "axis" not in rows[OURS]}
    timed = {name: rows for name, rows in shown.items() if not name.startswith("peak memory")}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for contestant, colour in COLOURS.items():
            found = [(rows[contestant]["over_fused"], y) for y, rows in enumerate(timed.values()) if contestant in rows]
            if found and contestant != OURS:
                axes.scatter(*zip(*found, strict=True), color=colour, s=32, label=contestant, zorder=3)
        axes.axvline(1, color=COLOURS[OURS], lw=2, label="fastadv")
        axes.set_yticks(range(len(timed)), list(timed))
        axes.set_ylim(len(timed) - 0.4, -0.6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("median time over fastadv's (log scale); right of the line is slower")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return svg(draw, "benchmarks", (9.4, 0.9 + 0.3 * len(timed)), opaque=True)


def step_time(methods: Mapping[str, Rows]) -> str:
    """A bar for every contestant of every method that has all of them, and a line where plain training is."""
    shown = ("reference", "torch", OURS)
    methods = {name: rows for name, rows in methods.items() if all(contestant in rows for contestant in shown)}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        height = 0.8 / len(shown)
        for index, name in enumerate(shown):
            found = [rows[name] for rows in methods.values()]
            at, medians = [y + (index - 1) * height for y in range(len(found))], [row["median"] for row in found]
            whiskers = {"xerr": [row["iqr"] / 2 for row in found], "error_kw": {"lw": 0.8, "ecolor": "#374151"}}
            axes.barh(at, medians, height * 0.9, color=COLOURS[name], label=MEANING[name], **whiskers)
        plain = sorted(rows["plain"]["median"] for rows in methods.values() if "plain" in rows)
        if plain:
            axes.axvline(plain[len(plain) // 2], color=COLOURS["plain"], ls=":", lw=1.6, label="plain training")
        axes.set_yticks(range(len(methods)), list(methods))
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("seconds of one training step, median; whiskers: interquartile range")
        axes.legend(loc="lower right")

    return svg(draw, "step_time", (7.6, 1.0 + 0.42 * len(methods)), opaque=True)


def lines(growth: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> str:
    """A panel for each axis, both scales logarithmic: a flat line does not grow, a diagonal is linear."""

    def draw(figure: Figure) -> None:
        columns = min(3, len(growth))
        panels = figure.subplots(-(-len(growth) // columns), columns, squeeze=False)
        for axes in panels.flat[len(growth) :]:
            axes.axis("off")
        for axes, (axis, found) in zip(panels.flat, growth.items(), strict=False):
            _panel(axes, axis, found)
        handles = [axes.get_legend_handles_labels() for axes in panels.flat]
        named = {name: line for both in handles for line, name in zip(*both, strict=True)}
        empty = panels.flat[-1] if len(growth) < panels.size else panels.flat[0]
        empty.legend(named.values(), named.keys(), loc="center left" if empty is not panels.flat[0] else "upper left")

    rows = -(-len(growth) // 3)
    return svg(draw, "-".join(growth), (5.6, 3.4) if len(growth) == 1 else (10.4, 3.2 * rows), opaque=True)


def _panel(axes: Axes, axis: str, found: Mapping[str, list[tuple[float, float]]]) -> None:
    title, unit = AXES[axis]
    scale, name = (1e3, "ms") if max(median for points in found.values() for _, median in points) < 10 else (1, "s")
    for contestant, points in found.items():
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": COLOURS[contestant], "marker": "o", "ms": 4, "lw": 1.6}
        axes.plot(x, [scale * one for one in y], label=MEANING.get(contestant, contestant), **style)
    axes.set(xscale="log", yscale="log", title=title, xlabel=unit, ylabel=f"{name}, median")
    axes.set_xticks([value for value, _ in next(iter(found.values()))])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value % 1000 == 0 else f"{value:,.0f}")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.title.set_fontsize(10)
