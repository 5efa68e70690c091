"""Draws launches.svg, the picture of docs/kernels.md: what ascend's launches read, keep in registers and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MUTED = "#1f2937", "#6b7280"
MEMORY, REGISTERS, HELD = "#e0f2fe", "#fef3c7", "#dcfce7"


def box(axes: Any, x: float, y: float, width: float, text: str, colour: str, height: float = 0.62) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=colour, ec=MUTED, lw=0.8
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=MUTED, lw=0.9))


def frame(axes: Any, x: float, y: float, width: float, height: float, title: str) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fc="none", ec=INK, lw=1.1
    )
    axes.add_patch(shape)
    axes.text(x + 0.12, y + height + 0.1, title, ha="left", va="bottom", fontsize=9, color=INK)


def by_row(axes: Any) -> None:
    """Token and row scope."""
    top = 4.6
    axes.text(0, top + 3.55, "A group is a row (token, row): one launch", fontsize=11, weight="bold", color=INK)
    frame(axes, 2.75, top, 6.1, 2.85, "rows_kernel: some whole rows, in registers")
    for y, text in ((2.1, "g, bf16"), (1.15, r"$\delta$, float32"), (0.2, "W[id], bf16")):
        box(axes, 0, top + y, 1.7, text, MEMORY)
        arrow(axes, (1.75, top + y + 0.31), (2.95 if y > 1 else 6.05, top + y + 0.31))
    box(axes, 3.0, top + 2.1, 2.3, "u,   a = step / |u|", REGISTERS)
    box(axes, 3.0, top + 1.15, 2.3, r"m = $\delta$ + a u,   |m|", REGISTERS)
    box(axes, 6.1, top + 1.15, 2.5, r"$\delta$ = m min(1, $\epsilon$ / |m|)", REGISTERS)
    box(axes, 6.1, top + 0.2, 2.5, r"E = round(W[id] + $\delta$)", REGISTERS)
    arrow(axes, (4.15, top + 2.08), (4.15, top + 1.81))
    arrow(axes, (5.35, top + 1.46), (6.05, top + 1.46))
    arrow(axes, (7.35, top + 1.13), (7.35, top + 0.86))
    for y, text in ((1.15, r"$\delta$, float32"), (0.2, "E, bf16")):
        box(axes, 9.9, top + y, 1.7, text, MEMORY)
        arrow(axes, (8.65, top + y + 0.31), (9.85, top + y + 0.31))


def by_group(axes: Any) -> None:
    """Sample, batch and table scope."""
    axes.text(
        0, 3.55, "A group is many rows (sample, batch, table): two launches", fontsize=11, weight="bold", color=INK
    )
    frame(axes, 2.75, 0, 2.5, 2.85, "sums_kernel")
    frame(axes, 6.75, 0, 2.1, 2.85, "move_kernel")
    for y, part in ((2.05, "part 0: tiles 0, P, 2P ..."), (1.1, "part 1: tiles 1, P+1 ..."), (0.15, "part P-1")):
        box(axes, 2.9, y, 2.2, part, REGISTERS)
        arrow(axes, (5.15, y + 0.31), (5.55, 1.41))
    box(axes, 5.6, 0.75, 0.85, "sums\nuu du dd\nof each\npart", HELD, 1.32)
    arrow(axes, (6.5, 1.41), (6.85, 1.41))
    box(axes, 6.9, 2.05, 1.8, "all parts, in order", REGISTERS)
    box(axes, 6.9, 1.1, 1.8, "a and |m|", REGISTERS)
    box(axes, 6.9, 0.15, 1.8, r"$\delta$, then E", REGISTERS)
    arrow(axes, (7.8, 2.03), (7.8, 1.76))
    arrow(axes, (7.8, 1.08), (7.8, 0.81))
    for y, text in ((1.6, "g, bf16"), (0.6, r"$\delta$, float32")):
        box(axes, 0, y, 1.7, text, MEMORY)
        arrow(axes, (1.75, y + 0.31), (2.7, y + 0.31))
    axes.text(
        5.98, 0.35, r"reads g, $\delta$" + "\nagain, and\nW[id]", ha="center", va="center", fontsize=7.5, color=MUTED
    )
    for y, text in ((1.1, r"$\delta$, float32"), (0.15, "E, bf16")):
        box(axes, 9.9, y, 1.7, text, MEMORY)
        arrow(axes, (8.9, y + 0.31), (9.85, y + 0.31))


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "fastadv", "mathtext.fontset": "dejavusans"})
    figure, axes = plt.subplots(figsize=(9.6, 6.6))
    axes.set_xlim(-0.1, 11.8)
    axes.set_ylim(-0.8, 8.5)
    axes.axis("off")
    by_row(axes)
    by_group(axes)
    for x, colour, text in (
        (0, MEMORY, "device memory"),
        (2.9, REGISTERS, "registers"),
        (5.2, HELD, "a few KB, in cache"),
    ):
        box(axes, x, -0.7, 0.35, "", colour, 0.25)
        axes.text(x + 0.5, -0.58, text, fontsize=8, va="center", color=MUTED)
    figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
