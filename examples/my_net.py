"""A network of one's own, in NumPy: `python examples/compare_numpy.py --network examples/my_net.py:make_net`."""

from __future__ import annotations

from typing import Any

import numpy as np


class Dense:
    """The gradient of `weights` is `weights_gradient`. backward() makes it."""

    def __init__(self, n_in: int, n_out: int, rng: np.random.Generator) -> None:
        self.weights = (rng.normal(size=(n_in, n_out)) / np.sqrt(n_in)).astype(np.float32)
        self.biases = np.zeros(n_out, np.float32)

    def forward(self, x: Any) -> Any:
        self.x = x
        return x @ self.weights + self.biases

    def backward(self, grad: Any) -> Any:
        self.weights_gradient = self.x.T @ grad
        self.biases_gradient = grad.sum(axis=0)
        return grad @ self.weights.T


class LeakyReLU:
    def forward(self, x: Any) -> Any:
        self.slope = np.where(x > 0, np.float32(1), np.float32(0.1))
        return x * self.slope

    def backward(self, grad: Any) -> Any:
        return grad * self.slope


class Network:
    def __init__(self, *layers: Any) -> None:
        self.layers = layers

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad: Any) -> Any:
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad

    def update(self, lr: float) -> None:
        for layer in self.layers:
            if isinstance(layer, Dense):
                layer.weights -= lr * layer.weights_gradient
                layer.biases -= lr * layer.biases_gradient


def make_net() -> Network:
    """From 64 pixels to scores of 10 classes."""
    rng = np.random.default_rng(0)
    return Network(Dense(64, 64, rng), LeakyReLU(), Dense(64, 10, rng))
