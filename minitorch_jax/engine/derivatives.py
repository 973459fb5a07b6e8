"""Turning repeated equations of a jaxpr into calls of jitted functions, whose derivatives JAX caches.

To differentiate a jaxpr, JAX derives a linear function from each equation, which takes most of a millisecond. It caches the
derivative of a jitted function. The functions of `jax.numpy` are jitted, so `jax.grad` of a network with many equal layers
derives each function once. In a jaxpr these functions have been inlined, so equations that occur often are jitted again here.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend import core as jax_core

from ..runtime import jax_private

_OFTEN = 4  # the smallest number of equal equations for which this is faster


def with_cached_derivatives(closed: Any) -> Any:
    """Return an equal jaxpr that is faster to differentiate."""
    config: Any = jax.config
    if config.jax_disable_jit:  # calls of jitted functions are then not traced as calls
        return closed
    keys = [_key(eqn) for eqn in closed.jaxpr.eqns]
    often = {key for key, count in Counter(keys).items() if key is not None and count >= _OFTEN}
    eqns = [_jitted(eqn, key) if key in often else eqn for eqn, key in zip(closed.jaxpr.eqns, keys, strict=True)]
    return jax_private.with_equations(closed, eqns) if often else closed


def _key(eqn: Any) -> Any:
    """Return a key that is equal for equations that may share a function, or None for an equation that may not."""
    avals = tuple([atom.aval for atom in eqn.invars])
    context = jax_private.context_of(eqn)
    if (
        eqn.effects
        or context is None
        or any(type(aval) is not ShapedArray for aval in avals)
        or any(jax_core.jaxprs_in_params(eqn.params))
    ):
        return None
    try:
        params = tuple(sorted(eqn.params.items()))
        key = eqn.primitive, params, tuple([_typed(value) for _, value in params]), avals, context
        hash(key)
    except TypeError:
        return None
    return key


def _typed(value: Any) -> Any:
    """Return the types in a parameter, which tell 1 from True.

    Raises:
        TypeError: for a value whose equality is not safe, such as a float (0.0 equals -0.0) or an object of the user.
    """
    if type(value) is tuple:
        return tuple(map(_typed, value))
    if value is None or isinstance(value, int | str | np.dtype) or type(value).__module__.partition(".")[0] in _JAX:
        return type(value)
    raise TypeError(value)


_JAX = ("jax", "jaxlib")


def _jitted(eqn: Any, key: Any) -> Any:
    """Return an equation as the call of a jitted function, which is inlined again when it is traced."""
    call = _call(key)
    return eqn if call is None else jax_private.calling(eqn, call)


@lru_cache(maxsize=1024)
def _call(key: Any) -> Any:
    """Return the call of a jitted function that computes an equation with this key, or None if there is no such call."""
    primitive, params, _, avals, context = key

    def function(*args: Any) -> Any:
        return primitive.bind(*args, **dict(params))

    inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type) for aval in avals]
    with jax_private.under(context):
        (call,) = jax.make_jaxpr(jax.jit(function))(*inputs).eqns
    if tuple([var.aval for var in call.invars]) != avals:  # the inputs have another property, such as a sharding
        return None
    return jax_private.inlined(call)
