"""What rules with running averages share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

BELOW_ONE = 0.99999994  # the largest float32 below 1: averages take β in [0, 1)


def bias_correction(beta: Any, t: Any) -> Any:
    """1 - βᵗ, exact also where β is nearly 1."""
    return -jnp.expm1(t * jnp.log1p(beta - 1))
