"""Torch's dtype rules: which functions promote their arguments, and which need one dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from ...state.static_values import describe


class DtypeMismatch(TypeError, ValueError):
    """The arrays have several dtypes, and the function needs one. Torch raises a RuntimeError or a ValueError here."""


def _own_dtype(array: Any) -> Any:
    """The dtype of an array in JAX. None for numbers and weakly typed arrays, which take the dtype of the others."""
    if not hasattr(array, "dtype") or getattr(getattr(array, "aval", None), "weak_type", False):
        return None
    return _dtype(array)


def _dtype(array: Any) -> Any:
    """The dtype of a jax array. For a NumPy array, the dtype after conversion: float64 becomes float32 unless x64 is on."""
    return array.dtype if isinstance(array, jax.Array) else jax.dtypes.canonicalize_dtype(array.dtype)


def wide(array: Any) -> jax.Array:
    """The array in float32 or wider, so that squares, powers and long sums of half precision do not overflow."""
    return jnp.asarray(array, wide_dtype(_dtype(array)))


def _are_alike(arrays: Iterable[Any]) -> bool:
    """True if all arrays that are not None have one dtype. This is the usual case, and the check is cheap."""
    return len({getattr(array, "dtype", None) for array in arrays if array is not None}) == 1


def promoted_dtype(*arrays: Any) -> Any:
    """The dtype that torch promotes these arrays, dtypes and numbers to.

    The rules are JAX's standard ones, with one exception: a weakly typed array such as `jnp.full(3, 0.1)` counts as a
    typed one. Only scalars take the dtype of the other arrays.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(_dtype(array) if getattr(array, "shape", ()) else array for array in arrays))


def promoted(*arrays: Any) -> list[jax.Array]:
    """The arrays, converted to `promoted_dtype`."""
    if _are_alike(arrays) and all(isinstance(array, jax.Array) for array in arrays):
        return list(arrays)
    dtype = promoted_dtype(*arrays)
    return [jnp.asarray(array, dtype) for array in arrays]


def promoted_to_floats(*arrays: Any) -> list[jax.Array]:
    """As `promoted`, and integers become floats of the default dtype, as in torch's divisions and logarithms."""
    arrays = tuple(promoted(*arrays))
    if jnp.issubdtype(arrays[0].dtype, jnp.floating):
        return list(arrays)
    return [array.astype(jnp.result_type(float)) for array in arrays]


def of_one_dtype(name: str, **arrays: Any) -> list[Any]:
    """The arrays, if all have one dtype. Numbers and weakly typed arrays take the dtype of the others; None stays None."""
    if _are_alike(arrays.values()):
        return list(arrays.values())
    dtypes = {dtype for array in arrays.values() if (dtype := _own_dtype(array)) is not None}
    if len(dtypes) > 1:
        raise _mismatch(f"{name} takes arrays of one dtype; got {', '.join(sorted(map(str, dtypes)))}", arrays)
    return [with_dtype(array, *dtypes) for array in arrays.values()]


def with_dtype(array: Any, dtype: Any = None) -> Any:
    """`array` as a jax array of `dtype`, if it has that dtype or is weakly typed. Otherwise `array` unchanged."""
    if array is None or dtype is None or _own_dtype(array) not in (None, dtype):
        return array
    return array if isinstance(array, jax.Array) and array.dtype == dtype else jnp.asarray(array, dtype)


def check_parameters(name: str, input: jax.Array, **arrays: Any) -> None:
    """Raise unless the parameters have the input's dtype. For an input of half precision, float32 is allowed too."""
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
        f"{rule} ({shown}). Convert one of them: `{first}.astype({other})`, or the layer: `layer.astype({one})`; or compute"
        " in a lower type with `mt.autocast(jnp.bfloat16)`."
    )
