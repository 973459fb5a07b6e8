"""Arrays in the form in which orbax writes and reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from minitorch_jax.state.cell import bound_to


class StoredArray(NamedTuple):
    dtype: Any
    shape: tuple[int, ...]


def arrays_of(what: Any) -> Iterator[tuple[str, StoredArray]]:
    """The paths, dtypes and shapes of the arrays in a description."""
    if isinstance(what, list):
        for item in what:
            yield from arrays_of(item)
    elif isinstance(what, dict):
        if "array" in what:
            yield what["array"], StoredArray(jnp.dtype(what["dtype"]), tuple(what["shape"]))
        else:
            children = what["dict"].values() if "dict" in what else what.values()
            for item in children:
                yield from arrays_of(item)


def stored_dtype(array: Any) -> Any:
    """The dtype in which orbax can write an array: its own dtype, or uint8 for its bits."""
    dtype = jnp.dtype(array.dtype)
    try:
        tensorstore.dtype(dtype.name)
    except ValueError:
        return np.dtype(np.uint8)
    return dtype


def stored_form(array: Any, place: str) -> Any:
    """An array in a form that orbax can write."""
    if stored_dtype(array) == array.dtype:
        return array
    if not (jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits == 8):
        raise TypeError(
            f"save(): {place} has dtype {array.dtype.name}, which orbax cannot write; convert it to another dtype"
        )
    return array.view(np.uint8)


def read_arguments(array: StoredArray, mine: Any) -> Any:
    """Orbax's arguments for reading an array: to the devices of the object's own array, or to NumPy."""
    stored = stored_dtype(array)
    if isinstance(mine, jax.Array | jax.ShapeDtypeStruct) and (mine.shape, mine.dtype) == (array.shape, array.dtype):
        sharding = bound_to(mine)
        if sharding is not None:
            return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=array.shape, dtype=stored)
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=stored)
