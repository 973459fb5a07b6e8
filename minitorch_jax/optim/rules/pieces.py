"""What rules share: ascent, weight decay, running averages and their correction, and hints for XLA on CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp


def ascended(g: Any, h: SimpleNamespace) -> Any:
    """The gradient to descend along: -g with `maximize`."""
    return -g if h.maximize else g


def coupled(p: Any, g: Any, h: SimpleNamespace) -> Any:
    """The gradient to descend along, with coupled weight decay in it."""
    return decayed(ascended(g, h), p, h.weight_decay)


def decoupled(p: Any, h: SimpleNamespace) -> Any:
    """The parameter after decoupled weight decay, (1 - lr λ) p."""
    return p * (1 - h.lr * h.weight_decay)


def moments(g: Any, s: Any, h: SimpleNamespace) -> tuple[Any, Any]:
    """The running averages of the gradient and of its square, from those in the state `s`."""
    (beta1, beta2), (rest1, rest2) = h.betas, h.one_minus.betas
    return beta1 * s.exp_avg + rest1 * g, beta2 * s.exp_avg_sq + rest2 * g * g


def bias_correction(one_minus: Any, t: Any) -> Any:
    """1 - βᵗ from 1 - β, exact also where β is nearly 1."""
    return -jnp.expm1(t * jnp.log1p(-one_minus))


def decayed(g: Any, p: Any, weight_decay: Any) -> Any:
    """g + λ p, the gradient with weight decay in it.

    Where λ = 0, as it mostly is, p is not even read: of this `where` XLA on CPU makes a loop for each case.
    """
    return jnp.where(weight_decay == 0, g, g + weight_decay * p)


def in_place(h: SimpleNamespace, p: Any, **state: Any) -> tuple[Any, ...]:
    """New state by name, and then the parameter, for what follows: all is computed in full, in place, before that is.

    A rule puts them through it before the step. Otherwise XLA on CPU computes the state a second time for the step, and
    copies what it has overwritten by then. With `state_dtype`, the state comes back as it will be stored.
    """
    rounding = getattr(h, "_rounding", None)
    if rounding is not None:
        found: tuple[Any, ...] = rounding.in_place(p, state)
        return found
    return tuple(jax.lax.optimization_barrier((*state.values(), p)))


def after(first: Any, old: Any, new: Any) -> Any:
    """`new`, the next value of `old`, for a rule that needs `old` itself for its step: computed once `first` has been.

    Otherwise XLA on CPU takes them in any order, and copies `old`. Of the two, the comparison makes the second wait for
    the first. (It holds where `first` is NaN: there the old value stays.)
    """
    return jnp.where(jax.lax.optimization_barrier(first) != first, old, new)
