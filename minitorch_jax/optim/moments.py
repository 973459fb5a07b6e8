"""What rules with running averages share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

BELOW_ONE = 0.99999994  # the largest float32 below 1: averages take β in [0, 1)


def bias_correction(beta: Any, t: Any) -> Any:
    """1 - βᵗ, exact also where β is nearly 1."""
    return -jnp.expm1(t * jnp.log1p(beta - 1))


def in_place(*arrays: Any) -> tuple[Any, ...]:
    """The new state, and the parameter, for what follows: the state is computed in full, in place, before the step is.

    Otherwise XLA on CPU computes it a second time for the step, and copies what it has overwritten by then.
    """
    return tuple(jax.lax.optimization_barrier(arrays))
