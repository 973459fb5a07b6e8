"""The Variables of a wrapped nnx module keep their values in cells.

A wrapped Variable has a `Held` in the slot `_raw_value`, where a Variable keeps its value. The Held reads and writes the
cells. So there is one copy of each value: nnx's own functions read and change the cells too, and all promises about cells
hold for the Variable.

For that, `nnx.Variable._raw_value` must be a property that looks for a Held. It is one only while a Variable has a Held.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx import tracers

from minitorch_jax.module.parameter import encode_checked
from minitorch_jax.state import access
from minitorch_jax.state import frame as frames
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.concurrent_reads import lend
from minitorch_jax.state.structure import changed

from .._functional_call import decoded
from .._wrapper import new_cell, problems_of, without_numbers

_slot: Any = vars(nnx.Variable)["_raw_value"]
get_slot: Callable[[Any], Any] = _slot.__get__  # the content of a Variable's slot: a value, or a Held
_set_slot: Callable[[Any, Any], None] = _slot.__set__
_LEAF = jax.tree.structure(0)


def _read(variable: Any) -> Any:
    kept = get_slot(variable)
    return kept.read(variable) if type(kept) is Held else kept


def _write(variable: Any, value: Any) -> None:
    try:
        kept = get_slot(variable)
    except AttributeError:  # the Variable is being made
        kept = None
    if type(kept) is Held:
        kept.write(variable, value)
    else:
        _set_slot(variable, value)


# The property is on flax's class itself. A subclass for wrapped Variables would leave that class alone, but JAX compares
# pytree nodes by their exact type: the states of such Variables would not fit those of others in `jax.tree.map` or
# `lax.scan`.
_property = property(_read, _write)
_lock = threading.RLock()  # reentrant: a garbage collection within it may call `_leave`
_in_slots: set[weakref.ref[Held]] = set()  # the Helds that are in the slot of a Variable


def _enter(held: Held) -> None:
    """Count a Held that is about to be put in a slot, and have Variables look for Helds."""
    with _lock:
        _in_slots.add(weakref.ref(held, _leave))
        if vars(nnx.Variable)["_raw_value"] is not _property:
            type.__setattr__(nnx.Variable, "_raw_value", _property)


def _leave(reference: weakref.ref[Held]) -> None:
    """Count off a Held that is in no slot any more. After the last one, flax's class is as flax made it."""
    with _lock:
        _in_slots.discard(reference)
        if not _in_slots:
            type.__setattr__(nnx.Variable, "_raw_value", _slot)


class _Anywhere(tracers.TraceState):
    """The trace state of a wrapped Variable. Its cells check in which traces it may change, so flax need not."""

    __slots__ = ()

    def __init__(self, before: Any) -> None:
        self._jax_trace = before._jax_trace

    def is_valid(self) -> bool:
        return True

    def __reduce__(self) -> Any:
        return tracers.TraceState, ()


class Held:
    """The value of a wrapped Variable: one cell, or the cells of a pytree's leaves."""

    __slots__ = ("cells", "treedef", "label", "owners", "before", "__weakref__")

    def __init__(self, found: list[Cell], treedef: Any, label: str) -> None:
        self.cells, self.treedef, self.label = found, treedef, label
        self.owners: list[weakref.ref[Any]] = []  # the wrappers; with none left, the Variable is a plain one
        self.before: Any = None  # the Variable's own trace state

    def owner(self) -> Any:
        for reference in self.owners:
            if (found := reference()) is not None:
                return found
        return None

    def hold(self, variable: Any, owner: Any) -> None:
        """Keep a Variable's value in the cells from now on."""
        if get_slot(variable) is not self:
            _enter(self)
            self.before = variable._trace_state
            object.__setattr__(variable, "_trace_state", _Anywhere(self.before))
            _set_slot(variable, self)
        self.owners = [reference for reference in self.owners if reference() not in (None, owner)]
        self.owners.append(weakref.ref(owner))

    def let_go(self, variable: Any, value: Any) -> None:
        """Put `value` in the Variable's own slot. It is a plain Variable again."""
        _set_slot(variable, value)
        object.__setattr__(variable, "_trace_state", self.before)
        _leave(weakref.ref(self))
        for owner in [found for reference in self.owners if (found := reference()) is not None]:
            changed(owner)

    def read(self, variable: Any) -> Any:
        owner = self.owner()
        if owner is not None:
            return jax.tree.unflatten(self.treedef, [access.read(cell, owner) for cell in self.cells])
        deque(map(lend, self.cells), 0)
        value = jax.tree.unflatten(self.treedef, list(map(decoded, self.cells)))
        self.let_go(variable, value)
        return value

    def write(self, variable: Any, value: Any) -> None:
        owner = self.owner()
        if owner is None:
            self.read(variable)  # makes it a plain Variable, for which flax checks the value
            return variable.set_raw_value(value)
        try:
            new = self.checked(value)
        except (ValueError, TypeError):
            # nnx's `split_rngs` writes another shape for a while; a parameter would lose its optimizer's state
            if not frames.is_eager() or any(cell.kind == "parameter" for cell in self.cells):
                raise
            return self.let_go(variable, value)
        for cell, leaf in zip(self.cells, new, strict=True):
            access.write(cell, leaf, self.label, owner)

    def checked(self, value: Any) -> list[Any]:
        """`value` as its cells would hold it. Raises if it does not fit."""
        leaves, treedef = jax.tree.flatten(value)
        if treedef != self.treedef:
            raise ValueError(
                f"{self.label} holds {_structure(self.treedef)}, and got {_structure(treedef)}. Assign a new Variable"
                " instead."
            )
        return [encode_checked(cell, leaf, self.label) for cell, leaf in zip(self.cells, leaves, strict=True)]


def _structure(treedef: Any) -> str:
    return "one array" if treedef == _LEAF else str(treedef)


def adopt(variable: Any, path: str, owner: Any, known: Held | None, trained: bool) -> tuple[Held, list[str]]:
    """The Held for a Variable, and a list of problems. The Variable itself does not change.

    `known` is the Held that the Variable had with this owner, if any. `trained` applies to new parameters.
    """
    if variable.hijax or variable.ref:
        return Held([], _LEAF, path), [f"  {path} is a hijax Variable or a reference: pass plain Variables"]
    kept = get_slot(variable)
    if type(kept) is Held and kept.owner() is not None:
        return kept, []
    value = _read(variable)
    if known is not None:
        try:
            new = known.checked(value)
        except (ValueError, TypeError):
            pass
        else:
            for cell, leaf in zip(known.cells, new, strict=True):
                access.write(cell, leaf, known.label, owner)
            return known, []
    is_parameter = isinstance(variable, nnx.Param)
    leaves, treedef = jax.tree.flatten(without_numbers(value))
    found = [problems_of(path, leaf, is_parameter) for leaf in leaves]
    problems = [problem for problem in found if problem is not None]
    kind = "parameter" if is_parameter else "buffer"
    made = [] if problems else [new_cell(leaf, kind, is_parameter and trained) for leaf in leaves]
    return Held(made, treedef, f"{type(owner).__name__}.{path}"), problems
