"""Train networks with the NumPy mini-torch and with minitorch_jax, and compare losses, weights and times.

minitorch_jax trains with one loop of three lines, which runs in three ways: in plain Python, as a function compiled by
`mt.jit`, and by `mt.scan`, which runs a whole epoch in one call. All sides (--functional adds one) start from the same
weights and see the same batches of scikit-learn's handwritten digits. There are two networks: a small one, for which a step
in NumPy is the quicker one, and a wide one, for which a compiled step is. The program prints a table and writes a PNG file:

    python examples/compare_numpy.py
    python examples/compare_numpy.py --functional --hidden 256,128 --epochs 50 --output digits.png

With --network, your own NumPy network is trained: by its own loop, and by `mt.Optimizer` through `wrap`. my_net.py is one:

    python examples/compare_numpy.py --network examples/my_net.py:make_net

It needs scikit-learn, matplotlib and rich: pip install -e ".[examples]"
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from comparison import (
    CLASSES,
    Console,
    Side,
    draw,
    load_data,
    result_table,
    train,
    verdict,
)
from numpy.typing import NDArray
from own_network import OwnNetwork, load_network

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.adapters import numpy as mini

HIDDEN = (64,), (1024, 1024)  # units of the hidden layers of the networks
MAX_LR = 1e38

NOTES = (
    "The loss is the last epoch's mean; the first step compiles, and counts in no other column. Nor does the step after each"
    " measurement of the weights, which copies them.",
    "mt.scan runs an epoch in one call: its first step stands for its whole first epoch, which compiles; its median"
    " step is the median of its later epochs' times, each divided by their steps.",
)
CAPTION = (
    "Why the weights differ at all: float32 rounding. XLA fuses the multiply and the subtract of an update into one"
    " FMA (one rounding where NumPy has two),\nand it sums in another order. Each step's roundings come on top"
    " of those before it, so the difference grows with the steps."
)

# -- the sides --------------------------------------------------------------------------------------------------------


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


def model_loss(model: nn.Sequential, x: Any, y: Any) -> jax.Array:
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
        x = jnp.tanh(x @ weight.T + bias[None])
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


def widths(text: str) -> tuple[int, ...]:
    """Parse the units of the hidden layers: `64`, or `1024,1024`."""
    return tuple(whole(1, 100_000)(each) for each in text.split(","))


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The parser of the options. It checks each option."""
    integers = {
        "--epochs": (1, 1_000_000, 20, "passes over the training images"),
        "--batch-size": (1, 1_000_000, 16, "images in a step; those left over at an epoch's end are dropped"),
        "--seed": (0, 2**32 - 1, 0, "of the split, the weights and the batches"),
    }
    for name, (low, high, default, text) in integers.items():
        parser.add_argument(name, type=whole(low, high), default=default, metavar="N", help=text)
    parser.add_argument("--lr", type=learning_rate, default=0.1, metavar="X", help="learning rate of plain SGD")
    parser.add_argument("--output", type=png_path, default="compare_numpy.png", metavar="FILE", help="PNG to write")
    parser.add_argument("--functional", action="store_true", help="also train with a functional JAX loop, by hand")
    which = parser.add_mutually_exclusive_group()
    shown = " ".join(",".join(map(str, units)) for units in HIDDEN)
    text = f"units of the hidden layers of each network (default: {shown})"
    which.add_argument("--hidden", type=widths, nargs="+", default=argparse.SUPPRESS, metavar="N,N", help=text)
    text = "your own network: a function in a file, which returns a network or a list of layers, in NumPy"
    which.add_argument("--network", type=load_network, default=argparse.SUPPRESS, metavar="FILE:FUNCTION", help=text)
    return parser.parse_args(argv)


def make_sides(shape: Sequence[int], lr: float, functional: bool, rng: np.random.Generator) -> list[Side]:
    """All sides, NumPy first, with the same initial weights. `shape` has the units of each layer, the input's first."""
    layers: list[mini.Module] = []
    for n_in, n_out in pairwise(shape):
        layers += [mini.Linear(n_in, n_out, rng=rng), mini.Tanh()]
    network = mini.Sequential(*layers[:-1])
    sides = [NumPySide(network, lr), EagerSide(network, lr), JitSide(network, lr), ScanSide(network, lr)]
    return [*sides, FunctionalSide(network, lr)] if functional else sides


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train networks on handwritten digits with the NumPy mini-torch and with minitorch_jax, from the same"
        " weights and on the same batches; compare losses, weights and times.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    args = parse(parser, argv)
    own: OwnNetwork | None = getattr(args, "network", None)
    if own and args.functional:
        parser.error("argument --functional: not allowed with argument --network")
    for_split, for_weights, for_batches = np.random.default_rng(args.seed).spawn(3)
    data = load_data(for_split)
    n, features = data.x_train.shape
    if args.batch_size > n:
        parser.error(f"argument --batch-size: there are only {n} training images; got {args.batch_size}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    steps, left_over = divmod(n, args.batch_size)
    console.print(f"{n} training images, {len(data.y_test)} test images")
    console.print(f"full batches of {args.batch_size} an epoch: {steps}; images left over and dropped: {left_over}")
    if own:
        networks = {own.name: own.sides(args.lr)}
    else:
        shapes = [(features, *hidden, CLASSES) for hidden in getattr(args, "hidden", HIDDEN)]
        networks = {
            "-".join(map(str, shape)): make_sides(shape, args.lr, args.functional, for_weights) for shape in shapes
        }
    comparisons = [
        train(name, sides, data, args.epochs, args.batch_size, for_batches, console) for name, sides in networks.items()
    ]
    console.print(result_table(comparisons))
    for line in (*(own.notes if own else NOTES), *(line for each in comparisons for line in verdict(each))):
        console.print(line, soft_wrap=True, markup=False)
    draw(comparisons, own.caption if own else CAPTION, args.output)
    console.print(f"Figure: {args.output}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
