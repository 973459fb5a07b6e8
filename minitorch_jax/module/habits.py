"""What torch's users write on arrays, where it does nothing: noticed when the arrays are next looked at.

A parameter is read as a plain `jax.Array`, which takes any attribute: `layer.weight.requires_grad = False` is kept by that
one array, and nobody looks at it. An array that was read is marked as lent, so only those are looked at, and only if any was
lent since the last look.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import ref

import jax

from ..state.cell import Cell
from ..state.lending import lendings

_FIXES = {
    "requires_grad": "freeze() or unfreeze() on the module that holds it",
    "data": "assignment (`module.weight = array`)",
    "grad": "zero_grad(), or assignment to `module.grads()[i]`",
}
_read: dict[int, tuple[ref[Cell], type, str]] = {}  # by (some bits of) an array's id: whose it was when it was read
_BITS = 0x3FF0


def look(holder: Any, found: Iterable[tuple[str, Cell]]) -> None:
    """Raise TypeError if torch's attributes were set on arrays of these cells; once, since it takes them off again.

    `holder.looked` is `lendings.last` at the last look: nothing is done while it is the same.
    """
    last = lendings.last
    if holder.looked is last:
        return
    wrong: dict[str, list[str]] = {}
    for path, cell in found:
        if cell.lent:
            _look_at(cell, path, wrong)
        if cell.grad is not None and cell.grad.lent:
            _look_at(cell.grad, f"the gradient of {path}", wrong)
    if wrong:
        raise _wrong(wrong)
    holder.looked = last


def _look_at(cell: Cell, path: str, wrong: dict[str, list[str]]) -> None:
    array: Any = cell.stored if cell.pack is None else cell.pack.known_part(cell)
    attributes: dict[str, Any] = getattr(array, "__dict__", {})
    for name in [name for name in _FIXES if name in attributes] if attributes else ():
        value = attributes.pop(name)
        if name != "requires_grad" or bool(value) is not cell.trainable:
            wrong.setdefault(name, []).append(path)


def _wrong(wrong: dict[str, list[str]]) -> TypeError:
    parts = []
    for name, paths in wrong.items():
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        parts.append(f"`{name}` was set on the array of {shown}: use {_FIXES[name]}")
    return TypeError(
        f"{'; '.join(parts)}. Parameters are read as plain JAX arrays, on which torch's attributes do nothing."
    )


def note_read(cell: Cell, array: Any, owner: type, name: str) -> None:
    """Remember for a while whose array was read."""
    _read[id(array) & _BITS] = ref(cell), owner, name


def warn_of_untied(cell: Cell, array: Any, owner: type, name: str) -> None:
    """Warn if a parameter is assigned the array that another one holds: in torch that ties the two."""
    reference, other_owner, other_name = _read.get(id(array) & _BITS, (None, owner, name))
    other = None if reference is None else reference()
    if other is None or other is cell or not other.kind == cell.kind == "parameter":
        return
    held = other.stored if other.pack is None else other.pack.known_part(other)
    if held is array and isinstance(array, jax.Array):
        warnings.warn(
            f"{owner.__name__}.{name} was assigned the array that {other_owner.__name__}.{other_name} holds: its values are"
            f" copied now, and the two go on as separate parameters. For one parameter under both names write"
            f" `a.tie({name!r}, b, {other_name!r})`, where `b` is the {other_owner.__name__}; for a copy,"
            " `jnp.copy(array)` does not warn.",
            stacklevel=3,
        )
