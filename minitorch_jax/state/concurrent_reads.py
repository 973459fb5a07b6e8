"""Which arrays someone else may hold, and which calls donate arrays: for threads that read what another thread trains.

An array that a cell returns to a reader is *lent*: the next call that would donate its buffer donates a copy. A call first
marks itself as in flight and then looks at what is lent. A reader first marks what it reads as lent and then looks at what
is in flight. So at least one of the two sees the other. A reader that sees a call on its cells does not use their arrays,
but copies. If an array is deleted already, the call is about to store its results and runs no Python code before that. A
reader waits only for this. It therefore never waits for code of the user (a callback, a finalizer, a signal handler), and a
reader in the thread of the call itself does not wait at all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import jax

from ..runtime.copies import fresh_copies
from .numpy_parts import values_of

get_ident = threading.get_ident
_get_held, get_lent = attrgetter("held"), attrgetter("lent")


class _Token:
    """`last` is replaced at each event. If it is unchanged, no event has happened since."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = object()


lendings = _Token()  # replaced each time an array is lent
gradient_writes = _Token()  # replaced each time a gradient gets a value outside of `mt.jit`
flights: dict[int, Any] = {}  # by thread: the pipeline whose call may be donating the arrays of its `owned` cells
overrides: dict[
    int, dict[Any, Any]
] = {}  # by thread: the values that it sees in place of the stored ones; see `steadily`
_steady: set[int] = set()  # the threads that are in `steadily`


def lend(cell: Any) -> None:
    """Record that someone outside may hold this cell's buffer from now on."""
    cell.lent = True
    lendings.last = object()


def taken(cell: Any) -> Any:
    """Return a cell's value to a user. The array is never changed, and never donated without a copy."""
    token = object()
    cell.lent = True
    lendings.last = token  # from the line above to the end there is no call, so Python switches to no other thread
    if flights or overrides:
        return _taken_in_flight(cell)
    return cell.stored


def _taken_in_flight(cell: Any) -> Any:
    stored = [_stored(cell)]
    if _sees_copy(cell):
        return cell.value
    while not in_flight(stored):
        lend(cell)
        value = cell.stored
        if not in_flight(stored) and cell.lent and (not _is_gone(value) or value is cell.stored):
            return value
    return private(stored)[0] if stored[0] is cell else cell.stored  # a view's value is already a copy


def using(cell: Any, function: Callable[[Any], Any]) -> Any:
    """Return `function(value)` for a cell's value, without lending the array: `function` must not keep it."""
    if cell.pack is not None:  # a view's value is already a copy
        return function(cell.value)
    if not (flights and in_flight([cell])) or _sees_copy(cell):
        value = cell.value
        try:
            return function(value)
        except Exception:
            if not _is_gone(value):
                raise
    return function(private([cell])[0])


def _sees_copy(cell: Any) -> bool:
    return bool(overrides) and _stored(cell) in overrides.get(get_ident(), ())


def overridden(cell: Any) -> Any:
    """Return the value of a cell that this thread sees: a copy if it is in `steadily`, else the stored value."""
    mine = overrides.get(get_ident(), {})
    return mine[cell] if cell in mine else cell.stored


def in_flight(stored: Sequence[Any]) -> bool:
    """True if a call in any thread may be donating or replacing the array of one of these cells."""
    if not flights:
        return False
    chosen = set(stored)
    calls = list(flights.values())
    return any(not chosen.isdisjoint(call.owned) or not chosen.isdisjoint(call.stored) for call in calls)


def private(stored: Sequence[Any]) -> list[Any]:
    """Return copies of the cells' values, as they are between two calls. Nobody else holds the copies."""
    pause = 1e-5
    while True:
        _lend_all(stored)  # the next call donates copies, so this loop ends however many calls follow
        values = values_of(list(map(_get_held, stored)))  # a view has none of its own, and is not among them
        arrays = [value for value in values if _is_array(value)]
        try:
            copies = iter(fresh_copies(arrays))
            return [next(copies) if _is_array(value) else value for value in values]
        except Exception as error:
            gone = [cell for cell, value in zip(stored, values, strict=True) if _is_gone(value)]
            if not gone or _are_lost(gone):
                raise
            if _is_mine(gone):
                raise RuntimeError(
                    "a parameter or state was read by a finalizer or a signal handler in the middle of the very call that"
                    " updates it. Read it before or after the call."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)


def _are_lost(cells: Sequence[Any]) -> bool:
    """True if the cells' arrays were deleted, and not by a call: calls replace what they donate.

    The order counts. A call that deleted these arrays is in flight when `in_flight` looks, or has replaced them by then.
    """
    values = [cell.stored for cell in cells]
    return (
        all(map(_is_gone, values))
        and not in_flight(cells)
        and all(cell.stored is value for cell, value in zip(cells, values, strict=True))
    )


def steadily(cells: Sequence[Any], gather: Callable[[], Any]) -> Any:
    """Return `gather()`, which reads these cells one after another, with values that are all of one moment.

    `gather` may be called twice; the caller must undo its other effects. The arrays that it returns are lent.
    """
    ident = get_ident()
    if ident in _steady:
        return gather()
    stored = list(dict.fromkeys(map(_stored, cells)))
    _lend_all(cells)
    _lend_all(stored)
    before = gradient_writes.last

    def is_undisturbed() -> bool:  # a call that began after `_lend_all` has set `lent` to False at its end
        return not in_flight(stored) and all(map(get_lent, stored)) and gradient_writes.last is before

    _steady.add(ident)
    try:
        if not in_flight(stored):
            try:
                result = gather()
            except Exception:
                if is_undisturbed():
                    raise
            else:
                if is_undisturbed():
                    return result
        overrides[ident] = dict(zip(stored, private(stored), strict=True))
        return gather()
    finally:
        overrides.pop(ident, None)
        _steady.discard(ident)


def is_steady() -> bool:
    """True if this thread is in `steadily`."""
    return get_ident() in _steady


def _lend_all(cells: Sequence[Any]) -> None:
    for cell in cells:
        cell.lent = True
    lendings.last = object()


def _stored(cell: Any) -> Any:
    return cell if cell.pack is None else cell.pack.cell


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)


def _is_gone(value: Any) -> bool:
    return _is_array(value) and value.is_deleted()


def _is_mine(gone: Sequence[Any]) -> bool:
    """True if the call that has deleted the arrays of some of these cells runs in this thread."""
    mine = flights.get(get_ident())
    return mine is not None and not set(gone).isdisjoint(mine.owned)
