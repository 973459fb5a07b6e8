"""A layer by plain JAX, as it is written by hand: one function of `lax` or `jnp`, in torch's layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..timing import Side
from .kinds import KINDS, cotangent, fingerprint


def differentiated(
    function: Callable[[Any, Any], jax.Array],
    given: Any,
    fixed: Any,
    jit: Callable[..., Any] = jax.jit,
    last: bool = False,
) -> Side:
    """A function of a dict with "x" and of one that is fixed, forward and backward in one program.

    With `last`, its images have channels last.
    """
    shape = jax.eval_shape(function, given, fixed).shape
    g = jnp.asarray(channels_last(cotangent((shape[0], shape[-1], *shape[1:-1]))) if last else cotangent(shape))

    def both(given: Any, fixed: Any, g: jax.Array) -> Any:
        out, pull = jax.vjp(lambda given: function(given, fixed), given)
        (gradient,) = pull(g)
        return (
            out,
            gradient["x"],
            [leaf for name in gradient if name != "x" for leaf in jax.tree.leaves(gradient[name])],
        )

    compiled = jit(both)

    def run(calls: int) -> Any:
        for _ in range(calls):
            result = compiled(given, fixed, g)
        return result

    def value(result: Any) -> list[float]:
        out, by_x, by_weights = result
        host = [np.asarray(array) for array in (out, g, given["x"], by_x, *by_weights)]
        return fingerprint(host[0], host[1], host[2], host[3:])

    return Side(run, value=value)


def channels_last(array: Any) -> Any:
    return np.moveaxis(array, 1, -1)


def _convolved(stride: int = 1, groups: bool = False) -> Callable[..., jax.Array]:
    def call(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        spatial = x.ndim - 2
        names = "NCHW", "OIHW", "NCHW"
        names = {1: ("NCH", "OIH", "NCH"), 2: names, 3: ("NCDHW", "OIDHW", "NCDHW")}[spatial]
        padding = [(weight.shape[-1] // 2,) * 2] * spatial
        count = x.shape[1] if groups else 1
        out = lax.conv_general_dilated(
            x, weight, (stride,) * spatial, padding, dimension_numbers=names, feature_group_count=count
        )
        return out + bias.reshape(-1, *[1] * spatial)

    return call


def _transposed(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    names = "NCHW", "OIHW", "NCHW"
    out = lax.conv_transpose(x, weight, (2, 2), [(2, 2)] * 2, dimension_numbers=names, transpose_kernel=True)
    return out + bias[:, None, None]


def _pooled(operation: Any, start: float, window: int, stride: int, padding: int) -> Callable[[jax.Array], jax.Array]:
    def call(x: jax.Array) -> jax.Array:
        pads = (0, 0), (0, 0), (padding,) * 2, (padding,) * 2
        return lax.reduce_window(x, start, operation, (1, 1, window, window), (1, 1, stride, stride), pads)

    return call


def _cross_entropy(x: jax.Array, target: jax.Array, smoothing: float = 0.0) -> jax.Array:
    logs = jax.nn.log_softmax(x)
    own = jnp.take_along_axis(logs, target[:, None], 1)[:, 0]
    return -((1 - smoothing) * own + smoothing * logs.mean(-1)).mean()


def attention(x: jax.Array, key: jax.Array, value: jax.Array, causal: bool = False) -> jax.Array:
    scores = jnp.einsum("nhld,nhsd->nhls", x, key) / math.sqrt(x.shape[-1])
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("nhls,nhsd->nhld", jax.nn.softmax(scores), value)


def lstm(x: jax.Array, weight_ih_l0: jax.Array, weight_hh_l0: jax.Array) -> jax.Array:
    def step(state: Any, row: jax.Array) -> Any:
        h, c = state
        i, f, g, o = jnp.split(row + h @ weight_hh_l0.T, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], weight_hh_l0.shape[1]))
    return lax.scan(step, (zeros, zeros), x @ weight_ih_l0.T)[1]


def _gru(x: jax.Array, weight_ih_l0: jax.Array, weight_hh_l0: jax.Array) -> jax.Array:
    def step(h: jax.Array, row: jax.Array) -> Any:
        (ir, iz, i), (hr, hz, own) = jnp.split(row, 3, -1), jnp.split(h @ weight_hh_l0.T, 3, -1)
        z = jax.nn.sigmoid(iz + hz)
        h = (1 - z) * jnp.tanh(i + jax.nn.sigmoid(ir + hr) * own) + z * h
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[1], weight_hh_l0.shape[1])), x @ weight_ih_l0.T)[1]


def _rnn(x: jax.Array, weight_ih_l0: jax.Array, weight_hh_l0: jax.Array) -> jax.Array:
    def step(h: jax.Array, row: jax.Array) -> Any:
        h = jnp.tanh(row + h @ weight_hh_l0.T)
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[1], weight_hh_l0.shape[1])), x @ weight_ih_l0.T)[1]


def _standardized(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)


def _group_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    groups = x.reshape(x.shape[0], 8, -1, *x.shape[2:])
    return _standardized(groups, (2, 3, 4)).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


CALLS: Mapping[str, Callable[..., jax.Array]] = {
    "Conv2d 1x1": _convolved(),
    "Conv2d 3x3": _convolved(),
    "Conv2d 3x3, stride 2": _convolved(2),
    "Conv2d of few channels": _convolved(),
    "Conv2d 3x3, depthwise": _convolved(groups=True),
    "ConvTranspose2d 4x4, stride 2": _transposed,
    "Conv1d 5": _convolved(),
    "Conv3d 3x3x3": _convolved(),
    "MaxPool2d 2x2": _pooled(lax.max, -jnp.inf, 2, 2, 0),
    "MaxPool2d 3x3, stride 2": _pooled(lax.max, -jnp.inf, 3, 2, 1),
    "AvgPool2d 2x2": lambda x: _pooled(lax.add, 0.0, 2, 2, 0)(x) / 4,
    "CrossEntropyLoss": _cross_entropy,
    "CrossEntropyLoss, smoothed": lambda x, target: _cross_entropy(x, target, 0.1),
    "LinearCrossEntropyLoss": lambda x, weight, target: _cross_entropy(x @ weight.T, target),
    "BCEWithLogitsLoss": lambda x, target: (jax.nn.softplus(x) - x * target).mean(),
    "attention": attention,
    "causal attention": lambda x, key, value: attention(x, key, value, causal=True),
    "LSTM": lstm,
    "GRU": _gru,
    "RNN": _rnn,
    "LayerNorm": lambda x, weight, bias: _standardized(x, (-1,)) * weight + bias,
    "RMSNorm": lambda x, weight: x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight,
    "GroupNorm": _group_norm,
    "BatchNorm2d": lambda x, weight, bias: _standardized(x, (0, 2, 3)) * weight[:, None, None] + bias[:, None, None],
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "softmax": jax.nn.softmax,
    "Embedding": lambda x, index: x[index],
    "Linear on 3-D": lambda x, weight, bias: x @ weight.T + bias,
    "Linear without bias, ReLU, on 3-D": lambda x, weight: jax.nn.relu(x @ weight.T),
}


def side(name: str, size: Sequence[int]) -> Side:
    kind = KINDS[name]
    fixed = {key: jnp.asarray(array) for key, array in kind.fixed(size).items()}
    arrays = {key: jnp.asarray(array) for key, array in kind.arrays(size).items()}
    call = CALLS[name]
    return differentiated(lambda arrays, fixed: call(**arrays, **fixed), arrays, fixed)
