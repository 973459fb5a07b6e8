"""What the modules around other libraries' modules share: cells with dotted names, and cells of a pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

import minitorch_jax as mt
from minitorch_jax.engine.arguments import Fixed
from minitorch_jax.module.parameter import as_array, declared, encode_checked
from minitorch_jax.state import access, births
from minitorch_jax.state import frame as frames
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.containers import describe
from minitorch_jax.state.encoding import Encoding
from minitorch_jax.state.pytree import Builder, build
from minitorch_jax.state.structure import changed
from minitorch_jax.state.walk import Node, Spec, Walker, join, walk_of

_config: Any = jax.config


class Bridge(mt.Module):
    """Base of modules whose parameters and buffers are another library's, under that library's dotted paths."""

    __slots__ = ()
    _holds = "a module"  # in messages: what it is a module around
    _inside = "module"  # the attribute that gives it

    def _set_mode(self, training: bool) -> None:
        """Put what it holds in training or evaluation mode."""

    def __setattr__(self, name: str, value: Any) -> None:
        label = f"{type(self).__name__}.{name}"
        if name == "training":
            own = frames.local.frame is not None and id(self) in frames.local.frame.own
            access.check_restructurable(self._birth, label, "was changed", own)
            self._set_mode(bool(value))
            super().__setattr__(name, bool(value))
        elif getattr(getattr(type(self), name, None), "fset", None) is not None:  # a property that can be assigned
            object.__setattr__(self, name, value)
        elif name in self._cells and not isinstance(value, mt.Parameter | mt.Buffer):
            super().__setattr__(name, value)
        else:
            raise AttributeError(
                f"{label}: {type(self).__name__} holds {self._holds} and takes no attributes of its own. Change that"
                f" (`.{self._inside}`), or write a Module that holds both."
            )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__}.{name} cannot be deleted: {type(self).__name__} holds {self._holds}, and nothing"
            f" else. Change that (`.{self._inside}`)."
        )

    def tie(self, name: str, other: mt.Module, other_name: str) -> NoReturn:
        """Raise TypeError: tie parameters in the library that the module is of."""
        raise TypeError(
            f"{type(self).__name__}.{name} cannot be tied: it belongs to {self._holds}. Share it there, before it is"
            " wrapped."
        )

    def _holder(self, path: str) -> tuple[mt.Module, str]:
        return (self, path) if path in self._cells else super()._holder(path)


def problems_of(path: str, value: Any, trained: bool) -> str | None:
    """What keeps `value` from being in a cell, as a parameter or as a buffer."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape") or isinstance(value, jax.ShapeDtypeStruct):
        return f"  {path} is {value!r}, which is no array"
    if trained and not jnp.issubdtype(value.dtype, jnp.floating):
        return f"  {path} is {describe(value)}, which gradients cannot train: only floating arrays can be parameters"
    if value.dtype == np.float64 and not _config.jax_enable_x64:
        return f"  {path} is float64, which JAX would cut to float32: convert it, or set jax_enable_x64"
    return None


def hidden(path: str, module: mt.Module) -> str:
    """What is wrong with one of our Modules within a module of another library, whose parameters nobody would find."""
    return (
        f"  {path} is a Module of minitorch_jax ({type(module).__name__}): write a Module that holds both, or convert it"
        " first (`to_flax`, `to_equinox`)"
    )


def without_numbers(tree: Any) -> Any:
    """A pytree with arrays in the place of Python's numbers."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, bool | int | float | complex) else x, tree)


def new_cell(value: Any, kind: str, trainable: bool = False) -> Cell:
    """A cell for an array of another library's module, which goes on holding it."""
    value = as_array(value)
    encoding = None if kind == "parameter" else Encoding.of(value)
    value = value if encoding is None else encoding.encode(value)
    birth = births.birth_here()
    return Cell(value, kind, trainable=trainable, lent=True, encoding=encoding, birth=birth)


# -- pytrees ----------------------------------------------------------------------------------------------------------


