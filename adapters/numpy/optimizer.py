"""The specification's optimizer, in NumPy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Optimizer:
    """Plain SGD, `p -= lr * grad`, in place in the modules' own arrays.

    `minitorch_jax.Optimizer` and all optimizers of `minitorch_jax.optim` take NumPy modules too.

    Args:
        modules: a list of objects with `parameters()` and `grads()`, which return aligned lists of arrays.
        lr: the learning rate.

    Example:
        >>> import numpy as np
        >>> from minitorch_jax.adapters.numpy import Linear
        >>> layer = Linear(2, 1, rng=0)
        >>> opt = Optimizer([layer], lr=0.5)
        >>> opt.zero_grad()
        >>> _ = layer(np.ones((1, 2))), layer.backward(np.ones((1, 1)))
        >>> before = layer.b.copy()
        >>> opt.step()
        >>> layer.b - before
        array([-0.5], dtype=float32)
    """

    def __init__(self, modules: Iterable[Any], lr: float = 0.01) -> None:
        self.modules = modules
        self.lr = lr

    def step(self) -> None:
        """Update every parameter from its gradient."""
        for module in self.modules:
            params, grads = module.parameters(), module.grads()
            for i in range(len(params)):
                params[i] -= self.lr * grads[i]

    def zero_grad(self) -> None:
        """Reset the gradients of every module to zeros; an object without a `zero_grad` is skipped."""
        for module in self.modules:
            if hasattr(module, "zero_grad"):
                module.zero_grad()
