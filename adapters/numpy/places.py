"""Where an array is: a place beside that of its gradient, or a list that methods of an object return."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minitorch_jax.state.walk import join

from . import names as naming
from .objects import attribute, is_floating, is_object, items_of, part, walk

_PARAMETERS = ("parameters", "params", "get_parameters", "get_params", "trainable_parameters")
_GRADIENTS = ("grads", "gradients", "get_grads", "get_gradients")
_BOTH = [f"{get}{p}_and_{g}" for get in ("", "get_") for p in ("params", "parameters") for g in ("grads", "gradients")]
_BOTH += ["param", *_PARAMETERS]
_ABSENT = object()


@dataclass(frozen=True)
class Place:
    """The place of an array, which is looked up each time: an attribute of an object, or an item of a container in one."""

    owner: Any
    keys: tuple[Any, ...]

    def get(self) -> Any:
        """The value at this place; None if there is none."""
        return None if (value := self._value(self.keys)) is _ABSENT else value

    def exists(self) -> bool:
        return self._value(self.keys) is not _ABSENT

    def is_foreseen(self) -> bool:
        """True if the attribute exists; the item of the container in it need not."""
        return self._value(self.keys[:1]) is not _ABSENT

    def holder(self) -> Any:
        """The object or container that holds the value; None if there is none."""
        return None if (value := self._value(self.keys[:-1])) is _ABSENT else value

    def _value(self, keys: Iterable[Any]) -> Any:
        value = self.owner
        for key in keys:
            value = part(value, key, _ABSENT)
        return value

    def steps(self) -> Iterator[tuple[Any, Any]]:
        """Each holder on the way to the holder of the value, and the key that leads on."""
        for i, key in enumerate(self.keys[:-1]):
            yield self._value(self.keys[:i]), key

    def missing(self) -> Any:
        """The first container on the path that lacks the item but has others; None if there is none."""
        for i in range(1, len(self.keys)):
            holder, key = Place(self.owner, self.keys[:i]).get(), self.keys[i]
            if (items := items_of(holder)) and key not in items:
                return items
        return None

    def set(self, value: Any) -> None:
        holder, key = self.holder(), self.keys[-1]
        if key in items_of(holder):
            holder[key] = value
        else:
            setattr(holder, key, value)


@dataclass(frozen=True)
class Pair:
    """A parameter and its gradient. The gradient is None for a frozen one, and while nobody knows where it will be."""

    path: str
    place: Place
    gradient: Place | None
    frozen: bool = False

    @property
    def owner(self) -> Any:
        return self.place.owner

    @property
    def collects(self) -> bool:
        """True for an item of a collection, which may also hold arrays of other objects."""
        return len(self.place.keys) > 1

    def named(self) -> Iterator[tuple[str, Any, Any]]:
        """The path, array and gradient. The gradient of a frozen array is its path."""
        beside = None if self.gradient is None else self.gradient.get()
        yield self.path, self.place.get(), self.path if self.frozen else beside


@dataclass(frozen=True)
class Listed:
    """An object with methods of its own that return its parameters and its gradients."""

    path: str
    owner: Any
    params: str
    grads: str | None  # None: `params` returns pairs
    names: dict[int, str] = field(default_factory=dict)  # the attributes' names, by the ids of the arrays
    collects = True
    frozen = False

    def arrays(self) -> tuple[list[Any], list[Any]]:
        """Its parameters and gradients. Raises if their numbers differ."""
        if self.grads is None:
            pairs = [tuple(pair) for pair in getattr(self.owner, self.params)()]
            return [param for param, _ in pairs], [grad for _, grad in pairs]
        params, grads = getattr(self.owner, self.params)(), getattr(self.owner, self.grads)()
        if isinstance(params, dict) and isinstance(grads, dict):
            named = naming.gradients_among(map(str, params), map(str, grads))
            grads = [
                grads[key] if key in grads else grads[named[key][0]] for key in params if key in grads or key in named
            ]
        elif isinstance(params, dict) or isinstance(grads, dict):
            raise ValueError(
                f"{self.path or type(self.owner).__name__}: {self.params}() returns a {type(params).__name__} and"
                f" {self.grads}() a {type(grads).__name__}: return two lists in one order, or two dicts of one set of names"
            )
        params, grads = _values(params), _values(grads)
        if len(params) != len(grads):
            raise ValueError(
                f"{self.path or type(self.owner).__name__}: {self.params}() returns {len(params)} arrays and"
                f" {self.grads}() returns {len(grads)}: they must be aligned"
            )
        return params, grads

    def parameters(self) -> list[Any]:
        return self.arrays()[0] if self.grads is None else _values(getattr(self.owner, self.params)())

    def so_far(self) -> tuple[list[Any], list[Any]]:
        """The same; with None for gradients that only backward() makes."""
        try:
            return self.arrays()
        except (AttributeError, LookupError, TypeError):
            params = self.parameters()
            return params, [None] * len(params)

    def named(self) -> Iterator[tuple[str, Any, Any]]:
        """The path, parameter and gradient of each. An array that is an attribute has the attribute's name."""
        params, grads = self.so_far()
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if id(param) not in self.names:
                walk(self.owner, lambda path, value: self.names.setdefault(id(value), path) is not None)
            yield join(self.path, self.names.get(id(param), f"{self.params}.{i}")), param, grad


def methods_of(value: Any) -> tuple[str, str | None] | None:
    """The names of the methods that return an object's parameters and gradients, or of one that returns pairs and None."""
    params = [name for name in _PARAMETERS if _takes_nothing(attribute(value, name))]
    grads = [name for name in _GRADIENTS if _takes_nothing(attribute(value, name))]
    if params and grads:
        return params[0], grads[0]
    return next(((name, None) for name in _BOTH if _returns_pairs(value, name)), None)


def _values(returned: Any) -> list[Any]:
    """The values of a dict, or the items of another collection."""
    return list(returned.values() if isinstance(returned, dict) else returned)


def _takes_nothing(method: Any) -> bool:
    if not callable(method) or is_object(method):
        return False
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return False
    return True


def _returns_pairs(owner: Any, name: str) -> bool:
    """True if a method returns a list of `(parameter, gradient)`. One that raises may need forward() first.

    Two arrays may also be two parameters. So unless the method's name says it, the arrays' names must.
    """
    method = attribute(owner, name)
    if not _takes_nothing(method):
        return False
    try:
        found = list(method())
    except Exception:
        return False
    if not found or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 and is_floating(pair[0]) for pair in found
    ):
        return False
    if not all(grad is None or np.isscalar(grad) or is_floating(grad) for _, grad in found):
        return False
    paths: dict[int, str] = {}
    walk(owner, lambda path, value: paths.setdefault(id(value), path) is not None)
    return "grad" in name or all(
        grad is None or np.isscalar(grad) or _are_named(paths.get(id(param), ""), paths.get(id(grad), ""))
        for param, grad in found
    )


def _are_named(param: str, grad: str) -> bool:
    """True if two paths are those of a parameter and its gradient."""
    return any(
        naming.gradients_among([other], [beside])
        for other, beside in zip(reversed(param.split(".")), reversed(grad.split(".")), strict=False)
        if beside != other
    )
