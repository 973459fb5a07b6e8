"""Copies made inside a JAX transform, and the warning when their changes are dropped."""

from __future__ import annotations

import warnings
from typing import Any

from ..runtime.jax_private import at_top_level, trace_state
from .errors import TWO_SPELLINGS, DroppedUpdateWarning


class Birth:
    """Where cells made inside a JAX transform came from, and which of them were changed and not used since.

    All cells of one unflattened copy share one Birth, so it dies with the last of them: if any is still `dirty` then,
    an update was lost, and the user is told.
    """

    __slots__ = ("state", "label", "dirty")

    def __init__(self, state: Any, label: str | None) -> None:
        self.state = state
        self.label = label  # None: not a copy of anything, so dropping it loses nothing
        self.dirty: dict[int, str] = {}

    def __del__(self) -> None:
        if self.dirty and self.label is not None:
            names = list(dict.fromkeys(self.dirty.values()))
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            warnings.warn(
                f"{self.label} was changed inside a JAX transform ({shown}), but on a temporary copy that was then"
                f" dropped, so nothing outside has changed. {TWO_SPELLINGS}",
                DroppedUpdateWarning,
                stacklevel=2,
            )


def birth_here(label: str | None = None) -> Birth | None:
    """The Birth of cells that are made now: None outside of transforms."""
    return None if at_top_level() else Birth(trace_state(), label)


def birth_state() -> Any:
    """The trace in which something static is made now: None outside of transforms."""
    return None if at_top_level() else trace_state()