class LeafLayout(NamedTuple):
    """A pytree without its arrays: of each leaf the name of its cell, or the static value that it is."""

    treedef: Any
    leaves: tuple[str | Fixed, ...]

    def build(self, values: Callable[[str], Any]) -> Any:
        """The pytree, with arrays by name."""
        leaves = [leaf.value if isinstance(leaf, Fixed) else values(leaf) for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)

    def __deepcopy__(self, memo: Any) -> LeafLayout:
        return self

    def __reduce__(self) -> Any:  # a treedef cannot be pickled
        return _unpickle_layout, (self.build(Name),)


class Name(str):
    """Stands for an array where a pytree is pickled without them."""

    __slots__ = ()


def _unpickle_layout(tree: Any) -> LeafLayout:
    leaves, treedef = jax.tree.flatten(tree)
    return LeafLayout(treedef, tuple([str(leaf) if isinstance(leaf, Name) else Fixed(leaf) for leaf in leaves]))


def is_array(value: Any) -> bool:
    """Whether a leaf has a cell."""
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def layout_of(tree: Any, prefix: str) -> tuple[LeafLayout, dict[str, Any], list[str]]:
    """A pytree's layout, its arrays by path, and what is wrong with its static leaves."""
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


class TreeHolder(Bridge):
    """Base of modules around pytrees of arrays that cannot change: the arrays are in cells, the rest is static."""

    __slots__ = ("_layouts",)
    _layouts: dict[str, LeafLayout]  # of each part
    _prefixes: Mapping[str, str] = {}  # of each part: what its paths begin with

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        object.__setattr__(self, "_layouts", {})
        return self

    def _kinds(self, part: str, tree: Any, names: Sequence[str]) -> dict[str, str]:
        """Of the arrays of a part: "parameter", "frozen", or "buffer"."""
        raise NotImplementedError

    def _get(self, part: str) -> Any:
        """A part with the arrays as they are now."""
        return self._layouts[part].build(lambda name: access.read(self._cells[name], self))

    def _set(self, part: str, tree: Any) -> None:
        """Write a part's arrays; where its structure is another one, take that over."""
        layout, arrays, problems = layout_of(tree, self._prefixes[part])
        label = f"{type(self).__name__}.{part}"
        if not problems and layout == self._layouts.get(part):
            self._write(arrays, label)
            self._layouts[part] = layout  # equal, but 1 may be True now
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
                kind = "frozen" if kind == "parameter" else kind  # as it was, by its name
            problem = problems_of(name, value, kind != "buffer")
            if problem is not None:
                problems.append(problem)
            elif not problems:
                new[name] = new_cell(value, "buffer" if kind == "buffer" else "parameter", kind == "parameter")
        if problems:
            listed = "\n".join(problems)
            raise ValueError(f"{label} cannot be held; nothing has changed:\n{listed}")
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
        """Whether an array may take the place of the one that has its name."""
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
                f"{label} was given arrays that do not fit; nothing has changed. For other shapes or dtypes alone make a"
                f" new {type(self).__name__}:\n{listed}"
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


# -- the other way ----------------------------------------------------------------------------------------------------


def decoded(cell: Cell) -> Any:
    """A cell's value as its readers see it, without lending it."""
    return cell.value if cell.encoding is None else cell.encoding.decode(cell.value)


def run_copy(
    spec: Spec, values: Mapping[str, Any], training: bool, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Call a module made anew of its structure and arrays by path; gives the result, and the arrays that it changed.

    `training` is the mode, if it is another one than the structure has; random layers draw from `key`, if there is one.
    """
    encodings = [encoding for _, _, encoding in spec.facts]
    leaves = [
        values[path] if encoding is None else encoding.encode(values[path])
        for path, encoding in zip(spec.paths, encodings, strict=True)
    ]
    module = build(spec, leaves, births.birth_here())
    if module.training != training:
        module.train(training)
    with nullcontext() if key is None else mt.rng(key):
        out = module(*args, **kwargs)
    ends = zip(spec.paths, walk_of(module).cells, leaves, strict=True)
    return out, {path: decoded(cell) for path, cell, leaf in ends if cell.value is not leaf}
