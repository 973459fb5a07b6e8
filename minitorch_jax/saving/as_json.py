"""Describing values in JSON, with their arrays in a separate dict, and rebuilding them. Every kind of checkpoint uses it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PLAIN_KEYS = (str, int, float, bool, type(None), tuple)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a checkpoint stores in place of a schedule: its text, or None for a function without a readable text."""

    text: str | None

    def __repr__(self) -> str:
        return self.text or "a function"


def text_of(schedule: Any) -> str | None:
    """Return a text that identifies a schedule in any process: the repr of one of this package, None for a function."""
    return _shown(schedule) if dataclasses.is_dataclass(schedule) else None


def _shown(value: Any) -> str:
    """Return the repr of a value, or only its type if the repr holds an address in memory."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f"{f.name}={_shown(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.repr]
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if type(value) in (list, tuple):
        items = ", ".join(map(_shown, value))
        return f"[{items}]" if type(value) is list else f"({items},)" if len(value) == 1 else f"({items})"
    return f"a {type(value).__name__}" if " at 0x" in repr(value) else repr(value)


def described(value: Any, path: str, arrays: dict[str, Any], schedules: bool = False) -> Any:
    """Return a description of a value in JSON types.

    Args:
        value: numbers, strings, arrays (or `jax.ShapeDtypeStruct`s in their place), random keys, and lists, tuples and
            dicts of these.
        path: the name of the value in messages.
        arrays: a dict to which the value's arrays (JAX or NumPy) are added, each under a name made from its path.
        schedules: True if functions in the value are schedules, whose text is stored.

    Raises:
        TypeError: if the value holds something else. The message names it.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, dict):
        return _described_dict(value, path, arrays, schedules)
    if type(value) in (list, tuple):
        items = [described(item, f"{path}.{i}", arrays, schedules) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = described(jax.random.key_data(value), path, arrays)
        return {"key": str(jax.random.key_impl(value)), "data": data}
    if isinstance(value, jax.ShapeDtypeStruct) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, value).update(sharding=value.sharding)
        return {"key": str(value.dtype._impl.name), "data": described(data, path, arrays)}
    array_types = jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic
    if isinstance(value, array_types) and not isinstance(value, np.ma.MaskedArray):
        array = _native(np.asarray(value), path) if isinstance(value, np.ndarray | np.generic) else value
        # any path becomes a valid name of an entry in the archive
        place = path.replace("\0", "").encode(errors="replace")[:1000].decode(errors="ignore")
        while place in arrays:
            place += "'"
        arrays[place] = array
        return {"array": place, "dtype": array.dtype.name, "shape": list(array.shape)}
    if schedules and callable(value) and not isinstance(value, type):
        return {"schedule": text_of(value)}
    raise TypeError(
        f"save(): {path} is a {type(value).__name__}, which cannot be saved. Pass modules and optimizers (those of another"
        " library within its adapter), each under a name of its own, or numbers, strings, arrays, random keys, and lists,"
        " tuples and dicts of these."
    )


def _described_dict(value: dict[Any, Any], path: str, arrays: dict[str, Any], schedules: bool) -> Any:
    items = {key: described(item, f"{path}.{key}", arrays, schedules) for key, item in value.items()}
    if all(type(key) is str for key in value):
        return {"dict": items}
    inside: dict[str, Any] = {}  # arrays within keys (NumPy numbers in a tuple), which cannot be saved
    strange = [key for key in value if type(key) not in _PLAIN_KEYS]
    pairs = [[described(key, path, inside), item] for key, item in items.items() if not strange]
    if strange or inside:
        raise TypeError(
            f"save(): {path} is a dict with keys that cannot be saved: {strange or list(value)!r}. Keys may be strings,"
            " numbers, None, and tuples of these."
        )
    return {"pairs": pairs}


def _native(array: np.ndarray[Any, Any], path: str) -> np.ndarray[Any, Any]:
    """Return the array in this machine's byte order.

    Raises:
        TypeError: if its dtype is not a named dtype of numbers.
    """
    dtype = array.dtype.newbyteorder("=")
    try:
        if np.dtype(dtype.name) == dtype and not dtype.hasobject:
            return array if dtype == array.dtype else array.astype(dtype)
    except TypeError:
        pass
    raise TypeError(
        f"save(): {path} is an array of {array.dtype}, which is no array of numbers. Save strings as a list:"
        " `array.tolist()`."
    )


def value_of(what: Any, arrays: Mapping[str, Any]) -> Any:
    """Return the value that `described` has described.

    Args:
        what: the description.
        arrays: the arrays by name, each in its dtype, or as bytes if NumPy does not know the dtype.

    Raises:
        ValueError: if an array does not have the dtype and size of its description.
    """
    match what:
        case {"float": text}:
            return float(text)
        case {"dict": items}:
            return {key: value_of(item, arrays) for key, item in items.items()}
        case {"pairs": items}:
            return {value_of(key, arrays): value_of(item, arrays) for key, item in items}
        case {"list": items}:
            return [value_of(item, arrays) for item in items]
        case {"tuple": items}:
            return tuple(value_of(item, arrays) for item in items)
        case {"key": impl, "data": data}:
            return jax.random.wrap_key_data(jnp.asarray(value_of(data, arrays)), impl=impl)
        case {"array": place, "dtype": dtype, "shape": shape}:
            array, wanted = arrays[place], jnp.dtype(dtype)
            if array.dtype == np.uint8 and wanted.isbuiltin != 1:
                array = array.view(wanted)
            if array.dtype != wanted or array.size != math.prod(shape):
                raise ValueError(f"the array {place} is not the {dtype}{shape} of its description")
            return array if list(array.shape) == shape else array.reshape(shape)
        case {"schedule": text}:
            return Schedule(text)
    return what
