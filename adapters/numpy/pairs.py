"""Finding the parameters of a network and their gradients: `W` beside `dW`, or lists of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import minitorch_jax as mt
from minitorch_jax.state.walk import join

from .objects import attribute, attributes_of, describe, is_floating, is_object, items_of, walk

_CONTAINERS = {"params": ("grads", "gradients"), "parameters": ("grads", "gradients")}


@cache
def gradient_names(name: str) -> tuple[str, ...]:
    """The names that a gradient may have. For `_W` or a private `__W`, they may start with the underscores too."""
    bare = name.rpartition("__")[2].lstrip("_")
    front = name.removesuffix(bare)
    own = [f"{front}d{bare}", f"{front}d_{bare}", f"{front}grad_{bare}", f"{name}_grad"]
    lists = [front + other for other in _CONTAINERS.get(bare, ())]
    return tuple(dict.fromkeys([*own, f"d{name}", f"d_{name}", f"grad_{name}", *lists]))


@dataclass(frozen=True)
class Place:
    """The place of an array, which is looked up each time: an attribute of an object, or an item of a container in one."""

    owner: Any
    keys: tuple[Any, ...]

    def get(self) -> Any:
        """The value at this place; None if there is none."""
        value = self.owner
        for key in self.keys:
            items = items_of(value)
            value = items[key] if key in items else attribute(value, key) if is_object(value) else None
        return value

    def missing(self) -> Any:
        """The first container on the path that lacks the item but has others; None if there is none."""
        for i in range(1, len(self.keys)):
            holder, key = Place(self.owner, self.keys[:i]).get(), self.keys[i]
            if (items := items_of(holder)) and key not in items:
                return items
        return None

    def set(self, value: Any) -> None:
        *above, key = self.keys
        holder = Place(self.owner, tuple(above)).get()
        if key in items_of(holder):
            holder[key] = value
        else:
            setattr(holder, key, value)


@dataclass(frozen=True)
class Pair:
    """A parameter and its gradient. A parameter without a gradient is frozen."""

    path: str
    place: Place
    gradient: Place | None

    @property
    def owner(self) -> Any:
        return self.place.owner

    @property
    def collects(self) -> bool:
        """True for an item of a collection, which may also hold arrays of other objects."""
        return len(self.place.keys) > 1

    @property
    def frozen(self) -> bool:
        return self.gradient is None

    def named(self) -> Iterator[tuple[str, Any, Any]]:
        """The path, array and gradient. The gradient of a frozen array is its path."""
        yield self.path, self.place.get(), self.path if self.gradient is None else self.gradient.get()


@dataclass(frozen=True)
class Listed:
    """An object with `parameters()` and `grads()` of its own."""

    path: str
    owner: Any
    collects = True
    frozen = False

    def arrays(self) -> tuple[list[Any], list[Any]]:
        """Its parameters and gradients. Raises if their numbers differ."""
        params, grads = list(self.owner.parameters()), list(self.owner.grads())
        if len(params) != len(grads):
            raise ValueError(
                f"{self.path or type(self.owner).__name__}: parameters() returns {len(params)} arrays and grads() returns"
                f" {len(grads)}: they must be aligned"
            )
        return params, grads

    def named(self) -> Iterator[tuple[str, Any, Any]]:
        """The path, parameter and gradient of each. An array that is an attribute has the attribute's name."""
        params, grads = self.arrays()
        names: dict[int, str] = {}
        walk(self.owner, lambda path, value: names.setdefault(id(value), path) is not None)
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            yield join(self.path, names.get(id(param), f"parameters.{i}")), param, grad


