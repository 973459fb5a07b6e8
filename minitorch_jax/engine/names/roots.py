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
from operator import getitem
from typing import Any, NamedTuple

from .bytecode import names_in
from .watch import GONE, Place, constant, contents, is_equal, item

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


def root_value(fn: Any, kind: int, key: Any) -> Any:
    """The present value of a root, of which `key` is a name, or the number of a closure variable or a default."""
    if kind == CLOSURE:
        return fn.__closure__[key].cell_contents
    if kind == DEFAULT:
        return fn.__defaults__[key]
    return (fn.__kwdefaults__ if kind == KEYWORD else fn.__globals__)[key]


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


_Known = tuple[Any, Callable[[], Any], Any]


class Outline:
    """The roots of a function that may not change, as a search found them. It keeps none of the user's objects alive.

    `compared`: the values of those roots by kind and key, as `root_value` takes them. `held` takes what cannot be referred
    to weakly: it is to lie with the function.
    """

    __slots__ = ("_code", "_closure", "_globals", "_defaults", "_num_defaults", "_keywords")

    def __init__(self, fn: types.FunctionType, compared: dict[tuple[int, Any], Any], held: Held) -> None:
        self._code = weakref.ref(fn.__code__)
        self._num_defaults, self._keywords = len(fn.__defaults__ or ()), list(fn.__kwdefaults__ or ())
        # of each root: its key, a look that returns its value as long as that is alive, and a plain value itself
        self._closure: list[_Known] = []
        self._globals: list[_Known] = []
        self._defaults: list[tuple[int, _Known]] = []
        for (kind, key), value in compared.items():
            known = key, *_kept(value, held)
            if kind == CLOSURE:
                self._closure.append(known)
            elif kind == GLOBAL:
                self._globals.append(known)
            else:
                self._defaults.append((kind, known))

    def is_same(self, fn: Any) -> bool:
        """True if a function has this code, and its roots are what they were."""
        code = self._code()
        if type(fn) is not types.FunctionType or fn.__code__ is not code:
            fn = root_of(fn)
            if type(fn) is not types.FunctionType or fn.__code__ is not code:
                return False
        try:
            closure: Any = fn.__closure__
            for i, look, was in self._closure:
                value = closure[i].cell_contents
                if value is not was and (value is None or look() is not value) and not is_equal(value, was):
                    return False
            for name, look, was in self._globals:
                value = fn.__globals__[name]
                if value is not was and (value is None or look() is not value) and not is_equal(value, was):
                    return False
            if fn.__defaults__ or fn.__kwdefaults__ or self._num_defaults or self._keywords:
                return self._has_same_defaults(fn)
        except GONE:
            return False
        return True

    def _has_same_defaults(self, fn: Any) -> bool:
        if self._num_defaults != len(fn.__defaults__ or ()) or self._keywords != list(fn.__kwdefaults__ or ()):
            return False
        for kind, (key, look, was) in self._defaults:
            value = root_value(fn, kind, key)
            if value is not was and (value is None or look() is not value) and not is_equal(value, was):
                return False
        return True


_UNBOUND, _NO_PLAIN_VALUE = object(), object()


def _content(variable: Any) -> Any:
    try:
        return variable.cell_contents
    except ValueError:
        return _UNBOUND


def _kept(value: Any, held: Held) -> tuple[Callable[[], Any], Any]:
    """A look that returns a value as long as it is alive (else None, or it raises ReferenceError), and a plain value."""
    if constant(value) is not None:
        return object, value
    try:
        return weakref.ref(value), _NO_PLAIN_VALUE
    except TypeError:
        held.append(value)
        return partial(getitem, weakref.proxy(held), len(held) - 1), _NO_PLAIN_VALUE
