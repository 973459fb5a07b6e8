"""Base of the Modules that wrap an immutable pytree: its arrays are in cells, the rest is static."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr

import minitorch_jax as mt
from minitorch_jax.engine.arguments import Fixed
from minitorch_jax.module.parameter import declared, encode_checked
from minitorch_jax.state import access
from minitorch_jax.state import frame as frames
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.pytree import Builder
from minitorch_jax.state.structure import changed
from minitorch_jax.state.walk import Node, Walker, join

from ._wrapper import Wrapper, hidden, new_cell, problems_of


class LeafLayout(NamedTuple):
    """A pytree without its arrays. Each leaf is the name of a cell, or a static value."""

    treedef: Any
    leaves: tuple[str | Fixed, ...]

    def build(self, values: Callable[[str], Any]) -> Any:
        """The pytree, with the array that `values` returns for each name."""
        leaves = [leaf.value if isinstance(leaf, Fixed) else values(leaf) for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)

    def __deepcopy__(self, memo: Any) -> LeafLayout:
        return self

    def __reduce__(self) -> Any:  # a treedef cannot be pickled
        return _unpickle_layout, (self.build(Name),)


class Name(str):
    """The name of an array, in its place in a pickled pytree."""

    __slots__ = ()


def _unpickle_layout(tree: Any) -> LeafLayout:
    leaves, treedef = jax.tree.flatten(tree)
    return LeafLayout(treedef, tuple([str(leaf) if isinstance(leaf, Name) else Fixed(leaf) for leaf in leaves]))


def is_array(value: Any) -> bool:
    """True if a leaf has a cell."""
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def layout_of(tree: Any, prefix: str) -> tuple[LeafLayout, dict[str, Any], list[str]]:
    """A pytree's layout, its arrays by path, and a list of problems with its static leaves."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, mt.Module))
    arrays: dict[str, Any] = {}
    leaves: list[str | Fixed] = []
    problems = []
    for path, leaf in found:
        name = join(prefix, keystr(path, simple=True, separator=".")) or "value"
        if is_array(leaf):
            if name in arrays:
                problems.append(f"  {name} is the name of two arrays")
            arrays[name] = leaf
            leaves.append(name)
            continue
        leaves.append(Fixed(leaf))
        if isinstance(leaf, mt.Module):
            problems.append(hidden(name, leaf))
        try:
            hash(leaf)
        except TypeError:
            problems.append(f"  {name} is a {type(leaf).__name__}, which is neither an array nor hashable")
    try:
        hash(treedef)
    except TypeError as error:
        problems.append(f"  a static field cannot be hashed ({error})")
    return LeafLayout(treedef, tuple(leaves)), arrays, problems


class PytreeWrapper(Wrapper):
    """Base of Modules around immutable pytrees. A wrapper may have several parts, each a pytree."""

    __slots__ = ("_layouts",)
    _layouts: dict[str, LeafLayout]  # by part
    _prefixes: Mapping[str, str] = {}  # by part: the first piece of its paths

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        object.__setattr__(self, "_layouts", {})
        return self

    def _kinds(self, part: str, tree: Any, names: Sequence[str]) -> dict[str, str]:
        """The kind of each array of a part: "parameter", "frozen" or "buffer". Arrays left out are buffers."""
        raise NotImplementedError

    def _get(self, part: str) -> Any:
        """A part, with the current arrays."""
        return self._layouts[part].build(lambda name: access.read(self._cells[name], self))

    def _set(self, part: str, tree: Any) -> None:
        """Write a part's arrays. If its structure is new, replace the structure."""
        layout, arrays, problems = layout_of(tree, self._prefixes[part])
        label = f"{type(self).__name__}.{part}"
        if not problems and layout == self._layouts.get(part):
            self._write(arrays, label)
            self._layouts[part] = layout  # equal to the old one, but 1 may have become True
            return
        own = frames.local.frame is not None and id(self) in frames.local.frame.own
        access.check_restructurable(self._birth, label, "was given another structure", own)
        old = self._names(part)
        kept = {name for name, value in arrays.items() if name in old and self._keeps(name, value)}
        kinds = self._kinds(part, tree, list(arrays)) if not problems else {}
        new: dict[str, Cell] = {}
        for name, value in arrays.items():
            if name in kept:
                continue
            if name in self._cells and name not in old:
                problems.append(f"  {name} is the name of two arrays")
                continue
            kind = kinds.get(name, "buffer")
            if name in old and self._cells[name].kind == "parameter" and not self._cells[name].trainable:
                kind = "frozen" if kind == "parameter" else kind  # a frozen parameter stays frozen under its name
            problem = problems_of(name, value, kind != "buffer")
            if problem is not None:
                problems.append(problem)
            elif not problems:
                new[name] = new_cell(value, "buffer" if kind == "buffer" else "parameter", kind == "parameter")
        if problems:
            listed = "\n".join(problems)
            raise ValueError(
                f"{label} has parts that {type(self).__name__} cannot hold; nothing has changed:\n{listed}"
            )
        self._write({name: arrays[name] for name in arrays if name in kept}, label)
        for name in old - kept:
            del self._cells[name]
        self._cells.update(new)
        self._layouts[part] = layout
        changed(self)

    def _names(self, part: str) -> set[str]:
        layout = self._layouts.get(part)
        return set() if layout is None else {leaf for leaf in layout.leaves if isinstance(leaf, str)}

    def _keeps(self, name: str, value: Any) -> bool:
        """True if an array has the shape and dtype of the cell of its name."""
        old = declared(self._cells[name])
        return hasattr(old, "dtype") and (old.shape, old.dtype) == (value.shape, value.dtype)

    def _write(self, arrays: Mapping[str, Any], label: str) -> None:
        new = []
        problems = []
        for name, value in arrays.items():
            cell = self._cells[name]
            if value is cell.value:
                continue
            try:
                new.append((name, cell, encode_checked(cell, value, name)))
            except (ValueError, TypeError) as error:
                problems.append(f"  {error}")
        if problems:
            listed = "\n".join(problems)
            raise ValueError(
                f"{label} got arrays that do not fit; nothing has changed. To change only shapes or dtypes, make a new"
                f" {type(self).__name__}:\n{listed}"
            )
        for name, cell, _ in new:
            access.check_writable(cell, f"{type(self).__name__}.{name}", self)
        for name, cell, value in new:
            access.write(cell, value, f"{type(self).__name__}.{name}", self)

    def __getstate__(self) -> Any:
        return super().__getstate__(), dict(self._layouts)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        self._layouts.update(state[1])

    def _describe(self, walker: Walker, path: str) -> Node:
        return *super()._describe(walker, path), tuple(self._layouts.items())

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Any:
        yield from super()._statics(payload[:2], path)
        for part, layout in payload[2]:
            yield f"{join(path, part)}", ("static", LeafLayout, layout.treedef)
            for i, leaf in enumerate(layout.leaves):
                if isinstance(leaf, Fixed):
                    yield f"{join(path, part)}[{i}]", ("static", type(leaf.value), leaf.value)

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Any:
        self: Any = super()._rebuild(payload[:2], builder)
        object.__setattr__(self, "_layouts", dict(payload[2]))
        return self
