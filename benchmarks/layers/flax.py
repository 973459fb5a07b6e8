"""A layer of flax (linen) under `jax.jit`, in its layout: channels last. Its functions that are JAX's own are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen

from ..timing import Side
from .by_hand import channels_last, differentiated
from .kinds import KINDS

Arrays = dict[str, Any]


class Layer(NamedTuple):
    """How flax calls a layer, of arrays in its layout."""

    call: Callable[..., jax.Array]
    convert: Callable[[Arrays], Arrays] = lambda arrays: arrays
    last: bool = False  # channels last


def _images(arrays: Arrays) -> Arrays:
    """An image with channels last, and the kernel of a convolution, if there is one."""
    found = {**arrays, "x": channels_last(arrays["x"])}
    weight = arrays.get("weight")
    if weight is not None and weight.ndim > 2:
        found["weight"] = weight.transpose(*range(2, weight.ndim), 1, 0)
    return found


def _transposed_images(arrays: Arrays) -> Arrays:
    """As torch, flax has a transposed convolution that is the gradient of one, but turns its kernel around itself."""
    weight = arrays["weight"].transpose(2, 3, 1, 0)
    return {**arrays, "x": channels_last(arrays["x"]), "weight": weight}


def _conv(stride: int = 1, groups: bool = False) -> Layer:
    def call(x: Any, weight: Any, bias: Any) -> Any:
        spatial = x.ndim - 2
        padding = [(weight.shape[0] // 2,) * 2] * spatial
        layer = linen.Conv(
            weight.shape[-1],
            weight.shape[:-2],
            (stride,) * spatial,
            padding,
            feature_group_count=x.shape[-1] if groups else 1,
        )
        return layer.apply({"params": {"kernel": weight, "bias": bias}}, x)

    return Layer(call, _images, True)


def _transposed(x: Any, weight: Any, bias: Any) -> Any:
    layer = linen.ConvTranspose(weight.shape[2], (4, 4), (2, 2), [(2, 2)] * 2, transpose_kernel=True)
    return layer.apply({"params": {"kernel": weight, "bias": bias}}, x)


def _normed(layer: Any) -> Callable[..., Any]:
    def call(x: Any, weight: Any, bias: Any = None) -> Any:
        params = {"scale": weight} | ({} if bias is None else {"bias": bias})
        return layer.apply({"params": params}, x)

    return call


def _batch_norm(x: Any, weight: Any, bias: Any) -> Any:
    size = x.shape[-1]
    stats = {"mean": jnp.zeros(size), "var": jnp.ones(size)}
    variables = {"params": {"scale": weight, "bias": bias}, "batch_stats": stats}
    layer = linen.BatchNorm(use_running_average=False, epsilon=1e-5)
    return layer.apply(variables, x, mutable=["batch_stats"])[0]


def _smoothed(x: Any, target: Any) -> Any:
    labels = optax.smooth_labels(jax.nn.one_hot(target, x.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(x, labels).mean()


def _integers(x: Any, target: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(x, target).mean()


def _attention(causal: bool) -> Layer:
    def call(x: Any, key: Any, value: Any) -> Any:
        mask = linen.make_causal_mask(jnp.ones((x.shape[0], x.shape[1]))) if causal else None
        return linen.dot_product_attention(x, key, value, mask=mask).swapaxes(1, 2)

    return Layer(call, lambda arrays: {name: array.swapaxes(1, 2) for name, array in arrays.items()})


def _recurrent(cell: Callable[[int], Any], gates: str, biased: Sequence[str]) -> Layer:
    """`gates` are in torch's order, as flax names them, a blank for a single one; `biased` have a bias, here zeros."""

    def convert(arrays: Arrays) -> Arrays:
        found: Arrays = {"x": arrays["x"]}
        for part, side in (("weight_ih_l0", "i"), ("weight_hh_l0", "h")):
            for gate, weight in zip(gates, jnp.split(arrays[part], len(gates)), strict=True):
                found[f"{side}{gate}".strip()] = weight.T
        return found

    def call(x: Any, **kernels: Any) -> Any:
        hidden = next(iter(kernels.values())).shape[1]
        params = {
            name: {"kernel": kernel} | ({"bias": jnp.zeros(hidden)} if name in biased else {})
            for name, kernel in kernels.items()
        }
        return linen.RNN(cell(hidden), time_major=True).apply({"params": {"cell": params}}, x)

    return Layer(call, convert)


LAYERS: Mapping[str, Layer] = {
    "Conv2d 1x1": _conv(),
    "Conv2d 3x3": _conv(),
    "Conv2d 3x3, stride 2": _conv(2),
    "Conv2d of few channels": _conv(),
    "Conv2d 3x3, depthwise": _conv(groups=True),
    "ConvTranspose2d 4x4, stride 2": Layer(_transposed, _transposed_images, True),
    "Conv1d 5": _conv(),
    "Conv3d 3x3x3": _conv(),
    "MaxPool2d 2x2": Layer(lambda x: linen.max_pool(x, (2, 2), (2, 2)), _images, True),
    "MaxPool2d 3x3, stride 2": Layer(lambda x: linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), _images, True),
    "AvgPool2d 2x2": Layer(lambda x: linen.avg_pool(x, (2, 2), (2, 2)), _images, True),
    "CrossEntropyLoss": Layer(_integers),
    "CrossEntropyLoss, smoothed": Layer(_smoothed),
    "BCEWithLogitsLoss": Layer(lambda x, target: optax.sigmoid_binary_cross_entropy(x, target).mean()),
    "attention": _attention(False),
    "causal attention": _attention(True),
    "LSTM": _recurrent(linen.OptimizedLSTMCell, "ifgo", ["hi", "hf", "hg", "ho"]),
    "GRU": _recurrent(linen.GRUCell, "rzn", ["ir", "iz", "in", "hn"]),
    "RNN": _recurrent(linen.SimpleCell, " ", ["i"]),
    "LayerNorm": Layer(_normed(linen.LayerNorm(epsilon=1e-5))),
    "RMSNorm": Layer(_normed(linen.RMSNorm(epsilon=1e-6))),
    "GroupNorm": Layer(_normed(linen.GroupNorm(8, epsilon=1e-5)), _images, True),
    "BatchNorm2d": Layer(_batch_norm, _images, True),
}


def side(name: str, size: Sequence[int]) -> Side:
    kind, layer = KINDS[name], LAYERS[name]
    fixed = {key: jnp.asarray(array) for key, array in kind.fixed(size).items()}
    arrays = {key: jnp.asarray(array) for key, array in kind.arrays(size).items()}
    converted = {key: jnp.asarray(array) for key, array in layer.convert(arrays).items()}
    return differentiated(lambda arrays, fixed: layer.call(**arrays, **fixed), converted, fixed, last=layer.last)
