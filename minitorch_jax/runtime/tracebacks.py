"""Tracebacks without the frames of this package, as JAX leaves out its own, and warnings that point to the user's line.

A public function that calls code of the user ends with `except Exception as error: trim(error); raise`. A bare `raise` adds
no line to the traceback. Nothing of this runs before an exception is on its way.
"""

from __future__ import annotations

import builtins
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

import jax

from .interrupts import unwrap
from .jax_private import at_top_level

P = ParamSpec("P")
R = TypeVar("R")

_config: Any = jax.config
PACKAGE = __name__.partition(".")[0]
_BETWEEN = {PACKAGE, "jax", "contextlib"}  # whose frames stand between a user's call and our code
_SETTING = "JAX_TRACEBACK_FILTERING"
explainers: list[Callable[[Exception], None]] = []  # called with each error that leaves code of the user
NOTE = f"(The frames of {PACKAGE} are left out. {_SETTING}=off shows them.)"


class UnfilteredStackTrace(Exception):  # noqa: N818  # the name that JAX uses
    """The cause of an error with JAX's setting `remove_frames`. It has the whole traceback."""


def is_ours(frame: FrameType) -> bool:
    """True for a frame of this package's code."""
    return bool(str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning that points to the nearest line outside of this package, of JAX and of `contextlib`: the user's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def trim(error: Exception) -> None:
    """Leave this package's frames out of the traceback of an error, as JAX's setting `jax_traceback_filtering` says.

    The `explainers` may add notes to the error. Raises KeyboardInterrupt instead if JAX made the error of one.
    """
    if isinstance(error, ValueError):
        unwrap(error)
    for explain in explainers:
        explain(error)
    mode = _mode()
    entries = list(_entries(error.__traceback__))
    kept = [entry for entry in entries if not is_ours(entry.tb_frame)]
    if mode == "off" or len(kept) == len(entries):
        return
    if mode == "tracebackhide":
        for entry in entries:
            if is_ours(entry.tb_frame):
                entry.tb_frame.f_locals["__tracebackhide__"] = True
        return
    if mode == "remove_frames":
        _keep_whole(error)
    shorter = None
    for entry in reversed(kept):
        shorter = TracebackType(shorter, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    error.__traceback__ = shorter
    if at_top_level() and not any(_SETTING in note for note in getattr(error, "__notes__", ())):
        error.add_note(NOTE)  # in a trace, JAX adds a note of its own


def trimmed(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a public function that is not called often, so that errors which leave it are trimmed."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            trim(error)
            raise

    return call


def _mode() -> str:
    mode = _config.jax_traceback_filtering
    if mode in (None, "auto"):
        return "tracebackhide" if hasattr(builtins, "get_ipython") else "quiet_remove_frames"
    return str(mode)


def _entries(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _keep_whole(error: Exception) -> None:
    """Make an exception with the whole traceback the cause, unless JAX has done so."""
    if type(error.__cause__).__name__ == UnfilteredStackTrace.__name__:
        return
    whole = UnfilteredStackTrace(f"{type(error).__name__}: {error}\n\nThe stack trace above has all frames.")
    whole.__traceback__ = error.__traceback__
    whole.__cause__, whole.__context__ = error.__cause__, error.__context__
    whole.__suppress_context__ = error.__suppress_context__
    error.__cause__ = whole
