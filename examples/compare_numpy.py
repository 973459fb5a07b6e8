"""Train one network with the NumPy mini-torch and with minitorch_jax, and compare losses, weights and times.

minitorch_jax trains with one loop of three lines, which runs in three ways: in plain Python, as a function compiled by
`mt.jit`, and by `mt.scan`, which runs a whole epoch in one call. All sides (--functional adds one) start from the same
weights and see the same batches of scikit-learn's handwritten digits. The program prints a table and writes a PNG file:

    python examples/compare_numpy.py
    python examples/compare_numpy.py --functional --epochs 50 --output digits.png

It needs scikit-learn, matplotlib and rich: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.adapters import numpy as mini

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, MaxNLocator
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit(f'{error}. This example needs more packages: pip install -e ".[examples]"') from None

TOLERANCE = 1e-3  # the largest allowed difference between the final weights of two sides
MEASUREMENTS = 150  # how often the weight difference is measured during training, besides the end of each epoch
CLASSES = 10
MAX_LR = 1e30

NOTES = (
    "The loss is the last epoch's mean; the first step compiles, and counts in no other column.",
    "mt.scan runs an epoch in one call: its first step stands for its whole first epoch, which compiles; its median"
    " step is the median of its later epochs' times, each divided by their steps.",
)
CAPTION = (
    "Why the weights differ at all: float32 rounding. XLA fuses the multiply and the subtract of an update into one"
    " FMA (one rounding where NumPy has two),\nand it sums in another order. Each step's roundings come on top"
    " of those before it, so the difference grows with the steps."
)

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


# -- the sides --------------------------------------------------------------------------------------------------------


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


class NumPySide(Side):
    """The mini-torch: hand-written gradients, and an optimizer that walks over `parameters()` and `grads()`."""

    name = "NumPy"

    def __init__(self, network: mini.Sequential, lr: float) -> None:
        self.network = network
        self.loss_fn = mini.SoftmaxCrossEntropy()
        self.opt = mini.Optimizer([network], lr)

    def step(self, x: NDArray[np.float32], y: NDArray[np.int32]) -> float:
        self.opt.zero_grad()
        loss = self.loss_fn(self.network(x), y)
        self.network.backward(self.loss_fn.backward())
        self.opt.step()
        return loss

    def weights(self) -> list[NDArray[Any]]:
        return [array.copy() for array in self.network.parameters()]

    def scores(self, x: NDArray[np.float32]) -> NDArray[Any]:
        out: NDArray[Any] = self.network(x)
        return out


def model_loss(model: nn.Sequential, x: jax.Array, y: jax.Array) -> jax.Array:
    return nn.functional.cross_entropy(model(x), y)


class EagerSide(Side):
    """The same loop on minitorch_jax, with gradients from JAX."""

    name = "eager loop"

    def __init__(self, network: mini.Sequential, lr: float) -> None:
        self.model = mini.to_jax(network)
        self.opt = mt.Optimizer([self.model], lr)

    def step(self, x: NDArray[np.float32], y: NDArray[np.int32]) -> jax.Array:
        self.opt.zero_grad()
        loss = mt.backward(model_loss, self.model, x, y)
        self.opt.step()
        return loss

    def weights(self) -> list[NDArray[Any]]:
        return [np.array(array) for array in self.model.parameters()]

    def scores(self, x: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(self.model(x))


class JitSide(EagerSide):
    """The same three lines with a decorator: one compiled program for each step."""

    name = "mt.jit"
    step = mt.jit(EagerSide.step)


class ScanSide(EagerSide):
    """The same three lines in `mt.scan`: one compiled program for each epoch."""

    name = "mt.scan"
    whole_epochs = True

    def run(self, xs: NDArray[np.float32], ys: NDArray[np.int32]) -> list[float]:
        losses: list[float] = mt.scan(self.step, xs, ys).tolist()
        return losses


Layers = list[tuple[jax.Array, jax.Array]]


def forward(layers: Layers, x: jax.Array) -> jax.Array:
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight.T + bias[None])
    weight, bias = layers[-1]
    return x @ weight.T + bias[None]


def functional_loss(layers: Layers, x: jax.Array, y: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(forward(layers, x))
    return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()


def update(layers: Layers, x: jax.Array, y: jax.Array, lr: jax.Array) -> tuple[Layers, jax.Array]:
    loss, grads = jax.value_and_grad(functional_loss)(layers, x, y)
    return jax.tree.map(lambda p, g: p - lr * g, layers, grads), loss


class FunctionalSide(Side):
    """Hand-written JAX: one compiled, pure function of the weights, whose result replaces them."""

    name = "functional JAX"

    def __init__(self, network: mini.Sequential, lr: float) -> None:
        linears = [layer for layer in network if isinstance(layer, mini.Linear)]
        self.layers: Layers = [(jnp.array(layer.W), jnp.array(layer.b)) for layer in linears]
        self.lr = jnp.float32(lr)
        self.update = jax.jit(update, donate_argnums=0)

    def step(self, x: NDArray[np.float32], y: NDArray[np.int32]) -> jax.Array:
        self.layers, loss = self.update(self.layers, x, y, self.lr)
        return loss

    def weights(self) -> list[NDArray[Any]]:
        return [np.array(array) for array in jax.tree.leaves(self.layers)]

    def scores(self, x: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(forward(self.layers, jnp.asarray(x)))


# -- training and measuring -------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The measurements of one side."""

    side: Side
    losses: list[list[float]] = field(default_factory=list)  # the losses of the steps, by epoch
    seconds: list[float] = field(default_factory=list)  # the time of each call of `run`; the first call compiles
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
        """The time of a step in seconds, for each call of `run` after the first."""
        steps_of_a_run = np.size(self.losses) / len(self.seconds)
        return [seconds / steps_of_a_run for seconds in self.seconds[1:]]

    @property
    def median_step(self) -> float:
        """The median time of a step in seconds; NaN if there was only the first call."""
        return float(np.median(self.warm)) if self.warm else math.nan

    @property
    def epoch(self) -> float:
        """The median time of an epoch in seconds. The first call counts as a median one, without compilation."""
        steps = np.reshape([self.median_step, *self.warm], (len(self.losses), -1))
        return float(np.median(steps.mean(axis=1))) * len(self.losses[0])


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
    record.losses.append(losses)
    return snapshots


