"""What is measured of layers: their arrays, and how they are called by torch's names, which are ours too.

Knows no library but NumPy. A call gets `nn`, which is `torch.nn` or `minitorch_jax.nn`, and arrays of that library.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A layer or a loss, at several sizes.

    `shapes(*size)` are those of the arrays that it is differentiated by: "x", and its weights. `integers(*size)` are
    those of integers, with a bound. With `module`, `call` gets a module instead of weights, which are its parameters.
    """

    sizes: Sequence[tuple[int, ...]]
    tiny: tuple[int, ...]
    shapes: Callable[..., Shapes]
    call: Callable[..., Any]
    integers: Callable[..., dict[str, tuple[tuple[int, ...], int]]] = field(default=lambda *size: {})
    module: Callable[..., Any] | None = None

    def arrays(self, size: Sequence[int]) -> dict[str, Array]:
        """Normal numbers; weights of unit gain. Parameters of a norm lie around 1."""
        found: dict[str, Array] = {}
        for name, shape in self.shapes(*size).items():
            rng = np.random.default_rng(zlib.crc32(repr((name, shape)).encode()))
            scale = 1.0 if name == "x" or len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            found[name] = (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)
        return found

    def fixed(self, size: Sequence[int]) -> dict[str, Array]:
        """Integers, by which nothing is differentiated."""
        rng = np.random.default_rng(len(self.sizes))
        return {name: rng.integers(0, high, shape) for name, (shape, high) in self.integers(*size).items()}


def cotangent(shape: tuple[int, ...]) -> Array:
    """The gradient that comes from behind the layer; 1 for a loss."""
    return np.random.default_rng(7).standard_normal(shape, np.float32) if shape else np.ones((), np.float32)


def fingerprint(out: Array, g: Array, x: Array, gradients: Sequence[Array]) -> list[float]:
    """Three numbers of a result that are the same in every layout; the first gradient is by `x`."""
    by_x, *by_weights = (np.asarray(gradient, np.float64) for gradient in gradients)
    products = np.asarray(out, np.float64) * g, by_x * x
    weights = math.sqrt(sum(float((gradient**2).sum()) for gradient in by_weights))
    return [*(float(np.sqrt((product**2).sum())) for product in products), weights]


def images(n: int, i: int, o: int, side: int, kernel: int) -> Shapes:
    return {"x": (n, i, side, side), "weight": (o, i, kernel, kernel), "bias": (o,)}


def _conv(stride: int = 1) -> Callable[..., Any]:
    def call(nn: Any, x: Any, weight: Any, bias: Any) -> Any:
        return nn.functional.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    return call


def _depthwise(nn: Any, x: Any, weight: Any, bias: Any) -> Any:
    return nn.functional.conv2d(x, weight, bias, 1, 1, 1, x.shape[1])


def _normed(*shape: int) -> Shapes:
    return {"x": shape, "weight": shape[-1:], "bias": shape[-1:]}


def _norm_of_channels(n: int, c: int, side: int) -> Shapes:
    return {"x": (n, c, side, side), "weight": (c,), "bias": (c,)}


def _classes(n: int, classes: int) -> dict[str, tuple[tuple[int, ...], int]]:
    return {"target": ((n,), classes)}


def _of_classes(n: int, classes: int) -> Shapes:
    return {"x": (n, classes)}


def _pooled(n: int, c: int, side: int) -> Shapes:
    return {"x": (n, c, side, side)}


def _heads(n: int, heads: int, length: int, size: int) -> Shapes:
    return dict.fromkeys(("x", "key", "value"), (n, heads, length, size))


def _sequences(length: int, n: int, i: int, hidden: int) -> Shapes:
    return {"x": (length, n, i)}


def _recurrent(name: str) -> Kind:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[name]
    return Kind(
        [(32, 8, 64, 64), (64, 32, 128, 128), (32, 32, 256, 256)],
        (3, 2, 4, 4),
        lambda t, n, i, h: {"x": (t, n, i), "weight_ih_l0": (gates * h, i), "weight_hh_l0": (gates * h, h)},
        lambda nn, module, x: module(x)[0],
        module=lambda nn, t, n, i, h: getattr(nn, name)(i, h, bias=False),
    )


