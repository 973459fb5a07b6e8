"""Errors for habits of torch users that do nothing here, such as `layer.weight.requires_grad = False` and `backward(loss)`.

A parameter is read as a plain `jax.Array`, which accepts any attribute, so such an assignment only sets an attribute of that
array. The next call that uses the module finds the attribute and raises. An array that was read is lent, so only lent arrays
are checked, and only if an array was lent since the last check.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

import jax

from ..runtime.tracebacks import warn
from ..state.cell import Cell
from ..state.concurrent_reads import lendings
from ..state.static_values import shown

_FIXES = {
    "requires_grad": "freeze() or unfreeze() on the module that holds it",
    "data": "assignment (`module.weight = array`)",
    "grad": "zero_grad(), or assignment to `module.grads()[i]`",
}
_read: dict[
    int, tuple[ref[Cell], type, str]
] = {}  # by some bits of an array's id: the cell it was read from, and its name
_BITS = 0x3FF0


def look(holder: Any, found: Iterable[tuple[str, Cell]]) -> None:
    """Raise TypeError if torch's attributes were set on arrays of these cells, and remove the attributes.

    `holder.looked` is the value of `lendings.last` at the last check. While that is unchanged, nothing is checked.
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
        f"{'; '.join(parts)}. A parameter is read as a plain JAX array, on which torch's attributes do nothing."
    )


def note_read(cell: Cell, array: Any, owner: type, name: str) -> None:
    """Remember from which cell an array was read, until a later array takes its entry."""
    _read[id(array) & _BITS] = ref(cell), owner, name


def warn_of_untied(cell: Cell, array: Any, owner: type, name: str) -> None:
    """Warn if a parameter is assigned the array of another parameter. In torch this would tie the two."""
    reference, other_owner, other_name = _read.get(id(array) & _BITS, (None, owner, name))
    other = None if reference is None else reference()
    if other is None or other is cell or not other.kind == cell.kind == "parameter":
        return
    current = other.stored if other.pack is None else other.pack.known_part(other)
    if current is array and isinstance(array, jax.Array):
        warn(
            f"{owner.__name__}.{name} was assigned the array that {other_owner.__name__}.{other_name} holds. This copies the"
            f" values, and the two stay separate parameters. For one parameter under both names write"
            f" `a.tie({name!r}, b, {other_name!r})`, where `b` is the {other_owner.__name__}. For a copy without this"
            " warning assign `jnp.copy(array)`.",
        )


def check_function(fn: Any, name: str) -> None:
    """Raise TypeError if what `name` was given is no function: most often its result, as in `backward(loss_fn(model, x))`."""
    if callable(fn):
        return
    fix = f"pass the function, and its arguments after it: `{name}(loss_fn, model, x)`, not `{name}(loss_fn(model, x))`"
    if name in ("mt.jit", "mt.grad", "mt.value_and_grad"):
        fix = f"pass the function, and its arguments to the result: `{name}(fn)(model, x)`, not `{name}(fn(model, x))`"
    raise TypeError(f"{name} takes a function, not {shown(fn)} ({type(fn).__name__}): {fix}")
