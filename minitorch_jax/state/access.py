"""Reading and writing cells on behalf of users: where it is allowed, and what is recorded about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import jax

from ..runtime.jax_private import at_top_level, trace_state
from .cell import Cell, get_stored, is_concrete, store
from .concurrent_reads import gradient_writes, lend, taken
from .errors import TWO_SPELLINGS, TraceError, changed_by_closure
from .frame import Frame, _substitute, is_eager, local, on_failure
from .gradient import gradient, unless_consumed
from .structure import cell_changed

_DRAWN = (
    "a random number was drawn inside a JAX transform (by a random layer, or a constructor without `key=`) from a stream"
    " outside of it. That stream would advance only while JAX traces the code, so every run would draw the same numbers."
    " Pass a key to the transformed function, such as `mt.next_key()` or `jax.random.key(0)`, and draw from it: `with"
    " mt.rng(key): ...`, or `nn.Linear(3, 2, key=key)`; or compile the stateful code with `mt.jit`."
)


def read(cell: Cell, owner: Any = None) -> Any:
    """Return the value for a user. The array is lent from now on, so it is never donated without a copy."""
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
    """Raise ValueError if a cell's floats stand for no value of its dtype, as after arithmetic on all leaves of a module."""
    encoding: Any = cell.encoding
    problem = encoding.problem(value)
    if problem is not None:
        raise ValueError(
            f"{label} is {encoding.dtype}, which a module's pytree keeps as floats: {problem}."
            " A map over all leaves of a module may cast them to float16, bfloat16 or a wider type, and copy them. Compute"
            " only with parameters (`model.parameters()`), or use `model.astype(dtype)`."
        )
    cell.unseen = not is_concrete(value)


def check_writable(cell: Cell, label: str, owner: Any = None) -> None:
    """Raise TraceError unless a change of `cell` made here is kept.

    It is kept at top level, in a run of this package's compiled functions, and on a copy that this transform made.
    """
    frame = local.frame
    if at_top_level():
        if frame is not None:  # true only under `jax.disable_jit()`
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
    """Raise TraceError unless the structure of an object may change here.

    `birth` is the trace in which the object was made. `own` says that the run of this thread has made it.
    """
    if own or is_eager():
        return
    if local.frame is not None and (at_top_level() or local.frame.state == trace_state()):
        raise TraceError(
            f"{label} {what} inside compiled code: the structure of a module cannot change while compiled code runs. Make"
            " the change in `__init__`, or between calls."
        )
    if birth is None or birth != trace_state():
        raise changed_by_closure(label)


def _note_write(frame: Frame, cell: Cell, owner: Any) -> None:
    """Keep a write to a cell that the run has not lifted within the run, which will be repeated with the cell lifted."""
    if cell not in frame.values and id(cell) not in frame.own:
        frame.touch(cell, owner)
        frame.values[cell] = cell.value


def write(cell: Cell, value: Any, label: str, owner: Any = None) -> None:
    """Give `cell` a new value from a user. The caller has checked its shape and dtype."""
    check_writable(cell, label, owner)
    if isinstance(value, jax.core.Tracer) and at_top_level():
        raise TraceError(f"{label} was given a tracer of a JAX transform that has ended. {TWO_SPELLINGS}")
    eager = local.frame is None and at_top_level()
    before = _place_of(cell.value) if eager else None
    if local.frame is None:
        lend(cell)
        gradient_writes.last = object()
    cell.value = value
    if eager and cell.kind != "gradient" and before != _place_of(value):
        moved(cell)


def _place_of(value: Any) -> Any:
    return getattr(value, "sharding", None), isinstance(value, jax.ShapeDtypeStruct)


def moved(cell: Cell) -> None:
    """Record that a cell has an array that may lie on other devices, or in another sharding, and move its gradient there.

    A compiled function puts results where the arrays were when it was compiled.
    """
    cell_changed(cell)
    value: Any = cell.value
    grad: Any = None if cell.grad is None else cell.grad.value
    if is_concrete(grad) and is_concrete(value) and value.committed and grad.sharding != value.sharding:
        lend(cell.grad)
        store_all([cell.grad], [jax.device_put(grad, value.sharding)])


def mark_used(cells: Iterable[Cell]) -> None:
    """Record that these cells' values were passed on (by flattening), so that changes of them are not lost."""
    for cell in cells:
        lend(cell)
        if cell.birth is not None:
            cell.birth.dirty.pop(id(cell), None)


def store_all(cells: Sequence[Cell], values: Sequence[Any]) -> None:
    """Store `values` in one C call: all of them or, if a Ctrl-C comes first, none."""
    gradient_writes.last = object()
    if local.frame is not None:
        left = [(cell, value) for cell, value in zip(cells, values, strict=True) if not _substitute(cell, value)]
        cells, values = [cell for cell, _ in left], [value for _, value in left]
    if any([cell.pack is not None for cell in cells]):
        cells, values = _into_packs(cells, values)
    for cell in cells if local.undo is not None else ():
        on_failure(setattr, cell, "stored", cell.stored)
    # `before` keeps the old arrays until all are stored: freeing one could let another thread run between two stores
    before = list(map(get_stored, cells))
    deque(map(store, cells, values), 0)
    del before


def _lies_as(one: Any, other: Any) -> bool:
    """True if arrays of any shape in these two shardings are on the same devices, whole on each of them."""
    whole = one.is_fully_replicated and other.is_fully_replicated and len(one.device_set) > 1
    return one == other or bool(whole and one.device_set == other.device_set)


def store_eagerly(cells: Sequence[Cell], value: Any) -> None:
    """`store_all` of one value, in eager code, to cells of which none is a view."""
    gradient_writes.last = object()
    before = [cell.stored for cell in cells]
    deque(map(store, cells, repeat(value)), 0)
    del before


def _into_packs(cells: Sequence[Cell], values: Sequence[Any]) -> tuple[list[Cell], list[Any]]:
    """Replace views by their packed cells, and the views' values by new values of the packed cells."""
    plain: list[tuple[Cell, Any]] = []
    packed: dict[Any, list[tuple[Cell, Any]]] = {}
    for cell, value in zip(cells, values, strict=True):
        if cell.pack is not None:
            sharding = getattr(value, "sharding", None)
            if sharding is not None and not _lies_as(sharding, getattr(cell.pack.cell.stored, "sharding", sharding)):
                cell.pack.release_both(cell)  # the new array lies elsewhere
            else:
                packed.setdefault(cell.pack, []).append((cell, value))
                continue
        plain.append((cell, value))
    for pack in [pack for pack, new in packed.items() if pack.splits(new)]:
        pack.dissolve()
        plain += packed.pop(pack)
    plain += [(pack.cell, pack.with_parts(new)) for pack, new in packed.items()]
    return [cell for cell, _ in plain], [value for _, value in plain]
