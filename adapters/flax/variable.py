"""The Variables of an nnx module as cells, and what else such a module is made of.

A Variable that was adopted has its value in cells: where it keeps that otherwise, it has a `Held`. So there are not two
copies to keep the same: whoever reads or changes the Variable, nnx's own functions included, reads or changes the cells,
and all that is promised of them holds for it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.nnx import graph, tracers
from flax.nnx.pytreelib import PytreeState
from jax.tree_util import keystr

import minitorch_jax as mt
from minitorch_jax.module.parameter import encode_checked
from minitorch_jax.state import access
from minitorch_jax.state import frame as frames
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.errors import TraceError
from minitorch_jax.state.lending import lend
from minitorch_jax.state.structure import changed
from minitorch_jax.state.walk import join

from ._bridge import decoded, hidden, new_cell, problems_of, without_numbers
from ._identity import Same

# -- Variables --------------------------------------------------------------------------------------------------------

_slot: Any = vars(nnx.Variable)["_raw_value"]
get_slot: Callable[[Any], Any] = _slot.__get__  # what a Variable keeps itself: a value, or a Held
_set_slot: Callable[[Any, Any], None] = _slot.__set__
_LEAF = jax.tree.structure(0)


def _read(variable: Any) -> Any:
    kept = get_slot(variable)
    return kept.read(variable) if type(kept) is Held else kept


def _write(variable: Any, value: Any) -> None:
    try:
        kept = get_slot(variable)
    except AttributeError:  # it is being made
        kept = None
    if type(kept) is Held:
        kept.write(variable, value)
    else:
        _set_slot(variable, value)


def _install() -> None:
    """Have Variables look for a Held.

    A subclass for those that are adopted would leave flax's class alone, but not them: JAX tells the nodes of pytrees
    apart by their exact type, so their states would not fit those of other Variables, in `jax.tree.map` or a `lax.scan`.
    """
    if vars(nnx.Variable)["_raw_value"] is _slot:
        type.__setattr__(nnx.Variable, "_raw_value", property(_read, _write))


class _Anywhere(tracers.TraceState):
    """The trace state of an adopted Variable: in which traces it may be changed, its cells know."""

    __slots__ = ()

    def __init__(self, before: Any) -> None:
        self._jax_trace = before._jax_trace

    def is_valid(self) -> bool:
        return True

    def __reduce__(self) -> Any:
        return tracers.TraceState, ()


class Held:
    """What an adopted Variable has in place of its value: one cell, or those of the leaves of a pytree."""

    __slots__ = ("cells", "treedef", "label", "owners", "before")

    def __init__(self, found: list[Cell], treedef: Any, label: str) -> None:
        self.cells, self.treedef, self.label = found, treedef, label
        self.owners: list[weakref.ref[Any]] = []  # the modules around it: while there is none, it is a plain Variable
        self.before: Any = None  # its trace state

    def owner(self) -> Any:
        for reference in self.owners:
            if (found := reference()) is not None:
                return found
        return None

    def hold(self, variable: Any, owner: Any) -> None:
        """Keep a Variable's value from now on."""
        _install()
        if get_slot(variable) is not self:
            self.before = variable._trace_state
            object.__setattr__(variable, "_trace_state", _Anywhere(self.before))
            _set_slot(variable, self)
        self.owners = [reference for reference in self.owners if reference() not in (None, owner)]
        self.owners.append(weakref.ref(owner))

    def let_go(self, variable: Any, value: Any) -> None:
        """Make it a Variable like others again."""
        _set_slot(variable, value)
        object.__setattr__(variable, "_trace_state", self.before)
        for owner in [found for reference in self.owners if (found := reference()) is not None]:
            changed(owner)

    def read(self, variable: Any) -> Any:
        owner = self.owner()
        if owner is not None:
            return jax.tree.unflatten(self.treedef, [access.read(cell, owner) for cell in self.cells])
        deque(map(lend, self.cells), 0)
        value = jax.tree.unflatten(self.treedef, list(map(decoded, self.cells)))
        self.let_go(variable, value)
        return value

    def write(self, variable: Any, value: Any) -> None:
        owner = self.owner()
        if owner is None:
            self.read(variable)  # makes it a Variable like others again, in which flax checks what is written
            return variable.set_raw_value(value)
        try:
            new = self.checked(value)
        except (ValueError, TypeError):
            # nnx does this for a while (`split_rngs`); for parameters it would be a loss of the optimizer's state
            if not frames.is_eager() or any(cell.kind == "parameter" for cell in self.cells):
                raise
            return self.let_go(variable, value)
        for cell, leaf in zip(self.cells, new, strict=True):
            access.write(cell, leaf, self.label, owner)

    def checked(self, value: Any) -> list[Any]:
        """What the cells would hold for a value, if it fits."""
        leaves, treedef = jax.tree.flatten(value)
        if treedef != self.treedef:
            raise ValueError(
                f"{self.label} holds {_structure(self.treedef)}, and was given {_structure(treedef)}. Put another Variable in"
                " its place."
            )
        return [encode_checked(cell, leaf, self.label) for cell, leaf in zip(self.cells, leaves, strict=True)]


