"""Finding the modules and optimizers that a function reaches by closure, by name.

`loss_fn` may use a model that is not among its arguments. What its code can name is looked through: closure variables,
globals, defaults, attributes of objects found there, functions that it calls. The first trace finds the rest. Plain values
that a function reads by name are found in `values.py`.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from ...module.hooks import Hook, hooks_below
from ...state.static_values import holds_state
from .bytecode import Names, names_in
from .libraries import is_library, is_namespace, is_users_code, is_wrapper
from .roots import GLOBAL, Slices, root_of, roots_of
from .watch import Place, getter, item, items, itself, length

_FUNCTIONS: Any = types.FunctionType | types.MethodType | functools.partial
_DEPTH = 4


class Found(NamedTuple):
    """The modules and optimizers that a function reaches, each once, and the places that lead to them."""

    objects: list[Any]
    places: list[Place]
    slices: Slices  # of the places, by root
    places_of_hooks: list[Place]  # that lead to them by way of a module's hooks


def stateful_objects(fn: Callable[..., Any]) -> Found:
    """What `fn` reaches by name."""
    fn = root_of(fn)
    places: list[Place] = []
    slices = Slices()
    _function(fn, places, {id(fn): False}, 0, slices)  # whoever watches may not hold it
    return Found(list({id(p.was): p.was for p in places if holds_state(p.was)}.values()), places, slices, [])


def add_found(found: Found, objects: list[Any]) -> Found:
    """Add what was found to the `objects` of a call, and then what the hooks of all of them reach. Returns all."""
    objects += found.objects
    places, waiting, seen = list[Place](), deque(objects), dict[Hook, None]()
    new: list[Any] = []
    while waiting:
        for hook in [hook for hook in dict.fromkeys(hooks_below(waiting.popleft())) if hook not in seen]:
            seen[hook] = None
            inner = stateful_objects(hook.function)
            places += inner.places
            reached = [obj for obj in inner.objects if all(obj is not other for other in (*objects, *new))]
            new += reached
            waiting += reached
    objects += new
    return found._replace(objects=[*found.objects, *new], places_of_hooks=places) if places else found


def _function(fn: Any, found: list[Place], seen: dict[int, bool], depth: int, slices: Slices | None = None) -> None:
    while is_wrapper(fn):  # jax.jit and others wrap functions in objects, and mt.jit also modules and their methods
        fn = fn.__wrapped__
    if isinstance(fn, functools.partial):
        for value in (fn.func, *fn.args, *fn.keywords.values()):
            _value(value, None, found, seen, depth)
        return
    if isinstance(fn, types.MethodType):
        _value(fn.__self__, None, found, seen, depth)
        fn = fn.__func__
    while is_wrapper(fn):
        fn = fn.__wrapped__
    if not isinstance(fn, types.FunctionType):  # an object with a __call__ of its own
        if holds_state(fn):
            found.append(Place(itself, fn, None, fn))
        else:
            _inside(fn, found, seen, depth)
        fn = type(fn).__call__
    if not isinstance(fn, types.FunctionType) or is_library(fn.__module__, fn.__code__):
        return
    for root in roots_of(fn):
        before = len(found)
        if root.kind < GLOBAL or not isinstance(root.value, types.ModuleType):
            _value(root.value, root.place, found, seen, depth)
        elif not is_library(root.value.__name__):
            _module(root.value, names_in(fn.__code__), found, seen, depth)
        if slices is not None and len(found) > before:
            slices.add(root, found[before:], {})


def _module(module: Any, names: Names, found: list[Place], seen: dict[int, bool], depth: int) -> None:
    """What a function names in a module of the user's."""
    namespace = vars(module)
    for name in sorted([name for name in namespace if names.may_be_attribute(name)]):
        _value(namespace[name], item(namespace, name), found, seen, depth)


def _value(value: Any, place: Place | None, found: list[Place], seen: dict[int, bool], depth: int) -> None:
    """Add to `found` what a value is or leads to, and, if that is anything, the place of the value.

    `seen` says of values whether they lead to something; those that are being looked through do.
    """
    leads = seen.get(id(value), holds_state(value))
    if not leads and id(value) not in seen and depth < _DEPTH:
        seen[id(value)] = True
        before = len(found)
        look = _function if isinstance(value, _FUNCTIONS) or is_wrapper(value) else _inside
        look(value, found, seen, depth + 1)
        leads = seen[id(value)] = len(found) > before
        if leads and isinstance(value, list | dict | deque):
            found.append(length(value))
    if leads:
        found.append(Place(itself, value, None, value) if place is None else place)


def _inside(value: Any, found: list[Place], seen: dict[int, bool], depth: int) -> None:
    """Look through what a container, or a user's object, holds."""
    if isinstance(value, list | tuple | deque | dict):
        places = [Place(getter(value), value, key, inner) for key, inner in islice(items(value), 100)]
    elif isinstance(value, types.ModuleType):
        return
    else:
        cls = value if isinstance(value, type) else type(value)
        places = (
            list(_attributes(value))
            if is_users_code(cls) or is_namespace(cls) or hasattr(cls, "_leads_to_state")
            else []
        )
    for place in places:
        _value(place.was, place, found, seen, depth)


def _attributes(value: Any) -> Iterator[Place]:
    """Where a user's object or class keeps data: instance attributes, slots, class attributes (no properties)."""
    own = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    for name in list(own):
        yield item(own, name)
    for cls in (value if isinstance(value, type) else type(value)).__mro__:
        for name, inner in list(vars(cls).items()) if _is_looked_into(cls) else ():
            if isinstance(inner, types.MemberDescriptorType):
                if isinstance(value, type):
                    continue
                try:
                    yield Place(inner.__get__, value, None, inner.__get__(value))
                except AttributeError:  # not yet assigned
                    continue
            elif name not in own and (isinstance(inner, list | tuple | dict) or holds_state(inner)):
                yield item(vars(cls), name)


def _is_looked_into(cls: Any) -> bool:
    return is_users_code(cls) or is_namespace(cls) or hasattr(cls, "_leads_to_state")
