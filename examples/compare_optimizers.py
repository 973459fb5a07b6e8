"""Train one network on handwritten digits with every optimizer, and with the same rule of torch, or of optax.

All runs of an optimizer start from the same weights and see the same batches. Our run is one call of `mt.scan`. (LBFGS is
not for batches: it takes a twentieth of the steps, each of up to 20 iterations, on all training images.) The table has
training loss and test accuracy after the last step, and the difference between the final weights of both sides. With --x64
both sides compute in float64, where rounding hardly matters: any remaining difference is a difference between the rules.

    python examples/compare_optimizers.py
    python examples/compare_optimizers.py --steps 100 --x64 --output table.md
    python examples/compare_optimizers.py --search  # how the learning rates were chosen

It needs scikit-learn, rich, torch and optax: pip install -e ".[oracles]"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import minitorch_jax as mt
from minitorch_jax import nn, optim

try:
    import optax
    import torch
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit(f'{error}. This example needs more packages: pip install -e ".[oracles]"') from None

FEATURES, HIDDEN, CLASSES, BATCH = 64, 64, 10, 32
torch.set_num_threads(1)  # the arrays are tiny, so more threads would only wait for each other
RATES = [float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 3)]
Weights = list[NDArray[Any]]  # weight and bias of each layer in turn, or only weights

# -- the optimizers ---------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """An optimizer, the learning rate that `--search` found, and its peer: a class of torch, or a function of optax."""

    name: str
    cls: type[mt.Optimizer]
    lr: float
    options: Mapping[str, Any] = {}
    peer: Callable[..., Any] | None = None
    bias: bool = True  # Muon trains matrices only: its network has no biases


RULES = [
    Rule("SGD", optim.SGD, 1.0),
    Rule("SGD, momentum 0.9", optim.SGD, 0.1, {"momentum": 0.9}),
    Rule("SGD, Nesterov 0.9", optim.SGD, 0.3, {"momentum": 0.9, "nesterov": True}),
    Rule("Adam", optim.Adam, 0.03),
    Rule("AdamW", optim.AdamW, 0.03),
    Rule("Adamax", optim.Adamax, 0.1),
    Rule("NAdam", optim.NAdam, 0.01),
    Rule("RAdam", optim.RAdam, 0.1),
    Rule("Adagrad", optim.Adagrad, 0.3),
    Rule("Adadelta", optim.Adadelta, 10.0),
    Rule("RMSprop", optim.RMSprop, 0.01),
    Rule("Rprop", optim.Rprop, 0.01),
    Rule("ASGD", optim.ASGD, 1.0),
    Rule("Adafactor", optim.Adafactor, 0.1),
    Rule("Muon", optim.Muon, 0.03, bias=False),
    Rule("LBFGS", optim.LBFGS, 1.0, {"line_search_fn": "strong_wolfe"}),
    Rule("Lion", optim.Lion, 0.003, peer=optax.lion),
    Rule("LAMB", optim.LAMB, 0.01, peer=optax.lamb),
    Rule("LARS", optim.LARS, 3.0, peer=optax.lars),
    Rule("AdaBelief", optim.AdaBelief, 0.03, peer=optax.adabelief),
    Rule("Yogi", optim.Yogi, 0.03, peer=optax.yogi),
    Rule("Adan", optim.Adan, 0.01, peer=optax.adan),
    Rule("ScheduleFreeAdamW", optim.ScheduleFreeAdamW, 0.1, peer=optax.contrib.schedule_free_adamw),
]

# -- data and networks ------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Handwritten digits, 8 x 8 pixels from 0 to 1."""

    x_train: NDArray[Any]  # (N, 64)
    y_train: NDArray[np.int32]  # (N,)
    x_test: NDArray[Any]  # (M, 64)
    y_test: NDArray[np.int32]  # (M,)


def load_data(rng: np.random.Generator, dtype: Any) -> Digits:
    """The digits of scikit-learn, shuffled. The first 80 % are for training."""
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    x, y = (digits.data[order] / 16).astype(dtype), digits.target[order].astype(np.int32)
    cut = len(y) * 4 // 5
    return Digits(x[:cut], y[:cut], x[cut:], y[cut:])


