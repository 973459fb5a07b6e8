"""equinox with optax, as in equinox's own examples: `filter_jit` around `filter_value_and_grad`."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ..problems import LR, MLP
from ..timing import Side


def make_model(problem: MLP) -> eqx.nn.Sequential:
    layers: list[Any] = []
    for weight, bias in problem.weights():
        linear = eqx.nn.Linear(problem.width, problem.width, key=jax.random.key(0))
        arrays = jnp.asarray(weight), jnp.asarray(bias)
        layers += [eqx.tree_at(lambda linear: (linear.weight, linear.bias), linear, arrays), eqx.nn.Lambda(jnp.tanh)]
    return eqx.nn.Sequential(layers)


def train(problem: MLP) -> Side:
    model: Any = make_model(problem)
    x, y = map(jnp.asarray, problem.data())
    optimizer = optax.sgd(LR)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    def loss_fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((jax.vmap(model)(x) - y) ** 2).mean()

    @eqx.filter_jit
    def train_step(model: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    def run(calls: int) -> jax.Array:
        nonlocal model, state
        for _ in range(calls):
            model, state, loss = train_step(model, state, x, y)
        return loss

    return Side(run)
