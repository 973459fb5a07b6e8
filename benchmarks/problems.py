"""What every side computes, as NumPy arrays: the same weights and the same data for all. Knows no library but NumPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
LR = 0.1
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
    """`number` parameters of `size` floats each with fixed gradients, for an update alone."""

    number: int
    size: int

    def parameters(self) -> list[Array]:
        return [np.full(self.size, 0.5, np.float32) for _ in range(self.number)]

    def gradients(self) -> list[Array]:
        return [np.full(self.size, 0.1, np.float32) for _ in range(self.number)]
