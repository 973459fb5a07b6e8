"""Delaying a Ctrl-C while JAX has deleted its donated inputs and has not returned its results yet.

A call of a compiled function is one C call, which no signal handler can interrupt. But when JAX must trace and compile, it
may run Python code after it has deleted the donated inputs. A program of this package therefore calls `defer` when its own
tracing has ended (nothing is donated yet), and the pipeline calls `release` when the results are stored. A Ctrl-C between
the two is raised by `release`; XLA's compilation cannot be interrupted anyway. A Ctrl-C during the tracing is raised at once.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .jax_private import thread_settings

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


# JAX's C++ code compares pytrees and keys of its caches. What Python raises there becomes the ValueError's cause or its text.
_IN_THE_TEXT = re.compile(r"The error was:\nTraceback \(most recent call last\):\n(?: .*\n)*KeyboardInterrupt\b")


def unwrap(error: ValueError) -> None:
    """Raise KeyboardInterrupt if it is what JAX made this ValueError of: Ctrl-C came while JAX compared two objects."""
    if isinstance(error.__cause__, KeyboardInterrupt):
        raise error.__cause__ from None
    if _IN_THE_TEXT.search(str(error)):
        raise KeyboardInterrupt from error


@contextmanager
def tracing() -> Iterator[None]:
    """A block in which JAX traces. A Ctrl-C leaves it as KeyboardInterrupt, and JAX's settings of this thread as they were.

    (JAX sets and resets them in Python: which trace is the current one, say. Between the two lines, nothing resets them.)
    """
    restore = thread_settings()
    try:
        yield
    except BaseException as error:
        restore()
        if isinstance(error, ValueError):
            unwrap(error)
        raise
