"""The structure of an nnx module: its graph and static attributes, and how changes of them are noticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.nnx import graph
from flax.nnx.pytreelib import PytreeState
from jax.tree_util import keystr

import minitorch_jax as mt
from minitorch_jax.state.errors import TraceError
from minitorch_jax.state.walk import join

from .._identity import ByIdentity
from .._wrapper import hidden
from .variable import Held, get_slot


class Entry(NamedTuple):
    """A leaf of an nnx module's graph: a Variable, whose cells have these names, or a constant."""

    path: str
    names: tuple[str, ...]
    treedef: Any
    constant: ByIdentity | None  # compared by identity; None for a Variable

    def value(self, values: Mapping[str, Any]) -> Any:
        if self.constant is not None:
            return self.constant.value
        return jax.tree.unflatten(self.treedef, [values[name] for name in self.names])


class Graph(NamedTuple):
    """The static part of an nnx module."""

    graphdef: Any
    entries: tuple[Entry, ...]
    statics: tuple[tuple[str, type, Any], ...]  # by path, with their types, since 1 == True
    trainable: Any

    def merged(self, values: Mapping[str, Any]) -> Any:
        """A new nnx module, made in this trace, with these values (by name)."""
        return nnx.merge(self.graphdef, [entry.value(values) for entry in self.entries])

    def call(self, values: Mapping[str, Any], method: str, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Call a method of a new module. Returns the result, and the values that the call changed."""
        net = self.merged(values)
        out = getattr(net, method)(*args, **kwargs)
        graphdef, leaves = flattened(net)
        now = {dotted(path): leaf for path, leaf in leaves}
        changed: dict[str, Any] = {}
        wrong = [path for path in now if path not in {entry.path for entry in self.entries}]
        for entry in self.entries:
            leaf = now.get(entry.path)
            if entry.constant is not None:
                wrong += [entry.path] if leaf is not entry.constant.value else []
                continue
            parts, treedef = jax.tree.flatten(get_slot(leaf) if isinstance(leaf, nnx.Variable) else leaf)
            if leaf is None or treedef != entry.treedef:
                wrong.append(entry.path)
                continue
            new = zip(entry.names, parts, strict=True)
            changed |= {name: part for name, part in new if part is not values[name]}
        if wrong or graphdef != self.graphdef:
            before, after = list(self.statics), statics_of(net)
            wrong += [item[0] for item in (*before, *after) if item not in before or item not in after]
            listed = ", ".join(dict.fromkeys(wrong)) or "its structure"
            raise TraceError(
                f"{type(net).__name__}.{method} changed {listed} inside compiled code. That would happen at the first call"
                " only: later calls run the compiled program. Change it between calls. If it is an array, declare it as an"
                " nnx.Variable in `__init__`."
            )
        return out, changed

    def __deepcopy__(self, memo: Any) -> Graph:
        return self

    def __reduce__(self) -> Any:  # the types in `statics` are left out: that of a function cannot be pickled
        return _unpickle_graph, (self.graphdef, self.entries, [(p, v) for p, _, v in self.statics], self.trainable)


def _unpickle_graph(graphdef: Any, entries: tuple[Entry, ...], statics: list[tuple[str, Any]], trainable: Any) -> Graph:
    return Graph(graphdef, entries, tuple([(path, type(value), value) for path, value in statics]), trainable)


def dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def flattened(net: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """The graphdef of an nnx module, and its Variables and arrays with their paths. Each appears once."""
    graphdef, state = graph.flatten(net, graph=True)
    return graphdef, list(state)


def statics_of(net: Any) -> list[tuple[str, type, Any]]:
    """The static attributes of all parts of an nnx module, by path."""
    found = []
    for path, value in nnx.iter_graph(net, graph=True):
        is_static = not isinstance(value, nnx.Variable | jax.Array | np.ndarray) and not graph.is_node(value)
        if is_static and not any(str(part).startswith("_pytree__") for part in path):
            found.append((dotted(path), type(value), value))
    return found


def modules_of_ours(net: Any) -> list[str]:
    """A problem for each of our Modules in an nnx module, which would hide its arrays."""
    parts = nnx.iter_graph(net, graph=True)
    return [hidden(dotted(path), value) for path, value in parts if isinstance(value, mt.Module)]


def check_hashable(net: Any, graphdef: Any) -> list[str]:
    """The static attributes that have no hash, as problems. Programs are looked up by the graphdef's hash."""
    try:
        hash(graphdef)
    except TypeError:
        wrong = []
        for path, value in nnx.iter_graph(net, graph=True):
            try:
                hash(value)
            except TypeError:
                is_data = isinstance(value, jax.Array | np.ndarray) or nnx.is_data(value)
                if not is_data and not any(nnx.is_data(leaf) for leaf in jax.tree.leaves(value, is_leaf=nnx.is_data)):
                    wrong.append(f"  {dotted(path)} is a {type(value).__name__}, a static attribute without a hash")
        return wrong or ["  a static attribute has no hash"]
    return []


def entry_of(path: Any, leaf: Any, held: Held | None) -> Entry:
    """The entry of a leaf."""
    name = dotted(path)
    if held is None:
        return Entry(name, (), None, ByIdentity(leaf))
    parts = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(held.treedef, range(held.treedef.num_leaves)))[0]
    names = tuple([join(name, keystr(inner, simple=True, separator=".")) if inner else name for inner, _ in parts])
    return Entry(name, names, held.treedef, None)


class Seen:
    """A record of all attributes of all parts of an nnx module. `is_same` compares it with the module as it is now."""

    def __init__(self, net: Any) -> None:
        parts = [value for _, value in nnx.iter_graph(net, graph=True)]
        self._variables = [part for part in parts if isinstance(part, nnx.Variable)]
        nodes = [part for part in parts if not isinstance(part, nnx.Variable) and graph.is_node(part)]
        self._tables = [vars(node) for node in nodes if hasattr(node, "__dict__")]
        self._tables += [node for node in nodes if isinstance(node, dict)]
        self._lists = [node for node in nodes if isinstance(node, list)]
        self._then = self._now()

    def _now(self) -> list[Any]:
        metadata = list(map(_get_metadata, self._variables))
        tables = [*self._tables, *metadata]
        inside = chain(tables, map(dict.values, tables), self._lists)
        return [*chain.from_iterable(inside), *map(get_slot, self._variables)]

    def is_same(self) -> bool:
        now, then = self._now(), self._then
        if len(now) != len(then):
            return False
        if not all(map(is_, now, then)):
            if not all(map(_are_alike, now, then)):
                return False
            self._then = now
        return True


def _are_alike(now: Any, then: Any) -> bool:
    """True if an attribute is the same object as before. nnx's transforms replace `PytreeState`s and equal strings."""
    return now is then or (type(now) is type(then) and (type(now) is PytreeState or (type(now) is str and now == then)))


_get_metadata = attrgetter("_var_metadata")
