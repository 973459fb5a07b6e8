"""Traced values that a forward hook keeps: `acts.append(output)` in compiled code keeps a tracer, which has no value.

Around a trace, `refused` notes the values that hooks are given and of which a hook has made new references. If one is alive
when the trace is over, the hook has kept it, or something that it computed from it. A list, an attribute, a dict: it does
not matter where.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from sys import getrefcount
from typing import Any
from weakref import ref

import jax

from ..runtime.jax_private import at_top_level, tracer_inside
from ..state.errors import TraceError
from ..state.static_values import describe
from ..state.uninitialized import is_unsized
from .call_errors import path_of_call


class _Local(threading.local):
    noted: list[tuple[str, str, Any]] | None = None  # (hook, module, weak reference) during a trace


_local = _Local()


@contextmanager
def refused(within: bool = False) -> Iterator[None]:
    """Raise TraceError at the end of this block, in which code is traced, if a hook has kept a traced value.

    Only the outermost block does so, and only at the top level, or `within` a program of ours: elsewhere, hooks are given
    tracers of a trace that goes on.

    Raises:
        TraceError: as said above.
    """
    noted = _local.noted
    if noted is not None:
        start = len(noted)
        try:
            yield
        except BaseException:
            del noted[start:]  # this trace is given up, perhaps repeated, and JAX may keep what is in it
            raise
        return
    if not (within or at_top_level()):
        yield
        return
    noted = []
    _local.noted = noted
    try:
        yield
    finally:
        _local.noted = None
    if any(_alive(noted)):
        gc.collect()  # what is part of a cycle is not kept
        for hook, module, value in _alive(noted):
            raise TraceError(
                f"the {hook} (at {module}) kept a traced value, {describe(value)}, or what it computed from it. Compiled"
                " code runs a hook once, while it is traced, when there are no values to keep. Return it: as a part of the"
                " result, or beside the loss, with `has_aux=True`. Or run eagerly, without mt.jit, mt.scan, mt.backward and"
                " the like: `model(x)` calls hooks with values."
            )


def _alive(noted: list[tuple[str, str, Any]]) -> Iterator[tuple[str, str, Any]]:
    return ((hook, module, value) for hook, module, get in noted if (value := get()) is not None)


def references(module: Any, given: tuple[Any, ...]) -> _References | None:
    """Count the references to what a hook is about to be given, and to its module's own arrays. None if nobody asks."""
    if _local.noted is None:
        return None
    cells = () if is_unsized(module) else module._cells.values()  # a lazy layer has none yet
    return _References((*given, *[cell.value for cell in cells]))


class _References:
    """How many references there are to the traced values among some objects, and to the containers that hold them."""

    def __init__(self, given: tuple[Any, ...]) -> None:
        self.parts: list[Any] = []  # each once
        self.tracers: list[list[Any]] = []  # of each part: itself, or those inside it
        self.places: dict[int, int] = {}
        for value in given:
            self._add(value)

    def _add(self, value: Any) -> list[Any]:
        if id(value) in self.places:
            return self.tracers[self.places[id(value)]]
        found: list[Any] = []
        if isinstance(value, jax.core.Tracer):
            found.append(value)
            inner = tracer_inside(value)
            found += self._add(inner) if inner is not None else []
        elif isinstance(value, tuple | list | dict):
            for item in value.values() if isinstance(value, dict) else value:
                found += self._add(item)
        if found:
            self.places[id(value)] = len(self.parts)
            self.parts.append(value)
            self.tracers.append(found)
        return found

    def counts(self) -> list[int]:
        """How many references there are to each part."""
        return list(map(getrefcount, self.parts))

    def note(self, before: Any, after: list[int], result: Any, hook: str, module: Any) -> None:
        """Note the values to which a hook has made more references than its result, of which one is held, accounts for."""
        returned = Counter[int]()
        self._count(result, returned)
        more = [
            value
            for part, values, was, now in zip(self.parts, self.tracers, before, after, strict=True)
            if now - returned[id(part)] > was
            for value in values
        ]
        if more and _local.noted is not None:
            path = path_of_call(module)
            _local.noted += [(hook, path, ref(value)) for value in more]

    def _count(self, value: Any, returned: Counter[int]) -> None:
        returned[id(value)] += 1
        if id(value) not in self.places and isinstance(value, tuple | list | dict):
            for item in value.values() if isinstance(value, dict) else value:
                self._count(item, returned)
