"""The arguments by which `mt.grad(fn, argnums=...)` differentiates: which these are, and the form of their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..state.static_values import holds_state, is_array, shown
from .arguments import Arguments


class Argnums(NamedTuple):
    """Positions of arguments of a call. `before` more arguments come first, such as the `self` of a method."""

    nums: tuple[int, ...]
    is_one: bool  # True if the user gave one number: the gradients are then no tuple
    before: int = 0

    def within(self, name: str, count: int, before: int) -> Argnums:
        """Return the same for a call with `count` positional arguments, after `before` others: none is negative.

        Raises:
            ValueError: if there is no such argument, or if one is named twice.
        """
        for num in self.nums:
            if not -count <= num < count:
                passed = "1 positional argument was" if count == 1 else f"{count} positional arguments were"
                raise ValueError(
                    f"argnums has {num}, but {passed} passed to the gradient of {name}. They are counted from 0; pass the"
                    " argument by position, not by name"
                )
        nums = tuple([num % count for num in self.nums])
        if len(set(nums)) < len(nums):
            raise ValueError(f"argnums names an argument of {name} twice: {self.nums}. Name each once")
        return Argnums(nums, self.is_one, before)

    def places(self, name: str, call: Arguments, args: Sequence[Any]) -> list[int]:
        """Return the places of the arguments' arrays among the data of a call.

        Raises:
            TypeError: if an argument holds no array, or something other than floating arrays.
        """
        found: list[int] = []
        for num in self.nums:
            leaves = jax.tree.leaves(args[self.before + num], is_leaf=holds_state)
            what = f"argument {num} of {name}, which argnums names,"
            if not leaves:
                raise TypeError(f"{what} holds no array; leave it out of argnums")
            for leaf in leaves:
                _check(what, leaf)
            found += range(call.count_data(self.before + num), call.count_data(self.before + num + 1))
        return found

    def gradients(self, call: Arguments, args: Sequence[Any], found: Mapping[int, Any]) -> Any:
        """Return the gradients in the form of the arguments, from those by place among the data."""
        trees = []
        for num, treedef in zip(self.nums, self.trees(args), strict=True):
            first = call.count_data(self.before + num)
            trees.append(jax.tree.unflatten(treedef, [found[first + i] for i in range(treedef.num_leaves)]))
        return trees[0] if self.is_one else tuple(trees)

    def trees(self, args: Sequence[Any]) -> list[Any]:
        """Return the structures of the arguments."""
        return [jax.tree.structure(args[self.before + num], is_leaf=holds_state) for num in self.nums]


def as_argnums(argnums: Any, name: str) -> Argnums | None:
    """Return what the user gave as `argnums`, checked; None for None."""
    if argnums is None:
        return None
    try:
        many = isinstance(argnums, Sequence) and not isinstance(argnums, str | bytes)
        nums = tuple(map(index, argnums)) if many else (index(argnums),)
        if not nums or any(isinstance(num, bool) for num in (argnums if many else [argnums])):
            raise TypeError
    except TypeError:
        raise TypeError(
            f"{name}: argnums must be the position of an argument, or a tuple of positions, such as 1 or (0, 1); got"
            f" {shown(argnums)}. Leave it out for gradients by the modules' parameters"
        ) from None
    return Argnums(nums, not many)


def _check(what: str, leaf: Any) -> None:
    """Raise TypeError for a leaf of an argument by which nothing can be differentiated."""
    kind = type(leaf).__name__
    if holds_state(leaf):
        raise TypeError(
            f"{what} is or holds a module or an optimizer ({kind}). Leave argnums out for gradients by the parameters; with"
            " argnums, name the arguments that are arrays"
        )
    if not (is_array(leaf) or isinstance(leaf, int | float | complex | jnp.generic)) or isinstance(leaf, bool):
        raise TypeError(f"{what} holds {shown(leaf)} ({kind}), which is no floating array; leave it out of argnums")
    dtype = jax.typeof(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{what} holds {dtype}, and only floating arrays have gradients. Convert it with `.astype(jnp.float32)`, or"
            " leave it out of argnums"
        )
