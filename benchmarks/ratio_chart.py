"""The picture of layers and whole steps: ours over each of the others, on one axis for each group."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .chart import STYLE, caption, label_ticks
from .comparison import CPU, rounds_of
from .report import WIDE

# Okabe and Ito's palette; the shape tells the peer too.
PEERS: dict[str, dict[str, Any]] = {
    "torch": {"color": "#0072B2", "marker": "o"},
    "torch fused": {"color": "#0072B2", "marker": "o"},
    "torch foreach": {"color": "#56B4E9", "marker": "v"},
    "flax": {"color": "#009E73", "marker": "^"},
    "nnx.jit": {"color": "#009E73", "marker": "^"},
    "plain JAX": {"color": "#000000", "marker": "x"},
    "optax under jax.jit": {"color": "#000000", "marker": "x"},
}
TITLES = {
    "layers": "Layers and losses, forward with backward",
    "updates": "step() on one large array",
    "programs": "Whole training steps",
}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the groups that were measured into a PNG: the processor's time, each size as a mark of its own."""
    rows = {name: [row for row in found["rows"] if row["group"] == name and row["peer"].endswith(CPU)] for name in WIDE}
    shown = {name: by_line(group) for name, group in rows.items() if group}
    with plt.rc_context(STYLE):
        left = "layers" in shown
        rest = [name for name in shown if name != "layers"]
        height = max(3.0, 0.3 * max(len(shown.get("layers", ())), sum(4 + len(shown[name]) for name in rest)) + 1.6)
        figure = plt.figure(figsize=(15 if left and rest else 8.5, height))
        grid = figure.add_gridspec(1, left + bool(rest))
        panels = {"layers": figure.add_subplot(grid[0, 0])} if left else {}
        if rest:
            sizes = [1 + len(shown[name]) for name in rest]
            inner = grid[0, -1].subgridspec(len(rest), 1, height_ratios=sizes, hspace=0.8)
            panels |= {name: figure.add_subplot(inner[i, 0]) for i, name in enumerate(rest)}
        for name, axes in panels.items():
            draw_group(axes, shown[name], TITLES[name])
        figure.tight_layout(rect=(0, 0.8 / height, 1, 1), w_pad=3)
        env = found["environment"]
        text = caption(env | {"rounds": rounds_of(env["rounds"])}).replace("bars are quartiles", "each size is a mark")
        figure.text(0.5, 0.3 / height, text, ha="center", va="center", fontsize=9, color="0.35")
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def by_line(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Of each kind of work, in order: the ratios of all its sizes, by peer."""
    lines: dict[str, dict[str, list[float]]] = {}
    for kind, group in itertools.groupby(rows, lambda row: kind_of(row["work"])):
        line = lines.setdefault(kind, {})
        for row in group:
            line.setdefault(row["peer"].removesuffix(CPU), []).append(row["ratio"])
    return lines


def kind_of(work: str) -> str:
    """A work's title without its sizes, which come after the last comma but "weight ..."."""
    words = work.split(", ")
    words = words[:-1] if words[-1].startswith("weight ") else words
    return ", ".join(words[:-1]) or work


def draw_group(axes: Axes, lines: dict[str, dict[str, list[float]]], title: str) -> None:
    for i, line in enumerate(lines.values()):
        for peer, ratios in line.items():
            axes.plot(ratios, [i] * len(ratios), linestyle="", markersize=6, alpha=0.8, **PEERS[peer])
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.set(title=title, xlabel="processor's time, ours / theirs (below 1: ours takes less)", xscale="log")
    axes.set_ylim(len(lines) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2))
    label_ticks(axes.xaxis)
    axes.grid(axis="x", which="both")
    for peer in dict.fromkeys(peer for line in lines.values() for peer in line):
        axes.plot([], [], linestyle="", label=peer, **PEERS[peer])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
