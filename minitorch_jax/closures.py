"""Finding the modules and optimizers that a function reaches by closure, by name, and noticing when a name is rebound.

`loss_fn` may use a model that is not among its arguments. What its code can name is looked through: closure variables,
globals, defaults, attributes of objects found there, functions that it calls. The first trace finds the rest.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from operator import attrgetter, is_, itemgetter
from typing import Any

from .containers import holds_state

_LIBRARIES = ("jax", "jaxlib", "numpy", "minitorch_jax", "optax", "flax", "equinox", "functools", "builtins")
_FUNCTIONS: Any = types.FunctionType | types.MethodType | functools.partial
_DEPTH = 4
_get_contents = attrgetter("cell_contents")

_Where = tuple[Callable[..., Any], tuple[Any, ...]]  # how to look there: a function and its arguments
Place = tuple[Callable[..., Any], tuple[Any, ...], Any]  # the same, and what was found


def search(fn: Any) -> list[Place]:
    """Where `fn` finds modules and optimizers (and functions that lead to them); a `Watch` looks there again."""
    found: list[Place] = []
    _function(fn, found, {id(fn): False}, 0)  # whoever watches may not hold it
    return found


class Watch:
    """Notices when any of some places holds another object than it did."""

    __slots__ = ("_tables", "_variables", "_contents", "_others")

    def __init__(self, places: list[Place]) -> None:
        by_table: dict[int, tuple[Any, dict[str, Any]]] = {}  # globals, and other dicts
        self._variables, self._contents = [], []  # of closures
        self._others = []
        for look, where, was in places:
            table = getattr(look, "__self__", None)
            if type(table) is dict and was is not None:
                by_table.setdefault(id(table), (table, {}))[1][where[0]] = was
            elif look is _contents:
                self._variables.append(where[0])
                self._contents.append(was)
            elif look is not _same:
                self._others.append((look, where, was))
        # all names of a dict in one call; the first one once more, so that `itemgetter` always gives a tuple
        self._tables = [
            (itemgetter(*names, next(iter(names))), table, (*names.values(), next(iter(names.values()))))
            for table, names in by_table.values()
        ]

    def rebound(self) -> bool:
        """Whether any does."""
        try:
            if self._variables and not all(map(is_, map(_get_contents, self._variables), self._contents)):
                return True
            for get, table, were in self._tables:
                if not all(map(is_, get(table), were)):
                    return True
        except (KeyError, ValueError):  # deleted
            return True
        for look, where, was in self._others:
            if look(*where) is not was:
                return True
        return False


def _function(fn: Any, found: list[Place], seen: dict[int, bool], depth: int) -> None:
    if isinstance(fn, functools.partial):
        for value in (fn.func, *fn.args, *fn.keywords.values()):
            _value(value, (_same, (value,)), found, seen, depth)
        return
    if isinstance(fn, types.MethodType):
        _value(fn.__self__, (_same, (fn.__self__,)), found, seen, depth)
        fn = fn.__func__
    if not hasattr(fn, "__code__"):
        if not hasattr(fn, "__wrapped__"):  # an object with a __call__ of its own
            if holds_state(fn):
                found.append((_same, (fn,), fn))
            else:
                _inside(fn, found, seen, depth)
            fn = type(fn).__call__
        else:  # jax.jit and others wrap functions in objects
            fn = fn.__wrapped__
    code = getattr(fn, "__code__", None)
    library = (getattr(fn, "__module__", None) or "").partition(".")[0]
    if code is None or (
        library in _LIBRARIES and not code.co_filename.startswith("<")
    ):  # (typed in, or by `exec`: not one)
        return
    for variable in fn.__closure__ or ():
        value = _contents(variable)
        _value(value, (_contents, (variable,)), found, seen, depth)
    for value in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
        _value(value, (_same, (value,)), found, seen, depth)
    names = frozenset(_names(code))
    for name in names & fn.__globals__.keys():
        value = fn.__globals__[name]
        if isinstance(value, types.ModuleType):
            if value.__name__.partition(".")[0] not in _LIBRARIES:
                for inner in names & vars(value).keys():
                    _value(vars(value)[inner], (vars(value).get, (inner,)), found, seen, depth)
        else:
            _value(value, (fn.__globals__.get, (name,)), found, seen, depth)


def _value(value: Any, where: _Where, found: list[Place], seen: dict[int, bool], depth: int) -> None:
    """Add to `found` what a value is or leads to, and, if that is anything, the place of the value.

    `seen` says of values whether they lead to something; those that are being looked through do.
    """
    leads = seen.get(id(value), holds_state(value))
    if not leads and id(value) not in seen and depth < _DEPTH:
        seen[id(value)] = True
        before = len(found)
        look = _function if isinstance(value, _FUNCTIONS) or hasattr(value, "__wrapped__") else _inside
        look(value, found, seen, depth + 1)
        leads = seen[id(value)] = len(found) > before
        if leads and isinstance(value, list | dict | deque):
            found.append((_has_length, (value, len(value)), True))
    if leads:
        found.append((*where, value))


def _inside(value: Any, found: list[Place], seen: dict[int, bool], depth: int) -> None:
    """Look through what a container, or a user's object, holds."""
    if isinstance(value, list | tuple | deque):
        for i, item in enumerate(islice(value, 100)):
            _value(item, (_item, (value, i)), found, seen, depth)
    elif isinstance(value, dict):
        for key in list(value)[:100]:
            _value(value[key], (value.get, (key,)), found, seen, depth)
    elif _is_users(value):
        for holder, name in _attributes(value):
            _value(getattr(holder, name, None), (getattr, (holder, name, None)), found, seen, depth)


def _is_users(value: Any) -> bool:
    """A class that is neither a library's nor built in, or an object of one."""
    if isinstance(value, types.ModuleType):
        return False
    cls = value if isinstance(value, type) else type(value)
    return cls.__module__.partition(".")[0] not in _LIBRARIES or hasattr(cls, "_leads_to_state")


def _attributes(value: Any) -> list[tuple[Any, str]]:
    """Where a user's object or class keeps data: instance attributes, slots, class attributes (no properties)."""
    names = {} if isinstance(value, type) else dict.fromkeys(getattr(value, "__dict__", {}))
    for cls in (value if isinstance(value, type) else type(value)).__mro__:
        if _is_users(cls):
            for name, inner in list(vars(cls).items()):
                if isinstance(inner, types.MemberDescriptorType | list | tuple | dict) or holds_state(inner):
                    names[name] = None
    return [(value, name) for name in names]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _contents(variable: Any) -> Any:
    try:
        return variable.cell_contents
    except ValueError:  # not yet bound
        return None


def _has_length(container: Any, length: int) -> bool:
    return len(container) == length


def _item(items: Any, index: int) -> Any:
    return items[index] if index < len(items) else None


def _same(value: Any) -> Any:
    return value
