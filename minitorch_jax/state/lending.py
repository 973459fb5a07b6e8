"""Who else may hold a cell's array, and which calls use arrays up: for the threads that read what another one trains.

Whoever is given a cell's array is *lent* its buffer: the next call that would donate it donates a copy. A call marks itself
as in flight before it looks at what is lent; a reader marks what it reads before it looks at what is in flight. So one of
the two sees the other. A reader that sees a call on its cells keeps nothing of theirs, but makes copies. If an array is gone
already, the call's results are about to be stored, with no Python before that: for this alone a reader waits. So it never
waits for code of the user's (a callback, a finalizer, a signal handler), and a reader in the very thread of the call does
not wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import jax

get_ident = threading.get_ident
_get_stored, get_lent = attrgetter("stored"), attrgetter("lent")


class _Lendings:
    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = object()


lendings = _Lendings()  # its `last` is another object after each lending: while it is the same, nothing was lent


gradient_writes = _Lendings()  # its `last` is another object after a gradient was given a value outside of `mt.jit`


flights: dict[int, Any] = {}  # by thread: the pipeline whose call may be using up what its `owned` cells hold
overrides: dict[int, dict[Any, Any]] = {}  # by thread: what it sees in place of what cells hold; see `steadily`
_steady: set[int] = set()  # the threads that are in `steadily`


def lend(cell: Any) -> None:
    """Record that someone outside may hold this cell's buffer from now on."""
    cell.lent = True
    lendings.last = object()


def taken(cell: Any) -> Any:
    """What a cell holds, for a reader outside: it stays as it is, and is never donated without a copy."""
    token = object()
    cell.lent = True
    lendings.last = token  # Python lets no other thread in from the line above to the end, as there is no call
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
    return private(stored)[0] if stored[0] is cell else cell.stored  # a view's value is an array of its own


def using(cell: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of what a cell holds, by a reader who has done with it when that returns."""
    if cell.pack is not None:  # a view's value is an array of its own
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
    """What this thread sees in a cell while some thread sees copies."""
    mine = overrides.get(get_ident(), {})
    return mine[cell] if cell in mine else cell.stored


def in_flight(stored: Sequence[Any]) -> bool:
    """Whether a call, in any thread, may be using up or changing what some of these cells hold."""
    if not flights:
        return False
    chosen = set(stored)
    calls = list(flights.values())
    return any(not chosen.isdisjoint(call.owned) or not chosen.isdisjoint(call.stored) for call in calls)


def private(stored: Sequence[Any]) -> list[Any]:
    """Copies of what cells hold between two calls, which nobody else has."""
    pause = 1e-5
    while True:
        _lend_all(stored)  # the next call leaves what it finds alive, so this comes to an end however many there are
        values = list(map(_get_stored, stored))
        arrays = [value for value in values if _is_array(value)]
        try:
            copies = iter(jax.device_put(arrays, may_alias=False))
            return [next(copies) if _is_array(value) else value for value in values]
        except Exception as error:
            gone = [cell for cell, value in zip(stored, values, strict=True) if _is_gone(value)]
            if not gone or not (in_flight(gone) or any(not _is_gone(cell.stored) for cell in gone)):
                raise
            if _is_mine(gone):
                raise RuntimeError(
                    "a parameter or state was read by a finalizer or a signal handler in the middle of the very call that"
                    " updates it. Read it before or after the call"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)


def steadily(cells: Sequence[Any], gather: Callable[[], Any]) -> Any:
    """`gather()`, which reads these cells one after another, as if nothing happened in between.

    It may be called twice: what it has done besides is the caller's matter. Arrays that it gives away are lent.
    """
    ident = get_ident()
    if ident in _steady:
        return gather()
    stored = list(dict.fromkeys(map(_stored, cells)))
    _lend_all(cells)
    _lend_all(stored)
    before = gradient_writes.last

    def is_undisturbed() -> bool:  # a call that began after the lending has taken that back at its end
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
    """Whether this thread is in `steadily`."""
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
    """Whether the call that uses up what some cells hold is one of this thread."""
    mine = flights.get(get_ident())
    return mine is not None and not set(gone).isdisjoint(mine.owned)
