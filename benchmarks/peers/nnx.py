"""flax nnx with `nnx.Optimizer`: `nnx.jit`, and the two spellings that flax offers against its overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..problems import LR, MLP
from ..timing import Side


def make_model(problem: MLP) -> nnx.Sequential:
    layers: list[Any] = []
    for weight, bias in problem.weights():
        linear = nnx.Linear(problem.width, problem.width, rngs=nnx.Rngs(0))
        linear.kernel, linear.bias = nnx.Param(jnp.asarray(weight.T)), nnx.Param(jnp.asarray(bias))
        layers += [linear, nnx.tanh]
    return nnx.Sequential(*layers)


def train_step(model: nnx.Sequential, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    def loss_fn(model: nnx.Sequential) -> jax.Array:
        return ((model(x) - y) ** 2).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def _train(problem: MLP, bind: Callable[[Any, Any], Callable[..., jax.Array]]) -> Side:
    model = make_model(problem)
    compiled = bind(model, nnx.Optimizer(model, optax.sgd(LR), wrt=nnx.Param))
    x, y = map(jnp.asarray, problem.data())

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            loss = compiled(x, y)
        return loss

    return Side(run)


def train(problem: MLP) -> Side:
    """`nnx.jit`, which takes the model and the optimizer apart and puts them together at each call."""

    def bind(model: Any, optimizer: Any) -> Callable[..., jax.Array]:
        compiled = nnx.jit(train_step)
        return lambda x, y: compiled(model, optimizer, x, y)

    return _train(problem, bind)


def train_cached(problem: MLP) -> Side:
    """`nnx.cached_partial`, which keeps what it found in them; their structure must not change."""
    return _train(problem, lambda model, optimizer: nnx.cached_partial(nnx.jit(train_step), model, optimizer))


def train_partial(problem: MLP) -> Side:
    """`nnx.jit_partial` in tree mode, which takes them apart once, and knows no shared references."""
    return _train(problem, lambda model, optimizer: nnx.jit_partial(train_step, model, optimizer, graph=False))
