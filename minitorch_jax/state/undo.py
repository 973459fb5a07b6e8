"""All or nothing within a trace: if a nested call raises, its changes are undone.

At top level a compiled call stores its results as its last act. A call within a trace (`mt.jit` within `mt.jit`, `backward`
in a scan, `opt.step()` on a copy in `jax.jit`) makes its changes one after another, and the code around it may catch an
exception and go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..runtime import interrupts
from .frame import Frame, call_undo, is_eager, local


class _Run:
    """A frame's values at the start of a block. `observed` and `met` are not restored: a repeated run fills them again."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.values, self.consumed = dict(frame.values), dict(frame.consumed)
        self.num_undo, self.num_statics = len(frame.undo), len(frame.statics)

    def put_back(self) -> None:
        frame = self.frame
        deque(map(call_undo, reversed(frame.undo[self.num_undo :])), 0)
        del frame.undo[self.num_undo :], frame.statics[self.num_statics :]
        for now, before in ((frame.values, self.values), (frame.consumed, self.consumed)):
            now.clear()
            now.update(before)


class _AllOrNothing:
    """A `with` block within a trace: if it raises, all its changes are undone. In eager code it does nothing."""

    __slots__ = ("runs", "start", "outermost")

    def __enter__(self) -> None:
        self.runs: list[_Run] | None = None
        if is_eager():
            return
        self.outermost = local.undo is None
        if local.undo is None:
            local.undo = []
        self.start = len(local.undo)
        runs, frame = [], local.frame
        while frame is not None:
            runs.append(_Run(frame))
            frame = frame.parent
        self.runs = runs

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.runs is None:
            return
        undo: Any = local.undo
        if self.outermost:
            local.undo = None
        if kind is not None:
            with interrupts.deferred:
                deque(map(call_undo, reversed(undo[self.start :])), 0)
                del undo[self.start :]
                for run in self.runs:
                    run.put_back()


def all_or_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that, within a trace, it undoes its changes if it raises."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _AllOrNothing():
            return function(*args, **kwargs)

    return call