def largest_difference(weights: list[NDArray[Any]], others: list[NDArray[Any]]) -> float:
    """The largest difference between two lists of arrays."""
    return max(float(np.abs(one - other).max()) for one, other in zip(weights, others, strict=True))


def train(
    sides: Sequence[Side], data: Digits, epochs: int, batch_size: int, rng: np.random.Generator, console: Console
) -> list[Record]:
    """Train all sides on the same batches, NumPy first. They take turns, since the machine may have other work."""
    steps = len(data.y_train) // batch_size
    total = epochs * steps
    measure = {*np.linspace(1, total, min(MEASUREMENTS, total)).round().astype(int).tolist()}
    measure |= {*range(steps, total + 1, steps)}
    records = [Record(side) for side in sides]
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress, np.errstate(all="ignore"):  # the table shows a diverging side
        task = progress.add_task("training", total=epochs * len(sides))
        for epoch in range(epochs):
            batches = shuffled_batches(len(data.y_train), batch_size, rng)
            reference: dict[int, list[NDArray[Any]]] = {}
            for record in records:
                progress.update(task, description=f"epoch {epoch + 1}/{epochs}: {record.side.name:<14}")
                snapshots = run_epoch(record, data, batches, epoch * steps, measure)
                reference = reference or snapshots
                for number, weights in snapshots.items():
                    record.differences[number] = largest_difference(weights, reference[number])
                progress.advance(task)
        progress.update(task, description="trained")
        for record in records:
            record.accuracy = float((record.side.scores(data.x_test).argmax(1) == data.y_test).mean())
    return records


# -- reporting --------------------------------------------------------------------------------------------------------


def duration(value: float, form: str) -> str:
    """A time as text, or a dash for NaN."""
    return "–" if math.isnan(value) else format(value, form)


def result_table(records: Sequence[Record]) -> Table:
    """The comparison, with one row for each side."""
    table = Table(title="Handwritten digits: the same initial weights, the same batches", title_justify="left")
    table.add_column("side", no_wrap=True)
    quality = ("final\ntrain\nloss", "test\naccuracy", "largest\nweight\ndifference")
    for heading in (*quality, "first\nstep\n(ms)", "median\nstep\n(ms)", "epoch\n(s)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            record.side.name,
            f"{record.final_loss:.5f}",
            f"{record.accuracy:.4f}",
            "–" if record is records[0] else f"{record.final_difference:.1e}",
            duration(record.first_step * 1e3, ".1f"),
            duration(record.median_step * 1e3, ".3f"),
            duration(record.epoch, ".4f"),
        )
    return table


