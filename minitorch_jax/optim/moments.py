"""What rules with running averages share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

BELOW_ONE = 0.99999994  # the largest float32 below 1: averages take β in [0, 1)


def bias_correction(beta: Any, t: Any) -> Any:
    """1 - βᵗ, exact also where β is nearly 1."""
    return -jnp.expm1(t * jnp.log1p(beta - 1))


def decayed(g: Any, p: Any, weight_decay: Any) -> Any:
    """g + λ p, the gradient with weight decay in it.

    Where λ = 0, as it mostly is, p is not even read: of this `where` XLA on CPU makes a loop for each case.
    """
    return jnp.where(weight_decay == 0, g, g + weight_decay * p)


def in_place(*arrays: Any) -> tuple[Any, ...]:
    """The new state, and the parameter, for what follows: the state is computed in full, in place, before the step is.

    Otherwise XLA on CPU computes it a second time for the step, and copies what it has overwritten by then.
    """
    return tuple(jax.lax.optimization_barrier(arrays))
