"""The programs: their networks, losses and data. Written once, for every library.

A network is a function of a `Builder`, which makes a layer when it first meets its name, and calls it from then on. So all
sides compute the same, and each with its own library's layers. Knows no library but NumPy.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Builder(Protocol):
    """What a network may call. Images have their library's layout; `flat` gives torch's order."""

    def conv(
        self, name: str, x: Any, out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Any: ...
    def conv_transpose(self, name: str, x: Any, out: int, kernel: int, stride: int, padding: int) -> Any: ...
    def linear(self, name: str, x: Any, out: int) -> Any: ...
    def batch_norm(self, name: str, x: Any) -> Any: ...
    def group_norm(self, name: str, x: Any, groups: int) -> Any: ...
    def layer_norm(self, name: str, x: Any) -> Any: ...
    def embedding(self, name: str, ids: Any, number: int, size: int) -> Any: ...
    def lstm(self, name: str, x: Any, hidden: int) -> Any: ...
    def causal_attention(self, q: Any, k: Any, v: Any) -> Any: ...
    def max_pool(self, x: Any) -> Any: ...
    def average(self, x: Any) -> Any: ...
    def upsample(self, x: Any) -> Any: ...
    def concatenate(self, *images: Any) -> Any: ...
    def per_channel(self, x: Any) -> Any: ...
    def flat(self, x: Any) -> Any: ...
    def relu(self, x: Any) -> Any: ...
    def leaky_relu(self, x: Any) -> Any: ...
    def gelu(self, x: Any) -> Any: ...
    def silu(self, x: Any) -> Any: ...
    def tanh(self, x: Any) -> Any: ...


class Library(Protocol):
    """What a loss may call."""

    def cross_entropy(self, logits: Any, target: Any) -> Any: ...
    def bce_with_logits(self, logits: Any, label: float) -> Any: ...
    def detach(self, x: Any) -> Any: ...
    def by_input(self, function: Callable[[Any], Any], x: Any) -> Any:
        """The gradient of the sum of what a function returns, which can be differentiated again."""

    def functional(self, net: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
        """The parameters of a network, and a function of parameters and input."""

    def grad(self, loss: Callable[..., Any]) -> Callable[..., Any]: ...
    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]: ...
    def map(self, function: Callable[..., Any], *trees: Any) -> Any: ...


Net = Callable[..., Any]
Loss = Callable[[Library, Mapping[str, Any], Sequence[Any]], Any]


@dataclass(frozen=True)
class Program:
    """A training step: in each phase, the gradients of a loss by one network, whose optimizer then steps.

    `data(*size)` are the batch: images as (batch, channels, side, side), integers, other numbers.
    """

    title: str
    nets: Mapping[str, Net]
    phases: Sequence[tuple[str, Loss]]
    data: Callable[..., list[Array]]
    size: tuple[int, ...]
    tiny: tuple[int, ...]
    rule: str  # "momentum" or "adam"
    lr: float
    inputs: Callable[[Any], dict[str, tuple[Any, ...]]] = lambda batch: {"net": (batch[0],)}  # of each network


def draw(name: str, shape: Sequence[int]) -> Array:
    """The first values of a parameter, in torch's layout; the same for all sides. Norms start at 1, biases near 0."""
    rng = np.random.default_rng(zlib.crc32(repr((name, tuple(shape))).encode()))
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return np.float32(0.1) * noise
    if len(shape) == 1:
        return 1 + np.float32(0.1) * noise
    scale = 0.1 if "embedding" in name else float(np.prod(shape[1:])) ** -0.5
    return (scale * noise).astype(np.float32)


def lenet(b: Builder, x: Any) -> Any:
    x = b.max_pool(b.relu(b.conv("conv1", x, 6, 5, padding=2)))
    x = b.max_pool(b.relu(b.conv("conv2", x, 16, 5)))
    x = b.relu(b.linear("fc1", b.flat(x), 120))
    return b.linear("fc3", b.relu(b.linear("fc2", x, 84)), 10)


def resnet(b: Builder, x: Any) -> Any:
    """The ResNet for CIFAR of 8 layers (He et al., 2015): one block for each width."""
    x = b.relu(b.batch_norm("norm", b.conv("conv", x, 16, 3, padding=1)))
    for i, width in enumerate((16, 32, 64)):
        stride = 1 if i == 0 else 2
        y = b.relu(b.batch_norm(f"norm{i}a", b.conv(f"conv{i}a", x, width, 3, stride, 1)))
        y = b.batch_norm(f"norm{i}b", b.conv(f"conv{i}b", y, width, 3, 1, 1))
        if stride > 1:
            x = b.batch_norm(f"norm{i}c", b.conv(f"conv{i}c", x, width, 1, stride))
        x = b.relu(x + y)
    return b.linear("fc", b.average(x), 10)


