"""The picture: what `step()` costs by the number of arrays, and what a training step costs by library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import rows
from .report import amount

# Okabe and Ito's palette, which colour-blind readers can tell apart. Ours are warm, plain JAX is black, others are cool.
OURS, OURS_PACKED, BY_HAND, OTHERS = "#D55E00", "#C98A00", "#000000", "#0072B2"
LINES: dict[str, dict[str, Any]] = {
    rows.STEP: {"color": OURS, "marker": "o", "linewidth": 2.2, "zorder": 4},
    rows.PACKED_STEP: {"color": OURS_PACKED, "marker": "s", "linewidth": 2.2, "zorder": 4},
    rows.HAND: {"color": BY_HAND, "marker": "x", "linestyle": "--", "linewidth": 1.4, "zorder": 5},
    rows.NUMPY: {"color": "#009E73", "marker": "^", "linestyle": "-."},
    rows.FOREACH: {"color": "#56B4E9", "marker": "v", "linestyle": ":"},
    rows.FUSED: {"color": OTHERS, "marker": "D", "linestyle": ":", "markersize": 4.5},
}
COLOURS = {rows.JIT: OURS, rows.SCANNED: OURS, rows.LOOP: OURS, rows.PACKED_LOOP: OURS_PACKED}
COLOURS |= {rows.HAND_FUSED: BY_HAND, rows.TWO: BY_HAND}
KEY = {"minitorch_jax": OURS, "minitorch_jax, packed": OURS_PACKED, "JAX by hand": BY_HAND, "other libraries": OTHERS}
STYLE: Any = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "axes.titlesize": 11.5}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the results, as they are in benchmarks.json, into a PNG."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), width_ratios=(1, 1.15))
        draw_updates(left, found["sides"])
        draw_training(right, found)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout(rect=(0, 0.06, 1, 1), w_pad=3)
        figure.text(0.5, 0.025, caption(found["environment"]), ha="center", va="center", fontsize=9, color="0.35")
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def caption(env: dict[str, Any]) -> str:
    versions = env["versions"]
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("jax", "flax", "equinox", "optax", "torch") if name in versions
    )
    text = f"{env['device']}, {env['cores']} cores; {named}. Medians of {env['rounds']} rounds; bars are quartiles."
    return f"A QUICK RUN, whose times mean nothing. {text}" if env["quick"] else text


def draw_updates(axes: Axes, sides: dict[str, Any]) -> None:
    """`step()` by number of arrays."""
    groups = {int(key.partition("/")[2]): group for key, group in sides.items() if key.startswith("step/")}
    for name, style in LINES.items():
        counts = [count for count, group in groups.items() if name in group]
        if not counts:
            continue
        found = [groups[count][name] for count in counts]
        medians = [side["median"] * 1e6 for side in found]
        spread = [
            [(side["median"] - side["low"]) * 1e6 for side in found],
            [(side["high"] - side["median"]) * 1e6 for side in found],
        ]
        axes.errorbar(counts, medians, spread, label=name, elinewidth=1, capsize=2, **style)
    axes.set(title="One update of many small arrays (16 floats each)", xlabel="arrays", ylabel="µs per update")
    if not axes.lines:
        empty(axes)
        return
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sorted(groups), [f"{count:,}" for count in sorted(groups)])
    axes.xaxis.set_minor_formatter(NullFormatter())
    label_ticks(axes.yaxis)
    axes.legend(loc="upper left", framealpha=0.9)


def draw_training(axes: Axes, found: dict[str, Any]) -> None:
    """A training step, by library: the fastest at the top."""
    sides = sorted(found["sides"].get("peers", {}).items(), key=lambda item: -item[1]["median"])
    works = [row["work"] for row in found["rows"] if row["work"].startswith("training step among peers, ")]
    axes.set_title(f"One training step, {works[0].partition(', ')[2]}" if works else "One training step")
    if not sides:
        empty(axes)
        return
    for i, (name, side) in enumerate(sides):
        colour = COLOURS.get(name, OTHERS)
        low, median, high = (side[part] * 1e6 for part in ("low", "median", "high"))
        axes.plot([low, high], [i, i], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(median, i, "o", color=colour, markersize=8)
        text = amount(side["median"], "s")
        axes.annotate(text, (high, i), (8, 0), textcoords="offset points", va="center", fontsize=9, color=colour)
    axes.set_yticks(range(len(sides)), [name for name, _ in sides])
    for label, (name, _) in zip(axes.get_yticklabels(), sides, strict=True):
        label.set_color(COLOURS.get(name, OTHERS))
    axes.set(xlabel="µs per step (dot: median; bar: quartiles)", xscale="log", ylim=(-0.7, len(sides) - 0.3))
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 1.6)  # room for the last label
    label_ticks(axes.xaxis)
    axes.grid(axis="x", which="both")
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=label) for label, colour in KEY.items()]
    axes.legend(handles=handles, loc="upper right", framealpha=0.9)  # where the fastest leave room


def label_ticks(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "125" else ""))


def empty(axes: Axes) -> None:
    """A panel whose rows were not asked for."""
    axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes, color="0.4")
    axes.set(xticks=[], yticks=[])
