"""The arguments and results of a compiled function: objects, data, and static values."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import tree_flatten, tree_map, tree_unflatten

from ..runtime.numpy_memory import refuse, refuse_packed
from ..state.static_values import holds_state, is_array


class Fixed:
    """An argument that is static because the user has named it in `static_argnums` or `static_argnames`."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if type(other) is not Fixed or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(self.value)

    def weakened(self, weaken: Any) -> Any:
        """Return its weak form for a cache key, which keeps no functions alive; see `bounded_cache.py`."""
        value = weaken(self.value)
        return self if value is self.value else (Fixed, value)

    def __repr__(self) -> str:
        return repr(self.value)


FLAT = jax.tree.structure(0)  # stands for positional arguments without containers
DATA, OBJECT, STATIC, CONTAINER = "data", "object", "static", "container"
_codes: dict[type, str] = {}


class Abstract(jax.ShapeDtypeStruct):
    """Stands for data when a program is lowered. (In a call, a `jax.ShapeDtypeStruct` is a static value.)"""

    __slots__ = ()


def abstract_data(tree: Any) -> Any:
    """Return arguments with each `jax.ShapeDtypeStruct` marked as data."""

    def mark(leaf: Any) -> Any:
        if type(leaf) is not jax.ShapeDtypeStruct:
            return leaf
        return Abstract(leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.weak_type)

    return tree_map(mark, tree, is_leaf=holds_state)


def _classify(value: Any) -> str:
    """Return how an argument is treated: traced (DATA), lifted cell by cell (OBJECT), flattened (CONTAINER), or STATIC."""
    kind = type(value)
    if holds_state(value):
        code = OBJECT
    elif isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex | Abstract) and kind is not bool:
        code = DATA
    elif is_array(value):
        code = refuse(value)
    else:
        refuse_packed(value)
        code = STATIC if jax.tree_util.all_leaves([value]) else CONTAINER
    if len(_codes) >= 1024:  # a bound, for programs that create new types all the time
        _codes.clear()
    _codes[kind] = code
    return code


class Arguments:
    """The arguments of one call: objects whose cells are lifted, data that is traced, and static values."""

    __slots__ = ("fn", "treedef", "template", "objects", "data")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fn = fn
        template: list[Any] = [_codes.get(type(arg)) or _classify(arg) for arg in args]
        leaves: Sequence[Any] = args
        self.treedef = FLAT
        if CONTAINER in template or kwargs:
            leaves, self.treedef = tree_flatten((args, kwargs), is_leaf=holds_state)
            template = [_codes.get(type(leaf)) or _classify(leaf) for leaf in leaves]
        self.objects: list[Any] = [leaf for leaf, code in zip(leaves, template, strict=True) if code is OBJECT]
        self.data = tuple([leaf for leaf, code in zip(leaves, template, strict=True) if code is DATA])
        if STATIC in template:
            check_hashable(leaves, template)
            template = [
                (type(leaf), leaf) if code is STATIC else code for leaf, code in zip(leaves, template, strict=True)
            ]
        self.template = tuple(template)

    def statics(self) -> list[Any]:
        """Return the static arguments."""
        values = [item[1] for item in self.template if type(item) is tuple]
        return [value.value if type(value) is Fixed else value for value in values]

    def count_data(self, first: int) -> int:
        """Return how many of the data belong to the first positional arguments, of which there are `first`."""
        if self.treedef is not FLAT:
            treedef: Any = self.treedef
            first = sum(child.num_leaves for child in treedef.children()[0].children()[:first])
        return self.template[:first].count(DATA)

    def run(self, data: Sequence[Any]) -> Any:
        """Call the function with `data` in place of the data of this call."""
        objects, arrays = iter(self.objects), iter(data)
        leaves = [
            next(arrays) if item is DATA else next(objects) if item is OBJECT else item[1] for item in self.template
        ]
        if self.treedef is FLAT:
            return self.fn(*leaves)
        args, kwargs = tree_unflatten(self.treedef, leaves)
        return self.fn(*args, **kwargs)


def unfold(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Replace a partial, a method of a module, or a module by a plain function with more arguments."""
    while True:
        if isinstance(fn, functools.partial):
            fn, args, kwargs = fn.func, (*fn.args, *args), {**fn.keywords, **kwargs}
        elif isinstance(fn, types.MethodType) and holds_state(fn.__self__):
            fn, args = fn.__func__, (fn.__self__, *args)
        elif holds_state(fn):
            fn, args = type(fn).__call__, (fn, *args)
        else:
            return fn, args, kwargs


def check_hashable(leaves: Sequence[Any], codes: Sequence[str]) -> None:
    """Raise TypeError for a static argument without a hash, which cannot be part of a program's key."""
    for leaf, code in zip(leaves, codes, strict=True):
        if code is STATIC:
            try:
                hash(leaf)
            except TypeError:
                value = leaf.value if type(leaf) is Fixed else leaf
                raise TypeError(
                    f"an argument is a {type(value).__name__}, which is neither an array nor a module, and is not hashable."
                    " Pass arrays, numbers, modules, pytrees of these, or hashable static values."
                ) from None


class Static:
    """Stands in a traced result for a leaf that is not an array, or for the object at position `index`.

    It is a pytree without leaves, so compiled code does not see the value.
    """

    def __init__(self, value: Any, index: int | None = None) -> None:
        self.value, self.index = value, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and (self.value, self.index) == (other.value, other.index)

    def __hash__(self) -> int:
        return hash((type(self.value), self.index))


jax.tree_util.register_pytree_node(Static, lambda s: ((), s), lambda s, _: s)


def wrap_output(out: Any, objects: Sequence[Any]) -> Any:
    """Wrap everything in `out` that is not an array, so that a compiled function can return it."""
    numbers = {id(obj): i for i, obj in enumerate(objects)}

    def wrap(leaf: Any) -> Any:
        if id(leaf) in numbers:
            return Static(None, numbers[id(leaf)])
        return leaf if holds_state(leaf) or is_array(leaf) else Static(leaf)

    return tree_map(wrap, out, is_leaf=holds_state)


def unwrap_output(out: Any, objects: Sequence[Any]) -> Any:
    """Undo `wrap_output` after the compiled call, with the objects of this call."""

    def unwrap(leaf: Any) -> Any:
        if not isinstance(leaf, Static):
            return leaf
        return leaf.value if leaf.index is None else objects[leaf.index]

    return tree_map(unwrap, out, is_leaf=lambda leaf: isinstance(leaf, Static))
