"""Frames: while stateful code is traced, a frame holds the values that its cells have in this thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ..runtime.jax_private import at_top_level, trace_state
from .errors import TraceError


def is_eager() -> bool:
    """True if the calling code runs eagerly: no JAX transform, `mt.jit` or `backward` is tracing it."""
    return local.frame is None and at_top_level()


Undo = tuple[Callable[..., Any], tuple[Any, ...]]


class Frame:
    """One run of stateful code: the values of its lifted cells (tracers), and the other cells that it reached.

    With `gradients`, gradients are lifted like other cells. Without it (in a loss function), no gradient may be touched.
    """

    __slots__ = (
        *(
            "values",
            "own",
            "met",
            "undo",
            "parent",
            "state",
            "gradients",
            "observed",
            "consumed",
            "statics",
            "inner",
            "losses",
        ),
    )

    def __init__(self, values: dict[Any, Any], gradients: bool = False) -> None:
        self.values = values  # of lifted cells, and of other cells that were changed
        self.own: dict[int, Any] = {}  # cells and modules made during the run, by id
        self.met: dict[int, tuple[Any, Any]] = {}  # cells that were reached but not lifted, by id: (owner, cell)
        self.undo: list[Undo] = []  # the calls that undo changes of static attributes
        self.statics: list[tuple[Any, str, Any]] = []  # those changes: (module, attribute, value before)
        self.parent = local.frame
        self.state: Any = None
        self.gradients = gradients
        self.losses = 0  # how many losses were traced within this run
        self.inner: Any = None  # traces of losses from earlier runs of the same program; see `tracing.trace_once`
        self.observed: set[Any] = set()  # gradients that were read before they were written
        self.consumed: dict[Any, Any] = {}  # gradients that an optimizer's step has used

    def touch(self, cell: Any, owner: Any) -> None:
        """Note that the run has reached a cell. Raises TraceError for a gradient in a loss function."""
        if cell not in self.values and id(cell) not in self.own:
            if cell.kind == "gradient" and not self.gradients:
                raise TraceError(
                    "accumulated gradients were read or changed inside a loss function. Its code runs only while it is"
                    " traced. Call zero_grad(), accumulate() and grads() outside of the loss function."
                )
            self.met.setdefault(id(cell), (owner, cell))


class _Local(threading.local):
    frame: Frame | None = None
    undo: list[Undo] | None = None  # the calls that undo changes outside of frames, within a block of `undo.py`


local = _Local()


def on_failure(function: Callable[..., Any], *args: Any) -> None:
    """Record that `function(*args)` undoes a change, if the block around it (see `undo.py`) raises."""
    if local.undo is not None:
        local.undo.append((function, args))


def _frame_of(cell: Any) -> Frame | None:
    """Return the innermost frame of this thread that has a value for the cell, or None."""
    frame = local.frame
    while frame is not None and cell not in frame.values:
        frame = frame.parent
    return frame


def _substitute(cell: Any, new: Any) -> bool:
    """Set the cell's value in the frame that has one. Returns False if no frame of this thread has one."""
    frame = _frame_of(cell)
    if frame is not None:
        frame.values[cell] = new
    return frame is not None


def places_of(cells: Iterable[Any]) -> tuple[int, ...]:
    """Return the positions of some cells among those that the present run has lifted, -1 for others.

    A run that meets others is repeated with them lifted.
    """
    frame: Any = local.frame
    places = {cell: i for i, cell in enumerate(frame.values)}
    return tuple([places.get(cell, -1) for cell in cells])


def is_unlifted(cell: Any) -> bool:
    """True if stateful code is traced that has not lifted the cell: it reads the stored value, not a tracer."""
    frame = local.frame
    return frame is not None and id(cell) not in frame.own and _frame_of(cell) is None


def is_lifted(cell: Any) -> bool:
    """True if stateful code is traced that did not make the cell itself. Later calls repeat only its writes of the cell."""
    frame = local.frame
    return frame is not None and id(cell) not in frame.own


def substituted(
    cells: Sequence[Any], values: Sequence[Any], run: Callable[[Frame], Any], gradients: bool = False
) -> tuple[Any, list[Any], Frame]:
    """Call `run(frame)` while the cells have other `values`. Returns its result, the values at the end, and the frame."""
    frame = Frame(dict(zip(cells, values, strict=True)), gradients)
    leave = partial(setattr, local, "frame", frame.parent)
    failed = True
    try:
        frame.state = trace_state()
        local.frame = frame
        out = run(frame)
        new = [frame.values[cell] for cell in cells]
        if frame.parent is not None:
            frame.parent.own.update(frame.own)  # for the outer run, too, these were made during the run
            frame.parent.undo += frame.undo
            frame.parent.statics += frame.statics
        failed = False
    finally:  # `leave` is one C call, so no signal handler can run before it is done
        try:
            leave()
        finally:
            frame.values.clear()  # breaks a cycle of references that would keep the cells alive
            if failed or frame.met:  # `met`: the run will be repeated with those cells lifted
                deque(map(call_undo, reversed(frame.undo)), 0)
    return out, new, frame


def call_undo(undo: Undo) -> None:
    """Undo one change."""
    undo[0](*undo[1])