def verdict(records: Sequence[Record]) -> list[str]:
    """Sentences that say how far each side ended from NumPy."""
    lines = []
    if not all(math.isfinite(record.final_loss) for record in records):
        lines.append("The training diverged: its loss is no number any more. Try a smaller --lr.")
    for record in records[1:]:
        difference, drift = record.final_difference, abs(record.accuracy - records[0].accuracy)
        within = "within" if difference <= TOLERANCE else "NOT within"
        lines.append(
            f"{record.side.name} ended {within} {TOLERANCE:g} of NumPy's weights (largest difference {difference:.1e}),"
            f" test accuracies {drift:.2%} apart"
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
    axes.set(title="Training loss", xlabel="epoch", ylabel="mean cross-entropy of the epoch", yscale="log")
    axes.set_xlim(0, len(records[0].losses) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def draw_differences(axes: Axes, records: Sequence[Record]) -> None:
    for side, record in list(enumerate(records))[1:]:
        values = [d if d > 0 else math.nan for d in record.differences.values()]  # a log axis cannot show 0
        plot(axes, list(record.differences), values, side, f"{record.side.name} − NumPy")
    axes.axhline(TOLERANCE, color="0.45", linestyle=":", label=f"tolerance {TOLERANCE:g}")
    axes.set(
        title="Largest weight difference",
        xlabel="step (mt.scan: ends of epochs)",
        ylabel="max |w − w of NumPy|",
        yscale="log",
    )
    axes.set_xlim(0, max(records[0].differences) + 1)
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
    axes.set(title="Time per step, compilation left out", xlabel="median (ms) of each side", yscale="log")
    axes.set_ylabel("ms (box: quartiles; whiskers: 5 to 95 %)")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else ""))


def draw(records: Sequence[Record], output: Path) -> None:
    """The three panels, as a PNG."""
    with plt.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 5.6))
        draw_losses(left, records)
        draw_differences(middle, records)
        draw_times(right, records)
        figure.tight_layout(rect=(0, 0.1, 1, 1), w_pad=2.5)
        figure.text(0.5, 0.035, CAPTION, ha="center", va="center", fontsize=9.5, color="0.25")
        figure.savefig(output, dpi=130, format="png")
        plt.close(figure)


# -- the command line -------------------------------------------------------------------------------------------------


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of integers from `low` to `high`."""

    def parse_whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}; got {text}")
        return value

    return parse_whole


def learning_rate(text: str) -> float:
    """Parse a number above 0 that is finite in float32."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_LR:
        raise argparse.ArgumentTypeError(f"must be a number above 0, at most {MAX_LR:g}; got {text}")
    return value


def png_path(text: str) -> Path:
    """Parse the name of a .png file that can be written."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must be the name of a .png file; got {text!r}")
    existed = path.exists()
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    return path


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The parser of the options. It checks each option."""
    integers = {
        "--epochs": (1, 1_000_000, 30, "passes over the training images"),
        "--batch-size": (1, 1_000_000, 32, "images in a step; those left over at an epoch's end are dropped"),
        "--hidden": (1, 100_000, 64, "units of the hidden layer"),
        "--seed": (0, 2**32 - 1, 0, "of the split, the weights and the batches"),
    }
    for name, (low, high, default, text) in integers.items():
        parser.add_argument(name, type=whole(low, high), default=default, metavar="N", help=text)
    parser.add_argument("--lr", type=learning_rate, default=0.3, metavar="X", help="learning rate of plain SGD")
    parser.add_argument("--output", type=png_path, default="compare_numpy.png", metavar="FILE", help="PNG to write")
    parser.add_argument("--functional", action="store_true", help="also train with a functional JAX loop, by hand")
    return parser.parse_args(argv)


def make_sides(features: int, hidden: int, lr: float, functional: bool, rng: np.random.Generator) -> list[Side]:
    """All sides, NumPy first, with the same initial weights."""
    network = mini.Sequential(
        mini.Linear(features, hidden, rng=rng), mini.ReLU(), mini.Linear(hidden, CLASSES, rng=rng)
    )
    sides = [NumPySide(network, lr), EagerSide(network, lr), JitSide(network, lr), ScanSide(network, lr)]
    return [*sides, FunctionalSide(network, lr)] if functional else sides


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train one small network on handwritten digits with the NumPy mini-torch and with minitorch_jax,"
        " from the same weights and on the same batches; compare losses, weights and times.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    args = parse(parser, argv)
    for_split, for_weights, for_batches = np.random.default_rng(args.seed).spawn(3)
    data = load_data(for_split)
    n, features = data.x_train.shape
    if args.batch_size > n:
        parser.error(f"argument --batch-size: there are only {n} training images; got {args.batch_size}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    steps, left_over = divmod(n, args.batch_size)
    console.print(f"{n} training images, {len(data.y_test)} test images, network {features}-{args.hidden}-{CLASSES}")
    console.print(f"full batches of {args.batch_size} an epoch: {steps}; images left over and dropped: {left_over}")
    sides = make_sides(features, args.hidden, args.lr, args.functional, for_weights)
    records = train(sides, data, args.epochs, args.batch_size, for_batches, console)
    console.print(result_table(records))
    for line in (*NOTES, *verdict(records)):
        console.print(line, soft_wrap=True)
    draw(records, args.output)
    console.print(f"Figure: {args.output}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
