"""optax under `jax.jit`, parameters and optimizer state donated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..problems import DECAY, LR, MLP, MOMENTUM, Arrays
from ..timing import Side
from .hand import Params, load, loss_fn


def make_optimizer(rule: str) -> optax.GradientTransformation:
    match rule:
        case "momentum":
            return optax.sgd(LR, momentum=MOMENTUM)
        case "adam":
            return optax.adam(LR)
        case "adamw":
            return optax.adamw(LR, weight_decay=DECAY)
        case "lion":
            return optax.lion(LR, weight_decay=DECAY)
    return optax.sgd(LR)


def step(problem: Arrays, rule: str) -> Side:
    """The update alone."""
    params = [jnp.asarray(p) for p in problem.parameters()]
    grads = [jnp.asarray(g) for g in problem.gradients()]
    optimizer = make_optimizer(rule)
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, grads: Params) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(calls: int) -> jax.Array:
        nonlocal params, state
        for _ in range(calls):
            params, state = update(params, state, grads)
        return params[0]

    return Side(run)


def train(problem: MLP) -> Side:
    """Gradients and update in one program."""
    params, x, y = load(problem)
    optimizer = make_optimizer("sgd")
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Params, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def run(calls: int) -> jax.Array:
        nonlocal params, state
        for _ in range(calls):
            params, state, loss = train_step(params, state, x, y)
        return loss

    return Side(run)
