"""The cell: one value that changes over time.

Each parameter, buffer, gradient, state array of an optimizer, step count, hyperparameter and random stream is stored in a
`Cell`. Modules and optimizers are trees of cells and static values. Nothing else stores arrays.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime.contexts import constants, full_width
from ..runtime.jax_private import at_top_level
from ..runtime.numpy_memory import owned
from .concurrent_reads import overridden, overrides, using
from .dropped_copies import Birth, birth_here
from .encoding import Encoding, from_halves
from .frame import _frame_of, _substitute, local, on_failure
from .gradient import CONSUMED, starting_value, unless_consumed


class _Registry:
    __slots__ = ("cells",)

    def __init__(self) -> None:
        self.cells: WeakValueDictionary[int, Cell] | None = None  # by id; None until the first call of `all_cells`


_registry = _Registry()


def all_cells() -> list[Cell]:
    """Return every living cell of the process."""
    if _registry.cells is None:
        _registry.cells = WeakValueDictionary()
        _registry.cells.update({id(found): found for found in gc.get_objects() if isinstance(found, Cell)})
    return [cell for reference in _registry.cells.valuerefs() if (cell := reference()) is not None]


class Cell:
    """One value that changes over time.

    `stored` is a `jax.Array`, `None` for a gradient of zeros that was never written, `CONSUMED` for a gradient that a
    compiled function did not return, or any leaf that `jax.tree.map` put there. `value` is the same, unless this thread
    traces code with another value for the cell (see `Frame`). That value is never stored in the cell, so no other thread
    reads it, and an exception or a Ctrl-C leaves no tracer behind. `lent` is True if a user may hold the array's buffer; it
    is then copied before it is donated. (The reference count of the array is no substitute: `jax.device_put` and others
    return new array objects that share the buffer, and are deleted with it.)
    """

    __slots__ = (
        "stored",
        "lent",
        "kind",
        "trainable",
        "grad",
        "encoding",
        "birth",
        "reached",
        "pack",
        "unseen",
        "stamp",
        "__weakref__",
    )

    held: Any  # what the slot `stored` itself holds, in subclasses that override `stored`, too

    def __init__(
        self,
        value: Any,
        kind: str,
        *,
        trainable: bool = False,
        lent: bool = False,
        encoding: Encoding | None = None,
        birth: Birth | None = None,
    ) -> None:
        self.stored = value
        self.lent = lent
        self.kind = kind
        self.trainable = trainable
        self.encoding = encoding
        self.birth = birth
        self.reached = False  # for a gradient: True once a loss has computed it
        self.stamp: object = None  # see `structure.py`
        self.unseen = encoding is not None  # True until the floats have been checked to stand for a value
        self.pack: Any = None  # the Pack that holds its value, if the cell is a view
        self.grad: Any = Cell(None, "gradient", birth=birth) if kind == "parameter" else None
        frame = local.frame
        if frame is not None:
            frame.own[id(self)] = self
        if _registry.cells is not None:
            _registry.cells[id(self)] = self

    @property
    def value(self) -> Any:
        """The value that code in this thread reads. Code in this thread assigns it to change it."""
        frame = _frame_of(self)
        if frame is None:
            return overridden(self) if overrides else self.stored
        return frame.values[self]

    @value.setter
    def value(self, new: Any) -> None:
        if not _substitute(self, new):
            on_failure(setattr, self, "stored", self.stored)
            self.stored = new

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        """Return a new cell with a copy of the array. The two cells share no buffer, so each may be donated."""
        value = using(self, _copied)
        new = Cell(value, self.kind, trainable=self.trainable, encoding=self.encoding, birth=birth_here())
        memo[id(self)] = new
        if self.grad is not None and new.grad is not None:
            new.grad.value = CONSUMED if starting_value(self.grad) is CONSUMED else using(self.grad, _copied_gradient)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_cell, (using(self, _to_numpy), self.kind, self.trainable, self.encoding), self._grad_state()

    def _grad_state(self) -> Any:
        grad = None if self.grad is None else using(self.grad, _to_numpy)
        return None if grad is None else (grad,)

    def __setstate__(self, state: tuple[Any]) -> None:
        if self.grad is not None:
            with full_width(state), constants():
                self.grad.value = state[0] if state[0] is CONSUMED else jnp.array(owned(state[0]))

    def __repr__(self) -> str:
        return f"Cell({self.kind}, {self.value!r})"


def is_concrete(value: Any) -> bool:
    """True for a JAX array with a value, False for a tracer."""
    return isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)


def bound_to(value: Any) -> Any:
    """Return the sharding that an array, or a `jax.ShapeDtypeStruct` in its place, is bound to, or None."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value.sharding
    return value.sharding if is_concrete(value) and value.committed else None


def _copied(value: Any) -> Any:
    return jnp.copy(value) if isinstance(value, jax.Array) and at_top_level() else value


def _copied_gradient(value: Any) -> Any:
    return _copied(unless_consumed(value))


def _to_numpy(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, jax.Array) else value


def _restored_cell(value: Any, kind: str, trainable: bool, encoding: Encoding | None) -> Cell:
    with full_width([value]), constants():
        value = jnp.array(owned(value)) if isinstance(value, np.ndarray) else value
    return Cell(value, kind, trainable=trainable, encoding=encoding)


def _unpickle_cell(value: Any, kind: str, trainable: bool, encoding: Encoding | None) -> Cell:
    """Return the cell of an older pickle, whose floats stand for 16 bits each."""
    if encoding is not None and isinstance(value, np.ndarray):
        value = np.asarray(from_halves(encoding, value))
    return _restored_cell(value, kind, trainable, encoding)


get_value = attrgetter("value")


get_stored = attrgetter("stored")  # faster, for code that never runs inside a Frame


_slot: Any = vars(Cell)["stored"]
store: Callable[[Cell, Any], None] = _slot.__set__  # the C slot setter
Cell.held = _slot
