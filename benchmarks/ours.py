"""Our sides: how users of minitorch_jax write the work."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters.numpy import wrap

from .peers.numpy import Flat as NumpyFlat
from .problems import DECAY, LAYER_LR, LR, MLP, MOMENTUM, Array, Arrays, Layer
from .timing import Side, flattened


class Flat(mt.Module):
    """A module that is nothing but parameters."""

    def __init__(self, problem: Arrays) -> None:
        for i, array in enumerate(problem.parameters()):
            setattr(self, f"p{i}", mt.Parameter(array))


def make_optimizer(rule: str, modules: list[Any]) -> mt.Optimizer:
    """The optimizer that all sides know under the name `rule`."""
    match rule:
        case "momentum":
            return optim.SGD(modules, lr=LR, momentum=MOMENTUM)
        case "adam":
            return optim.Adam(modules, lr=LR)
        case "adamw":
            return optim.AdamW(modules, lr=LR, weight_decay=DECAY)
        case "lion":
            return optim.Lion(modules, lr=LR, weight_decay=DECAY)
    return mt.Optimizer(modules, lr=LR)


def step(problem: Arrays, rule: str = "sgd", packed: bool = False, optimizer: Any = None) -> Side:
    """`opt.step()` alone."""
    model = Flat(problem)
    if packed:
        mt.pack(model)
    opt = make_optimizer(rule, [model]) if optimizer is None else optimizer([model])
    model.accumulate([jnp.asarray(grad) for grad in problem.gradients()])

    def run(calls: int) -> int:
        for _ in range(calls):
            opt.step()
        return opt.num_steps  # waits for the last update, and lends no parameter, which would then be copied

    return Side(run, value=lambda _: model.p0)


class Scale:
    """A layer of a NumPy network that knows nothing of this library."""

    def __init__(self, weight: Array, gradient: Array) -> None:
        self.W, self.dW = weight, gradient


def numpy_step(problem: Arrays, rule: str = "sgd", wrapped: bool = False) -> Side:
    """`opt.step()` on NumPy arrays: lists that an object gives, or what `wrap` finds in one layer for each array."""
    model = NumpyFlat(problem)
    layers = [Scale(*pair) for pair in zip(model.params, model.gradients, strict=True)]
    opt = make_optimizer(rule, [wrap(layers) if wrapped else model])

    def run(calls: int) -> Array:
        for _ in range(calls):
            opt.step()
        return model.params[0]

    return Side(run)


def make_model(problem: MLP) -> nn.Sequential:
    layers: list[mt.Module] = []
    for weight, bias in problem.weights():
        linear = nn.Linear(problem.width, problem.width, key=jax.random.key(0))
        linear.weight, linear.bias = jnp.asarray(weight), jnp.asarray(bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class Training:
    """A model, its optimizer, its data, and one step of the three-call loop."""

    def __init__(self, problem: MLP, packed: bool = False, model: Any = None, optimizer: Any = None) -> None:
        self.model = make_model(problem) if model is None else model
        if packed:
            mt.pack(self.model)
        self.opt = mt.Optimizer([self.model], lr=LR) if optimizer is None else optimizer([self.model])
        self.x, self.y = map(jnp.asarray, problem.data())

        def loss_fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return nn.functional.mse_loss(model(x), y)

        self.loss_fn = loss_fn  # a new one each time, which is compiled anew

    def step(self, x: jax.Array, y: jax.Array) -> jax.Array:
        self.opt.zero_grad()
        loss = mt.backward(self.loss_fn, self.model, x, y)
        self.opt.step()
        return loss


def three_calls(problem: MLP, packed: bool = False) -> Side:
    """`zero_grad`, `backward` and `step`, eagerly."""
    training = Training(problem, packed)
    model, opt, x, y, loss_fn = training.model, training.opt, training.x, training.y, training.loss_fn

    def run(calls: int) -> tuple[jax.Array, int]:
        for _ in range(calls):
            opt.zero_grad()
            loss = mt.backward(loss_fn, model, x, y)
            opt.step()
        return loss, opt.num_steps  # which waits for the last update

    return Side(run, value=lambda result: result[0])


def compiled(problem: MLP, model: Any = None, optimizer: Any = None, from_numpy: bool = False) -> Side:
    """The same three lines under `mt.jit`; `from_numpy`: the data come in NumPy arrays at each call."""
    training = Training(problem, model=model, optimizer=optimizer)
    model, opt, loss_fn = training.model, training.opt, training.loss_fn
    x, y = problem.data() if from_numpy else (training.x, training.y)

    @mt.jit
    def train_step(x: Any, y: Any) -> jax.Array:
        opt.zero_grad()
        loss = mt.backward(loss_fn, model, x, y)
        opt.step()
        return loss

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            loss = train_step(x, y)
        return loss

    return Side(run)


def functional(problem: MLP) -> Side:
    """The same three lines as a pure function of the optimizer, under `jax.jit`."""
    training = Training(problem)
    opt, x, y, loss_fn = training.opt, training.x, training.y, training.loss_fn

    @jax.jit
    def train_step(opt: mt.Optimizer, x: jax.Array, y: jax.Array) -> tuple[mt.Optimizer, jax.Array]:
        opt.zero_grad()
        loss = mt.backward(loss_fn, opt.modules[0], x, y)
        opt.step()
        return opt, loss

    def run(calls: int) -> jax.Array:
        nonlocal opt
        for _ in range(calls):
            opt, loss = train_step(opt, x, y)
        return loss

    return Side(run)


def flattened_module(problem: MLP) -> Side:
    """A network flattened and put together again, as at each call of a plain `jax.jit`."""
    return Side(partial(flattened, make_model(problem)), value=lambda model: model[0].weight[0])


def flattened_optimizer(problem: MLP) -> Side:
    """An Adam with its network flattened and put together again."""
    opt = Training(problem, optimizer=partial(make_optimizer, "adam")).opt
    return Side(partial(flattened, opt), value=lambda opt: opt.modules[0][0].weight[0])


def planned(problem: MLP, listed: bool) -> Side:
    """An optimizer made for layers that are listed one by one, or lie in one Sequential: it plans its step then."""
    model = make_model(problem)

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            mt.Optimizer(list(model) if listed else [model])
        return model[0].weight[0]

    return Side(run)


def scanned(problem: MLP, steps: int) -> Side:
    """The same three lines under `mt.scan`."""
    training = Training(problem)
    xs, ys = (jnp.stack([array] * steps) for array in (training.x, training.y))
    train_step = training.step

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            losses = mt.scan(train_step, xs, ys)
        return losses

    return Side(run, steps=steps)


class Called(mt.Module):
    """A layer, and how it is called to map one array to one."""

    def __init__(self, problem: Layer) -> None:
        n = problem.size
        self.kind = problem.kind
        match problem.kind:
            case "conv":
                self.layer: Any = nn.Conv2d(n, n, 3, padding=1)
            case "lstm":
                self.layer = nn.LSTM(n, n, bias=False, batch_first=True)
            case "attention":
                self.layer = nn.MultiheadAttention(n, problem.heads, batch_first=True)
            case "transformer":
                self.layer = nn.TransformerEncoderLayer(n, problem.heads, 2 * n, dropout=0.0, batch_first=True)
        self.layer.load_state_dict(problem.weights())

    def forward(self, x: jax.Array) -> jax.Array:
        if self.kind == "attention":
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)[0] if self.kind == "lstm" else self.layer(x)


def layer(problem: Layer) -> Side:
    """Forward, backward and an SGD step of one layer, under `mt.jit`."""
    model = Called(problem)
    opt = mt.Optimizer([model], lr=LAYER_LR)
    x, y = map(jnp.asarray, problem.data())

    @mt.jit
    def train_step(x: jax.Array, y: jax.Array) -> jax.Array:
        opt.zero_grad()
        loss = mt.backward(lambda model, x, y: nn.functional.mse_loss(model(x), y), model, x, y)
        opt.step()
        return loss

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            loss = train_step(x, y)
        return loss

    return Side(run)
