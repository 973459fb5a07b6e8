"""Search for modules and arrays hidden in a value: in a function's closure, an object's attributes, a method's object.

A static attribute of a module is searched when it is assigned. A walk over the module would not find modules inside it, and
all copies of the module would share them.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from .cell import Cell

# Types whose values refer to nothing else and have a hash.
PLAIN = frozenset({str, bytes, int, float, bool, complex, type(None), type(Ellipsis)})
_MOST, _MOST_OF_ONE = 10_000, 2_000  # how many values are searched in all, and in one container
_CONTAINERS = (dict, types.MappingProxyType, list, tuple, set, frozenset, deque, functools.partial)
_LIBRARIES = ("jax", "jaxlib")
_NOT_SEARCHED = ("_Kept", "RemovableHandle")  # compiled programs; the handle of a hook refers to its module weakly


class Found(NamedTuple):
    """The value that a search found, and the last step of the path to it that has a name."""

    value: Any
    way: str


def find(value: Any, holds_state: Callable[[Any], bool], is_array: Callable[[Any], bool]) -> Found | None:
    """Return the nearest module, optimizer, parameter or array that `value` leads to, or None. `value` itself is not counted.

    Arrays are ignored in a function's closure and defaults, where they are constants, and inside objects of builtin types
    (such as the state of a NumPy generator). Globals are not searched.
    """
    seen = {id(value)}
    queue, looked_at = deque([(value, "", False)]), 0
    while queue and looked_at < _MOST:
        outer, way, in_function = queue.popleft()
        constant = in_function or type(outer) is types.FunctionType or _is_opaque(outer)
        for step, inner in islice(_inside(outer), _MOST_OF_ONE):
            looked_at += 1
            if type(inner) in PLAIN or id(inner) in seen:
                continue
            array = is_array(inner)
            if holds_state(inner) or issubclass(type(inner), Cell) or (array and not constant):
                return Found(inner, step or way)
            if not array:
                seen.add(id(inner))
                queue.append((inner, step or way, constant))
    return None


def _is_opaque(value: Any) -> bool:
    """True for an object of a builtin type that is not a container: the user has put nothing into it."""
    kind = type(value)
    if issubclass(kind, _CONTAINERS) or kind is types.MethodType or isinstance(getattr(value, "__dict__", None), dict):
        return False
    return not any("__slots__" in vars(cls) for cls in kind.__mro__)


def leads_somewhere(function: Any) -> bool:
    """True if a function may lead to a value that did not exist when the function was assigned: a closure bound later."""
    return bool(getattr(function, "__closure__", None)) or hasattr(function, "__wrapped__")


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over `(step, inner)` of what `value` refers to directly. `step` names the reference, or is empty."""
    kind = type(value)
    if issubclass(kind, type | types.ModuleType | types.CodeType):
        return
    if issubclass(kind, dict | types.MappingProxyType):
        yield from (("", item) for item in list(islice(value.values(), _MOST_OF_ONE)))
    elif issubclass(kind, list):
        yield from (("", item) for item in list.__iter__(value))  # a live list of `parameters()` holds cells
    elif issubclass(kind, tuple | set | frozenset | deque):
        yield from (("", item) for item in list(islice(value, _MOST_OF_ONE)))
    elif issubclass(kind, functools.partial):
        yield "", value.func
        yield from (("an argument of it", item) for item in (*value.args, *value.keywords.values()))
    elif kind is types.MethodType:
        yield "the object that it is bound to", value.__self__
        yield "", value.__func__
    elif kind is types.FunctionType:
        yield from _inside_function(value)
    elif issubclass(kind, weakref.ref):
        yield "", value()
    elif kind.__module__.partition(".")[0] in (*_LIBRARIES, "minitorch_jax") and hasattr(value, "__wrapped__"):
        yield "", value.__wrapped__  # jax.jit, mt.jit
    elif kind.__module__.partition(".")[0] not in _LIBRARIES and kind.__name__ not in _NOT_SEARCHED:
        yield from _inside_object(value)


def _inside_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, variable in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"its closure's variable `{name}`", variable.cell_contents
        except ValueError:  # not bound yet
            continue
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield from (("a default of its arguments", item) for item in defaults)
    yield from (("", item) for item in list(vars(function).values()))


def _inside_object(value: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f"its attribute `{name}`", item) for name, item in list(attributes.items()))
    elif _is_opaque(value):  # an iterator, a method of a list
        yield from (("", item) for item in gc.get_referents(value))
    for cls in type(value).__mro__:
        for name, slot in list(vars(cls).items()):
            if type(slot) is types.MemberDescriptorType and name not in ("__dict__", "__weakref__"):
                try:
                    yield f"its attribute `{name}`", slot.__get__(value)
                except AttributeError:  # empty
                    continue
