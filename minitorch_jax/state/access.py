"""Reading and changing cells from outside: who may, where, and what is recorded about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from ..runtime.jax_private import at_top_level, trace_state
from .cell import Cell, get_stored, is_concrete, store
from .errors import TWO_SPELLINGS, TraceError, changed_by_closure
from .frame import Frame, _substitute, is_eager, local, on_failure
from .gradient import gradient, unless_consumed
from .lending import gradient_writes, lend, taken
from .structure import cell_changed

_DRAWN = (
    "a random number was drawn inside a JAX transform (by a random layer, or a constructor without `key=`) from a stream"
    " outside of it: that would advance only while tracing, so every run would draw the same numbers. Pass a key"
    " to the transformed function, such as `mt.next_key()` or `jax.random.key(0)`, and draw from that: `with"
    " mt.rng(key): ...`, or `nn.Linear(3, 2, key=key)`; or compile the stateful code with `mt.jit`."
)


def read(cell: Cell, owner: Any = None) -> Any:
    """The value for a caller outside: it is theirs from now on, so it is never donated without a copy."""
    frame = local.frame
    if frame is not None:
        frame.touch(cell, owner)
    if cell.kind == "gradient":
        if cell.birth is not None:
            cell.birth.dirty.pop(id(cell), None)
        return unless_consumed(taken(cell)) if frame is None else gradient(cell)
    value = taken(cell) if frame is None else cell.value
    if cell.encoding is None:
        return value
    if cell.unseen:
        names = getattr(owner, "_cells", {}).items()
        name = next((name for name, mine in names if mine is cell), "a buffer")
        check_encoded(cell, value, f"{type(owner).__name__}.{name}")
    return cell.encoding.decode(value)


def check_encoded(cell: Cell, value: Any, label: str) -> None:
    """Raise ValueError if the floats of a cell stand for no value, as after a map over leaves that computes with them."""
    encoding: Any = cell.encoding
    problem = encoding.problem(value)
    if problem is not None:
        raise ValueError(
            f"{label} is {encoding.dtype}, which a module's pytree keeps as floats: {problem}."
            " Maps over all leaves of a module may cast them to float16, bfloat16 or wider, and copy them; compute with"
            " parameters alone (`model.parameters()`), or use `model.astype(dtype)`."
        )
    cell.unseen = not is_concrete(value)


def check_writable(cell: Cell, label: str, owner: Any = None) -> None:
    """Raise unless a change of `cell` made here lasts: at top level, in a run of ours, or on a copy of this transform."""
    frame = local.frame
    if at_top_level():
        if frame is not None:  # only with `jax.disable_jit()`
            _note_write(frame, cell, owner)
        return
    state = trace_state()
    birth = cell.birth
    if birth is not None and birth.state == state:
        if id(cell) not in birth.dirty:
            on_failure(birth.dirty.pop, id(cell), None)
        birth.dirty[id(cell)] = label
        return
    if frame is not None and frame.state == state:
        _note_write(frame, cell, owner)
        return
    raise TraceError(_DRAWN) if cell.kind == "stream" else changed_by_closure(label)


def check_restructurable(birth: Any, label: str, what: str, own: bool = False) -> None:
    """Raise unless the structure of something made in trace `birth` (or, if `own`, in this very run) may change here."""
    if own or is_eager():
        return
    if local.frame is not None and (at_top_level() or local.frame.state == trace_state()):
        raise TraceError(
            f"{label} {what} inside compiled code: the structure of a module cannot change while it runs. Declare it in"
            " `__init__`, or change it between calls."
        )
    if birth is None or birth != trace_state():
        raise changed_by_closure(label)


def _note_write(frame: Frame, cell: Cell, owner: Any) -> None:
    if cell not in frame.values and id(cell) not in frame.own:
        frame.touch(cell, owner)
        frame.values[cell] = cell.value  # from here on; the run will be repeated with the cell lifted


def write(cell: Cell, value: Any, label: str, owner: Any = None) -> None:
    """Give `cell` a new value from outside. Shapes and dtypes have been checked by whoever knows the path."""
    check_writable(cell, label, owner)
    if isinstance(value, jax.core.Tracer) and at_top_level():
        raise TraceError(f"{label} was given a tracer of a JAX transform that has ended. {TWO_SPELLINGS}")
    eager = local.frame is None and at_top_level()
    before = getattr(cell.value, "sharding", None) if eager else None
    if local.frame is None:
        lend(cell)
        gradient_writes.last = object()
    cell.value = value
    if eager and cell.kind != "gradient" and before != getattr(value, "sharding", None):
        cell_changed(cell)  # compiled functions keep results where they were


def mark_used(cells: Iterable[Cell]) -> None:
    """These cells' values have been handed on (flattened), so a change of them is not lost."""
    for cell in cells:
        lend(cell)
        if cell.birth is not None:
            cell.birth.dirty.pop(id(cell), None)


def store_all(cells: Sequence[Cell], values: Sequence[Any]) -> None:
    """Store `values`, already computed, in one C call: all of them or, if the interrupt came first, none."""
    gradient_writes.last = object()
    if local.frame is not None:
        left = [(cell, value) for cell, value in zip(cells, values, strict=True) if not _substitute(cell, value)]
        cells, values = [cell for cell, _ in left], [value for _, value in left]
    if any([cell.pack is not None for cell in cells]):
        cells, values = _into_packs(cells, values)
    for cell in cells if local.undo is not None else ():
        on_failure(setattr, cell, "stored", cell.stored)
    before = list(map(get_stored, cells))  # freeing an array lets other threads in: not before all are stored
    deque(map(store, cells, values), 0)
    del before


def _into_packs(cells: Sequence[Cell], values: Sequence[Any]) -> tuple[list[Cell], list[Any]]:
    """For views, their packed cells with new values."""
    plain: list[tuple[Cell, Any]] = []
    packed: dict[Any, list[tuple[Cell, Any]]] = {}
    for cell, value in zip(cells, values, strict=True):
        if cell.pack is not None:
            sharding = getattr(value, "sharding", None)
            if sharding is not None and sharding != getattr(cell.pack.cell.stored, "sharding", sharding):
                cell.pack.release_both(cell)  # its array lies elsewhere from now on
            else:
                packed.setdefault(cell.pack, []).append((cell, value))
                continue
        plain.append((cell, value))
    for pack in [pack for pack, new in packed.items() if pack.splits(new)]:
        pack.dissolve()
        plain += packed.pop(pack)
    plain += [(pack.cell, pack.with_parts(new)) for pack, new in packed.items()]
    return [cell for cell, _ in plain], [value for _, value in plain]
