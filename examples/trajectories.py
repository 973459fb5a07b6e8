"""Draw the paths that the optimizers take on two classic test functions, Rosenbrock's and Beale's.

Each optimizer takes the same number of steps from the same point, in one call of `mt.scan`. All learning rates of 1, 2 and 5
times a power of ten are tried, since another rate compiles no new program. The rate that ends lowest is drawn, out of those
without a step longer than 0.5 or out of the drawn region. The program prints a table and writes the figure to a PNG file:

    python examples/trajectories.py
    python examples/trajectories.py --steps 1000 --output long.png

It needs matplotlib and rich: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import minitorch_jax as mt
from minitorch_jax import optim

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'{error}. This example needs more packages: pip install -e ".[examples]"') from None

# -- the functions ----------------------------------------------------------------------------------------------------


def rosenbrock(x: Any, y: Any) -> Any:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(x: Any, y: Any) -> Any:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


class Surface(NamedTuple):
    """A function of two numbers, and the region in which it is drawn."""

    name: str
    formula: str
    function: Callable[[Any, Any], Any]
    start: tuple[float, float]
    minimum: tuple[float, float]
    x: tuple[float, float]
    y: tuple[float, float]

    def holds(self, path: NDArray[Any]) -> bool:
        """True if all points lie in the drawn region. NaNs do not."""
        low, high = np.array([self.x, self.y]).T
        return bool(((path >= low) & (path <= high)).all())


SURFACES = (
    Surface(
        "Rosenbrock",
        "(1 − x)² + 100 (y − x²)²",
        rosenbrock,
        start=(-1.2, 1.0),
        minimum=(1.0, 1.0),
        x=(-1.65, 1.65),
        y=(-0.6, 1.85),
    ),
    Surface(
        "Beale",
        "(1.5 − x + xy)² + (2.25 − x + xy²)² + (2.625 − x + xy³)²",
        beale,
        start=(0.25, -0.75),
        minimum=(3.0, 0.5),
        x=(-0.25, 4.25),
        y=(-1.35, 1.0),
    ),
)

# -- the optimizers ---------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """An optimizer, with options other than the learning rate."""

    label: str
    cls: type[mt.Optimizer]
    options: Mapping[str, Any] = {}


FAMILIES: dict[str, list[Rule]] = {
    "gradient descent": [
        Rule("SGD", optim.SGD),
        Rule("SGD, momentum 0.9", optim.SGD, {"momentum": 0.9}),
        Rule("SGD, Nesterov 0.9", optim.SGD, {"momentum": 0.9, "nesterov": True}),
        Rule("ASGD", optim.ASGD),
    ],
    "Adam and relatives": [
        Rule("Adam", optim.Adam),
        Rule("Adamax", optim.Adamax),
        Rule("NAdam", optim.NAdam),
        Rule("RAdam", optim.RAdam),
    ],
    "adaptive rates": [
        Rule("Adagrad", optim.Adagrad),
        Rule("Adadelta", optim.Adadelta),
        Rule("RMSprop", optim.RMSprop),
    ],
    "by sign or direction": [
        Rule("Rprop", optim.Rprop),
        Rule("Lion", optim.Lion, {"weight_decay": 0.0}),
        Rule("Muon", optim.Muon, {"weight_decay": 0.0}),
    ],
    "scaled by the parameter": [
        Rule("LAMB", optim.LAMB),
        Rule("LARS", optim.LARS),
        Rule("Adafactor", optim.Adafactor),
    ],
    "other second moments": [
        Rule("AdaBelief", optim.AdaBelief),
        Rule("Yogi", optim.Yogi),
        Rule("Adan", optim.Adan),
        Rule("ScheduleFreeAdamW", optim.ScheduleFreeAdamW),
    ],
}
LONGEST_STEP = 0.5
RATES = [float(f"{digit}e{power}") for power in range(-6, 3) for digit in (1, 2, 5)]


class Point(mt.Module):
    """A point of the plane. It is a matrix of one row, since Muon takes only matrices."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.position: Any = mt.Parameter(jnp.array([start], jnp.float32))


