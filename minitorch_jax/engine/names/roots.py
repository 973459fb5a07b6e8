"""What a function's own code names first: the roots from which everything else that it reads is found.

Functions made from the same code (a lambda in a loop, a local function) share their programs. What the last one named and
what the next one names are compared root by root, without keeping anything of the user's alive.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import compress, repeat
from operator import call, getitem, is_
from typing import Any, NamedTuple

from .bytecode import names_in
from .watch import GONE, Place, constant, contents, item, itself

CLOSURE, DEFAULT, KEYWORD, GLOBAL, IMPORT, ATTRIBUTE, ARGUMENT = range(7)


class Root(NamedTuple):
    """A closure variable, a default, a global, an import in the body, an attribute of the function; a static argument."""

    kind: int
    key: Any  # a name, or the number of a default
    value: Any
    place: Place | None


def roots_of(fn: types.FunctionType) -> Iterator[Root]:
    """The roots of a function, in an order that is the same in every process."""
    for name, variable in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            value = variable.cell_contents
        except ValueError:  # not yet bound
            continue
        yield Root(CLOSURE, name, value, Place(contents, variable, None, value))
    for i, value in enumerate(fn.__defaults__ or ()):
        yield Root(DEFAULT, i, value, item(fn.__defaults__, i))
    for name, value in (fn.__kwdefaults__ or {}).items():
        yield Root(KEYWORD, name, value, item(fn.__kwdefaults__, name))
    names = names_in(fn.__code__)
    for name in names.globals:
        if name in fn.__globals__:
            yield Root(GLOBAL, name, fn.__globals__[name], item(fn.__globals__, name))
    for module, level in names.imports:
        found = _imported(module, level, fn.__globals__.get("__package__"))
        if found is not None:
            yield Root(IMPORT, found.__name__, found, None)


def _imported(name: str, level: int, package: Any) -> Any:
    """The module that an import in a function's body finds, if it has been imported already."""
    if level:
        try:
            name = importlib.util.resolve_name("." * level + name, package)
        except (ImportError, TypeError, ValueError):
            return None
    return sys.modules.get(name)


def root_of(fn: Any) -> Any:
    """The user's function that a wrapper of ours stands for: what that reads is what counts."""
    while (inner := getattr(fn, "stands_for", None)) is not None:
        fn = inner
    return fn


def settings_of(fn: Any) -> tuple[Any, ...]:
    """What tells functions of the same code apart, as far as it is no array and no object: a part of a key."""
    if type(fn) is not types.FunctionType:
        return ()
    values = [*map(_content, fn.__closure__ or ()), *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    return tuple([id(value) if type(value) is types.FunctionType else constant(value) for value in values])


class Slices:
    """Which of the places that a search has found were found by way of which root."""

    def __init__(self) -> None:
        self.of: list[tuple[Root, list[Place], dict[str, Place]]] = []

    def add(self, root: Root, places: Iterable[Place], arrays: dict[str, Place]) -> None:
        """Note what was found by way of a root, itself included."""
        self.of.append((root, list(places), arrays))


class Held(list[Any]):
    """A list that can be referred to weakly."""

    __slots__ = ("__weakref__",)


class Outline:
    """The roots of a function as a call found them. It keeps none of the user's objects alive.

    `compared`: the roots, as (kind, key), that may not change; `names`: those of globals that count. An input of the program
    may. `held` takes what cannot be referred to weakly: it is to lie with the function.
    """

    __slots__ = (
        *("_code", "_globals", "_keywords", "_num_defaults", "_contents", "_looks", "_chosen", "places", "__weakref__"),
    )

    def __init__(
        self, fn: types.FunctionType, compared: set[tuple[int, Any]], names: Iterable[str], held: Held
    ) -> None:
        code, defaults, keywords = fn.__code__, fn.__defaults__ or (), fn.__kwdefaults__ or {}
        self._code = weakref.ref(code)
        self._globals = list(names)
        self._num_defaults, self._keywords = len(defaults), list(keywords)
        self._contents: Callable[[Any], Any] = contents
        order: list[tuple[int, Any]] = [(CLOSURE, name) for name in code.co_freevars]
        order += [(DEFAULT, i) for i in range(len(defaults))] + [(KEYWORD, name) for name in keywords]
        order += [(GLOBAL, name) for name in names]
        self.places = {key: i for i, key in enumerate(order)}  # of each root among the values
        try:
            values = self._values(fn)
        except ValueError:
            self._contents = _content
            values = self._values(fn)
        self._chosen = [key in compared for key in order]
        self._looks = [_reference(value, held) for value in compress(values, self._chosen)]

    def _values(self, fn: Any) -> list[Any]:
        values = list(map(self._contents, fn.__closure__ or ()))
        if fn.__defaults__:
            values += fn.__defaults__
        if fn.__kwdefaults__:
            values += fn.__kwdefaults__.values()
        if self._globals:
            values += map(fn.__globals__.__getitem__, self._globals)
        return values

    def values_if_same(self, fn: Any) -> list[Any] | None:
        """The values of the roots if all but the inputs are what they were; else None."""
        if fn.__code__ is not self._code():
            return None
        if self._num_defaults != len(fn.__defaults__ or ()) or self._keywords != list(fn.__kwdefaults__ or ()):
            return None
        try:
            values = self._values(fn)
            now = list(compress(values, self._chosen))
            same = all(map(is_, map(call, self._looks), now))
            if same and not any(map(is_, now, repeat(None))):  # a weak reference to what has gone returns None, too
                return values
            if self._are_equal(now):
                return values
        except GONE:
            pass
        return None

    def _are_equal(self, now: list[Any]) -> bool:
        """Compare by value what is not identical."""
        for value, look in zip(now, self._looks, strict=True):
            was = look()
            if was is None and type(look) is weakref.ref:  # it has gone
                return False
            if was is not value:
                before = constant(was)
                if before is None or constant(value) != before:
                    return False
        return True


_UNBOUND = object()


def _content(variable: Any) -> Any:
    try:
        return variable.cell_contents
    except ValueError:
        return _UNBOUND


def _reference(value: Any, held: Held) -> Callable[[], Any]:
    """What gives a value back as long as it is alive."""
    if constant(value) is not None:
        return partial(itself, value)
    try:
        return weakref.ref(value)
    except TypeError:
        if value is _UNBOUND:
            return partial(itself, value)
    held.append(value)
    return partial(getitem, weakref.proxy(held), len(held) - 1)