@dataclass
class Scan:
    """The result of a search through a network."""

    gradients: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    sources: list[Pair | Listed] = field(default_factory=list)
    lonely: dict[str, Any] = field(default_factory=dict)  # arrays without a gradient, by path
    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # the names and patterns that matched
    consumed: set[int] = field(default_factory=set)  # containers that were searched already

    def look(self, network: Any) -> Scan:
        walk(network, self._enter)
        return self

    def _enter(self, path: str, value: Any) -> bool:
        items = items_of(value)
        if isinstance(value, mt.Module):
            self.problems.append(
                f"{path or 'the network'} is a minitorch_jax Module: list it in the optimizer's modules by itself"
            )
        elif id(value) in self.consumed:
            pass
        elif is_object(value) and has_lists(value):
            self.sources.append(Listed(path, value))
        elif isinstance(value, set | frozenset) and any(map(is_object, value)):
            where = path or "the network"
            self.problems.append(f"{where} is a set, which has no order: use a list, or name it in `ignored`")
        elif items or is_object(value):
            named = {key: item for key, item in items.items() if isinstance(key, str)}
            self._scope(path, value, named | attributes_of(value) if is_object(value) else named)
            for key, item in items.items():
                if not isinstance(key, str) and is_floating(item):
                    self._without(join(path, str(key)), Place(value, (key,)), item)
            return True
        return False

    def _scope(self, path: str, owner: Any, items: dict[str, Any]) -> None:
        """Pair the values that are kept beside each other."""
        gradients = {g for name in items for g in self._names(path, name, items)}
        for name, value in items.items():
            where, place = join(path, name), Place(owner, (name,))
            if name in gradients:
                if items_of(value):
                    self.consumed.add(id(value))
                continue
            names = self._names(path, name, items)
            if self._matches(self.ignored, where):
                self.consumed.add(id(value))
            elif is_floating(value) and not (names and not self._matches(self.frozen, where)):
                self._without(where, place, value)
            elif value is None and self._matches(self.frozen, where):
                self.sources.append(Pair(where, place, None))  # forward() may make it
            elif names and (is_floating(value) or _holds_arrays(value)):
                if len(names) > 1:
                    listed = " and ".join(names)
                    self.problems.append(
                        f"{where} has several possible gradients, {listed}: select one, gradients={{{name!r}: ...}}"
                    )
                self._pair(where, value, place, Place(owner, (names[0],)))
                self.consumed.add(id(value))
            elif names and _is_numeric(value) and not self._matches(self.frozen, where):
                self.problems.append(
                    f"{where} is {describe(value)} beside {names[0]}, and only floating NumPy arrays can be updated in"
                    " place: make it such an array. If it is not a parameter, name it in `frozen`"
                )

    def _names(self, path: str, name: str, items: dict[str, Any]) -> list[str]:
        """The names under which the gradient of `name` exists, or the name that the caller passed."""
        for key in (join(path, name), name):
            if key in self.gradients:
                self.used.add(key)
                return [self.gradients[key]]
        return [g for g in gradient_names(name) if g in items]

    def _pair(self, path: str, value: Any, place: Place, gradient: Place) -> None:
        if is_floating(value):
            self.sources.append(Pair(path, place, gradient))
            return
        beside = gradient.get()
        for key, item in items_of(value).items():
            if is_floating(item) or items_of(item):
                names = (key, *gradient_names(key)) if isinstance(key, str) and isinstance(beside, dict) else (key,)
                name = next((n for n in names if isinstance(beside, dict) and n in beside), key)
                where = join(path, str(key))
                if self._matches(self.ignored, where):
                    continue
                if self._matches(self.frozen, where):
                    self._without(where, Place(place.owner, (*place.keys, key)), item)
                    continue
                self._pair(
                    where, item, Place(place.owner, (*place.keys, key)), Place(gradient.owner, (*gradient.keys, name))
                )

    def _without(self, path: str, place: Place, value: Any) -> None:
        """An array without a gradient."""
        if self._matches(self.ignored, path):
            return
        if self._matches(self.frozen, path):
            self.sources.append(Pair(path, place, None))
        else:
            self.lonely[path] = value

    def _matches(self, patterns: tuple[str, ...], path: str) -> bool:
        found = [pattern for pattern in patterns if fnmatchcase(path, pattern)]
        self.used.update(found)
        return bool(found)

    def unused(self) -> list[str]:
        """The caller's names and patterns that matched nothing."""
        return [name for name in (*self.gradients, *self.frozen) if name not in self.used]


def has_lists(value: Any) -> bool:
    """True if an object has `parameters()` and `grads()`."""
    return all(callable(attribute(value, name)) for name in ("parameters", "grads"))


def patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _holds_arrays(value: Any) -> bool:
    """True if a container holds arrays, and nothing else."""
    items = [item for item in items_of(value).values() if item is not None]
    return bool(items) and all(is_floating(item) or _holds_arrays(item) for item in items)


def _is_numeric(value: Any) -> bool:
    """True for a floating number, an array of any kind, or a container of these and integers."""
    if items := items_of(value).values():
        return any(map(_is_numeric, items)) and all(isinstance(item, int) or _is_numeric(item) for item in items)
    return isinstance(value, float) or hasattr(type(value), "__array__")