def _structure(treedef: Any) -> str:
    return "one array" if treedef == _LEAF else str(treedef)


def adopt(variable: Any, path: str, owner: Any, known: Held | None, trained: bool) -> tuple[Held, list[str]]:
    """The Held for a Variable, and what is wrong with it; the Variable itself is as it was.

    `known` is the one that it had with this owner. `trained` is for parameters that are new here.
    """
    if variable.hijax or variable.ref:
        return Held([], _LEAF, path), [f"  {path} is a hijax Variable or a reference, which keeps its value elsewhere"]
    kept = get_slot(variable)
    if type(kept) is Held and kept.owner() is not None:
        return kept, []
    value = _read(variable)
    if known is not None:
        try:
            new = known.checked(value)
        except (ValueError, TypeError):
            pass
        else:
            for cell, leaf in zip(known.cells, new, strict=True):
                access.write(cell, leaf, known.label, owner)
            return known, []
    is_parameter = isinstance(variable, nnx.Param)
    leaves, treedef = jax.tree.flatten(without_numbers(value))
    found = [problems_of(path, leaf, is_parameter) for leaf in leaves]
    problems = [problem for problem in found if problem is not None]
    kind = "parameter" if is_parameter else "buffer"
    made = [] if problems else [new_cell(leaf, kind, is_parameter and trained) for leaf in leaves]
    return Held(made, treedef, f"{type(owner).__name__}.{path}"), problems


# -- modules ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A leaf of an nnx module's graph: a Variable with its cells by name, or a constant."""

    path: str
    names: tuple[str, ...]
    treedef: Any
    constant: Same | None  # static, and the same if it is the same object

    def value(self, values: Mapping[str, Any]) -> Any:
        if self.constant is not None:
            return self.constant.value
        return jax.tree.unflatten(self.treedef, [values[name] for name in self.names])


class Graph(NamedTuple):
    """All that is static of an nnx module."""

    graphdef: Any
    entries: tuple[Entry, ...]
    statics: tuple[tuple[str, type, Any], ...]  # by path, with their types, as 1 == True
    trainable: Any

    def merged(self, values: Mapping[str, Any]) -> Any:
        """A new nnx module, made in this trace, with values by name."""
        return nnx.merge(self.graphdef, [entry.value(values) for entry in self.entries])

    def call(self, values: Mapping[str, Any], method: str, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Call a method of a new module; gives the result, and the values that are other ones now."""
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
                f"{type(net).__name__}.{method} changed {listed} inside compiled code: that would happen at the first call"
                " only, since later ones run the compiled program. Change it between calls, or, if it is an array that"
                " changes, declare it in `__init__` as an nnx.Variable."
            )
        return out, changed

    def __deepcopy__(self, memo: Any) -> Graph:
        return self

    def __reduce__(self) -> Any:  # the type of a function cannot be pickled
        return _unpickle_graph, (self.graphdef, self.entries, [(p, v) for p, _, v in self.statics], self.trainable)


def _unpickle_graph(graphdef: Any, entries: tuple[Entry, ...], statics: list[tuple[str, Any]], trainable: Any) -> Graph:
    return Graph(graphdef, entries, tuple([(path, type(value), value) for path, value in statics]), trainable)


def dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def flattened(net: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """The graphdef of an nnx module, and its Variables and arrays with their paths, each once."""
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
    """The Modules in an nnx module, whose arrays it would hide."""
    parts = nnx.iter_graph(net, graph=True)
    return [hidden(dotted(path), value) for path, value in parts if isinstance(value, mt.Module)]


def check_hashable(net: Any, graphdef: Any) -> list[str]:
    """What keeps a graphdef from being part of what a program is found by."""
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
    """The description of a leaf."""
    name = dotted(path)
    if held is None:
        return Entry(name, (), None, Same(leaf))
    parts = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(held.treedef, range(held.treedef.num_leaves)))[0]
    names = tuple([join(name, keystr(inner, simple=True, separator=".")) if inner else name for inner, _ in parts])
    return Entry(name, names, held.treedef, None)


class Seen:
    """All attributes of all parts of an nnx module as they were: any change of one is seen, at the price of a comparison."""

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
    """Whether two attributes are one, but for what nnx's transforms make anew: a node's own record, and its names."""
    return now is then or (type(now) is type(then) and (type(now) is PytreeState or (type(now) is str and now == then)))


_get_metadata = attrgetter("_var_metadata")
