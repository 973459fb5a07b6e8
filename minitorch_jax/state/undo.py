"""All or nothing within a trace: what a nested call changed is taken back if it raises.

At top level a compiled call stores its results when everything else is done. A call within a trace (`mt.jit` within `mt.jit`,
`backward` in a scan, `opt.step()` on a copy in `jax.jit`) changes things one after another, and code around it may catch
what it raises and go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..runtime import interrupts
from .frame import Frame, call_undo, is_eager, local


class _Run:
    """What one run around the block had at its start. What it has looked at and met stays so: it is asked for again."""

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
    """`with` it, everything that the block changes is as it was if it raises, where that is no compiled call by itself."""

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
    """Have `function` change everything that it changes, or, if it raises, nothing, also within a trace."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _AllOrNothing():
            return function(*args, **kwargs)

    return call
