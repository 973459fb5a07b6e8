"""What losses call, by JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


class JaxLibrary:
    """optax's losses, and JAX's transformations."""

    detach = staticmethod(jax.lax.stop_gradient)
    grad = staticmethod(jax.grad)
    vmap = staticmethod(jax.vmap)
    map = staticmethod(jax.tree.map)

    @staticmethod
    def cross_entropy(logits: Any, target: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    @staticmethod
    def bce_with_logits(logits: Any, label: float) -> Any:
        return optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, label)).mean()

    @staticmethod
    def by_input(function: Callable[[Any], Any], x: Any) -> Any:
        return jax.grad(lambda x: function(x).sum())(x)
