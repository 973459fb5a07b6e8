"""The values that a NumPy array and its views share. JAX may trace them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray


class Untraceable(TypeError):
    """A traced array cannot do this; only a NumPy array can."""


class Memory:
    """The values that an array and all its views share: a NumPy array, or a traced array."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._places: NDArray[np.int64] | None = None

    def places(self) -> NDArray[np.int64]:
        """The position of each value in memory."""
        if self._places is None:
            self._places = np.arange(self.value.size).reshape(self.value.shape)
        return self._places


def is_tracer(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def known(value: Any) -> NDArray[Any]:
    """The current numbers of a traced value. Use it only for piecewise constant functions, which have no derivative."""
    if is_tracer(value):
        value = jax.lax.stop_gradient(value)
    if is_tracer(value):
        raise Untraceable("the numbers of a traced value are not known")
    return np.asarray(value)


def widened(dtype: Any) -> Any:
    """The dtype used here for an array of `dtype`: float64 for every floating dtype."""
    return np.float64 if np.issubdtype(dtype, np.floating) else np.dtype(dtype)


class Held:
    """Some of a memory's values. `places` holds their positions; None means all of them, in order.

    Operations that only move elements (indexing, reshape, transpose, windows, …) run in NumPy, on the positions. So copies
    and views are told apart as in NumPy.
    """

    __slots__ = ("memory", "places")

    def __init__(self, value: Any) -> None:
        self.memory = Memory(value)
        self.places: NDArray[np.int64] | None = None

    @classmethod
    def at(cls, memory: Memory, places: NDArray[np.int64]) -> Self:
        new = object.__new__(cls)
        new.memory, new.places = memory, places
        return new

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.memory.value.shape if self.places is None else self.places.shape)

    @property
    def dtype(self) -> Any:
        return np.dtype(self.memory.value.dtype)

    def _axes(self) -> tuple[int, ...] | None:
        """The axes in the order of memory, if this is all of the memory with transposed or reshaped axes; else None."""
        places = self.places
        if places is None or places.size != self.memory.value.size or not places.size:
            return None
        if not np.may_share_memory(places, self.memory.places()):  # selected by an index array, in any order
            return None
        axes = tuple(sorted(range(places.ndim), key=lambda axis: -places.strides[axis]))
        return axes if places.transpose(axes).flags.c_contiguous else None

    @property
    def value(self) -> Any:
        """The values: a NumPy array, or a traced array."""
        whole, places = self.memory.value, self.places
        if places is None:
            return whole
        axes = self._axes()
        if axes is None:
            return whole.reshape(-1)[places]
        shape = tuple([places.shape[a] for a in axes])
        whole = whole if whole.shape == shape else whole.reshape(shape)
        return whole if axes == tuple(range(len(axes))) else whole.transpose(np.argsort(axes))

    def write(self, new: Any) -> None:
        """Write new values to the memory. They have this shape, or broadcast to it."""
        whole = self.memory.value
        if is_tracer(new) and not np.issubdtype(self.dtype, np.floating):
            raise Untraceable(f"a traced value was assigned to an array of dtype {self.dtype}")
        if not is_tracer(new) and not is_tracer(whole):
            flat: Any = np.array(whole).reshape(-1)
            flat[self.where()] = new
        else:
            new = new if is_tracer(new) and new.dtype == self.dtype else jnp.asarray(new, self.dtype)
            new = new if new.shape == self.shape else jnp.broadcast_to(new, self.shape)
            axes = self._axes()
            if self.places is None:
                flat = new
            elif axes is not None:
                flat = new if axes == tuple(range(len(axes))) else new.transpose(axes)
            else:
                flat = jnp.asarray(whole).reshape(-1).at[self.places].set(new)
        self.memory.value = flat if flat.shape == whole.shape else flat.reshape(whole.shape)

    def where(self) -> NDArray[np.int64]:
        """The position of each element in memory."""
        return self.memory.places() if self.places is None else self.places

    def moved(self, move: Callable[[Any], Any]) -> Any:
        """Apply `move` to the positions. A view shares the memory; anything else is a copy. `move` may return a list."""
        mine = self.memory.places()
        found = move(self.where())

        def array(places: Any) -> Any:
            view = self.at(self.memory, np.asarray(places))
            return view if np.may_share_memory(view.where(), mine) else type(self)(view.value)

        return type(found)(map(array, found)) if isinstance(found, list | tuple) else array(found)
