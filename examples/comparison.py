"""The data of `compare_numpy.py`, the training and measuring of its sides, and the table and figure of the results."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, MaxNLocator
    from rich.console import Console as Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit(f'{error}. This example needs more packages: pip install -e ".[examples]"') from None

TOLERANCE = 1e-3  # the largest allowed difference between the final weights of two sides
MEASUREMENTS = 150  # how often the weight difference is measured during training, besides the end of each epoch
CLASSES = 10

# -- data -------------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Handwritten digits, 8 x 8 pixels from 0 to 1."""

    x_train: NDArray[np.float32]  # (N, 64)
    y_train: NDArray[np.int32]  # (N,)
    x_test: NDArray[np.float32]  # (M, 64)
    y_test: NDArray[np.int32]  # (M,)


def load_data(rng: np.random.Generator) -> Digits:
    """The digits of scikit-learn, shuffled. The first 80 % are for training."""
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    x = (digits.data[order] / 16).astype(np.float32)
    y = digits.target[order].astype(np.int32)
    cut = len(y) * 4 // 5
    return Digits(x[:cut], y[:cut], x[cut:], y[cut:])


def shuffled_batches(n: int, batch_size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """The images in each batch of an epoch, `(steps, batch_size)`, out of `n`. An incomplete last batch is dropped."""
    steps = n // batch_size
    return rng.permutation(n)[: steps * batch_size].reshape(steps, batch_size)


# -- training and measuring -------------------------------------------------------------------------------------------


class Side(Protocol):
    """A network and a way to train it."""

    name: str
    whole_epochs: bool = False  # True if a call of `run` gets all batches of an epoch, False if it gets one

    def step(self, x: NDArray[np.float32], y: NDArray[np.int32]) -> Any:
        """Train on one batch. Returns its loss before the step."""

    def run(self, xs: NDArray[np.float32], ys: NDArray[np.int32]) -> list[float]:
        """Train on stacked batches, `(steps, batch_size, ...)`. Returns their losses."""
        return [float(self.step(x, y)) for x, y in zip(xs, ys, strict=True)]

    def weights(self) -> list[NDArray[Any]]:
        """The weights. Waits until all steps have finished."""

    def scores(self, x: NDArray[np.float32]) -> NDArray[Any]:
        """The network's output, `(N, 10)`."""


@dataclass
class Record:
    """The measurements of one side."""

    side: Side
    losses: list[list[float]] = field(default_factory=list)  # the losses of the steps, by epoch
    seconds: list[float] = field(default_factory=list)  # the time of each call of `run`; the first call compiles
    copying: set[int] = field(default_factory=set)  # the calls right after the weights were read: they copy them
    differences: dict[int, float] = field(default_factory=dict)  # the largest difference from NumPy's weights, by step
    accuracy: float = math.nan

    @property
    def final_loss(self) -> float:
        """The mean loss of the last epoch."""
        return float(np.mean(self.losses[-1]))

    @property
    def final_difference(self) -> float:
        return self.differences[max(self.differences)]

    @property
    def first_step(self) -> float:
        """The time of the first call of `run` in seconds, compilation included."""
        return self.seconds[0]

    @property
    def warm(self) -> list[float]:
        """The times of a step in seconds, of all calls of `run` that are compared."""
        return [seconds for epoch in self._warm_by_epoch() for seconds in epoch]

    def _warm_by_epoch(self) -> list[list[float]]:
        """The time of a step in seconds, for each call of `run` but the first and those that copy weights.

        A call for a whole epoch always copies them, so these calls stay.
        """
        steps = np.size(self.losses) / len(self.seconds)  # of a run
        runs = range(1, len(self.seconds))
        used = set(runs) - self.copying or set(runs)
        by_epoch = np.array_split(np.arange(len(self.seconds)), len(self.losses))
        return [[self.seconds[run] / steps for run in epoch.tolist() if run in used] for epoch in by_epoch]

    @property
    def median_step(self) -> float:
        """The median time of a step in seconds; NaN if there was only the first call."""
        return float(np.median(self.warm)) if self.warm else math.nan

    @property
    def epoch(self) -> float:
        """The median time of an epoch in seconds, without compilation and without copies."""
        means = [float(np.mean(steps)) for steps in self._warm_by_epoch() if steps]
        return float(np.median(means)) * len(self.losses[0]) if means else math.nan


@dataclass
class Comparison:
    """The measurements of all sides on one network."""

    network: str
    records: list[Record]


def run_epoch(
    record: Record, data: Digits, batches: NDArray[np.intp], done: int, measure: set[int]
) -> dict[int, list[NDArray[Any]]]:
    """Train one side on the batches of an epoch. Returns its weights after the steps in `measure` at which a run ends."""
    snapshots: dict[int, list[NDArray[Any]]] = {}
    losses: list[float] = []
    runs = batches[None] if record.side.whole_epochs else batches[:, None]
    for run in runs:  # (steps, batch_size)
        xs, ys = data.x_train[run], data.y_train[run]
        start = time.perf_counter()
        losses += record.side.run(xs, ys)  # waits for the losses; the last update may end during the next run
        record.seconds.append(time.perf_counter() - start)
        number = done + len(losses)
        if number in measure:
            snapshots[number] = record.side.weights()
            record.copying.add(len(record.seconds))
    record.losses.append(losses)
    return snapshots


def largest_difference(weights: list[NDArray[Any]], others: list[NDArray[Any]]) -> float:
    """The largest difference between two lists of arrays."""
    return max(float(np.abs(one - other).max()) for one, other in zip(weights, others, strict=True))


def train(
    network: str,
    sides: Sequence[Side],
    data: Digits,
    epochs: int,
    batch_size: int,
    rng: np.random.Generator,
    console: Console,
) -> Comparison:
    """Train all sides on the same batches, NumPy first. They take turns, since the machine may have other work."""
    steps = len(data.y_train) // batch_size
    total = epochs * steps
    measure = {*np.linspace(1, total, min(MEASUREMENTS, total)).round().astype(int).tolist()}
    measure |= {*range(steps, total + 1, steps)}
    records = [Record(side) for side in sides]
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress, np.errstate(all="ignore"):  # the table shows a diverging side
        task = progress.add_task(network, total=epochs * len(sides))
        for epoch in range(epochs):
            batches = shuffled_batches(len(data.y_train), batch_size, rng)
            reference: dict[int, list[NDArray[Any]]] = {}
            for record in records:
                progress.update(task, description=f"{network}, epoch {epoch + 1}/{epochs}: {record.side.name:<14}")
                np.random.seed(epoch)  # for networks that draw from a global stream
                random.seed(epoch)
                snapshots = run_epoch(record, data, batches, epoch * steps, measure)
                reference = reference or snapshots
                for number, weights in snapshots.items():
                    record.differences[number] = largest_difference(weights, reference[number])
                progress.advance(task)
        progress.update(task, description=f"{network}, trained")
        for record in records:
            record.accuracy = float((record.side.scores(data.x_test).argmax(1) == data.y_test).mean())
    return Comparison(network, records)


# -- reporting --------------------------------------------------------------------------------------------------------


def duration(value: float, form: str) -> str:
    """A time as text, or a dash for NaN."""
    return "–" if math.isnan(value) else format(value, form)


def result_table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons, with one row for each side."""
    table = Table(title="Handwritten digits: the same initial weights, the same batches", title_justify="left")
    table.add_column("network", no_wrap=True)
    table.add_column("side", no_wrap=True)
    quality = ("final\ntrain\nloss", "test\naccuracy", "largest\nweight\ndifference")
    for heading in (*quality, "first\nstep\n(ms)", "median\nstep\n(ms)", "epoch\n(s)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for comparison in comparisons:
        table.add_section()
        for i, record in enumerate(comparison.records):
            table.add_row(
                "" if i else comparison.network,
                record.side.name,
                f"{record.final_loss:.5f}",
                f"{record.accuracy:.4f}",
                f"{record.final_difference:.1e}" if i else "–",
                duration(record.first_step * 1e3, ".1f"),
                duration(record.median_step * 1e3, ".3f"),
                duration(record.epoch, ".4f"),
            )
    return table


def verdict(comparison: Comparison) -> list[str]:
    """Sentences that say how far each side ended from NumPy."""
    numpy, *others = comparison.records
    lines = []
    if not all(math.isfinite(record.final_loss) for record in comparison.records):
        lines.append(
            f"{comparison.network}: the training diverged: its loss is no number any more. Try a smaller --lr."
        )
    for record in others:
        difference, drift = record.final_difference, abs(record.accuracy - numpy.accuracy)
        within = "within" if difference <= TOLERANCE else "NOT within"
        lines.append(
            f"{comparison.network}: {record.side.name} ended {within} {TOLERANCE:g} of NumPy's weights (largest difference"
            f" {difference:.1e}), test accuracies {drift:.2%} apart"
        )
    return lines


# Okabe and Ito's palette, for colour-blind readers. Each side also has its own dashes and marker.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#56B4E9", "linestyle": "-", "linewidth": 8, "alpha": 0.6, "marker": "s", "markersize": 12},
    {"color": "#D55E00", "linestyle": "-", "linewidth": 3.5, "marker": "o", "markersize": 9.5},
    {"color": "#009E73", "linestyle": "-", "linewidth": 1.5, "marker": "^", "markersize": 8.5},
    {"color": "#CC79A7", "linestyle": "--", "linewidth": 1.5, "marker": "D", "markersize": 5.5},
    {"color": "#000000", "linestyle": ":", "linewidth": 1.5, "marker": "x", "markersize": 5},
)


def plot(axes: Axes, x: Sequence[int], y: Sequence[float], side: int, label: str) -> None:
    """The line of one side. The lines coincide, so later lines are thinner, and the markers of the sides alternate."""
    apart = math.ceil(len(x) / 6)
    axes.plot(x, y, label=label, markevery=(side * apart // len(STYLES), apart), **STYLES[side])


def draw_losses(axes: Axes, records: Sequence[Record]) -> None:
    for side, record in enumerate(records):
        means = [float(np.mean(losses)) for losses in record.losses]
        plot(axes, range(1, len(means) + 1), means, side, record.side.name)
    axes.set(title="training loss", xlabel="epoch", ylabel="mean cross-entropy of the epoch", yscale="log")
    axes.set_xlim(0, len(records[0].losses) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def draw_differences(axes: Axes, records: Sequence[Record]) -> None:
    for side, record in list(enumerate(records))[1:]:
        values = [d if d > 0 else math.nan for d in record.differences.values()]  # a log axis cannot show 0
        label = f"{record.side.name} − NumPy" + ("" if any(record.differences.values()) else ": always 0")
        plot(axes, list(record.differences), values, side, label)
    axes.axhline(TOLERANCE, color="0.45", linestyle=":", label=f"tolerance {TOLERANCE:g}")
    axes.set(
        title="largest weight difference",
        xlabel="step (mt.scan: ends of epochs)" if any(record.side.whole_epochs for record in records) else "step",
        ylabel="max |w − w of NumPy|",
        yscale="log",
    )
    axes.set_xlim(0, max(records[0].differences) + 1)
    axes.set_ylim(bottom=min(axes.get_ylim()[0], TOLERANCE / 1e3))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def draw_times(axes: Axes, records: Sequence[Record]) -> None:
    medians = [duration(record.median_step * 1e3, ".3f") for record in records]
    names = [record.side.name.replace(" ", "\n") for record in records]
    boxes = axes.boxplot(
        [np.array(record.warm) * 1e3 for record in records],
        tick_labels=[f"{median}\n{name}" for median, name in zip(medians, names, strict=True)],
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        widths=0.5,
        medianprops={"color": "black", "linewidth": 1.5},
    )
    for box, style in zip(boxes["boxes"], STYLES, strict=False):
        box.set(facecolor=style["color"], alpha=0.55)
    axes.set(title="time per step", xlabel="median (ms) of each side, compilation left out", yscale="log")
    axes.set_ylabel("ms (box: quartiles; whiskers: 5 to 95 %)")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else ""))


def draw(comparisons: Sequence[Comparison], caption: str, output: Path) -> None:
    """Three panels for each comparison, as a PNG. The caption says why the weights differ."""
    with plt.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        height = 0.6 + 5 * len(comparisons)
        figure, rows = plt.subplots(len(comparisons), 3, figsize=(14, height), squeeze=False)
        for comparison, row in zip(comparisons, rows, strict=True):
            for axes, panel in zip(row, (draw_losses, draw_differences, draw_times), strict=True):
                panel(axes, comparison.records)
                axes.set_title(f"{comparison.network}: {axes.get_title()}")
        figure.tight_layout(rect=(0, 0.6 / height, 1, 1), w_pad=2.5, h_pad=2.5)
        figure.text(0.5, 0.25 / height, caption, ha="center", va="center", fontsize=9.5, color="0.25")
        figure.savefig(output, dpi=130, format="png")
        plt.close(figure)
