"""Lists, tuples and dicts held by a module: tracked, and still tracked when they are changed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import jax
import numpy as np

from . import access, births
from .cell import Cell
from .reach import PLAIN, Found, find, leads_somewhere
from .structure import changed


class TrackedList(list[Any]):
    """A list assigned to a module's attribute. Changing it changes the module's structure, as an assignment does."""

    _source: Any = None  # the plain list that was assigned, and its items then: changing that one is an error
    _snapshot: Any = None
    _birth: Any = None  # the trace in which it was made
    _structure: Any = None
    _label = "TrackedList"  # whose it is

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return TrackedList, (list(self),)


class TrackedDict(dict[str, Any]):
    """A dict assigned to a module's attribute. Changing it changes the module's structure, as an assignment does."""

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
    """Track what was put into a tracked container, without passing through its tracked methods."""
    label = container._label
    if isinstance(container, list):
        for i, item in enumerate(container):
            list.__setitem__(container, i, convert(item, f"{label}[{i}]"))
    else:
        for key, item in dict.items(container):
            if not isinstance(key, str):
                raise TypeError(
                    f"a dict held by a module needs string keys, for the paths of its parameters; got {key!r}"
                )
            dict.__setitem__(container, key, convert(item, f"{label}[{key!r}]"))


def convert(value: Any, label: str) -> Any:
    """`value` as a module keeps it: containers tracked, anything else a module or a checked static value."""
    kind = type(value)
    if kind is list or kind is dict:
        new: Any = TrackedList() if kind is list else TrackedDict()
        (list.extend if kind is list else dict.update)(new, value)
        new._label = label
        _convert_items(new)
        new._source, new._snapshot, new._birth = value, _items(value), births.birth_state()
        return new
    if kind is tuple:
        return tuple(convert(item, f"{label}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, TrackedList | TrackedDict):
        check_static(value, label)
    return value


def _items(container: Any) -> list[Any]:
    return list(container) if isinstance(container, list) else [*container, *container.values()]


def watched(container: Any) -> bool:
    """Whether someone still holds the plain list or dict that was assigned, and so may change it."""
    if container._source is not None and sys.getrefcount(container._source) <= 2:
        container._source = container._snapshot = None
    return container._source is not None


def check_source(container: Any, path: str) -> None:
    """Raise if the plain list or dict that was assigned has been changed since: the module holds its own."""
    if container._source is None:
        return
    now, then = _items(container._source), container._snapshot
    if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
        kind = type(container._source).__name__
        raise RuntimeError(
            f"{path} was assigned from a plain {kind}, and that {kind} has been changed since, which the module cannot"
            f" see: it holds its own. Change the module's, `self.{path}`, instead."
        )


def describe(value: Any) -> str:
    """`float32[3, 4]`, or the type of what is not an array."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


class _Bare(AttributeError, TypeError):
    """A bare array where a declared one is needed: an AttributeError to some readers, a TypeError to others."""


def bare_array(label: str, value: Any) -> AttributeError:
    name = label.rpartition(".")[2]
    shown = describe(value)
    return _Bare(
        f"{label} was given a bare array ({shown}), and a module must know what it is. Declare it in `__init__`:\n"
        f"    self.{name} = Parameter(array)   # trained by an optimizer\n"
        f"    self.{name} = Buffer(array)      # kept and saved, not trained\n"
        "An activation kept in `forward` for a hand-written `backward` is not needed: JAX computes the gradients."
    )


def is_array(value: Any) -> bool:
    """Whether `value` is an array of JAX, NumPy or another library (NumPy's scalars count as numbers)."""
    if isinstance(value, jax.Array | np.ndarray):
        return True
    kind = type(value)
    return hasattr(kind, "__jax_array__") or (hasattr(kind, "__array__") and not isinstance(value, np.generic))


def holds_state(value: Any) -> bool:
    return getattr(type(value), "_holds_cells", False)


def stateful_in(value: Any) -> Iterator[Any]:
    """The modules and optimizers in what `convert` gives: itself, or those in its lists, tuples and dicts."""
    if holds_state(value):
        yield value
    elif type(value) in (TrackedList, TrackedDict, tuple):
        for item in value.values() if type(value) is TrackedDict else value:
            yield from stateful_in(item)


def is_declaration(value: Any) -> bool:
    """Whether `value` is a Parameter or a Buffer."""
    return getattr(type(value), "_declares", False)


def check_static(value: Any, label: str) -> None:
    """Raise unless `value` may be a static part of a module: a module, or hashable and without arrays inside."""
    if type(value) in PLAIN or holds_state(value):
        return
    if is_array(value):
        raise bare_array(label, value)
    if is_declaration(value):
        raise TypeError(
            f"{label}: a {type(value).__name__} inside a list, tuple or dict has no name of its own. Assign each one to"
            " an attribute (`setattr(self, f'weight{i}', Parameter(...))`), or wrap it in a small Module."
        )
    found = find_hidden(value)
    if found is not None:
        raise _hidden(value, found, label)
    if not _has_hash(value):
        raise TypeError(
            f"{label}: a static attribute of a module must be hashable, since it is part of what a compiled program"
            f" depends on; got {type(value).__name__}. Use a tuple or a frozen dataclass instead."
        )


def find_hidden(value: Any) -> Found | None:
    """A module, an optimizer or an array that `value` leads to, or None."""
    return find(value, holds_state, is_array)


def _hidden(value: Any, found: Found, label: str) -> TypeError:
    inner = found.value
    what = "an array" if is_array(inner) else f"a {'parameter' if isinstance(inner, Cell) else type(inner).__name__}"
    holds = f"{label}: a {type(value).__name__} that holds {what}"
    hides = "would hide it from parameters(), state_dict() and every optimizer"
    if callable(value) and not is_array(inner):
        name = label.rpartition(".")[2].partition("[")[0]
        way = f" ({found.way})" if found.way else ""
        return TypeError(
            f"{holds}{way} {hides}, and copies of this module, as jax.grad, jax.jit and copy.deepcopy make them, would"
            f" go on using that very one. Write a method in its place, `def {name}(self, ...)`, and assign each module"
            " that it uses to an attribute (`self.net = net`)."
        )
    return TypeError(
        f"{holds} {hides}. Assign modules to attributes directly, or in lists, tuples and dicts with string keys;"
        " declare arrays as Parameter(...) or Buffer(...)."
    )


def check_walked(value: Any, path: str) -> None:
    """Raise if a static value that a walk has met is none: put there past `__setattr__`, or a closure bound since."""
    kind = type(value)
    if is_array(value) or is_declaration(value) or kind in (list, dict) or not _has_hash(value):
        raise TypeError(
            f"{path} holds a {kind.__name__} that came there past `Module.__setattr__` (by `vars(module)[...] = ...`, by"
            " `object.__setattr__`, or by a `__setattr__` of the class that does not call `super().__setattr__`), so"
            " nothing tracks it. Assign it: `module.name = ...`, arrays as Parameter(...) or Buffer(...)."
        )
    if callable(value) and leads_somewhere(value):
        check_static(value, path)


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
