"""The picture of small and large networks: a training step's time by width and by depth, and where the lines cross."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from . import rows
from .chart import BY_HAND, OTHERS, OURS, OURS_PACKED, STYLE, caption, label_ticks

LINES: dict[str, dict[str, Any]] = {
    rows.NNX: {"color": "#56B4E9", "marker": "v", "label": "flax nnx.jit"},
    rows.EQUINOX: {"color": "#CC79A7", "marker": "D", "markersize": 4.5, "label": "equinox filter_jit"},
    rows.FUSED: {"color": OTHERS, "marker": "P", "label": "PyTorch, eager, fused optimizer"},
    rows.NUMPY: {"color": "#009E73", "marker": "^", "label": "NumPy"},
    rows.HAND_FUSED: {"color": BY_HAND, "marker": "x", "linestyle": "--", "zorder": 5, "label": "jax.jit by hand"},
    rows.JIT: {"color": OURS, "marker": "o", "linewidth": 2.6, "zorder": 4, "label": "mt.jit"},
    rows.SCANNED: {"color": OURS_PACKED, "marker": "s", "linewidth": 2.6, "zorder": 4, "label": rows.SCANNED},
}
AXES = {"width": "width (2 layers, batch 32)", "depth": "depth (width 32, batch 32)"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the two panels into a PNG."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(13, 5.4), sharey=True)
        for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
            measured = {
                int(key.partition("/")[2]): side for key, side in found["sides"].items() if key.startswith(axis)
            }
            draw_panel(axes, measured)
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("µs per training step")
        handles, labels = panels[0].get_legend_handles_labels()
        panels[1].legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.suptitle("One training step of an MLP: forward, backward and update")
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        text = caption(found["environment"]).replace("; bars are quartiles", "")
        figure.text(0.5, 0.025, text, ha="center", va="center", fontsize=9, color="0.35")
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def draw_panel(axes: Axes, measured: dict[int, dict[str, Any]]) -> None:
    sizes = sorted(measured)
    for name, style in LINES.items():
        shown = [size for size in sizes if name in measured[size]]
        axes.plot(shown, [measured[size][name]["median"] * 1e6 for size in shown], **style)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    label_ticks(axes.yaxis)
    if all({rows.JIT, rows.NUMPY} <= {*measured[size]} for size in sizes):
        ours, numpy = ([measured[size][name]["median"] for size in sizes] for name in (rows.JIT, rows.NUMPY))
        for size, height in crossings(sizes, ours, numpy):
            axes.plot(size, height * 1e6, "o", markersize=15, fillstyle="none", color="0.3", zorder=6)
            note = f"mt.jit passes NumPy\nat about {size:,.0f}"
            axes.annotate(note, (size, height * 1e6), (14, -30), textcoords="offset points", fontsize=9, color="0.3")


def crossings(sizes: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> list[tuple[float, float]]:
    """Where our line comes to lie under the other, as size and time, between two sizes on logarithmic axes."""
    x, mine, other = np.log(sizes), np.log(ours), np.log(theirs)
    above = mine - other
    found = []
    for i in range(len(sizes) - 1):
        if above[i] > 0 >= above[i + 1]:
            part = above[i] / (above[i] - above[i + 1])
            place = np.exp([x[i] + part * (x[i + 1] - x[i]), mine[i] + part * (mine[i + 1] - mine[i])])
            found.append((float(place[0]), float(place[1])))
    return found
