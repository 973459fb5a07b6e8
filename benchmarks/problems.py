"""What every side computes, as NumPy arrays: the same weights and the same data for all. Knows no library but NumPy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
LR = 0.1
LAYER_LR = 1.0  # of a layer alone, whose loss is the mean over many outputs
MOMENTUM = 0.9
DECAY = 0.01  # of AdamW and Lion


class MLP(NamedTuple):
    """`depth` times Linear and Tanh, all of one width; the mean squared error of one batch, which every step repeats."""

    depth: int
    width: int
    batch: int = 8

    def weights(self) -> list[tuple[Array, Array]]:
        """Weight (out, in) and bias of each layer; of unit gain, so that gradients reach the first of 100 layers."""
        rng = np.random.default_rng(self.depth)
        scale = self.width**-0.5
        draw = [
            (rng.normal(0, scale, (self.width, self.width)), rng.normal(0, 0.1, self.width)) for _ in range(self.depth)
        ]
        return [(w.astype(np.float32), b.astype(np.float32)) for w, b in draw]

    def data(self) -> tuple[Array, Array]:
        """Inputs, and targets outside of what tanh can reach, so that training never ends."""
        rng = np.random.default_rng(self.width)
        x, y = rng.normal(0, 1, (self.batch, self.width)), rng.normal(2, 1, (self.batch, self.width))
        return x.astype(np.float32), y.astype(np.float32)


class Arrays(NamedTuple):
    """`number` parameters of `size` floats each with fixed gradients, for an update alone; and one of `rest`, if any."""

    number: int
    size: int
    rest: int = 0

    @property
    def sizes(self) -> list[int]:
        return [self.size] * self.number + [self.rest] * bool(self.rest)

    def parameters(self) -> list[Array]:
        return [np.full(size, 0.5, np.float32) for size in self.sizes]

    def gradients(self) -> list[Array]:
        return [np.full(size, 0.1, np.float32) for size in self.sizes]


class Matrices(Arrays):
    """The same as square matrices."""

    def parameters(self) -> list[Array]:
        return list(map(_square, super().parameters()))

    def gradients(self) -> list[Array]:
        return list(map(_square, super().gradients()))


def _square(array: Array) -> Array:
    return array.reshape(math.isqrt(array.size), -1)


class Layer(NamedTuple):
    """One layer of torch's, forward, backward and an SGD step; weights under torch's names, data in torch's layout."""

    kind: str  # "conv", "lstm", "attention" or "transformer"
    batch: int = 8
    size: int = 64  # channels or features
    length: int = 32  # of sequences, or of an image's sides

    @property
    def heads(self) -> int:
        return 4

    def weights(self) -> dict[str, Array]:
        """Uniform, of the bounds that torch uses."""
        n = self.size
        attention = {"in_proj_weight": (3 * n, n), "in_proj_bias": (3 * n,)}
        attention |= {"out_proj.weight": (n, n), "out_proj.bias": (n,)}
        match self.kind:
            case "conv":
                shapes: dict[str, tuple[int, ...]] = {"weight": (n, n, 3, 3), "bias": (n,)}
            case "lstm":
                shapes = {"weight_ih_l0": (4 * n, n), "weight_hh_l0": (4 * n, n)}
            case "attention":
                shapes = attention
            case "transformer":
                shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
                shapes |= {"linear1.weight": (2 * n, n), "linear1.bias": (2 * n,)}
                shapes |= {"linear2.weight": (n, 2 * n), "linear2.bias": (n,)}
                shapes |= {f"norm{i}.{name}": (n,) for i in (1, 2) for name in ("weight", "bias")}
            case _:
                raise ValueError(f"no such layer: {self.kind}")
        rng = np.random.default_rng(n)
        return {
            name: (rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:]) or n)).astype(np.float32)
            + np.float32(name.startswith("norm") and name.endswith("weight"))
            for name, shape in shapes.items()
        }

    def data(self) -> tuple[Array, Array]:
        """Inputs and targets: `(batch, channels, side, side)` for images, else `(batch, length, features)`."""
        rng = np.random.default_rng(self.length)
        n, side = self.size, self.length
        shape = (self.batch, n, side, side) if self.kind == "conv" else (self.batch, side, n)
        return rng.normal(0, 1, shape).astype(np.float32), rng.normal(1, 1, shape).astype(np.float32)