def batches(n: int, steps: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """The images in each batch, `(steps, BATCH)`, out of `n`. Each pass over the images has another order."""
    passes = -(-steps // (n // BATCH))
    return np.concatenate([rng.permutation(n)[: n // BATCH * BATCH].reshape(-1, BATCH) for _ in range(passes)])[:steps]


def initial_weights(rng: np.random.Generator, dtype: Any) -> Weights:
    """The weights and biases of the two layers, drawn from torch's uniform distribution."""
    shapes = ((HIDDEN, FEATURES), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,))
    bounds = (FEATURES**-0.5, FEATURES**-0.5, HIDDEN**-0.5, HIDDEN**-0.5)
    return [rng.uniform(-b, b, shape).astype(dtype) for b, shape in zip(bounds, shapes, strict=True)]


def loss_and_accuracy(weights: Weights, x: NDArray[Any], y: NDArray[np.int32]) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy for the weights of any side, in NumPy's float64."""
    wide = [np.asarray(w, np.float64) for w in weights]
    w1, b1, w2, b2 = wide if len(wide) == 4 else (wide[0], np.zeros(HIDDEN), wide[1], np.zeros(CLASSES))
    scores = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
    scores = scores - scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(y)), y].mean()), float((scores.argmax(axis=1) == y).mean())


# -- ours -------------------------------------------------------------------------------------------------------------


class Trainer:
    """A network and one of our optimizers. `mt.scan` compiles one program for `step`, which serves all learning rates."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def closure(self, x: jax.Array, y: jax.Array) -> jax.Array:
        self.opt.zero_grad()
        return mt.backward(model_loss, self.model, x, y)

    def step(self, x: jax.Array, y: jax.Array) -> jax.Array:
        loss = self.closure(x, y)
        self.opt.step()
        return loss

    def train(self, start: Weights, xs: NDArray[Any], ys: NDArray[np.int32], lr: float) -> Weights:
        """The weights after one step on each of the stacked batches."""
        layers = (nn.Linear(i, o, bias=self.rule.bias) for i, o in ((FEATURES, HIDDEN), (HIDDEN, CLASSES)))
        self.model = nn.Sequential(next(layers), nn.ReLU(), next(layers)).astype(start[0].dtype)
        self.model.load_state_dict(dict(zip(self.model.state_dict(), start, strict=True)))
        self.opt = self.rule.cls([self.model], lr=lr, **self.rule.options)
        if isinstance(self.opt, optim.LBFGS):
            for x, y in zip(xs, ys, strict=True):
                self.opt.step(partial(self.closure, x, y))
        else:
            mt.scan(self.step, jnp.asarray(xs), jnp.asarray(ys))
        weights = self.model.state_dict()
        if isinstance(self.opt, optim.ScheduleFreeAdamW):  # evaluate its average
            states = self.opt.state_dict()["state"]
            for path, y in weights.items():
                z, beta = states[f"0.{path}"]["z"], self.opt.betas[0]
                weights[path] = (y - (1 - beta) * z) / beta
        return [np.array(weight) for weight in weights.values()]


def model_loss(model: nn.Sequential, x: jax.Array, y: jax.Array) -> jax.Array:
    return nn.functional.cross_entropy(model(x), y)


# -- the peers --------------------------------------------------------------------------------------------------------


def train_torch(rule: Rule, start: Weights, xs: NDArray[Any], ys: NDArray[np.int32]) -> Weights:
    """The same with torch's network, autograd and optimizer of the same name."""
    layers = [torch.nn.Linear(i, o, bias=rule.bias) for i, o in ((FEATURES, HIDDEN), (HIDDEN, CLASSES))]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).to(torch.from_numpy(start[0]).dtype)
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), start, strict=True):
            parameter.copy_(torch.from_numpy(array))
    opt = getattr(torch.optim, rule.cls.__name__)(model.parameters(), lr=rule.lr, **rule.options)

    def closure(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for x, y in zip(torch.from_numpy(xs), torch.from_numpy(ys).long(), strict=True):
        opt.step(partial(closure, x, y))
    return [parameter.detach().numpy() for parameter in model.parameters()]


def train_optax(rule: Rule, start: Weights, xs: NDArray[Any], ys: NDArray[np.int32]) -> Weights:
    """The same with hand-written layers and optax's rule, in one `lax.scan`."""
    if rule.peer is None:
        raise ValueError(f"{rule.name} has no peer in optax")
    transformation = rule.peer(rule.lr, **rule.options)

    def loss_fn(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        w1, b1, w2, b2 = params
        log_p = jax.nn.log_softmax(jax.nn.relu(x @ w1.T + b1[None]) @ w2.T + b2[None])
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        updates, state = transformation.update(jax.grad(loss_fn)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    params: Any = [jnp.asarray(array) for array in start]
    with jax.numpy_dtype_promotion("standard"):
        (params, state), _ = jax.lax.scan(step, (params, transformation.init(params)), (xs, ys))
        if rule.peer is optax.contrib.schedule_free_adamw:
            params = optax.contrib.schedule_free_eval_params(state, params)
    return [np.array(array) for array in params]


# -- the table --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The measurements: (training loss, test accuracy) of our side and of the peer."""

    rule: Rule
    ours: tuple[float, float]
    peer: tuple[float, float]
    difference: float  # the largest difference between the final weights

    def cells(self) -> list[str]:
        (loss, accuracy), (peer_loss, peer_accuracy) = self.ours, self.peer
        library = "torch" if self.rule.peer is None else "optax"
        losses, accuracies = f"{loss:.5f}", f"{accuracy:.4f}"
        return [
            *(self.rule.name, f"{self.rule.lr:g}", library, losses, f"{peer_loss:.5f}"),
            *(accuracies, f"{peer_accuracy:.4f}", f"{self.difference:.1e}"),
        ]


HEADINGS = (
    "optimizer",
    "lr",
    "peer",
    "loss",
    "peer's loss",
    "accuracy",
    "peer's accuracy",
    "largest weight difference",
)


def seen(rule: Rule, data: Digits, which: NDArray[np.intp]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """The stacked batches for training with a rule."""
    if rule.cls is optim.LBFGS:
        which = np.tile(np.arange(len(data.y_train)), (-(-len(which) // 20), 1))
    return data.x_train[which], data.y_train[which]


def compare(rule: Rule, data: Digits, start: Weights, which: NDArray[np.intp]) -> Row:
    """Train both sides and measure."""
    start = start if rule.bias else start[::2]
    xs, ys = seen(rule, data, which)
    ours = Trainer(rule).train(start, xs, ys, rule.lr)
    theirs = (train_torch if rule.peer is None else train_optax)(rule, start, xs, ys)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    return Row(rule, measured(ours, data), measured(theirs, data), difference)


def measured(weights: Weights, data: Digits) -> tuple[float, float]:
    """Loss on the training images, accuracy on the test images."""
    return (
        loss_and_accuracy(weights, data.x_train, data.y_train)[0],
        loss_and_accuracy(weights, data.x_test, data.y_test)[1],
    )


def search(rule: Rule, data: Digits, start: Weights, which: NDArray[np.intp]) -> tuple[float, float]:
    """The learning rate with the lowest training loss at the end, and that loss."""
    start = start if rule.bias else start[::2]
    trainer, losses = Trainer(rule), {}
    with np.errstate(all="ignore"):
        for lr in RATES:
            weights = trainer.train(start, *seen(rule, data, which), lr)
            losses[lr] = loss_and_accuracy(weights, data.x_train, data.y_train)[0]
    lr = min(losses, key=lambda lr: (not np.isfinite(losses[lr]), losses[lr]))
    return lr, losses[lr]


def markdown(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -- the command line -------------------------------------------------------------------------------------------------


def number_of_steps(text: str) -> int:
    """Parse an integer from 1 to 100,000."""
    if not (text.isdecimal() and 1 <= int(text) <= 100_000):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 100000; got {text}")
    return int(text)


def markdown_path(text: str) -> Path:
    """Parse the name of a .md file in an existing folder."""
    path = Path(text)
    if path.suffix.lower() != ".md":
        raise argparse.ArgumentTypeError(f"must be the name of a .md file; got {text!r}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return path


def seed_of(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1}; got {text}")
    return int(text)


def run(args: argparse.Namespace, console: Console) -> None:
    """Run everything, in the precision of the options."""
    dtype = np.float64 if args.x64 else np.float32
    for_split, for_weights, for_batches = np.random.default_rng(args.seed).spawn(3)
    data = load_data(for_split, dtype)
    start = initial_weights(for_weights, dtype)
    which = batches(len(data.y_train), args.steps, for_batches)
    console.print(
        f"network {FEATURES}-{HIDDEN}-{CLASSES}, {args.steps} steps of {BATCH} images, {np.dtype(dtype).name};"
        f" {len(data.y_train)} training images, {len(data.y_test)} test images"
    )
    if args.search:
        for rule in RULES:
            lr, loss = search(rule, data, start, which)
            console.print(f"{rule.name}: lr {lr:g}, training loss {loss:.5f}", soft_wrap=True)
        return
    table = Table(title="the same initial weights, the same batches", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("optimizer", "peer") else "right")
    rows = []
    with console.status("training ..."):
        for rule in RULES:
            rows.append(compare(rule, data, start, which))
            table.add_row(*rows[-1].cells())
    console.print(table)
    if args.output is not None:
        args.output.write_text(markdown(rows), encoding="utf-8")
        console.print(f"Markdown: {args.output}", soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train one small network on handwritten digits with every optimizer, and with torch's or optax's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=number_of_steps, default=440, metavar="N", help="steps of each optimizer")
    parser.add_argument(
        "--seed", type=seed_of, default=0, metavar="N", help="of the split, the weights and the batches"
    )
    parser.add_argument("--x64", action="store_true", help="compute in float64")
    parser.add_argument("--search", action="store_true", help="only find the learning rates with the lowest losses")
    parser.add_argument("--output", type=markdown_path, metavar="FILE", help="markdown to write the table to")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    with jax.enable_x64(args.x64):
        run(args, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
