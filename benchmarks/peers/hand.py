"""Plain JAX, by hand: pure functions of a flat list of arrays, compiled, the old parameters donated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..problems import LR, MLP, Arrays
from ..timing import Side

Params = list[jax.Array]


def learning_rate(on_device: bool) -> Any:
    """A number, as such loops are written; or an array, which saves the transfer of the number at each call."""
    return jnp.float32(LR) if on_device else LR


def make_update() -> Any:
    @partial(jax.jit, donate_argnums=0)
    def update(params: Params, grads: Params, lr: Any) -> Params:
        return [p - lr * g for p, g in zip(params, grads, strict=True)]

    return update


def step(problem: Arrays, lr_on_device: bool = False) -> Side:
    """The update alone."""
    params = [jnp.asarray(p) for p in problem.parameters()]
    grads = [jnp.asarray(g) for g in problem.gradients()]
    update, lr = make_update(), learning_rate(lr_on_device)

    def run(calls: int) -> jax.Array:
        nonlocal params
        for _ in range(calls):
            params = update(params, grads, lr)
        return params[0]

    return Side(run)


def load(problem: MLP) -> tuple[Params, jax.Array, jax.Array]:
    """Parameters, inputs, targets."""
    x, y = problem.data()
    return [jnp.asarray(array) for pair in problem.weights() for array in pair], jnp.asarray(x), jnp.asarray(y)


def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    for weight, bias in zip(params[::2], params[1::2], strict=True):
        x = jnp.tanh(x @ weight.T + bias)
    return ((x - y) ** 2).mean()


def two_calls(problem: MLP, lr_on_device: bool = False) -> Side:
    """The gradients in one call, the update in another."""
    params, x, y = load(problem)
    gradients = jax.jit(jax.value_and_grad(lambda params, x, y: loss_fn(params, x, y)))
    update, lr = make_update(), learning_rate(lr_on_device)

    def run(calls: int) -> tuple[jax.Array, jax.Array]:
        nonlocal params
        for _ in range(calls):
            loss, grads = gradients(params, x, y)
            params = update(params, grads, lr)
        return loss, params[0]  # the last update is waited for too

    return Side(run, value=lambda result: result[0])


def train_step(params: Params, x: jax.Array, y: jax.Array, lr: Any) -> tuple[Params, jax.Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    return [p - lr * g for p, g in zip(params, grads, strict=True)], loss


def fused(problem: MLP, from_numpy: bool = False) -> Side:
    """Gradients and update in one program; the learning rate is on the device, the best case of one that may change.

    `from_numpy`: the data come in NumPy arrays at each call, which JAX may read after it has returned.
    """
    params, *batch = load(problem)
    x, y = problem.data() if from_numpy else batch
    compiled = jax.jit(lambda params, x, y, lr: train_step(params, x, y, lr), donate_argnums=0)
    lr = learning_rate(on_device=True)

    def run(calls: int) -> jax.Array:
        nonlocal params
        for _ in range(calls):
            params, loss = compiled(params, x, y, lr)
        return loss

    return Side(run)


def scanned(problem: MLP, steps: int) -> Side:
    """`lax.scan` over the fused step."""
    params, x, y = load(problem)
    xs, ys = (jnp.stack([array] * steps) for array in (x, y))
    lr = learning_rate(on_device=True)

    @partial(jax.jit, donate_argnums=0)
    def compiled(params: Params, xs: jax.Array, ys: jax.Array, lr: Any) -> tuple[Params, jax.Array]:
        return jax.lax.scan(lambda params, batch: train_step(params, *batch, lr), params, (xs, ys))

    def run(calls: int) -> jax.Array:
        nonlocal params
        for _ in range(calls):
            params, losses = compiled(params, xs, ys, lr)
        return losses

    return Side(run, steps=steps)
