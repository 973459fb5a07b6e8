"""Copying the caller's NumPy memory before a call returns.

JAX copies a NumPy array later, in the background, or uses its memory without a copy. A caller who fills one buffer with
each batch in turn would then train on the wrong batch. Every array that is not a JAX array therefore passes through `owned`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64  # bytes: XLA uses memory that begins at a multiple of this, and copies any other memory again
SMALL = 4096  # bytes: a smaller array is copied twice, which is faster than aligning it
_IMMUTABLE = (jax.Array, np.generic, bool, int, float, complex, str, bytes, type(None))
immutable: set[type] = set()  # types of `_IMMUTABLE` seen so far: a set lookup is faster than isinstance


def as_numpy(value: Any) -> Any:
    """Return an object of another library as a NumPy array.

    Raises:
        TypeError: if it cannot be read by NumPy, as a torch tensor that requires a gradient, is on a GPU, or is bfloat16.
    """
    try:
        return np.asarray(value)
    except Exception as error:
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise
        library, what = _described(value)
        fix = "convert it to a NumPy array or a JAX array first"
        if library == "torch":
            fix = (
                "write `from_torch(tensor)`, and `load_from_torch(model, torch_model)` for weights, both of"
                " `minitorch_jax.adapters.torch`"
            )
        raise TypeError(
            f"expected an array of JAX or NumPy, got {what}, which NumPy cannot read ({error}): {fix}"
        ) from error


def refuse(value: Any) -> Any:
    """Raise TypeError for an array of another library among the arguments of a call."""
    as_numpy(value)  # raises for a tensor that needs more than the conversion below
    kind = type(value)
    library, what = _described(value, f"{kind.__module__}.{kind.__name__}")
    fix = "`jnp.asarray(x)`" if hasattr(kind, "__jax_array__") else "`jnp.asarray(np.asarray(x))`"
    if library == "torch":
        fix = "`jnp.asarray(x.numpy())`"
    raise TypeError(f"an argument is {what}, which is no array of JAX or NumPy: write {fix}")


def refuse_packed(value: Any) -> None:
    """Raise TypeError for torch's PackedSequence. (It is a tuple, so the error would be about the tensors in it.)"""
    kind = type(value)
    if kind.__name__ == "PackedSequence" and kind.__module__.partition(".")[0] == "torch":
        raise TypeError(
            "an argument is a torch PackedSequence: pass the padded array, `padded, lengths = pad_packed_sequence(x)` in"
            " torch, then here `pack_padded_sequence(padded.numpy(), lengths.numpy(), enforce_sorted=False)`"
        )


def _described(value: Any, name: str = "") -> tuple[str, str]:
    """Return the library of an array, and "a torch Tensor, float32[3]", or with another name for its class."""
    library = type(value).__module__.partition(".")[0]
    what = f"a {name or f'{library} {type(value).__name__}'}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        what += f", {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return library, what


def owned(value: Any, convert: Callable[[Any], Any] = as_numpy) -> Any:
    """Return `value` with all memory copied that the caller can still write to.

    It copies NumPy arrays (read-only ones too: they may be views of writable memory), objects that share memory with NumPy
    (torch tensors and others with `__array__`, memoryviews), and all of these in lists, tuples, dicts and pytrees. It
    returns JAX arrays, numbers and other objects as they are. `convert` makes a NumPy array of an object with `__array__`, or
    raises.
    """
    kind = type(value)
    if kind in immutable:
        return value
    if isinstance(value, np.ndarray):
        return _copied(value)
    if isinstance(value, _IMMUTABLE):
        immutable.add(kind)
        return value
    if kind is list or kind is tuple:
        items = [owned(item, convert) for item in value]
        return value if _same(items, value) else kind(items)
    if kind is dict:
        named = {key: owned(item, convert) for key, item in value.items()}
        return value if _same(named.values(), value.values()) else named
    if isinstance(value, memoryview):
        return _copied(np.asarray(value))
    if hasattr(kind, "__array__") and not hasattr(kind, "__jax_array__"):
        return _copied(convert(value))
    if getattr(kind, "_holds_cells", False) or jax.tree_util.all_leaves([value]):
        return value  # modules and optimizers keep arrays of their own
    refuse_packed(value)
    leaves, treedef = jax.tree.flatten(value, is_leaf=_holds_state)
    mine = [owned(leaf, convert) for leaf in leaves]
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


def owned_data(data: tuple[Any, ...], convert: Callable[[Any], Any] = refuse) -> tuple[Any, ...]:
    """Return the data of a call, each value passed through `owned`. Immutable data costs one look at the types.

    An array of another library is a TypeError, since it would hide a copy in each call; with `convert=as_numpy` it is none.
    """
    return data if immutable.issuperset(map(type, data)) else tuple(map(owned, data, repeat(convert)))
