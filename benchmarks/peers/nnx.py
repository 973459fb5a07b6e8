"""flax nnx with `nnx.Optimizer`: `nnx.jit`, and the two spellings that flax offers against its overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..problems import LAYER_LR, LR, MLP, Layer
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


def _attention(weights: dict[str, Any], problem: Layer) -> nnx.MultiHeadAttention:
    n, heads = problem.size, problem.heads
    layer = nnx.MultiHeadAttention(heads, n, decode=False, rngs=nnx.Rngs(0))
    split = zip(jnp.split(weights["in_proj_weight"], 3), jnp.split(weights["in_proj_bias"], 3), strict=True)
    for part, (weight, bias) in zip((layer.query, layer.key, layer.value), split, strict=True):
        part.kernel, part.bias = nnx.Param(weight.T.reshape(n, heads, -1)), nnx.Param(bias.reshape(heads, -1))
    layer.out.kernel = nnx.Param(weights["out_proj.weight"].T.reshape(heads, -1, n))
    layer.out.bias = nnx.Param(weights["out_proj.bias"])
    return layer


def _linear(weights: dict[str, Any], name: str) -> nnx.Linear:
    weight = weights[f"{name}.weight"]
    layer = nnx.Linear(*weight.T.shape, rngs=nnx.Rngs(0))
    layer.kernel, layer.bias = nnx.Param(weight.T), nnx.Param(weights[f"{name}.bias"])
    return layer


def _norm(weights: dict[str, Any], name: str) -> nnx.LayerNorm:
    scale = weights[f"{name}.weight"]
    layer = nnx.LayerNorm(len(scale), epsilon=1e-5, rngs=nnx.Rngs(0))
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(weights[f"{name}.bias"])
    return layer


class Transformer(nnx.Module):
    """A layer of an encoder, as torch's default: the norms come last."""

    def __init__(self, weights: dict[str, Any], problem: Layer) -> None:
        inner = {name.removeprefix("self_attn."): weight for name, weight in weights.items()}
        self.attention = _attention(inner, problem)
        self.linear1, self.linear2 = _linear(weights, "linear1"), _linear(weights, "linear2")
        self.norm1, self.norm2 = _norm(weights, "norm1"), _norm(weights, "norm2")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))


def make_layer(problem: Layer) -> Any:
    weights = {name: jnp.asarray(weight) for name, weight in problem.weights().items()}
    n = problem.size
    match problem.kind:
        case "conv":
            conv = nnx.Conv(n, n, (3, 3), padding="SAME", rngs=nnx.Rngs(0))
            conv.kernel = nnx.Param(weights["weight"].transpose(2, 3, 1, 0))
            conv.bias = nnx.Param(weights["bias"])
            return conv
        case "lstm":
            cell = nnx.OptimizedLSTMCell(n, n, rngs=nnx.Rngs(0))
            cell.dense_h = nnx.Linear(n, 4 * n, use_bias=False, rngs=nnx.Rngs(0))
            cell.dense_i.kernel = nnx.Param(weights["weight_ih_l0"].T)
            cell.dense_h.kernel = nnx.Param(weights["weight_hh_l0"].T)
            return nnx.RNN(cell)
        case "attention":
            return _attention(weights, problem)
    return Transformer(weights, problem)


def layer(problem: Layer) -> Side:
    """One layer under `nnx.jit_partial`, the quickest of flax's ways to call; images in its layout, channels last."""
    model = make_layer(problem)
    optimizer = nnx.Optimizer(model, optax.sgd(LAYER_LR), wrt=nnx.Param)
    compiled = nnx.jit_partial(train_step, model, optimizer, graph=False)
    x, y = map(jnp.asarray, problem.data())
    if problem.kind == "conv":
        x, y = (array.transpose(0, 2, 3, 1) for array in (x, y))

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            loss = compiled(x, y)
        return loss

    return Side(run)
