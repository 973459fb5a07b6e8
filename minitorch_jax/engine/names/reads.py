"""What a bound program reads by name: whether it is as it was, and the arrays there that are the program's inputs."""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

from ...state.cell import is_concrete
from ..kept_with_owner import kept_for
from ..program import Partition
from .followed import Followed
from .libraries import is_library
from .modules import Found
from .roots import ARGUMENT, CLOSURE, GLOBAL, Held, Outline, Root, root_of, root_value
from .watch import BINARY, GONE, Place, Watch
from .watch import itself as nothing


class Part:
    """Places that are watched, and those of arrays that are a program's inputs. `held` is kept alive with them."""

    __slots__ = ("watch", "looks", "held", "__weakref__")

    def __init__(self, places: list[Place], arrays: dict[str, Place], inputs: set[str], held: Any = None) -> None:
        self.watch = Watch([*places, *(place for path, place in arrays.items() if path not in inputs)])
        self.looks = {path: _looking(place) for path, place in arrays.items() if path in inputs}
        self.held = held


class Reads:
    """What a bound program reads by name.

    It lies with the binding, and so with a module, which may outlive whatever else was read. So the function's roots are
    compared by an `Outline`, which keeps nothing alive, and what was found by way of a root lies with that: with a
    function or a Python module there, else with the function that was called. `_parts` refers to it weakly. A function of
    the same code that has the same roots reads the same.
    """

    __slots__ = ("partition", "_outline", "_parts", "_own", "_where", "_all_roots")

    def __init__(self, fn: Any, followed: Followed, found: Found, partition: Partition) -> None:
        fn = root_of(fn)
        self.partition = partition
        inputs = {path for group in partition.named for path in group}
        for path in inputs:
            followed.place_of(path)  # an item of a long container becomes one of the arrays
        sorted_out = _SortedOut(fn, followed, found)
        self._outline: Outline | None = None
        self._parts: list[weakref.ref[Part]] = []
        places, arrays, held = sorted_out.loose, sorted_out.loose_arrays, Held()
        at = sorted_out.roots_of_arrays
        if sorted_out.is_function:
            free = {key for path, key in at.items() if path in inputs}
            compared = {key: value for key, value in sorted_out.compared.items() if key not in free}
            self._outline = Outline(fn, compared, held)
        for value, behind, arrays_behind in sorted_out.behind:
            if not self._keep(value, Part(behind, arrays_behind, inputs)):
                places += behind
                arrays |= arrays_behind
        own, own_arrays = sorted_out.of_objects, sorted_out.arrays_of_objects
        if (places or arrays or held) and not self._keep(fn, Part(places, arrays, inputs, held)):
            own, own_arrays = [*places, *own], {**arrays, **own_arrays}
        self._own = Part(own, own_arrays, inputs, held)
        self._where: list[list[Any]] = [[at.get(path, path) for path in group] for group in partition.named]
        roots = [group[0] for group in self._where if len(group) == 1 and type(group[0]) is tuple]
        self._all_roots = roots if len(roots) == len(self._where) else []  # if each input is a root: these

    def _keep(self, owner: Any, part: Part) -> bool:
        """Have a part lie with its owner."""
        kept = kept_for(getattr(owner, "__self__", owner))
        if kept is not None:
            kept.setdefault(_PARTS, deque(maxlen=_MAX_PARTS)).append(part)
            self._parts.append(weakref.ref(part))
        return kept is not None

    @property
    def is_empty(self) -> bool:
        """True if nothing is to be compared."""
        return self._outline is None and not self._parts and not len(self._own.watch)

    def are_same(self, fn: Any) -> bool:
        """True if nothing that the function reads is another by now, but for inputs."""
        if self._outline is not None and not self._outline.is_same(fn):
            return False
        for reference in self._parts:
            part = reference()
            if part is None or part.watch.rebound():
                return False
        return not self._own.watch.rebound()

    def fetch(self, fn: Any) -> tuple[Any, ...] | None:
        """The inputs as they are now; None if any is no array of JAX's, or one that had two names has become two."""
        fn = root_of(fn)
        try:
            if self._all_roots:
                found = [root_value(fn, kind, key) for kind, key in self._all_roots]
            else:
                found = self._fetch_all(fn)
        except GONE:
            return None
        return tuple(found) if all(map(is_concrete, found)) else None

    def _fetch_all(self, fn: Any) -> list[Any]:
        looks, found = dict(self._own.looks), []
        for reference in self._parts:
            looks |= reference().looks  # type: ignore[union-attr]  # GONE has AttributeError
        for group in self._where:
            first, *others = [root_value(fn, *where) if type(where) is tuple else looks[where]() for where in group]
            found.append(first if all(array is first for array in others) else None)
        return found


class _SortedOut:
    """What two searches have found, by what it is to lie with."""

    def __init__(self, fn: Any, followed: Followed, found: Found) -> None:
        self.is_function = type(fn) is types.FunctionType and (
            not is_library(fn.__module__, fn.__code__) or bool(followed.slices.of)  # a library's wrapper
        )
        self.compared: dict[
            tuple[int, Any], Any
        ] = {}  # the values of roots that may not change, as `root_value` takes them
        self.numbers = {name: i for i, name in enumerate(fn.__code__.co_freevars)} if self.is_function else {}
        self.roots_of_arrays: dict[str, tuple[int, Any]] = {}  # by path
        self.behind: list[tuple[Any, list[Place], dict[str, Place]]] = []  # roots that can keep what lies behind them
        self.loose: list[Place] = []
        self.loose_arrays: dict[str, Place] = {}
        self.of_objects = [*followed.places[followed.num_by_name :], *found.places_of_hooks]
        self.arrays_of_objects = {path: followed.arrays[path] for path in followed.paths_of_objects}
        seen = set(map(id, self.of_objects))
        for root, places, arrays in (*followed.slices.of, *found.slices.of):
            seen.update(map(id, places))
            self._root(root, places, arrays)
        if self.is_function:
            itself = weakref.proxy(fn)
            seen.update(id(place) for place in followed.places if place.of is itself and place.look is not getitem)
        self.loose += [place for place in (*followed.places, *found.places) if id(place) not in seen]
        known = self.roots_of_arrays.keys() | self.arrays_of_objects.keys()
        known |= {path for _, _, arrays in self.behind for path in arrays}
        self.loose_arrays |= {path: place for path, place in followed.arrays.items() if path not in known}

    def _root(self, root: Root, places: list[Place], arrays: dict[str, Place]) -> None:
        key = root.kind, self.numbers.get(root.key) if root.kind == CLOSURE else root.key
        if self.is_function and CLOSURE <= root.kind <= GLOBAL:
            mine = [path for path, place in arrays.items() if place is root.place]
            if mine or any(place is root.place for place in places):
                self.compared.setdefault(key, root.value)
            places = [place for place in places if place is not root.place]
            self.roots_of_arrays |= dict.fromkeys(mine, key)
            arrays = {path: place for path, place in arrays.items() if path not in mine}
        if any(place.look is not nothing for place in places) or arrays:
            kinds = _KEEPERS | types.MethodType if root.kind == ARGUMENT else _KEEPERS
            if isinstance(root.value, kinds):
                self.behind.append((root.value, places, arrays))
            else:
                self.loose += places
                self.loose_arrays |= arrays


_KEEPERS: Any = types.FunctionType | types.ModuleType
_PARTS, _MAX_PARTS = "parts", 64


def _looking(place: Place) -> Callable[[], Any]:
    return partial(place.look, place.of, place.key) if place.look in BINARY else partial(place.look, place.of)
