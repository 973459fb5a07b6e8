"""Call one of our modules as a function of its arrays. `to_flax` and `to_equinox` need this."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import minitorch_jax as mt
from minitorch_jax.state import dropped_copies
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.pytree import build
from minitorch_jax.state.walk import Spec, walk_of


def decoded(cell: Cell) -> Any:
    """A cell's value as readers see it, without lending it."""
    return cell.value if cell.encoding is None else cell.encoding.decode(cell.value)


def functional_call(
    spec: Spec, values: Mapping[str, Any], training: bool, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Build a module from its structure and arrays (by path), and call it.

    Returns the result, and the arrays that the call changed. `training` is the mode of the module. Random layers draw from
    `key`, if it is not None.
    """
    encodings = [encoding for _, _, encoding in spec.facts]
    leaves = [
        values[path] if encoding is None else encoding.encode(values[path])
        for path, encoding in zip(spec.paths, encodings, strict=True)
    ]
    module = build(spec, leaves, dropped_copies.birth_here())
    if module.training != training:
        module.train(training)
    with nullcontext() if key is None else mt.rng(key):
        out = module(*args, **kwargs)
    ends = zip(spec.paths, walk_of(module).cells, leaves, strict=True)
    return out, {path: decoded(cell) for path, cell, leaf in ends if cell.value is not leaf}
