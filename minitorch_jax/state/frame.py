"""The run of stateful code that is being traced: which values stand in place of those that cells hold."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ..runtime.jax_private import at_top_level, trace_state
from .errors import TraceError


def is_eager() -> bool:
    """Whether the code that calls runs eagerly: in no JAX transform, and in nothing that `mt.jit` or `backward` traces."""
    return at_top_level() and local.frame is None


Undo = tuple[Callable[..., Any], tuple[Any, ...]]


class Frame:
    """One run of stateful code with tracers in place of values: those of the lifted cells, and which cells were met besides.

    In the run of a loss function no gradient may be touched; with `gradients`, they are lifted too.
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
        self.values = values  # of lifted cells, and of others that were changed
        self.own: dict[int, Any] = {}  # cells and modules made during the run, by id
        self.met: dict[int, tuple[Any, Any]] = {}  # reached, but not lifted: (owner, cell)
        self.undo: list[Undo] = []  # what takes back changes to static parts
        self.statics: list[tuple[Any, str, Any]] = []  # which those were: (module, attribute, value before)
        self.parent = local.frame
        self.state: Any = None
        self.gradients = gradients
        self.losses = 0  # how many were traced within this run
        self.inner: Any = None  # what was traced in an earlier run of the same program; see `tracing.trace_once`
        self.observed: set[Any] = set()  # gradients looked at before they were written
        self.consumed: dict[Any, Any] = {}  # gradients that an optimizer's step has used

    def touch(self, cell: Any, owner: Any) -> None:
        if cell not in self.values and id(cell) not in self.own:
            if cell.kind == "gradient" and not self.gradients:
                raise TraceError(
                    "accumulated gradients were read or changed inside a loss function, which runs only while it is"
                    " traced. Call zero_grad(), accumulate() and grads() outside of it."
                )
            self.met.setdefault(id(cell), (owner, cell))


class _Local(threading.local):
    frame: Frame | None = None
    undo: list[Undo] | None = None  # what takes back changes outside of frames, in a block that is all or nothing


local = _Local()


def on_failure(function: Callable[..., Any], *args: Any) -> None:
    """Have a change taken back by `function(*args)` if the block around it (see `undo.py`) raises."""
    if local.undo is not None:
        local.undo.append((function, args))


def _frame_of(cell: Any) -> Frame | None:
    """The innermost run of this thread that has a value in place of the cell's own."""
    frame = local.frame
    while frame is not None and cell not in frame.values:
        frame = frame.parent
    return frame


def _substitute(cell: Any, new: Any) -> bool:
    """Change the value that stands in place of the cell's own in this thread, if one does."""
    frame = _frame_of(cell)
    if frame is not None:
        frame.values[cell] = new
    return frame is not None


def places_of(cells: Iterable[Any]) -> tuple[int, ...]:
    """Where some cells are among those that the present run has lifted."""
    frame: Any = local.frame
    places = {cell: i for i, cell in enumerate(frame.values)}
    return tuple([places[cell] for cell in cells])


def is_unlifted(cell: Any) -> bool:
    """Whether code of ours is being traced that has not been told of the cell: it sees what the cell itself holds."""
    frame = local.frame
    return frame is not None and id(cell) not in frame.own and _frame_of(cell) is None


def is_lifted(cell: Any) -> bool:
    """Whether code of ours is being traced in which the cell is not new: what is done besides writing it is not repeated."""
    frame = local.frame
    return frame is not None and id(cell) not in frame.own


def substituted(
    cells: Sequence[Any], values: Sequence[Any], run: Callable[[Frame], Any], gradients: bool = False
) -> tuple[Any, list[Any], Frame]:
    """Run `run(frame)` while `values` stand in place of the cells'; give its result, the values at the end, and the frame."""
    frame = Frame(dict(zip(cells, values, strict=True)), gradients)
    leave = partial(setattr, local, "frame", frame.parent)
    failed = True
    try:
        frame.state = trace_state()
        local.frame = frame
        out = run(frame)
        new = [frame.values[cell] for cell in cells]
        if frame.parent is not None:
            frame.parent.own.update(frame.own)  # what was made in this run is no stranger to the one around it
            frame.parent.undo += frame.undo
            frame.parent.statics += frame.statics
        failed = False
    finally:  # each step of it is a single C call, which no signal handler can come before
        try:
            leave()
        finally:
            frame.values.clear()  # or a cycle of references would keep the cells alive
            if failed or frame.met:  # `met`: the run will be repeated with those cells lifted
                deque(map(call_undo, reversed(frame.undo)), 0)
    return out, new, frame


def call_undo(undo: Undo) -> None:
    """Take one change back."""
    undo[0](*undo[1])
