"""The values of gradients: None for zeros, `CONSUMED` after its use in a compiled function, `Unread` before it is read."""

from __future__ import annotations

from typing import Any

import jax


class _Consumed:
    """Stands for a gradient that a compiled function computed, used in an optimizer's step, and did not return."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "CONSUMED"

    def __reduce__(self) -> str:
        return "CONSUMED"


CONSUMED = _Consumed()


jax.tree_util.register_pytree_node(_Consumed, lambda _: ((), None), lambda *_: CONSUMED)


class Unread:
    """Stands for a gradient in a compiled function until the function writes it. `frame` records who read it."""

    __slots__ = ("value", "frame")

    def __init__(self, value: Any, frame: Any) -> None:
        self.value, self.frame = value, frame


def gradient(cell: Any) -> Any:
    """Return the gradient that a cell holds: an array, or None for zeros."""
    value = cell.value
    if type(value) is Unread:
        value.frame.observed.add(cell)
        value = value.value
    return unless_consumed(value)


def unless_consumed(value: Any) -> Any:
    """Return a gradient's value. Raises RuntimeError if a compiled function has used it up."""
    if value is CONSUMED:
        raise RuntimeError(
            "this gradient was computed inside a function compiled by mt.jit (or mt.scan) and used up there by"
            " opt.step(). To return all gradients would cost time and memory at each call. Return those you need from the"
            " function, or compile it with `mt.jit(keep_grads=True)`. To accumulate new gradients, call zero_grad() first."
        )
    return value


def added(before: Any, new: Any) -> Any:
    """Return the sum of a gradient's value (None for zeros) and another gradient."""
    return new if unless_consumed(before) is None else before + new


def starting_value(cell: Any) -> Any:
    """Return the cell's value, without an `Unread` around it, as the starting value of another run."""
    value = cell.value
    return value.value if type(value) is Unread else value
