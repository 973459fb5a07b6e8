"""Keeping values that are not floating as floats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Encoding:
    """How a value that is not floating is kept in a cell, exactly, as floats.

    Leaves of a module's pytree are what `jax.grad` differentiates, and it refuses integers, booleans and random keys. So
    a cell keeps their bits: up to 16 as one float32 each, more as several on a new last axis.
    """

    __slots__ = ("dtype",)

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoding) and self.dtype == other.dtype

    def __hash__(self) -> int:
        return hash(self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoding, (self.dtype,)

    @staticmethod
    def of(value: Any) -> Encoding | None:
        dtype = value.dtype
        return None if jnp.issubdtype(dtype, jnp.inexact) else Encoding(dtype)

    def encode(self, value: Any) -> Any:
        if jnp.issubdtype(self.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if value.dtype.itemsize > 2:
            value = jax.lax.bitcast_convert_type(value, np.uint16)
        return value.astype(np.float32)

    def decode(self, value: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.eval_shape(self.decode, value)
        if not hasattr(value, "astype"):  # a leaf that jax.tree.map put there
            return value
        is_key = jnp.issubdtype(self.dtype, jax.dtypes.prng_key)
        dtype = np.dtype(np.uint32) if is_key else np.dtype(self.dtype)
        if dtype.itemsize > 2:
            value = jax.lax.bitcast_convert_type(jnp.round(jnp.asarray(value)).astype(np.uint16), dtype)
        else:
            value = jnp.round(jnp.asarray(value)).astype(dtype)
        if is_key:
            value = jax.random.wrap_key_data(value, impl=str(self.dtype._impl.name))
        return value
