"""equinox with optax, as in equinox's own examples: `filter_jit` around `filter_value_and_grad`."""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ..problems import LAYER_LR, LR, MLP, Layer
from ..timing import Side, flattened


def make_model(problem: MLP) -> eqx.nn.Sequential:
    layers: list[Any] = []
    for weight, bias in problem.weights():
        linear = eqx.nn.Linear(problem.width, problem.width, key=jax.random.key(0))
        arrays = jnp.asarray(weight), jnp.asarray(bias)
        layers += [eqx.tree_at(lambda linear: (linear.weight, linear.bias), linear, arrays), eqx.nn.Lambda(jnp.tanh)]
    return eqx.nn.Sequential(layers)


def train(problem: MLP) -> Side:
    """A network, sample by sample under `vmap`."""
    return _train(make_model(problem), problem.data(), LR)


def flattened_module(problem: MLP) -> Side:
    """A network flattened and put together again."""
    return Side(partial(flattened, make_model(problem)), value=lambda model: model.layers[0].weight[0])


def flattened_optimizer(problem: MLP) -> Side:
    """A network and optax's state of Adam for it, flattened and put together again."""
    model = make_model(problem)
    both = model, optax.adam(LR).init(eqx.filter(model, eqx.is_array))
    return Side(partial(flattened, both), value=lambda both: both[0].layers[0].weight[0])


def _train(model: Any, data: tuple[Any, Any], lr: float) -> Side:
    x, y = map(jnp.asarray, data)
    optimizer = optax.sgd(lr)
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


def _replaced(layer: Any, **arrays: Any) -> Any:
    """A layer with other arrays in some attributes."""
    names = list(arrays)
    return eqx.tree_at(lambda tree: [getattr(tree, name) for name in names], layer, [arrays[name] for name in names])


def _linear(weight: Any, bias: Any) -> eqx.nn.Linear:
    layer = eqx.nn.Linear(weight.shape[1], weight.shape[0], key=jax.random.key(0))
    return _replaced(layer, weight=weight, bias=bias)


def _attention(weights: dict[str, Any], problem: Layer) -> eqx.nn.MultiheadAttention:
    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    layer = eqx.nn.MultiheadAttention(problem.heads, problem.size, **biases, key=jax.random.key(0))
    split = zip(jnp.split(weights["in_proj_weight"], 3), jnp.split(weights["in_proj_bias"], 3), strict=True)
    query, key, value = (_linear(weight, bias) for weight, bias in split)
    output = _linear(weights["out_proj.weight"], weights["out_proj.bias"])
    return _replaced(layer, query_proj=query, key_proj=key, value_proj=value, output_proj=output)


class Recurrent(eqx.Module):
    """equinox has the cell of an LSTM; the loop over time is the user's."""

    cell: eqx.nn.LSTMCell

    def __call__(self, x: jax.Array) -> jax.Array:
        def step(state: Any, row: jax.Array) -> Any:
            state = self.cell(row, state)
            return state, state[0]

        zeros = jnp.zeros(self.cell.hidden_size)
        return jax.lax.scan(step, (zeros, zeros), x)[1]


class Attention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attention(x, x, x)


class Transformer(eqx.Module):
    """A layer of an encoder, as torch's default: the norms come last."""

    attention: eqx.nn.MultiheadAttention
    linears: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.vmap(self.norms[0])(x + self.attention(x, x, x))
        hidden = jax.nn.relu(jax.vmap(self.linears[0])(x))
        return jax.vmap(self.norms[1])(x + jax.vmap(self.linears[1])(hidden))


def make_layer(problem: Layer) -> Any:
    """A layer that maps one sample to one."""
    weights = {name: jnp.asarray(weight) for name, weight in problem.weights().items()}
    n, key = problem.size, jax.random.key(0)
    match problem.kind:
        case "conv":
            conv = eqx.nn.Conv2d(n, n, 3, padding=1, key=key)
            return _replaced(conv, weight=weights["weight"], bias=weights["bias"].reshape(n, 1, 1))
        case "lstm":
            cell = eqx.nn.LSTMCell(n, n, use_bias=False, key=key)
            return Recurrent(_replaced(cell, weight_ih=weights["weight_ih_l0"], weight_hh=weights["weight_hh_l0"]))
        case "attention":
            return Attention(_attention(weights, problem))
    inner = {name.removeprefix("self_attn."): weight for name, weight in weights.items()}
    linears = [_linear(weights[f"linear{i}.weight"], weights[f"linear{i}.bias"]) for i in (1, 2)]
    norms = [
        _replaced(eqx.nn.LayerNorm(n), weight=weights[f"norm{i}.weight"], bias=weights[f"norm{i}.bias"]) for i in (1, 2)
    ]
    return Transformer(_attention(inner, problem), linears, norms)


def layer(problem: Layer) -> Side:
    """One layer under `filter_jit`."""
    return _train(make_layer(problem), problem.data(), LAYER_LR)
