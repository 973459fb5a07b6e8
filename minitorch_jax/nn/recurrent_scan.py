"""The scan over time of the recurrent layers, with a derivative of its own."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .functional.linear import product


class Kind(NamedTuple):
    """What a scan runs, all of it static."""

    rule: Any
    reverse: bool
    gates_apart: bool


class Weights(NamedTuple):
    """What each step multiplies h by, or a tangent of it. None stands for what the layer does not have."""

    weight_hh: Any
    bias_hh: Any
    weight_hr: Any


@partial(jax.jit, static_argnums=0)
def scan(kind: Kind, start: Any, x: Any, weights: Weights, mask: Any) -> Any:
    """Run the steps of a rule over time. Where the mask is False, the state stays as it is, and the output is 0.

    So a forward scan stops at each sequence's end, and a reverse one starts there. An eager `lax.scan` compiles for each new
    `step` function. Under `jax.jit`, this happens once for each shape.
    """
    return _recurrence(kind, start, x, weights, mask)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrence(kind: Kind, start: Any, x: Any, weights: Weights, mask: Any) -> Any:
    return _steps(kind, start, x, weights, mask)[0]


@partial(_recurrence.defjvp, symbolic_zeros=True)
def _recurrence_jvp(kind: Kind, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The weights' part of the tangent is one product for all steps. Its transpose is one product, after the backward scan.

    JAX's own rule makes it inside of the scan: the backward scan then adds a product to the weights' gradient at each step.
    """
    start, x, weights, mask = primals
    w_hr, (d_start, d_x, d_weights, _) = weights.weight_hr, tangents
    d_start, d_x = jax.tree.map(_instantiated, (d_start, d_x), is_leaf=_is_zero)
    zeros = (
        jnp.zeros_like(x) if kind.gates_apart else None,
        None if w_hr is None else jnp.zeros((*x.shape[:-1], w_hr.shape[0]), x.dtype),
    )

    def steps(start: Any, x: Any, added: Any) -> Any:
        return _steps(kind, start, x, weights, mask, added)

    result, tangent, (h, unprojected) = jax.linearize(steps, start, x, zeros, has_aux=True)
    d_gates = _product_tangent(h, d_weights.weight_hh, d_weights.bias_hh)
    d_projected = None if w_hr is None else _product_tangent(unprojected, d_weights.weight_hr, None)
    if not kind.gates_apart and d_gates is not None:
        d_x, d_gates = d_x + d_gates, None
    added = tuple(z if d is None else d for z, d in zip(zeros, (d_gates, d_projected), strict=True))
    return result, tangent(d_start, d_x, added)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _instantiated(tangent: Any) -> Any:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent


def _product_tangent(x: Any, d_weight: Any, d_bias: Any) -> Any:
    """The tangent of x W^T + b for a constant x; None if neither W nor b has one."""
    if _is_zero(d_weight) and (d_bias is None or _is_zero(d_bias)):
        return None
    return product(x, _instantiated(d_weight), None if _is_zero(d_bias) else d_bias)


def _steps(kind: Kind, start: Any, x: Any, weights: Weights, mask: Any, added: Any = None) -> Any:
    """Return the last state and the outputs; and with `added`, what the weights multiplied at each step, else None.

    `added` are zeros. Their tangents are added to those of W_hh h + b_hh and of W_hr h. None stands for no addition.
    """
    w_hh, b_hh, w_hr = weights

    def step(state: Any, inputs: Any) -> Any:
        x, inside, (d_gates, d_projected) = inputs
        h, *cell = kind.rule(x, _with_tangent(product(state[0], w_hh, b_hh), d_gates), state)
        multiplied = None if added is None else (state[0], None if w_hr is None else h)
        h = h if w_hr is None else _with_tangent(product(h, w_hr), d_projected)
        new = (h, *cell)
        if inside is None:
            return new, (h, multiplied)
        new = tuple(jnp.where(inside, a, b) for a, b in zip(new, state, strict=True))
        return new, (jnp.where(inside, h, 0), multiplied)

    last, (outputs, multiplied) = jax.lax.scan(step, start, (x, mask, added or (None, None)), reverse=kind.reverse)
    return (last, outputs), multiplied


def _with_tangent(x: Any, zeros: Any) -> Any:
    return x if zeros is None else _add_tangent(x, zeros)


@jax.custom_jvp
def _add_tangent(x: Any, zeros: Any) -> Any:
    """x + 0, without an addition. Its tangent is the sum of both tangents."""
    return x


_add_tangent.defjvp(lambda primals, tangents: (primals[0], tangents[0] + tangents[1]))
