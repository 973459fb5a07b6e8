"""Lists, tuples and dicts in a module: their modules are tracked, also after the container is changed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import jax
import numpy as np

from . import access, births
from .cell import Cell
from .hidden_state import PLAIN, Found, find, leads_somewhere
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


def describe(value: Any) -> str:
    """Return the type of an array as `float32[3, 4]`, or the name of another value's class."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


class _Bare(AttributeError, TypeError):
    """A bare array where a declared one is needed. Some code catches AttributeError, other code TypeError."""


def bare_array(label: str, value: Any) -> AttributeError:
    """The error for an array that was assigned without a Parameter or Buffer around it."""
    name = label.rpartition(".")[2]
    shown = describe(value)
    return _Bare(
        f"{label} was given a bare array ({shown}), but each array of a module is declared. Declare it in `__init__`:\n"
        f"    self.{name} = Parameter(array)   # trained by an optimizer\n"
        f"    self.{name} = Buffer(array)      # kept and saved, not trained\n"
        "`forward` need not keep activations for a hand-written `backward`: JAX computes the gradients."
    )


def is_array(value: Any) -> bool:
    """True for an array of JAX, NumPy or another library. A NumPy scalar counts as a number."""
    if isinstance(value, jax.Array | np.ndarray):
        return True
    kind = type(value)
    return hasattr(kind, "__jax_array__") or (hasattr(kind, "__array__") and not isinstance(value, np.generic))


def holds_state(value: Any) -> bool:
    """True for a module, an optimizer or another Stateful object."""
    return getattr(type(value), "_holds_cells", False)


def stateful_in(value: Any) -> Iterator[Any]:
    """Iterate over the modules and optimizers in a result of `convert`: the value itself, or those in its containers."""
    if holds_state(value):
        yield value
    elif type(value) in (TrackedList, TrackedDict, tuple):
        for item in value.values() if type(value) is TrackedDict else value:
            yield from stateful_in(item)


def is_declaration(value: Any) -> bool:
    """True for a Parameter or a Buffer."""
    return getattr(type(value), "_declares", False)


def check_static(value: Any, label: str) -> None:
    """Raise TypeError unless `value` is a module, or a static value: it has a hash, and holds no array or module."""
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
            f"{label}: a static attribute of a module must be hashable, since compiled programs depend on its value; got"
            f" {type(value).__name__}. Use a tuple or a frozen dataclass instead."
        )


def find_hidden(value: Any) -> Found | None:
    """Return a module, an optimizer or an array that `value` leads to, or None."""
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
            f"{holds}{way} {hides}, and copies of this module (jax.grad, jax.jit and copy.deepcopy make some) would share"
            f" it. Write a method instead, `def {name}(self, ...)`, and assign each module that it uses to an attribute"
            " (`self.net = net`)."
        )
    return TypeError(
        f"{holds} {hides}. Assign modules to attributes directly, or in lists, tuples and dicts with string keys;"
        " declare arrays as Parameter(...) or Buffer(...)."
    )


def check_walked(value: Any, path: str) -> None:
    """Raise TypeError for a static value that `__setattr__` has not checked, or whose closure has been bound since."""
    kind = type(value)
    if is_array(value) or is_declaration(value) or kind in (list, dict) or not _has_hash(value):
        raise TypeError(
            f"{path} holds a {kind.__name__} that was set without `Module.__setattr__` (by `vars(module)[...] = ...`, by"
            " `object.__setattr__`, or by a `__setattr__` of the class that does not call `super().__setattr__`), so"
            " nothing tracks it. Assign it: `module.name = ...`. Declare arrays as Parameter(...) or Buffer(...)."
        )
    if callable(value) and leads_somewhere(value):
        check_static(value, path)


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
