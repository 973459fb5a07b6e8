"""Putting a Ctrl-C off for the moments in which JAX runs Python between using up its inputs and giving its results.

A call of a compiled function is one C call, which no signal handler interrupts. Only when JAX has to trace and compile
does it run Python code after the donated inputs are gone. A program of ours calls `defer` as soon as its own tracing has
ended, when nothing has been used up yet, and the pipeline calls `release` when the results are stored: a Ctrl-C in between
(XLA's compilation cannot be interrupted anyway) is raised then. What comes before, in the tracing itself, is raised at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_previous: Any = None  # the handler that `defer` replaced; only the main thread reads or writes these
_noted: list[tuple[int, FrameType | None]] = []
_depth = 0  # of blocks of `deferred`


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append((number, frame))


def defer() -> None:
    """From now until `release`, remember a SIGINT instead of raising KeyboardInterrupt (in the main thread)."""
    global _previous
    if _previous is None and threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):  # neither ignored, nor the system's own, nor set from C
            _previous = handler
            signal.signal(signal.SIGINT, _note)


def release() -> None:
    """Undo `defer`, and raise what came in between."""
    global _previous
    if _previous is None:
        return
    if not _depth and threading.current_thread() is threading.main_thread():
        handler, _previous = _previous, None
        signal.signal(signal.SIGINT, handler)
        if _noted:
            number, frame = _noted[-1]
            _noted.clear()
            handler(number, frame)


class _Deferred:
    """`with deferred:` puts a Ctrl-C off to the end of the outermost block, for what is stored in more than one call."""

    def __enter__(self) -> None:
        global _depth
        defer()
        if threading.current_thread() is threading.main_thread():
            _depth += 1

    def __exit__(self, *_: object) -> None:
        global _depth
        if threading.current_thread() is threading.main_thread():
            _depth -= 1
            release()


deferred = _Deferred()


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a Ctrl-C as a KeyboardInterrupt where JAX makes a ValueError of it: that came while it compared two pytrees."""
    try:
        yield
    except ValueError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        raise
