"""Births: where copies inside a JAX transform were made, and the warning if their changes are dropped."""

from __future__ import annotations

from typing import Any

from ..runtime.jax_private import at_top_level, trace_state
from ..runtime.tracebacks import warn
from .errors import TWO_SPELLINGS, DroppedUpdateWarning


class Birth:
    """The origin of cells made inside a JAX transform, and which of them were changed and not used since.

    All cells of one unflattened copy share one Birth, which is freed with the last of them. If a cell is still in `dirty`
    then, an update was lost, and a warning says so.
    """

    __slots__ = ("state", "label", "dirty")

    def __init__(self, state: Any, label: str | None) -> None:
        self.state = state
        self.label = label  # None: the cells are not a copy, so dropping them loses nothing
        self.dirty: dict[int, str] = {}

    def __del__(self) -> None:
        if self.dirty and self.label is not None:
            names = list(dict.fromkeys(self.dirty.values()))
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            warn(
                f"{self.label} was changed inside a JAX transform ({shown}), but it is a temporary copy, and it was dropped."
                f" Nothing outside has changed. {TWO_SPELLINGS}",
                DroppedUpdateWarning,
            )


def birth_here(label: str | None = None) -> Birth | None:
    """Return a Birth for cells that are made now, or None outside of transforms."""
    return None if at_top_level() else Birth(trace_state(), label)


def birth_state() -> Any:
    """Return the trace that runs now, in which a new object is made, or None outside of transforms."""
    return None if at_top_level() else trace_state()