def separable(b: Builder, x: Any) -> Any:
    """As MobileNet (Howard et al., 2017): depthwise and 1x1 convolutions."""
    x = b.relu(b.batch_norm("norm", b.conv("conv", x, 32, 3, padding=1)))
    width = 32
    for i, (out, stride) in enumerate(((64, 1), (128, 2), (128, 1))):
        x = b.relu(b.batch_norm(f"norm{i}a", b.conv(f"conv{i}a", x, width, 3, stride, 1, groups=width)))
        x = b.relu(b.batch_norm(f"norm{i}b", b.conv(f"conv{i}b", x, out, 1)))
        width = out
    return b.linear("fc", b.average(x), 10)


def word_lm(b: Builder, ids: Any) -> Any:
    """(batch, length) to logits of `WORDS` words."""
    x = b.lstm("lstm", b.embedding("embedding", ids, WORDS, 128), 128)
    return b.linear("decoder", x, WORDS)


def gpt(b: Builder, ids: Any) -> Any:
    n, length = ids.shape
    width, heads = 128, 4
    x = b.embedding("embedding", ids, CHARACTERS, width)
    for i in range(2):
        h = b.linear(f"qkv{i}", b.layer_norm(f"norm{i}a", x), 3 * width)
        parts = [h[..., k * width : (k + 1) * width].reshape(n, length, heads, -1).swapaxes(1, 2) for k in range(3)]
        h = b.causal_attention(*parts).swapaxes(1, 2).reshape(n, length, width)
        x = x + b.linear(f"out{i}", h, width)
        h = b.linear(f"up{i}", b.layer_norm(f"norm{i}b", x), 4 * width)
        x = x + b.linear(f"down{i}", b.gelu(h), width)
    return b.linear("head", b.layer_norm("norm", x), CHARACTERS)


def generator(b: Builder, z: Any) -> Any:
    x = b.relu(b.batch_norm("norm1", b.conv_transpose("conv1", z, 128, 4, 1, 0)))
    x = b.relu(b.batch_norm("norm2", b.conv_transpose("conv2", x, 64, 4, 2, 1)))
    x = b.relu(b.batch_norm("norm3", b.conv_transpose("conv3", x, 32, 4, 2, 1)))
    return b.tanh(b.conv_transpose("conv4", x, 3, 4, 2, 1))


def discriminator(b: Builder, x: Any) -> Any:
    x = b.leaky_relu(b.conv("conv1", x, 32, 4, 2, 1))
    x = b.leaky_relu(b.batch_norm("norm2", b.conv("conv2", x, 64, 4, 2, 1)))
    x = b.leaky_relu(b.batch_norm("norm3", b.conv("conv3", x, 128, 4, 2, 1)))
    return b.conv("conv4", x, 1, 4)


def _residual(b: Builder, name: str, x: Any, emb: Any, width: int) -> Any:
    h = b.conv(f"{name}a", b.silu(x if name == "in" else b.group_norm(f"{name}norm", x, 8)), width, 3, padding=1)
    h = h + b.per_channel(b.linear(f"{name}time", emb, width))
    return b.conv(f"{name}b", b.silu(b.group_norm(f"{name}norm2", h, 8)), width, 3, padding=1)


def unet(b: Builder, x: Any, time: Any) -> Any:
    """A denoiser (Ho et al., 2020) of two resolutions; `time` is embedded already, (batch, 32)."""
    emb = b.silu(b.linear("time", time, 64))
    first = _residual(b, "in", x, emb, 32)
    low = _residual(b, "down", b.conv("shrink", first, 32, 3, 2, 1), emb, 64)
    low = low + _residual(b, "middle", low, emb, 64)
    x = b.concatenate(b.upsample(low), first)
    return b.conv("last", _residual(b, "up", x, emb, 32), 3, 3, padding=1)


def pinn(b: Builder, x: Any) -> Any:
    for i in range(4):
        x = b.tanh(b.linear(f"fc{i}", x, 64))
    return b.linear("last", x, 1)[:, 0]


def sine(b: Builder, x: Any) -> Any:
    x = b.tanh(b.linear("fc1", x, 40))
    return b.linear("fc3", b.tanh(b.linear("fc2", x, 40)), 1)


def classify(lib: Library, nets: Mapping[str, Any], batch: Sequence[Any]) -> Any:
    x, target = batch
    logits = nets["net"](x)
    return lib.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


def judge(lib: Library, nets: Mapping[str, Any], batch: Sequence[Any]) -> Any:
    """The discriminator's loss."""
    images, z = batch
    real = lib.bce_with_logits(nets["d"](images), 1.0)
    return real + lib.bce_with_logits(nets["d"](lib.detach(nets["g"](z))), 0.0)


def deceive(lib: Library, nets: Mapping[str, Any], batch: Sequence[Any]) -> Any:
    """The generator's loss."""
    return lib.bce_with_logits(nets["d"](nets["g"](batch[1])), 1.0)


def denoise(lib: Library, nets: Mapping[str, Any], batch: Sequence[Any]) -> Any:
    noisy, noise, time = batch
    return ((nets["net"](noisy, time) - noise) ** 2).mean()


