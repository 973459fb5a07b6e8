"""Equations of a jaxpr as jitted functions, of which JAX remembers the derivative.

To differentiate a jaxpr, JAX derives a linear function from each equation, which takes it most of a millisecond. What it has
derived from a jitted function it keeps. jax.numpy's functions are jitted, so in a network of many like layers, traced by
`jax.grad`, each is derived once; a jaxpr has lost them. Here equations that a jaxpr has many times become jitted again.
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

_OFTEN = 4  # from how many like equations on it pays


def remembered(closed: Any) -> Any:
    """The same jaxpr, quicker to differentiate."""
    config: Any = jax.config
    if config.jax_disable_jit:  # then a function that is called leaves no trace
        return closed
    keys = [_key(eqn) for eqn in closed.jaxpr.eqns]
    often = {key for key, count in Counter(keys).items() if key is not None and count >= _OFTEN}
    eqns = [_jitted(eqn, key) if key in often else eqn for eqn, key in zip(closed.jaxpr.eqns, keys, strict=True)]
    return jax_private.with_equations(closed, eqns) if often else closed


def _key(eqn: Any) -> Any:
    """What an equation computes, apart from its inputs: equal for equations that may share a function. None: not known."""
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
    """The types in a parameter, since 1 equals True. TypeError: it may be Python's, or 0.0, which equals -0.0."""
    if type(value) is tuple:
        return tuple(map(_typed, value))
    if value is None or isinstance(value, int | str | np.dtype) or type(value).__module__.partition(".")[0] in _JAX:
        return type(value)
    raise TypeError(value)


_JAX = ("jax", "jaxlib")


def _jitted(eqn: Any, key: Any) -> Any:
    """An equation as the call of a function, which is inlined again wherever it is traced."""
    call = _call(key)
    return eqn if call is None else jax_private.calling(eqn, call)


@lru_cache(maxsize=1024)
def _call(key: Any) -> Any:
    """The call of the function that an equation with this key computes, or None if it cannot be made one."""
    primitive, params, _, avals, context = key

    def function(*args: Any) -> Any:
        return primitive.bind(*args, **dict(params))

    inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type) for aval in avals]
    with jax_private.under(context):
        (call,) = jax.make_jaxpr(jax.jit(function))(*inputs).eqns
    if tuple([var.aval for var in call.invars]) != avals:  # sharded, or whatever else this does not know of
        return None
    return jax_private.inlined(call)
