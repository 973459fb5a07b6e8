"""Dtypes as torch treats them: which are promoted, and which must be the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from ...state.containers import describe


class DtypeMismatch(TypeError, ValueError):
    """Arrays of several dtypes where one is needed: torch has a RuntimeError or a ValueError here."""


def _own_dtype(array: Any) -> Any:
    """The dtype that JAX gives an array; None for numbers and weakly typed arrays, which follow the others."""
    if not hasattr(array, "dtype") or getattr(getattr(array, "aval", None), "weak_type", False):
        return None
    return _dtype(array)


def _dtype(array: Any) -> Any:
    """That of a jax array; of a NumPy array, the one that JAX makes of it, float32 of float64 where its 64 bits are off."""
    return array.dtype if isinstance(array, jax.Array) else jax.dtypes.canonicalize_dtype(array.dtype)


def wide(array: Any) -> jax.Array:
    """The array in float32 at least, so that squares, powers and long sums of half precision do not overflow."""
    return jnp.asarray(array, wide_dtype(_dtype(array)))


def _are_alike(arrays: Iterable[Any]) -> bool:
    """True if all that is not None has one dtype: nearly always, and quickly found out."""
    return len({getattr(array, "dtype", None) for array in arrays if array is not None}) == 1


def promoted_dtype(*arrays: Any) -> Any:
    """The dtype that arrays, dtypes and numbers have in common by torch's rules.

    They are JAX's standard ones, but that the weak type of `jnp.full(3, 0.1)` counts: only scalars follow other arrays.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(_dtype(array) if getattr(array, "shape", ()) else array for array in arrays))


def promoted(*arrays: Any) -> list[jax.Array]:
    """The arrays in the dtype that they have in common."""
    if _are_alike(arrays) and all(isinstance(array, jax.Array) for array in arrays):
        return list(arrays)
    dtype = promoted_dtype(*arrays)
    return [jnp.asarray(array, dtype) for array in arrays]


def promoted_to_floats(*arrays: Any) -> list[jax.Array]:
    """`promoted`; integers become floats of the default dtype, as where torch divides or takes logarithms."""
    arrays = tuple(promoted(*arrays))
    if jnp.issubdtype(arrays[0].dtype, jnp.floating):
        return list(arrays)
    return [array.astype(jnp.result_type(float)) for array in arrays]


def of_one_dtype(name: str, **arrays: Any) -> list[Any]:
    """The arrays, or None for None, if all are of one dtype; numbers and weakly typed arrays take that of the others."""
    if _are_alike(arrays.values()):
        return list(arrays.values())
    dtypes = {dtype for array in arrays.values() if (dtype := _own_dtype(array)) is not None}
    if len(dtypes) > 1:
        raise _mismatch(f"{name} takes arrays of one dtype; got {', '.join(sorted(map(str, dtypes)))}", arrays)
    return [with_dtype(array, *dtypes) for array in arrays.values()]


def with_dtype(array: Any, dtype: Any = None) -> Any:
    """A jax array of a dtype, if JAX would make one of that dtype, or let it follow; else, or for None, as it is."""
    if array is None or dtype is None or _own_dtype(array) not in (None, dtype):
        return array
    return array if isinstance(array, jax.Array) and array.dtype == dtype else jnp.asarray(array, dtype)


def check_parameters(name: str, input: jax.Array, **arrays: Any) -> None:
    """Raise unless the parameters of a normalisation have the input's dtype, or float32 where the input has fewer bits."""
    if _are_alike((input, *arrays.values())):
        return
    own = _own_dtype(input)
    given = {dtype for array in arrays.values() if (dtype := _own_dtype(array)) is not None}
    if own is None or not given or given in ({own}, {wide_dtype(own)}):
        return
    wide = "" if wide_dtype(own) == own else " or float32"
    rule = f"{name} takes parameters of the input's dtype{wide}"
    raise _mismatch(f"{rule}; got {own} and {', '.join(sorted(map(str, given)))}", {"input": input, **arrays})


def _mismatch(rule: str, arrays: dict[str, Any]) -> DtypeMismatch:
    given = {label: array for label, array in arrays.items() if _own_dtype(array) is not None}
    (first, one), *rest = ((label, _own_dtype(array)) for label, array in given.items())
    other = next((dtype for _, dtype in rest if dtype != one), one)
    shown = ", ".join(f"{label} {describe(array)}" for label, array in given.items())
    return DtypeMismatch(
        f"{rule} ({shown}). Convert one of them: `{first}.astype({other})`, or the layer: `layer.astype({one})`."
    )
