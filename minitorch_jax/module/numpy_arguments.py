"""Copying the caller's NumPy arrays in eager calls of modules and functions; see `runtime/memory.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime.jax_private import at_top_level
from ..runtime.numpy_memory import SMALL, owned_data
from ..runtime.tracebacks import trim


def copied_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with NumPy memory copied. Large ones become JAX arrays, so inner calls copy no more."""
    mine = owned_data(args)
    named = kwargs if not kwargs else dict(zip(kwargs, owned_data(tuple(kwargs.values())), strict=True))
    if (mine is args and not kwargs) or not at_top_level():
        return mine, named
    return tuple(map(_on_device, mine)), {name: _on_device(value) for name, value in named.items()}


def _on_device(value: Any) -> Any:
    """Return a NumPy array as a JAX array, unless that changes its dtype. A small array may be a shape, so it stays NumPy."""
    if type(value) is not np.ndarray or value.nbytes < SMALL or value.dtype.kind not in "biufcV":
        return value
    try:
        kept = jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype
    except TypeError:
        return value
    return jnp.asarray(value) if kept else value


def own_arguments(namespace: dict[str, Any]) -> None:
    """Wrap every public function of a Python module so that it copies the caller's NumPy memory."""
    for name, function in list(namespace.items()):
        ours = isinstance(function, FunctionType) and function.__module__.startswith(namespace["__name__"])
        if ours and not name.startswith("_"):
            namespace[name] = _owning(function, namespace["__name__"])


def _owning(function: Callable[..., Any], module: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            args, kwargs = copied_arguments(args, kwargs)
            return function(*args, **kwargs)
        except Exception as error:
            trim(error)
            raise

    call.__module__ = module  # where pickle looks the function up
    return call
