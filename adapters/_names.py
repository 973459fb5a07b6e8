"""Weights under other names: which array goes where, and how it is transposed, cut or joined on the way.

`names` of `load_from_torch`, `safetensors.load` and `hub.load` is a table of their names and ours:

    names = {
        "h.*.attn.c_attn.weight": transposed("blocks.*.attn.in_proj_weight"),  # stored as (in, out)
        ("*.query.weight", "*.key.weight", "*.value.weight"): "*.in_proj_weight",  # joined along the first axis
        "h.*.attn.bias": None,  # left out
    }

In a key, `*` stands for any characters, dots included; the same text stands for the `*` of the value, in their order. The
first key that matches a name counts. A name that no key matches stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minitorch_jax.module.globs import Globs


class Transposed(NamedTuple):
    """A value of `names`: the name here, and the order of the axes; None reverses the two axes of a matrix."""

    name: str | tuple[str, ...]
    axes: tuple[int, ...] | None


Names = Mapping[Any, Any]  # str | tuple[str, ...] to str | tuple[str, ...] | Transposed | None
Keep = str | Sequence[str]


def transposed(name: str | tuple[str, ...], *axes: int) -> Transposed:
    """A value of `names`, for an array that the source stores with its axes in another order.

    Args:
        name: the name here, or a tuple of names, among which the transposed array is divided along its first axis.
        axes: the order of the axes, as for `numpy.transpose`. Without it, the array is a matrix, and its two axes change
            places.

    Example:
        >>> transposed("blocks.*.mlp.fc.weight")  # of GPT-2's Conv1D, which stores (in, out)
        Transposed(name='blocks.*.mlp.fc.weight', axes=None)
        >>> transposed("conv.weight", 3, 2, 0, 1)  # of flax's Conv, which stores (height, width, in, out)
        Transposed(name='conv.weight', axes=(3, 2, 0, 1))
    """
    return Transposed(name, axes or None)


@dataclass
class Renamed:
    """Arrays by our names, and where each comes from."""

    arrays: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)  # their names, for each of ours
    problems: list[str] = field(default_factory=list)
    idle: list[Any] = field(default_factory=list)  # the keys that match no name

    def without(self, keep: Keep) -> Renamed:
        """Return the arrays whose names are not to be kept."""
        kept = Globs(as_globs(keep))
        return Renamed(
            {name: array for name, array in self.arrays.items() if not kept.matching(name)},
            self.sources,
            idle=self.idle,
        )

    def notes(self, here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
        """Return what a reader of an error wants to know. `here` and `there` are shapes by our names."""
        lines = []
        for name in self.arrays:
            ours, theirs = (None if shapes.get(name) is None else tuple(shapes[name]) for shapes in (here, there))
            if ours != theirs and self.sources[name] != (name,):
                lines.append(f"{name} comes from {', '.join(self.sources[name])}")
            if ours is not None and ours != theirs and len(ours) == 2 and ours[::-1] == theirs:
                lines.append(f"{name} has its axes the other way round: put transposed({name!r}) into `names`")
        return lines + [f"the key {key!r} of `names` matches no name" for key in self.idle]


def as_globs(keep: Keep) -> list[str]:
    """`keep` as a list. A string is one glob."""
    return [keep] if isinstance(keep, str) else list(keep)


class _Rule(NamedTuple):
    key: Any
    patterns: tuple[re.Pattern[str], ...]
    names: tuple[str, ...] | None  # ours; None leaves the arrays out
    axes: tuple[int, ...] | None
    transposes: bool


class Operations(NamedTuple):
    """What a library does with its arrays."""

    permute: Callable[[Any, tuple[int, ...]], Any]
    join: Callable[[list[Any]], Any]  # along the first axis
    describe: Callable[[Any], str]  # as `float32[3, 4]`
    unreadable: Callable[[Any], str | None] = lambda array: None


def renamed(names: Names | None, given: Mapping[str, Any], operations: Operations) -> Renamed:
    """Return `given` under our names.

    Args:
        names: the table. None keeps all names.
        given: arrays by their names.

    Raises:
        TypeError: if a key or a value of `names` has another type.
        ValueError: if a key and its value have different numbers of `*`.
    """
    if names is None:
        return Renamed(dict(given), {name: (name,) for name in given})
    if not isinstance(names, Mapping):
        raise TypeError(f"names is a dict of their names and ours; got {names!r}")
    rules = [_rule(key, value) for key, value in names.items()]
    groups: dict[Any, dict[int, str]] = {}  # by rule and by what `*` stands for, the name that each pattern matches
    for name in given:
        place, text, part = _group(rules, name)
        groups.setdefault((place, text), {})[part] = name
    found = Renamed(idle=[rule.key for i, rule in enumerate(rules) if not any(place == i for place, _ in groups)])
    for (place, text), parts in groups.items():
        try:
            if place is None:
                _add(found, [parts[0]], [given[parts[0]]], (parts[0],))
            elif ours := _ours(rules[place], text):
                theirs = _sources(rules[place], text, parts)
                arrays = _made(rules[place], ours, {name: given[name] for name in theirs}, operations)
                _add(found, ours, arrays, theirs)
        except ValueError as error:
            found.problems.append(str(error))
    return found


def _rule(key: Any, value: Any) -> _Rule:
    """Check an item of `names`."""
    globs = key if isinstance(key, tuple) else (key,)
    target = value.name if isinstance(value, Transposed) else value
    ours = target if isinstance(target, tuple) or target is None else (target,)
    if not globs or not all(isinstance(name, str) for name in (*globs, *(ours or ()))) or ours == ():
        raise TypeError(
            "names has a name or a tuple of names as each key, and as each value a name, a tuple of names,"
            f" transposed(name), or None; got {key!r}: {value!r}"
        )
    if any(re.search(r"[?\[]", name) for name in globs):
        raise ValueError(f"the key {key!r} of names has `?` or `[`: in a key, only `*` stands for something")
    counts = {name.count("*") for name in (*globs, *(ours or globs))}
    if len(counts) > 1 and ours is not None:
        raise ValueError(
            f"names has {key!r}: {target!r}, with different numbers of `*`: each `*` of a name here stands for the text that"
            " the `*` in its place in their name stands for"
        )
    patterns = tuple(re.compile("(.*)".join(map(re.escape, name.split("*"))), re.DOTALL) for name in globs)
    return _Rule(key, patterns, ours, getattr(value, "axes", None), isinstance(value, Transposed))


def _group(rules: list[_Rule], name: str) -> tuple[int | None, tuple[str, ...], int]:
    """Return the place of the first rule that matches a name, what `*` stands for, and which pattern of the rule it is."""
    for place, rule in enumerate(rules):
        for part, pattern in enumerate(rule.patterns):
            if match := pattern.fullmatch(name):
                return place, match.groups(), part
    return None, (name,), 0


def _filled(name: str, text: Sequence[str]) -> str:
    pieces = name.split("*")
    return pieces[0] + "".join(said + piece for said, piece in zip(text, pieces[1:], strict=True))


def _ours(rule: _Rule, text: tuple[str, ...]) -> list[str]:
    return [_filled(name, text) for name in rule.names or ()]


def _sources(rule: _Rule, text: tuple[str, ...], parts: Mapping[int, str]) -> tuple[str, ...]:
    """Return the names that a rule joins, in its order. Raises ValueError if one is missing."""
    globs = rule.key if isinstance(rule.key, tuple) else (rule.key,)
    lacking = [_filled(glob, text) for part, glob in enumerate(globs) if part not in parts]
    if lacking:
        ours = ", ".join(_ours(rule, text))
        raise ValueError(f"{ours} is joined from {len(globs)} arrays, without {', '.join(lacking)}")
    return tuple(parts[part] for part in range(len(globs)))


def _made(rule: _Rule, ours: list[str], given: Mapping[str, Any], do: Operations) -> list[Any]:
    """Return the arrays of a rule: transposed, then joined, then divided. Raises ValueError if they do not fit."""
    arrays = list(given.values())
    if not rule.transposes and len(arrays) == len(ours) == 1:
        return arrays
    unreadable = [f"{name}: {said}" for name, array in given.items() if (said := do.unreadable(array))]
    if unreadable:
        raise ValueError("; ".join(unreadable))
    names, listed = ", ".join(ours), ", ".join(f"{name} {do.describe(array)}" for name, array in given.items())
    if rule.transposes:
        axes = rule.axes or (1, 0)
        if sorted(axes) != list(range(len(axes))) or any(array.ndim != len(axes) for array in arrays):
            raise ValueError(f"transposed({names}), with the axes {axes}, does not fit {listed}")
        arrays = [do.permute(array, axes) for array in arrays]
    if len(arrays) > 1:
        if len({(str(array.dtype), tuple(array.shape[1:])) for array in arrays}) > 1 or not arrays[0].ndim:
            raise ValueError(f"{names} cannot be joined along the first axis: {listed}")
        arrays = [do.join(arrays)]
    (whole,) = arrays
    if whole.ndim == 0 or whole.shape[0] % len(ours):
        raise ValueError(f"{listed} cannot be divided among {names}")
    size = whole.shape[0] // len(ours)
    return [whole[i * size : (i + 1) * size] for i in range(len(ours))]


def _add(found: Renamed, ours: list[str], arrays: list[Any], theirs: tuple[str, ...]) -> None:
    for name, array in zip(ours, arrays, strict=True):
        if name in found.arrays:
            earlier = ", ".join(found.sources[name])
            raise ValueError(f"{name} is made twice: from {earlier}, and from {', '.join(theirs)}")
        found.arrays[name], found.sources[name] = array, theirs
