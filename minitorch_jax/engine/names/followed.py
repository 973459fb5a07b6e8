"""What a search of the values that a function reads by name has found: a key of what is static, and where JAX arrays are.

The search itself is in `values.py`.
"""

from __future__ import annotations

import pickle
import random
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .bytecode import Names
from .roots import Slices
from .watch import Place, Same, getter, items


class Followed:
    """What a search found."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}  # by path: what is static there
        self.places: list[Place] = []  # to be watched
        self.arrays: dict[str, Place] = {}  # where JAX arrays are
        self.fixed: set[int] = set()  # ids of arrays that a rule of the user's for a derivative reads
        self.long: dict[str, Any] = {}  # containers that are too long to look at each item
        self.large: dict[str, Any] = {}  # NumPy arrays of which only the identity counts
        self.generators: dict[str, Any] = {}  # of random numbers
        self.cut: list[str] = []  # where the search ended
        self.slices = Slices()  # of the places and the arrays, by root
        self.num_by_name = 0  # of the places, the first ones: those not found by way of a module or optimizer
        self.paths_of_objects: set[str] = set()  # those of the arrays that were found by way of one
        self.names = Names()

    @property
    def key(self) -> tuple[Any, ...]:
        """What a program is compiled for."""
        return tuple(self.entries.items())

    def changed_by(self, after: Followed) -> set[str]:
        """The paths at which the code itself has changed something, if `after` was found when it had run.

        What changed without a store in the code was changed by another thread.
        """
        differing = [path for path, entry in self.entries.items() if after.entries.get(path) != entry]
        differing += [path for path in after.entries if path not in self.entries]
        return {path for path in differing if self._stores_to(path, after)}

    def _stores_to(self, path: str, after: Followed) -> bool:
        name = path.rpartition(".")[2]
        plain = isinstance(self.entries.get(path), tuple) and self.entries[path][0] in (bool, int, float, str)
        stores = self.names.stores | after.names.stores
        return not plain or name.endswith("]") or name in stores or "setattr" in self.names.globals

    def named(self, constants: Iterable[Any], inner: set[int]) -> tuple[tuple[str, ...], ...]:
        """The paths of arrays among a trace's constants, those of one array together; not of `inner` ones.

        Also finds them in the long containers.
        """
        wanted = {id(array) for array in constants if isinstance(array, jax.Array)} - inner - self.fixed
        paths: dict[int, list[str]] = {}
        for path, place in self.arrays.items():
            if id(place.was) in wanted:
                paths.setdefault(id(place.was), []).append(path)
        left = wanted - paths.keys()
        for path, container in self.long.items() if left else ():
            for key, value in items(container):
                if id(value) in left:
                    found = f"{path}[{key!r}]"
                    self.arrays[found] = Place(getter(container), container, key, value)
                    paths.setdefault(id(value), []).append(found)
        return tuple(map(tuple, paths.values()))

    def others(self, named: Iterable[Sequence[str]]) -> dict[str, weakref.ref[Any]]:
        """The arrays that are no inputs, by path: whatever the code made of them is part of the program."""
        inputs = {path for group in named for path in group}
        return {path: weakref.ref(place.was) for path, place in self.arrays.items() if path not in inputs}

    def place_of(self, path: str) -> Place:
        """Where an array is; KeyError if there is none at this path."""
        if path not in self.arrays:
            for long, container in self.long.items():
                for key, value in items(container) if path.startswith(f"{long}[") else ():
                    if f"{long}[{key!r}]" == path and isinstance(value, jax.Array):
                        self.arrays[path] = Place(getter(container), container, key, value)
        return self.arrays[path]

    def fits(self, named: Iterable[Sequence[str]], others: dict[str, weakref.ref[Any]]) -> bool:
        """True if the arrays are those that a program takes: equal paths hold one array, no input another."""
        try:
            groups = [[self.place_of(path).was for path in group] for group in named]
        except KeyError:
            return False
        if any(array is not group[0] for group in groups for array in group):
            return False
        return all(path in self.arrays and self.arrays[path].was is ref() for path, ref in others.items())

    def is_value(self, path: str) -> bool:
        """True for a plain value or a NumPy array, which could be an argument instead."""
        entry = self.entries[path]
        return path in self.arrays or (
            isinstance(entry, tuple) and (isinstance(entry[0], type) or entry[0] == "ndarray")
        )

    def describe(self, path: str) -> str:
        """What is at a path, for a message."""
        entry = self.entries.get(path)
        if path in self.arrays:
            return f"another array, {_array(self.arrays[path].was)}"
        if not isinstance(entry, tuple):
            return str(entry)
        if entry[0] == "ndarray":
            return (
                f"a NumPy array, {_array(entry[1])}" if len(entry) == 2 else f"a NumPy array with {entry[3][:8].hex()}…"
            )
        if entry[0] == "container":
            return f"a {entry[1].__name__} of {entry[2] if isinstance(entry[2], int) else len(entry[2])}"
        if entry[0] in _LABELS:
            return _LABELS[entry[0]]
        return str(entry[-1]) if isinstance(entry[-1], str) else repr(entry[-1])


_LABELS = {"function": "other code", "instance": "another object", "opaque": "another object", "class": "another class"}


def _array(array: Any) -> str:
    array = array._get() if isinstance(array, Same) else array
    return "" if array is None else f"{array.dtype}[{','.join(map(str, array.shape))}]"


def random_state(generators: dict[str, Any]) -> dict[str, Any]:
    """The states of generators of random numbers, and of the two global ones, to be compared."""
    states: dict[str, Any] = {"np.random": np.random.get_state(), "random": random.getstate()}  # noqa: NPY002
    for path, generator in generators.items():
        if isinstance(generator, np.random.Generator):
            states[path] = generator.bit_generator.state
        else:
            states[path] = (
                generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()
            )
    return {name: pickle.dumps(state) for name, state in states.items()}
