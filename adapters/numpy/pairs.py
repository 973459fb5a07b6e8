"""Which arrays of a network are parameters, and where their gradients are: `W` beside `dW`, or lists of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

import minitorch_jax as mt
from minitorch_jax.stateful import join

from .objects import attributes_of, is_floating, is_object, walk

_CONTAINERS = {"params": ("grads", "gradients"), "parameters": ("grads", "gradients")}


def gradient_names(name: str) -> tuple[str, ...]:
    """The names under which a gradient is looked for."""
    return (f"d{name}", f"d_{name}", f"grad_{name}", f"{name}_grad", *_CONTAINERS.get(name, ()))


@dataclass(frozen=True)
class Place:
    """Where an array is kept, and looked up each time: an attribute of an object, or an item of a list or dict in one."""

    owner: Any
    keys: tuple[Any, ...]

    def get(self) -> Any:
        """What is there; None if there is nothing."""
        value = self.owner
        for key in self.keys:
            try:
                value = value[key] if isinstance(value, list | tuple | dict) else getattr(value, key, None)
            except (KeyError, IndexError):
                return None
        return value

    def missing(self) -> Any:
        """The container on the way that has other items and not this one; None if there is none such."""
        for i in range(1, len(self.keys)):
            holder, key = Place(self.owner, self.keys[:i]).get(), self.keys[i]
            if isinstance(holder, dict) and holder and key not in holder:
                return holder
            if isinstance(holder, list | tuple) and holder and key >= len(holder):
                return holder
        return None

    def set(self, value: Any) -> None:
        *above, key = self.keys
        holder = Place(self.owner, tuple(above)).get()
        if isinstance(holder, list | dict):
            holder[key] = value
        else:
            setattr(holder, key, value)


@dataclass(frozen=True)
class Pair:
    """A parameter and its gradient; one without a gradient is frozen."""

    path: str
    place: Place
    gradient: Place | None

    @property
    def owner(self) -> Any:
        return self.place.owner


@dataclass(frozen=True)
class Listed:
    """An object with `parameters()` and `grads()` of its own."""

    path: str
    owner: Any

    def arrays(self) -> tuple[list[Any], list[Any]]:
        """Its parameters and gradients, as many of each."""
        params, grads = list(self.owner.parameters()), list(self.owner.grads())
        if len(params) != len(grads):
            raise ValueError(
                f"{self.path or type(self.owner).__name__}: parameters() gives {len(params)} arrays and grads()"
                f" {len(grads)}: they must be aligned"
            )
        return params, grads

    def named(self) -> Iterator[tuple[str, Any, Any]]:
        """Path, parameter and gradient: by the names of the attributes, where these are the arrays' own."""
        params, grads = self.arrays()
        names: dict[int, str] = {}
        walk(self.owner, lambda path, value: names.setdefault(id(value), path) is not None)
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            yield join(self.path, names.get(id(param), f"parameters.{i}")), param, grad


@dataclass
class Scan:
    """What a look through a network found."""

    gradients: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    sources: list[Pair | Listed] = field(default_factory=list)
    lonely: dict[str, Any] = field(default_factory=dict)  # arrays for which there is no gradient, by path
    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # which names and patterns meant something
    consumed: set[int] = field(default_factory=set)  # containers that have been looked into
    parts: bool = True  # whether to go into objects below the first

    def look(self, network: Any) -> Scan:
        walk(network, self._enter)
        return self

    def _enter(self, path: str, value: Any) -> bool:
        if isinstance(value, mt.Module):
            self.problems.append(
                f"{path or 'the network'} is a minitorch_jax Module: list it in the optimizer's modules by itself"
            )
        elif id(value) in self.consumed:
            pass
        elif is_object(value) and has_lists(value):
            self.sources.append(Listed(path, value))
        elif is_object(value):
            self._scope(path, value, attributes_of(value))
            return True
        elif isinstance(value, dict):
            self._scope(path, value, {key: item for key, item in value.items() if isinstance(key, str)})
            return True
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                if is_floating(item):
                    self._without(join(path, str(i)), Place(value, (i,)), item)
            return True
        return False

    def _scope(self, path: str, owner: Any, items: dict[str, Any]) -> None:
        """Pair the values that are kept beside each other."""
        gradients = {g for name in items for g in self._names(path, name, items)}
        for name, value in items.items():
            where, place = join(path, name), Place(owner, (name,))
            if name in gradients:
                if isinstance(value, list | tuple | dict):
                    self.consumed.add(id(value))
                continue
            names = self._names(path, name, items)
            if self._matches(self.ignored, where):
                self.consumed.add(id(value))
            elif is_floating(value) and not (names and not self._matches(self.frozen, where)):
                self._without(where, place, value)
            elif names and isinstance(value, float | np.floating) and not self._matches(self.frozen, where):
                self.problems.append(
                    f"{where} is a number beside {names[0]}, and cannot be updated in place: make it an array,"
                    f" `np.array({value!r})`, or, if it is no parameter, name it in `frozen`"
                )
            elif names and (is_floating(value) or _holds_arrays(value)):
                if len(names) > 1:
                    listed = " and ".join(names)
                    self.problems.append(
                        f"{where}: {listed} may be its gradient: say which, gradients={{{name!r}: ...}}"
                    )
                self._pair(where, value, place, Place(owner, (names[0],)))
                self.consumed.add(id(value))

    def _names(self, path: str, name: str, items: dict[str, Any]) -> list[str]:
        """Under which of its names the gradient of `name` is there, or is said to be."""
        for key in (join(path, name), name):
            if key in self.gradients:
                self.used.add(key)
                return [self.gradients[key]]
        return [g for g in gradient_names(name) if g in items]

    def _pair(self, path: str, value: Any, place: Place, gradient: Place) -> None:
        if is_floating(value):
            self.sources.append(Pair(path, place, gradient))
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        beside = gradient.get()
        for key, item in items:
            if is_floating(item) or isinstance(item, list | tuple | dict):
                names = (key, *gradient_names(key)) if isinstance(key, str) and isinstance(beside, dict) else (key,)
                name = next((n for n in names if isinstance(beside, dict) and n in beside), key)
                where = join(path, str(key))
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
        """The names and patterns of the caller that meant nothing."""
        return [name for name in (*self.gradients, *self.frozen) if name not in self.used]


def has_lists(value: Any) -> bool:
    """Whether an object gives its own lists."""
    return all(callable(getattr(value, name, None)) for name in ("parameters", "grads"))


def patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _holds_arrays(value: Any) -> bool:
    """Whether a list, tuple or dict has arrays in it, and nothing else."""
    if not isinstance(value, list | tuple | dict):
        return False
    items = [item for item in (value.values() if isinstance(value, dict) else value) if item is not None]
    return bool(items) and all(is_floating(item) or _holds_arrays(item) for item in items)