def burgers(lib: Library, nets: Mapping[str, Any], batch: Sequence[Any]) -> Any:
    """Burgers' equation inside, and values at the edge (Raissi et al., 2019)."""
    inside, edge, values = batch
    net = nets["net"]

    def first(x: Any) -> Any:
        return lib.by_input(net, x)

    u, du = net(inside), first(inside)
    second = lib.by_input(lambda x: first(x)[:, 0], inside)[:, 0]
    residual = du[:, 1] + u * du[:, 0] - 0.01 * second
    return (residual**2).mean() + ((net(edge) - values) ** 2).mean()


def meta(lib: Library, nets: Mapping[str, Any], batch: Sequence[Any]) -> Any:
    """MAML (Finn et al., 2017) with two inner steps; the tasks are batched."""
    params, apply = lib.functional(nets["net"])

    def error(params: Any, x: Any, y: Any) -> Any:
        return ((apply(params, x) - y) ** 2).mean()

    def task(x: Any, y: Any, x_query: Any, y_query: Any) -> Any:
        own = params
        for _ in range(2):
            own = lib.map(lambda p, g: p - 0.05 * g, own, lib.grad(error)(own, x, y))
        return error(own, x_query, y_query)

    return lib.vmap(task)(*batch).mean()


def _rng() -> np.random.Generator:
    return np.random.default_rng(5)


def _normal(*shape: int) -> Array:
    return _rng().standard_normal(shape, np.float32)


def _labelled(n: int, channels: int, side: int) -> list[Array]:
    return [_normal(n, channels, side, side), _rng().integers(0, 10, (n,))]


def _tokens(high: int) -> Callable[..., list[Array]]:
    return lambda n, length: [
        _rng().integers(0, high, (n, length)),
        _rng().permuted(_rng().integers(0, high, (n, length))),
    ]


def _diffused(n: int, side: int) -> list[Array]:
    return [_normal(n, 3, side, side), _normal(n, 3, side, side)[::-1].copy(), _normal(n, 32)]


def _points(n: int) -> list[Array]:
    edge = _rng().uniform(-1, 1, (n // 8, 2)).astype(np.float32)
    return [_rng().uniform(-1, 1, (n, 2)).astype(np.float32), edge, -np.sin(np.pi * edge[:, 0])]


def _tasks(n: int, shots: int) -> list[Array]:
    x = _rng().uniform(-5, 5, (2, n, shots, 1)).astype(np.float32)
    y = np.sin(x + np.arange(n, dtype=np.float32)[:, None, None])
    return [x[0], y[0], x[1], y[1]]


WORDS, CHARACTERS = 5000, 96

PROGRAMS: Mapping[str, Program] = {
    "lenet": Program(
        "LeNet, 64 images of 28 x 28",
        {"net": lenet},
        [("net", classify)],
        _labelled,
        (64, 1, 28),
        (2, 1, 28),
        "momentum",
        0.01,
    ),
    "resnet": Program(
        "a ResNet of 8 layers, 32 images of 32 x 32",
        {"net": resnet},
        [("net", classify)],
        _labelled,
        (32, 3, 32),
        (2, 3, 8),
        "momentum",
        0.01,
    ),
    "separable": Program(
        "a depthwise-separable net, 16 images of 32 x 32",
        {"net": separable},
        [("net", classify)],
        _labelled,
        (16, 3, 32),
        (2, 3, 4),
        "momentum",
        0.01,
    ),
    "word_lm": Program(
        "a language model of an LSTM, 32 x 32 of 5,000 words",
        {"net": word_lm},
        [("net", classify)],
        _tokens(WORDS),
        (32, 32),
        (2, 3),
        "adam",
        1e-3,
    ),
    "gpt": Program(
        "a GPT of 2 layers of 128, 8 x 128 characters",
        {"net": gpt},
        [("net", classify)],
        _tokens(CHARACTERS),
        (8, 128),
        (2, 4),
        "adam",
        1e-3,
    ),
    "dcgan": Program(
        "DCGAN, 16 images of 32 x 32",
        {"d": discriminator, "g": generator},
        [("d", judge), ("g", deceive)],
        lambda n: [_normal(n, 3, 32, 32), _normal(n, 64, 1, 1)],
        (16,),
        (2,),
        "adam",
        2e-4,
        lambda batch: {"d": (batch[0],), "g": (batch[1],)},
    ),
    "unet": Program(
        "a U-Net of a diffusion model, 16 images of 16 x 16",
        {"net": unet},
        [("net", denoise)],
        _diffused,
        (16, 16),
        (1, 4),
        "adam",
        1e-3,
        lambda batch: {"net": (batch[0], batch[2])},
    ),
    "pinn": Program(
        "a PINN of Burgers' equation, 2,048 points",
        {"net": pinn},
        [("net", burgers)],
        _points,
        (2048,),
        (16,),
        "adam",
        1e-3,
    ),
    "maml": Program(
        "MAML, 16 tasks of 20 points", {"net": sine}, [("net", meta)], _tasks, (16, 20), (2, 3), "adam", 1e-3
    ),
}