def _linear(n: int, length: int, i: int, o: int) -> Shapes:
    return {"x": (n, length, i), "weight": (o, i), "bias": (o,)}


POOLED = [(8, 32, 16), (8, 64, 32), (16, 64, 56)]
CHANNELS = [(8, 32, 16), (8, 64, 32), (16, 128, 28)]
FEATURES = [(8, 64, 64), (64, 64, 512), (32, 128, 768)]
HEADS = [(8, 4, 64, 32), (4, 8, 256, 32), (1, 8, 1024, 64)]
CLASSES = [(1024, 10), (512, 10_000), (256, 50_000)]
LINEAR = [(32, 16, 64, 64), (32, 64, 256, 1024), (16, 128, 768, 768)]

KINDS: Mapping[str, Kind] = {
    "Conv2d 1x1": Kind(
        [(8, 32, 64, 16, 1), (8, 64, 256, 32, 1), (16, 256, 128, 14, 1)], (2, 3, 4, 5, 1), images, _conv()
    ),
    "Conv2d 3x3": Kind(
        [(8, 32, 32, 16, 3), (8, 64, 64, 32, 3), (8, 128, 128, 16, 3)], (2, 3, 4, 5, 3), images, _conv()
    ),
    "Conv2d 3x3, stride 2": Kind(
        [(8, 32, 64, 16, 3), (8, 64, 128, 32, 3), (8, 128, 256, 14, 3)], (2, 3, 4, 6, 3), images, _conv(2)
    ),
    "Conv2d of few channels": Kind(
        [(32, 1, 6, 28, 5), (8, 3, 64, 32, 3), (4, 3, 64, 96, 7)], (2, 1, 4, 6, 3), images, _conv()
    ),
    "Conv2d 3x3, depthwise": Kind(
        [(8, 32, 16), (8, 64, 32), (8, 128, 28)],
        (2, 4, 5),
        lambda n, c, side: {"x": (n, c, side, side), "weight": (c, 1, 3, 3), "bias": (c,)},
        _depthwise,
    ),
    "ConvTranspose2d 4x4, stride 2": Kind(
        [(8, 64, 32, 8), (8, 128, 64, 16), (8, 64, 3, 32)],
        (2, 3, 4, 4),
        lambda n, i, o, side: {"x": (n, i, side, side), "weight": (i, o, 4, 4), "bias": (o,)},
        lambda nn, x, weight, bias: nn.functional.conv_transpose2d(x, weight, bias, 2, 1),
    ),
    "Conv1d 5": Kind(
        [(8, 32, 32, 256), (8, 64, 64, 512), (8, 128, 128, 128)],
        (2, 3, 4, 7),
        lambda n, i, o, length: {"x": (n, i, length), "weight": (o, i, 5), "bias": (o,)},
        lambda nn, x, weight, bias: nn.functional.conv1d(x, weight, bias, 1, 2),
    ),
    "Conv3d 3x3x3": Kind(
        [(2, 8, 8, 8), (2, 16, 16, 16), (1, 32, 32, 16)],
        (1, 2, 3, 4),
        lambda n, i, o, side: {"x": (n, i, side, side, side), "weight": (o, i, 3, 3, 3), "bias": (o,)},
        lambda nn, x, weight, bias: nn.functional.conv3d(x, weight, bias, 1, 1),
    ),
    "MaxPool2d 2x2": Kind(POOLED, (2, 3, 6), _pooled, lambda nn, x: nn.functional.max_pool2d(x, 2)),
    "MaxPool2d 3x3, stride 2": Kind(POOLED, (2, 3, 6), _pooled, lambda nn, x: nn.functional.max_pool2d(x, 3, 2, 1)),
    "AvgPool2d 2x2": Kind(POOLED, (2, 3, 6), _pooled, lambda nn, x: nn.functional.avg_pool2d(x, 2)),
    "AdaptiveAvgPool2d to 7x7": Kind(
        POOLED, (2, 3, 9), _pooled, lambda nn, x: nn.functional.adaptive_avg_pool2d(x, (7, 7))
    ),
    "CrossEntropyLoss": Kind(
        CLASSES, (6, 5), _of_classes, lambda nn, x, target: nn.functional.cross_entropy(x, target), _classes
    ),
    "CrossEntropyLoss, smoothed": Kind(
        CLASSES,
        (6, 5),
        _of_classes,
        lambda nn, x, target: nn.functional.cross_entropy(x, target, label_smoothing=0.1),
        _classes,
    ),
    "LinearCrossEntropyLoss": Kind(
        [(512, 64, 1000), (512, 256, 10_000), (256, 256, 50_000)],
        (6, 4, 5),
        lambda n, i, classes: {"x": (n, i), "weight": (classes, i)},
        lambda nn, x, weight, target: nn.functional.linear_cross_entropy(x, weight, target),
        lambda n, i, classes: {"target": ((n,), classes)},
    ),
    "BCEWithLogitsLoss": Kind(
        [(64, 64), (512, 512), (2048, 2048)],
        (3, 4),
        _of_classes,
        lambda nn, x, target: nn.functional.binary_cross_entropy_with_logits(x, 1.0 * target),
        lambda n, m: {"target": ((n, m), 2)},
    ),
    "attention": Kind(
        HEADS,
        (2, 2, 4, 4),
        _heads,
        lambda nn, x, key, value: nn.functional.scaled_dot_product_attention(x, key, value),
    ),
    "causal attention": Kind(
        HEADS,
        (2, 2, 4, 4),
        _heads,
        lambda nn, x, key, value: nn.functional.scaled_dot_product_attention(x, key, value, is_causal=True),
    ),
    "LSTM": _recurrent("LSTM"),
    "GRU": _recurrent("GRU"),
    "RNN": _recurrent("RNN"),
    "LayerNorm": Kind(
        FEATURES,
        (2, 3, 4),
        _normed,
        lambda nn, x, weight, bias: nn.functional.layer_norm(x, x.shape[-1:], weight, bias),
    ),
    "RMSNorm": Kind(
        FEATURES,
        (2, 3, 4),
        lambda *shape: {"x": shape, "weight": shape[-1:]},
        lambda nn, x, weight: nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6),
    ),
    "GroupNorm": Kind(
        CHANNELS,
        (2, 8, 3),
        _norm_of_channels,
        lambda nn, x, weight, bias: nn.functional.group_norm(x, 8, weight, bias),
    ),
    "BatchNorm2d": Kind(
        CHANNELS,
        (2, 8, 3),
        _norm_of_channels,
        lambda nn, x, weight, bias: nn.functional.batch_norm(x, None, None, weight, bias, True),
    ),
    "GELU": Kind(
        [(64, 256), (64, 64, 512), (32, 128, 2048)],
        (3, 4),
        lambda *shape: {"x": shape},
        lambda nn, x: nn.functional.gelu(x),
    ),
    "softmax": Kind(
        [(8, 4, 64, 64), (4, 8, 256, 256), (512, 10_000)],
        (2, 3, 4),
        lambda *shape: {"x": shape},
        lambda nn, x: nn.functional.softmax(x, -1),
    ),
    "Embedding": Kind(
        [(1000, 64, 1024), (10_000, 256, 4096), (50_000, 256, 4096)],
        (5, 4, 3),
        lambda n, size, count: {"x": (n, size)},
        lambda nn, x, index: nn.functional.embedding(index, x),
        lambda n, size, count: {"index": ((count,), n)},
    ),
    "Linear on 3-D": Kind(
        LINEAR, (2, 3, 4, 5), _linear, lambda nn, x, weight, bias: nn.functional.linear(x, weight, bias)
    ),
    "Linear without bias, ReLU, on 3-D": Kind(
        LINEAR,
        (2, 3, 4, 5),
        lambda n, length, i, o: {"x": (n, length, i), "weight": (o, i)},
        lambda nn, x, weight: nn.functional.relu(nn.functional.linear(x, weight)),
    ),
}
