"""Keeping values that are not floating as floats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Encoding:
    """How a value that is not floating is kept in a cell, exactly, as floats.

    Leaves of a module's pytree are what `jax.grad` differentiates, and it refuses integers, booleans and random keys. So
    a cell keeps their bytes, which bfloat16 and float16 hold exactly, too: a map that casts every floating leaf loses
    nothing. Types of one byte are kept as numbers, longer ones as their bytes on a new last axis.
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

    @property
    def is_key(self) -> bool:
        return bool(jnp.issubdtype(self.dtype, jax.dtypes.prng_key))

    @property
    def plain(self) -> Any:
        """The dtype of the numbers that are kept: of a key, those of its data."""
        return np.dtype(np.uint32) if self.is_key else np.dtype(self.dtype)

    def encode(self, value: Any, like: Any = None) -> Any:
        """The floats that stand for `value`: float32, or of the dtype of `like`, the ones that they replace."""
        dtype = like.dtype if _is_exact(like) else jnp.dtype(np.float32)
        value = jax.random.key_data(value) if self.is_key else value
        if self.plain.itemsize == 1:
            return value.astype(dtype)
        return jax.lax.bitcast_convert_type(value, np.uint8).astype(dtype)

    def decode(self, value: Any) -> Any:
        """The value that the floats stand for; they have been looked at by `problem`."""
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.eval_shape(self.decode, value)
        if not hasattr(value, "astype"):  # a leaf that jax.tree.map put there
            return value
        parts = jnp.round(jnp.asarray(value))
        if self.plain.itemsize == 1:
            return parts.astype(self.plain)
        value = jax.lax.bitcast_convert_type(parts.astype(np.uint8), self.plain)
        return jax.random.wrap_key_data(value, impl=str(self.dtype._impl.name)) if self.is_key else value

    def problem(self, value: Any) -> str | None:
        """Why floats stand for no value of this dtype; None if they do, or are traced and of a dtype that can."""
        if isinstance(value, jax.ShapeDtypeStruct) or not hasattr(value, "astype"):
            return None
        if not _is_exact(value):
            return f"it was converted to {value.dtype}, in which its bytes have no place"
        if isinstance(value, jax.core.Tracer):
            return None
        parts = np.array(value).astype(np.float64)
        low, high = 0, 1 if self.plain.kind == "b" else 255
        if self.plain.itemsize == 1 and self.plain.kind != "b":
            low, high = int(jnp.iinfo(self.plain).min), int(jnp.iinfo(self.plain).max)
        whole = np.round(parts)
        fits = (abs(parts - whole) <= _ROUNDING) & (low <= whole) & (whole <= high)
        return None if fits.all() else f"it was computed with, and {parts[~fits][0]:g} is not one of its bytes"


_ROUNDING = 1 / 16  # how far from a whole number a byte may be: averages of equal ones are rounded


def _is_exact(value: Any) -> bool:
    """Whether an array's dtype holds all numbers from -256 to 256."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    return bool(jnp.finfo(dtype).nmant >= 7)


def from_halves(encoding: Encoding, value: Any) -> Any:
    """The floats of today for those of a pickle written before: one float per 16 bits."""
    dtype = encoding.plain
    whole = np.round(np.asarray(value))
    kept = whole.astype(dtype) if dtype.itemsize <= 2 else whole.astype(np.uint16).view(dtype)[..., 0]
    kept = jnp.asarray(kept)
    return encoding.encode(
        jax.random.wrap_key_data(kept, impl=str(encoding.dtype._impl.name)) if encoding.is_key else kept
    )
