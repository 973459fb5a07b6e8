"""Lists, tuples and dicts held by a module: tracked, and still tracked when they are changed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from . import access, dropped_copies
from .static_values import check_static, holds_state
from .structure import changed


class TrackedList(list[Any]):
    """A list in an attribute of a module. A change of the list is a change of the module's structure."""

    _source: Any = None  # the plain list that was assigned; a later change of that list is an error
    _snapshot: Any = None  # the items that the plain list had
    _birth: Any = None  # the trace in which it was made
    _structure: Any = None
    _label = "TrackedList"  # its name in messages: the class and the attribute

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return TrackedList, (list(self),)


class TrackedDict(dict[str, Any]):
    """A dict in an attribute of a module. A change of the dict is a change of the module's structure."""

    _source: Any = None
    _snapshot: Any = None
    _birth: Any = None
    _structure: Any = None
    _label = "TrackedDict"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return TrackedDict, (dict(self),)


def _tracked(cls: type, name: str) -> Callable[..., Any]:
    method = getattr(cls.__base__, name)

    @wraps(method)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        access.check_restructurable(self._birth, f"{self._label}.{name}", "was called")
        before = self.copy()
        out = method(self, *args, **kwargs)
        try:
            _convert_items(self)
        except BaseException:
            cls.__base__.clear(self)  # type: ignore[union-attr]
            (list.extend if cls is TrackedList else dict.update)(self, before)
            raise
        changed(self)
        return out

    return change


for _cls, _names in (
    (TrackedList, "append extend insert remove pop clear sort reverse __setitem__ __delitem__ __iadd__ __imul__"),
    (TrackedDict, "update setdefault pop popitem clear __setitem__ __delitem__ __ior__"),
):
    for _name in _names.split():
        setattr(_cls, _name, _tracked(_cls, _name))


def _convert_items(container: Any) -> None:
    """Convert new items of a tracked container. It uses the methods of `list` and `dict`, which record no change."""
    label = container._label
    if isinstance(container, list):
        for i, item in enumerate(container):
            list.__setitem__(container, i, convert(item, f"{label}[{i}]"))
    else:
        for key, item in dict.items(container):
            if not isinstance(key, str):
                raise TypeError(
                    f"a dict in a module needs string keys, which are part of the paths of its parameters; got {key!r}"
                )
            dict.__setitem__(container, key, convert(item, f"{label}[{key!r}]"))


def convert(value: Any, label: str) -> Any:
    """Return `value` as a module stores it: containers become tracked ones, anything else is checked and unchanged."""
    kind = type(value)
    if kind is list or kind is dict:
        new: Any = TrackedList() if kind is list else TrackedDict()
        (list.extend if kind is list else dict.update)(new, value)
        new._label = label
        _convert_items(new)
        new._source, new._snapshot, new._birth = value, _items(value), dropped_copies.birth_state()
        return new
    if kind is tuple:
        return tuple(convert(item, f"{label}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, TrackedList | TrackedDict):
        check_static(value, label)
    return value


def _items(container: Any) -> list[Any]:
    return list(container) if isinstance(container, list) else [*container, *container.values()]


def watched(container: Any) -> bool:
    """True if someone else still refers to the plain list or dict that was assigned, and so may change it."""
    if container._source is not None and sys.getrefcount(container._source) <= 2:
        container._source = container._snapshot = None
    return container._source is not None


def check_source(container: Any, path: str) -> None:
    """Raise RuntimeError if the plain list or dict that was assigned has been changed since."""
    if container._source is None:
        return
    now, then = _items(container._source), container._snapshot
    if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
        kind = type(container._source).__name__
        raise RuntimeError(
            f"{path} was assigned from a plain {kind}, and that {kind} has been changed since. The module has a copy of its"
            f" own. Change the copy, `self.{path}`, instead."
        )


def stateful_in(value: Any) -> Iterator[Any]:
    """Iterate over the modules and optimizers in a result of `convert`: the value itself, or those in its containers."""
    if holds_state(value):
        yield value
    elif type(value) in (TrackedList, TrackedDict, tuple):
        for item in value.values() if type(value) is TrackedDict else value:
            yield from stateful_in(item)
