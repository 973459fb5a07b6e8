"""Copying the caller's NumPy memory before a call returns.

JAX copies a NumPy array later, in the background, or uses its memory without a copy. A caller who fills one buffer with
each batch in turn would then train on the wrong batch. Every array that is not a JAX array therefore passes through `owned`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64  # bytes: XLA uses memory that begins at a multiple of this, and copies any other memory again
SMALL = 4096  # bytes: a smaller array is copied twice, which is faster than aligning it
_IMMUTABLE = (jax.Array, np.generic, bool, int, float, complex, str, bytes, type(None))
_immutable: set[type] = set()  # types of `_IMMUTABLE` seen so far: a set lookup is faster than isinstance


def owned(value: Any) -> Any:
    """Return `value` with all memory copied that the caller can still write to.

    It copies NumPy arrays (read-only ones too: they may be views of writable memory), objects that share memory with NumPy
    (torch tensors and others with `__array__`, memoryviews), and all of these in lists, tuples, dicts and pytrees. It
    returns JAX arrays, numbers and other objects as they are.
    """
    kind = type(value)
    if kind in _immutable:
        return value
    if isinstance(value, np.ndarray):
        return _copied(value)
    if isinstance(value, _IMMUTABLE):
        _immutable.add(kind)
        return value
    if kind is list or kind is tuple:
        items = [owned(item) for item in value]
        return value if _same(items, value) else kind(items)
    if kind is dict:
        named = {key: owned(item) for key, item in value.items()}
        return value if _same(named.values(), value.values()) else named
    if isinstance(value, memoryview) or (hasattr(kind, "__array__") and not hasattr(kind, "__jax_array__")):
        return _copied(np.asarray(value))
    if getattr(kind, "_holds_cells", False) or jax.tree_util.all_leaves([value]):
        return value  # modules and optimizers keep arrays of their own
    leaves, treedef = jax.tree.flatten(value, is_leaf=_holds_state)
    mine = [owned(leaf) for leaf in leaves]
    try:
        return value if _same(mine, leaves) else jax.tree.unflatten(treedef, mine)
    except Exception:  # its class takes other arrays only: the code that uses `value` reports the error
        return value


def _holds_state(value: Any) -> bool:
    return getattr(type(value), "_holds_cells", False)


def _same(mine: Any, theirs: Any) -> bool:
    return all([a is b for a, b in zip(mine, theirs, strict=True)])


def _copied(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a copy in C order, aligned so that XLA need not copy it again."""
    if array.nbytes < SMALL or type(array) is not np.ndarray or array.dtype.hasobject:
        return np.array(array, order="C", subok=True)
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % _ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def owned_data(data: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the data of a compiled call, each value passed through `owned`. Immutable data costs one look at the types."""
    return data if _immutable.issuperset(map(type, data)) else tuple(map(owned, data))
