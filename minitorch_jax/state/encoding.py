"""Storing integers, booleans and random keys as floats, because `jax.grad` refuses leaves that are not floating."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Encoding:
    """How a cell stores a value that is not floating exactly, as floats.

    `jax.grad` differentiates the leaves of a module's pytree, and refuses integers, booleans and random keys. A cell
    therefore stores the bytes of such values as floats. bfloat16 and float16 hold a byte exactly too, so a map that casts
    every floating leaf loses nothing. Values of one byte are stored as numbers of the same shape, longer ones as their bytes
    on a new last axis.
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
        """Return the encoding for an array's dtype, or None for a floating or complex one, which needs none."""
        dtype = value.dtype
        return None if jnp.issubdtype(dtype, jnp.inexact) else Encoding(dtype)

    @property
    def is_key(self) -> bool:
        return bool(jnp.issubdtype(self.dtype, jax.dtypes.prng_key))

    @property
    def plain(self) -> Any:
        """The dtype of the numbers whose bytes are stored. For a random key, these are the numbers of its data."""
        return np.dtype(np.uint32) if self.is_key else np.dtype(self.dtype)

    def encode(self, value: Any, like: Any = None) -> Any:
        """Return the floats that stand for `value`, in the dtype of `like`, the floats that they replace, or in float32."""
        dtype = like.dtype if _is_exact(like) else jnp.dtype(np.float32)
        value = jax.random.key_data(value) if self.is_key else value
        if self.plain.itemsize == 1:
            return value.astype(dtype)
        return jax.lax.bitcast_convert_type(value, np.uint8).astype(dtype)

    def decode(self, value: Any) -> Any:
        """Return the value that the floats stand for. `problem` has checked them before."""
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.eval_shape(self.decode, value).update(sharding=value.sharding)
        if not hasattr(value, "astype"):  # a leaf that jax.tree.map put there
            return value
        parts = jnp.round(jnp.asarray(value))
        if self.plain.itemsize == 1:
            return parts.astype(self.plain)
        value = jax.lax.bitcast_convert_type(parts.astype(np.uint8), self.plain)
        return jax.random.wrap_key_data(value, impl=str(self.dtype._impl.name)) if self.is_key else value

    def problem(self, value: Any) -> str | None:
        """Return why the floats stand for no value of this dtype, or None. Of traced floats, only the dtype is checked."""
        if isinstance(value, jax.ShapeDtypeStruct) or not hasattr(value, "astype"):
            return None
        if not _is_exact(value):
            return f"it was converted to {value.dtype}, which cannot hold its bytes exactly"
        if isinstance(value, jax.core.Tracer):
            return None
        parts = np.array(value).astype(np.float64)
        low, high = 0, 1 if self.plain.kind == "b" else 255
        if self.plain.itemsize == 1 and self.plain.kind != "b":
            low, high = int(jnp.iinfo(self.plain).min), int(jnp.iinfo(self.plain).max)
        whole = np.round(parts)
        fits = (abs(parts - whole) <= _ROUNDING) & (low <= whole) & (whole <= high)
        return None if fits.all() else f"it was changed by arithmetic, and {parts[~fits][0]:g} is not one of its bytes"


_ROUNDING = 1 / 16  # the largest distance of a byte from a whole number: an average of equal bytes is rounded


def _is_exact(value: Any) -> bool:
    """True if an array's dtype holds all whole numbers from -256 to 256 exactly."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    return bool(jnp.finfo(dtype).nmant >= 7)


def from_halves(encoding: Encoding, value: Any) -> Any:
    """Return the floats of an older pickle, which stored one float per 16 bits, in today's form, one float per byte."""
    dtype = encoding.plain
    whole = np.round(np.asarray(value))
    kept = whole.astype(dtype) if dtype.itemsize <= 2 else whole.astype(np.uint16).view(dtype)[..., 0]
    kept = jnp.asarray(kept)
    return encoding.encode(
        jax.random.wrap_key_data(kept, impl=str(encoding.dtype._impl.name)) if encoding.is_key else kept
    )
