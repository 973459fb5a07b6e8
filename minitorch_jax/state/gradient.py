"""The values of gradients: zeros that are not there, those used up inside a compiled function, those not looked at yet."""

from __future__ import annotations

from typing import Any

import jax


class _Consumed:
    """Stands for a gradient that a compiled function computed, used up in an optimizer's step, and did not give out."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "CONSUMED"

    def __reduce__(self) -> str:
        return "CONSUMED"


CONSUMED = _Consumed()


jax.tree_util.register_pytree_node(_Consumed, lambda _: ((), None), lambda *_: CONSUMED)


class Unread:
    """What stands for a gradient in a compiled function until that writes it: its value, and who looked at it."""

    __slots__ = ("value", "frame")

    def __init__(self, value: Any, frame: Any) -> None:
        self.value, self.frame = value, frame


def gradient(cell: Any) -> Any:
    """The gradient that a cell holds: an array, or None for zeros."""
    value = cell.value
    if type(value) is Unread:
        value.frame.observed.add(cell)
        value = value.value
    return unless_consumed(value)


def unless_consumed(value: Any) -> Any:
    """A gradient's value, or the error that says that it is not there any more."""
    if value is CONSUMED:
        raise RuntimeError(
            "this gradient was computed inside a function compiled by mt.jit (or mt.scan) and used up there by"
            " opt.step(); to give every gradient out would cost time and memory at each call. Return what you need from"
            " the function, or compile it with `mt.jit(keep_grads=True)`; to go on from here, call zero_grad() first."
        )
    return value


def added(before: Any, new: Any) -> Any:
    """The sum of a gradient's value (None for zeros) and another one."""
    return new if unless_consumed(before) is None else before + new


def starting_value(cell: Any) -> Any:
    """What a cell holds, for another run to begin with."""
    value = cell.value
    return value.value if type(value) is Unread else value
