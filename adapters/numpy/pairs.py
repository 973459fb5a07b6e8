"""Finding the parameters of a network and their gradients: arrays kept beside each other, or methods that return both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

import minitorch_jax as mt
from minitorch_jax.state.walk import join

from . import names as naming
from .assigned import made_by_forward, replaced_by_forward
from .objects import attribute, attributes_of, describe, is_container, is_floating, is_object, items_of, parts_of, walk
from .places import Listed, Pair, Place, methods_of

_WHOLE = (str, int, float, np.number, np.ndarray, type(None))  # what has no parts


@dataclass
class Scan:
    """The result of a search through a network."""

    gradients: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    sources: list[Pair | Listed] = field(default_factory=list)
    lonely: dict[str, Any] = field(default_factory=dict)  # arrays without a gradient, by path
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  # problems: which gradient belongs to which parameter
    used: set[str] = field(default_factory=set)  # the names and patterns that matched
    consumed: set[int] = field(default_factory=set)  # what was searched already, or is a gradient
    entered: list[Any] = field(default_factory=list)  # all objects and containers that were searched
    places: dict[str, Place] = field(default_factory=dict)  # of the lonely arrays
    beside: dict[str, list[str]] = field(default_factory=dict)  # names of arrays of its shape beside a lonely one
    order: dict[str, int] = field(default_factory=dict)  # the positions of parameters and lonely arrays in the search
    asked: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # objects, and which of their methods are used
    parents: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # what holds each container, and its key there
    made: set[tuple[int, Any]] = field(default_factory=set)  # what forward makes: the id of what holds it, and the key
    wanted: set[tuple[int, Any]] = field(default_factory=set)  # what the caller names, in the same form

    def look(self, network: Any) -> Scan:
        walk(network, self._enter, self._parts)
        known = [array for source in self.sources for _, array, _ in source.named() if is_floating(array)]
        known += [array for path, array in self.lonely.items() if not self._is_kept(path)]
        shapes = {array.shape for array in known}
        for path, array in list(self.lonely.items()):
            name = str(self.places[path].keys[-1])
            if naming.is_state(name, self.beside[path]) or (self._is_kept(path) and array.shape in shapes):
                del self.lonely[path]
        return self

    def _parts(self, value: Any) -> dict[str, Any]:
        items = parts_of(value).items()
        parts = {name: item for name, item in items if not isinstance(item, _WHOLE) or is_container(item)}
        return {name: item for name, item in parts.items() if not self.leaves_out(value, name)}

    def key(self, source: Pair | Listed) -> tuple[int, tuple[Any, ...]]:
        """The identity of a source: an object, and the keys that lead from it to the array."""
        owner, keys = (source.place.owner, source.place.keys) if isinstance(source, Pair) else (source.owner, ())
        while not is_object(owner) and id(owner) in self.parents:
            owner, key = self.parents[id(owner)]
            keys = (key, *keys)
        return id(owner), keys

    def leaves_out(self, owner: Any, name: Any) -> bool:
        """True if an attribute or item is not searched: it is ignored, or forward() makes it anew and nobody named it."""
        place = id(owner), name
        return place not in self.wanted and (place in self.made or made_by_forward(owner, (name,)))

    def _enter(self, path: str, value: Any) -> bool:
        items = items_of(value)
        if isinstance(value, mt.Module):
            self.problems.append(
                f"{path or 'the network'} is a minitorch_jax Module: list it in the optimizer's modules by itself"
            )
        elif id(value) in self.consumed:
            pass
        elif is_object(value) and (methods := self._methods(value)):
            self._add(Listed(path, value, *methods))
        elif isinstance(value, set | frozenset) and any(map(is_object, value)):
            where = path or "the network"
            self.problems.append(f"{where} is a set, which has no order: use a list, or name it in `ignored`")
        elif callable(attribute(value, "backward")) and not isinstance(value, type) and not is_object(value):
            if self._matches(self.ignored, path):
                return False
            cls = type(value)
            self.problems.append(
                f"{path or 'the network'} was not looked into: its class is {cls.__module__}.{cls.__qualname__}, of a"
                f" library. Name it in `ignored` if it has no parameters, ignored={path!r}"
            )
        elif is_container(value) or is_object(value):
            self.entered.append(value)
            self.parents.update({id(item): (value, key) for key, item in items.items() if is_container(item)})
            named = {k: item for k, item in items.items() if isinstance(k, str) and not isinstance(item, str | int)}
            self._scope(path, value, named | attributes_of(value) if is_object(value) else named)
            for key, item in items.items():
                if not isinstance(key, str) and is_floating(item):
                    self._without(join(path, str(key)), Place(value, (key,)), item, ())
            return True
        return False

    def _methods(self, value: Any) -> Any:
        """The methods of an object that return its parameters and gradients; None if it has none. It is asked once."""
        if id(value) not in self.asked:
            self.asked[id(value)] = value, methods_of(value)
        return self.asked[id(value)][1]

    def _scope(self, path: str, owner: Any, items: dict[str, Any]) -> None:
        """Pair the values that are kept beside each other."""
        for name in items:
            where = join(path, name)
            if self._matches(self.frozen, where) or not {name, where}.isdisjoint(self.gradients):
                self.wanted.add((id(owner), name))
        left = {name for name in items if self.leaves_out(owner, name)}
        for name, value in items.items():
            if is_container(value) or is_object(value):
                self.parents[id(value)] = owner, name
        chosen = self._chosen(path, owner, items)
        gradients = {g for beside in chosen.values() for g, *_ in beside}
        carried = {name for name in chosen if (id(owner), name) not in self.wanted and replaced_by_forward(owner, name)}
        self.made |= {(id(owner), name) for name in carried}
        left |= carried
        self.wanted |= {(id(owner), g) for name, beside in chosen.items() if name not in left for g, *_ in beside}
        others = left | gradients
        for name in items.keys() - others:
            value = items[name]
            self.made |= {(id(value), key) for key in items_of(value) if made_by_forward(owner, (name, key))}
        shapes = {name: value.shape for name, value in items.items() if is_floating(value) and name not in others}
        for name, value in items.items():
            where, place = join(path, name), Place(owner, (name,))
            if name in gradients:
                if is_container(value) or is_object(value):
                    self._consume(value)
                continue
            if name in left:
                continue
            if is_container(value) and name not in chosen and naming.is_like_a_gradient(name):
                self._consume(value)
                continue
            found, is_frozen = chosen.get(name, []), self._matches(self.frozen, where)
            if self._matches(self.ignored, where):
                self.consumed.add(id(value))
                self.made.add((id(owner), name))
                self.wanted.discard((id(owner), name))
            elif is_floating(value) and (is_frozen or not found):
                like = [n for n, shape in shapes.items() if shape == value.shape and n != name]
                self._without(where, place, value, [*like, *gradients])
            elif value is None and is_frozen:
                self._add(Pair(where, place, None, True))  # forward() may make it
            elif found and (is_floating(value) or _holds_arrays(value)):
                if len(found) > 1:
                    listed = " and ".join(".".join(keys) for keys in found)
                    self.doubts.append(
                        f"{where} has several possible gradients, {listed}: select one, gradients={{{name!r}: ...}}"
                    )
                self._consume(value)
                self._pair(where, value, place, Place(owner, found[0]))
            elif found and _is_numeric(value) and not is_frozen:
                self.problems.append(
                    f"{where} is {describe(value)} beside {found[0][0]}, and only floating NumPy arrays can be updated in"
                    " place: make it such an array. If it is not a parameter, name it in `frozen`"
                )

    def _chosen(self, path: str, owner: Any, items: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
        """The keys of what may be the gradient of each value: by name, or as the caller says."""
        given: dict[str, list[tuple[str, ...]]] = {}
        for name in items:
            for key in (join(path, name), name):
                if key in self.gradients and name not in given:
                    self.used.add(key)
                    given[name] = [(self.gradients[key],)]
        taken = {keys[0][0] for keys in given.values()}
        free = [name for name in items if name not in given and name not in taken]
        found = naming.gradients_among(free, [name for name in free if _may_be_gradient(items[name])])
        for gradient in {g for mine in found.values() for g in mine}:
            both = [name for name, mine in found.items() if gradient in mine and is_floating(items[name])]
            if len(both) > 1:
                self.doubts.append(
                    f"{join(path, gradient)} may be the gradient of {' or of '.join(both)}: select one,"
                    f" gradients={{{both[0]!r}: {gradient!r}}}"
                )
        for name, beside in self._beside_collections({name: items[name] for name in free}).items():
            found.setdefault(name, beside)
        chosen: dict[str, list[tuple[str, ...]]] = given | {name: [(g,) for g in mine] for name, mine in found.items()}
        for gradient, value in items.items():
            if isinstance(value, dict) and naming.of_one_parameter([gradient])[1] and gradient not in taken:
                floating = [name for name in free if is_floating(items[name]) and name not in chosen]
                named = naming.gradients_among(floating, map(str, value))
                for name in floating:
                    keys = [*named.get(name, ()), *[name] * (name in value)]
                    if keys:
                        chosen.setdefault(name, []).extend((gradient, key) for key in keys)
        if callable(attribute(owner, "forward")):
            return chosen
        return chosen | self._of_one_parameter(path, {name: items[name] for name in free}, found)

    def _beside_collections(self, items: dict[str, Any]) -> dict[str, list[str]]:
        """The dicts that hold a gradient for each item of another by its name: `p["W1"]` and `g["dW1"]`."""
        dicts = {n: v for n, v in items.items() if isinstance(v, dict) and all(isinstance(key, str) for key in v)}
        dicts = {n: v for n, v in dicts.items() if _holds_arrays(v) and not naming.holds_state(n)}
        found = {
            name: [
                n for n, v in dicts.items() if n != name and naming.gradients_among(params, v).keys() == params.keys()
            ]
            for name, params in dicts.items()
            if not naming.is_like_a_gradient(name)
        }
        return {name: beside for name, beside in found.items() if beside}

    def _of_one_parameter(
        self, path: str, items: dict[str, Any], found: dict[str, list[str]]
    ) -> dict[str, list[tuple[str, ...]]]:
        """The pair of an object that holds one parameter, such as `data` and `grad`."""
        left = [n for n in items if n not in found and not any(n in mine for mine in found.values())]
        values, gradients = naming.of_one_parameter(left)
        values = [name for name in values if is_floating(items[name]) or self._matches(self.frozen, join(path, name))]
        others = [n for n in left if is_floating(items[n]) and not naming.holds_state(n)]
        others = [n for n in others if n not in (*values, *gradients)]
        if not values or not gradients or others:
            return {}
        if any(items.get(name) is False for name in ("requires_grad", "trainable")):
            self.frozen = (*self.frozen, join(path, values[0]))
        if len(values) > 1:
            self.doubts.append(
                f"{join(path, gradients[0])} may be the gradient of {' or of '.join(values)}: select one,"
                f" gradients={{{values[0]!r}: {gradients[0]!r}}}"
            )
        inside = {g: naming.of_one_parameter(attributes_of(items[g]))[0] for g in gradients if is_object(items[g])}
        return {values[0]: [(g, *inside.get(g, ())[:1]) for g in gradients]}

    def _consume(self, value: Any) -> None:
        """Leave a value out of the search: it is a gradient, or its items are paired already."""
        self.consumed.add(id(value))
        if is_container(value) or is_object(value):
            self.entered.append(value)
        for item in _members(value).values():
            if _members(item):
                self._consume(item)

    def _pair(self, path: str, value: Any, place: Place, gradient: Place) -> None:
        beside = gradient.get()
        if is_floating(value):
            self._add(Pair(path, place, gradient))
            if is_floating(beside) and beside.shape != value.shape:
                self.problems.append(
                    f"{path} is {describe(value)}, and {gradient.keys[-1]} beside it is {describe(beside)}: a gradient has"
                    " the shape of its parameter. Is another array its gradient, or does a sum lack keepdims=True?"
                )
            return
        for key, item in _members(value).items():
            if is_floating(item) or _members(item):
                where = join(path, str(key))
                if self._matches(self.ignored, where):
                    continue
                mine = Place(place.owner, (*place.keys, key))
                if self._matches(self.frozen, where):
                    self._without(where, mine, item, ())
                    continue
                found = [key]
                if isinstance(key, str) and isinstance(beside, dict):
                    named = naming.gradients_among(map(str, items_of(value)), map(str, beside)).get(key, [])
                    found = [*[name for name in named if name in beside], *[key] * (key in beside)] or [key]
                if len(found) > 1:
                    self.doubts.append(
                        f"{where} has several possible gradients, {' and '.join(found)} of {'.'.join(gradient.keys)}: keep"
                        " one of them"
                    )
                self._pair(where, item, mine, Place(gradient.owner, (*gradient.keys, found[0])))

    def _without(self, path: str, place: Place, value: Any, beside: Iterable[str]) -> None:
        """An array without a gradient."""
        if self._matches(self.ignored, path):
            return
        if self._matches(self.frozen, path):
            self._add(Pair(path, place, None, True))
        elif not (isinstance(place.keys[-1], str) and naming.is_like_a_gradient(place.keys[-1])):
            self.lonely[path], self.places[path], self.beside[path] = value, place, list(beside)
            self.order[path] = len(self.order)

    def _add(self, source: Pair | Listed) -> None:
        self.order[source.path] = len(self.order)
        self.sources.append(source)

    def _is_kept(self, path: str) -> bool:
        """True if the name of a lonely array, or of what holds it, says that an optimizer keeps it: `velocity`, `m.W1`."""
        place, above = self.places[path], path.split(".")[:-1]
        if is_container(place.owner):
            owner, name = self.parents.get(id(place.owner), (None, ""))
            beside = [other for other in parts_of(owner) if other != name]
            if any(map(naming.holds_state, above[-2:])) or naming.is_state(str(name), beside):
                return True
        name, beside = str(place.keys[-1]), self.beside[path]
        like_moments = name in ("m", "v") and bool(beside)  # arrays of one shape
        sure = len(name) > 1 or like_moments or any(naming.of_one_parameter([other])[1] for other in beside)
        return naming.holds_state(name) and sure

    def _matches(self, patterns: tuple[str, ...], path: str) -> bool:
        found = [pattern for pattern in patterns if fnmatchcase(path, pattern)]
        self.used.update(found)
        return bool(found)

    def unused(self) -> list[str]:
        """The caller's names and patterns that matched nothing."""
        return [name for name in (*self.gradients, *self.frozen) if name not in self.used]


def patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _may_be_gradient(value: Any) -> bool:
    return not isinstance(value, str | bool | type) and not (callable(value) and not is_object(value))


def _members(value: Any) -> dict[Any, Any]:
    """The items of a container, or the attributes of an object that only holds others, such as a dataclass."""
    if is_object(value) and not is_container(value) and not callable(attribute(value, "forward")):
        return attributes_of(value)
    return items_of(value)


def _holds_arrays(value: Any) -> bool:
    """True if a container, or an object, holds arrays and nothing else, and no gradients of these arrays."""
    items = [item for item in _members(value).values() if item is not None]
    if is_object(value) and (
        all(naming.of_one_parameter(_members(value))) or naming.gradients_among(*[_members(value)] * 2)
    ):
        return False
    return bool(items) and all(is_floating(item) or _holds_arrays(item) for item in items)


def _is_numeric(value: Any) -> bool:
    """True for a floating number, an array of any kind, or a container of these and integers."""
    if items := items_of(value).values():
        return any(map(_is_numeric, items)) and all(isinstance(item, int) or _is_numeric(item) for item in items)
    return isinstance(value, float) or hasattr(type(value), "__array__")
