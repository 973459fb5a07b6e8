"""Delaying a Ctrl-C while JAX has deleted its donated inputs and has not returned its results yet.

A call of a compiled function is one C call, which no signal handler can interrupt. But when JAX must trace and compile, it
may run Python code after it has deleted the donated inputs. A program of this package therefore calls `defer` when its own
tracing has ended (nothing is donated yet), and the pipeline calls `release` when the results are stored. A Ctrl-C between
the two is raised by `release`; XLA's compilation cannot be interrupted anyway. A Ctrl-C during the tracing is raised at once.
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
_depth = 0  # how many blocks of `deferred` are open


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append((number, frame))


def defer() -> None:
    """From now until `release`, remember a SIGINT instead of raising KeyboardInterrupt (in the main thread)."""
    global _previous
    if _previous is None and threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):  # a Python function: SIGINT is not ignored, and not handled by the system or by C code
            _previous = handler
            signal.signal(signal.SIGINT, _note)


def release() -> None:
    """Undo `defer`, and raise the Ctrl-C that came since, if any."""
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
    """`with deferred:` delays a Ctrl-C until the outermost block ends, so that several stores are all done or none."""

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
    """Raise KeyboardInterrupt where JAX turns it into a ValueError: when Ctrl-C comes while JAX compares two pytrees."""
    try:
        yield
    except ValueError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        raise