class Walk(NamedTuple):
    """The path of an optimizer, `(steps + 1, 2)`, and the values of the function on it."""

    rule: Rule
    lr: float
    points: NDArray[Any]
    values: NDArray[Any]

    @property
    def final(self) -> float:
        """The highest value of the last twentieth of the path, so that one lucky step does not count."""
        return float(self.values[-max(1, len(self.values) // 20) :].max())

    @property
    def longest_step(self) -> float:
        return float(np.linalg.norm(np.diff(self.points, axis=0), axis=1).max())


class Explorer:
    """An optimizer on a surface. `mt.scan` compiles one program for `move`, which serves all learning rates."""

    def __init__(self, surface: Surface, rule: Rule) -> None:
        self.surface, self.rule = surface, rule

    def height(self, point: Point) -> jax.Array:
        x, y = point.position[0]
        value: jax.Array = self.surface.function(x, y)
        return value

    def move(self) -> jax.Array:
        """Take one step. Returns the new point."""
        self.opt.zero_grad()
        mt.backward(self.height, self.point)
        self.opt.step()
        return self.point.position[0]

    def walk(self, lr: float, steps: int) -> Walk:
        """Take all steps in one call."""
        self.point = Point(self.surface.start)
        self.opt = self.rule.cls([self.point], lr=lr, **self.rule.options)
        moves = mt.scan(self.move, length=steps)
        points = np.concatenate([[self.surface.start], np.asarray(moves, np.float64)])
        with np.errstate(all="ignore"):  # a diverging path becomes NaN
            return Walk(self.rule, lr, points, self.surface.function(*points.T))

    def best_walk(self, steps: int) -> Walk:
        """The path of the learning rate that ends lowest, out of those that stay in the region and take no long step."""
        walks = [self.walk(lr, steps) for lr in RATES]
        fit = [walk for walk in walks if self.surface.holds(walk.points) and walk.longest_step <= LONGEST_STEP]
        return min(fit, key=lambda walk: walk.final)


# -- the table and the figure -----------------------------------------------------------------------------------------

# Okabe and Ito's palette (with a darker green), for colour-blind readers. Each line also has its own dashes and end marker.
# Later lines are thinner, so that all are visible where paths coincide.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#56B4E9", "linestyle": "-", "marker": "o", "linewidth": 4, "markersize": 10},
    {"color": "#D55E00", "linestyle": "-", "marker": "s", "linewidth": 2.5, "markersize": 8.5},
    {"color": "#00664B", "linestyle": (0, (4, 1.5)), "marker": "^", "linewidth": 1.8, "markersize": 8},
    {"color": "#000000", "linestyle": (0, (1, 1.2)), "marker": "D", "linewidth": 1.6, "markersize": 5},
)
COLUMNS = 3


def result_table(surface: Surface, paths: Sequence[Walk], steps: int) -> Table:
    """The learning rates and the values that they reached."""
    table = Table(title=f"{surface.name}: {surface.formula}, from {surface.start}", title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("learning rate", f"value after {steps} steps", "distance to the minimum"):
        table.add_column(heading, justify="right")
    for path in paths:
        distance = np.linalg.norm(path.points[-1] - surface.minimum)
        table.add_row(path.rule.label, f"{path.lr:g}", f"{path.values[-1]:.2g}", f"{distance:.2g}")
    return table


def draw_surface(axes: Axes, surface: Surface) -> None:
    """Draw contours, evenly spaced in the logarithm, the start and the minimum."""
    xs, ys = np.linspace(*surface.x, 300), np.linspace(*surface.y, 300)
    values = surface.function(xs[None, :], ys[:, None])
    levels = np.geomspace(0.03, values.max(), 13)
    norm = LogNorm(levels[0], levels[-1])
    axes.contourf(xs, ys, np.maximum(values, levels[0]), levels=levels, norm=norm, cmap="Greys", alpha=0.45)
    axes.contour(xs, ys, values, levels=levels, colors="0.6", linewidths=0.5)
    axes.plot(*surface.start, "o", color="white", markeredgecolor="black", markersize=8, zorder=5)
    axes.plot(*surface.minimum, "*", color="#F0E442", markeredgecolor="black", markersize=19, zorder=4)
    axes.set(xlim=surface.x, ylim=surface.y)


def draw_panel(axes: Axes, surface: Surface, family: str, paths: Sequence[Walk]) -> None:
    """Draw the paths of one family over the contours."""
    draw_surface(axes, surface)
    for place, (path, style) in enumerate(zip(paths, STYLES, strict=False)):
        axes.plot(
            *path.points.T,
            **style,
            zorder=6 + place,
            label=f"{path.rule.label}, lr {path.lr:g}",
            markevery=[len(path.points) - 1],
            markeredgecolor="white",
        )
    axes.set(title=f"{surface.name}: {family}", xlabel="x", ylabel="y")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=2,
        fontsize=9,
        handlelength=2.6,
        columnspacing=1.2,
        frameon=False,
    )


def draw(found: Mapping[str, Sequence[Walk]], steps: int, output: Path) -> None:
    """Write the figure as a PNG: a row of panels for each function, with one panel for each family."""
    rows = -(-len(FAMILIES) // COLUMNS)
    with plt.rc_context({"font.size": 10}):
        figure, grid = plt.subplots(rows * len(SURFACES), COLUMNS, figsize=(15, 4.6 * rows * len(SURFACES)))
        for band, surface in enumerate(SURFACES):
            panels = grid[band * rows : (band + 1) * rows].ravel()
            paths = iter(found[surface.name])
            for axes, (family, rules) in zip(panels, FAMILIES.items(), strict=True):
                draw_panel(axes, surface, family, [next(paths) for _ in rules])
        marks = [
            Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor="black", markersize=8),
            Line2D([], [], linestyle="", marker="*", color="#F0E442", markeredgecolor="black", markersize=15),
            Line2D([], [], linestyle="", marker="s", color="0.4", markersize=7),
        ]
        figure.legend(
            marks,
            ["start", "minimum", f"end of a path, after {steps} steps"],
            loc="upper center",
            bbox_to_anchor=(0.5, 0.972),
            ncols=3,
            frameon=False,
        )
        figure.suptitle(
            f"{steps} steps of each optimizer on {' and '.join(f'{s.name}’s function' for s in SURFACES)}",
            fontsize=14,
            y=0.993,
        )
        figure.text(
            0.5,
            0.974,
            "learning rate (lr): the one of 1, 2, 5 × 10ᵏ that ends lowest, with no step longer than"
            f" {LONGEST_STEP} or out of the picture",
            ha="center",
        )
        figure.tight_layout(rect=(0, 0, 1, 0.962), w_pad=1.5, h_pad=1.5)
        figure.savefig(output, dpi=90, format="png")
        plt.close(figure)


# -- the command line -------------------------------------------------------------------------------------------------


def number_of_steps(text: str) -> int:
    """Parse an integer from 1 to 100,000."""
    if not (text.isdecimal() and 1 <= int(text) <= 100_000):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 100000; got {text}")
    return int(text)


def png_path(text: str) -> Path:
    """Parse the name of a .png file in an existing folder."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must be the name of a .png file; got {text!r}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw the paths that the optimizers take on Rosenbrock's and Beale's functions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=number_of_steps, default=500, metavar="N", help="steps of each optimizer")
    parser.add_argument(
        "--output",
        type=png_path,
        default=Path(__file__).parents[1] / "docs" / "trajectories.png",
        metavar="FILE",
        help="PNG to write",
    )
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    rules = [rule for family in FAMILIES.values() for rule in family]
    found: dict[str, list[Walk]] = {}
    for surface in SURFACES:
        with console.status(f"{surface.name} ..."):
            found[surface.name] = [Explorer(surface, rule).best_walk(args.steps) for rule in rules]
        console.print(result_table(surface, found[surface.name], args.steps))
    draw(found, args.steps, args.output)
    console.print(f"Figure: {args.output}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
