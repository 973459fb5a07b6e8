"""Hints for a wrong gradient: the simple mistakes that lead to exactly these values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations, permutations
from typing import Any

import numpy as np


@dataclass
class Context:
    """The known facts about the call whose gradient is wrong."""

    args: tuple[Any, ...]
    dout: list[Any]
    params: Mapping[Any, Any] = field(default_factory=dict)
    right: Mapping[str, Any] = field(default_factory=dict)  # all right gradients, by the name of the input or parameter
    others: Mapping[Any, Any] = field(default_factory=dict)  # the right gradients for another batch
    theirs: Mapping[Any, Any] = field(default_factory=dict)  # the gradients from backward for that batch
    rtol: float = 1e-6

    def sizes(self) -> Iterator[tuple[float, str]]:
        """Factors by which gradients are often wrong, with their names."""
        yield 2.0, "2"
        first = next((arg for arg in self.args if isinstance(arg, np.ndarray) and arg.ndim), None)
        if first is not None:
            yield float(first.shape[0]), f"the batch size {first.shape[0]}"
            for axis, size in enumerate(first.shape[1:], 1):
                yield float(size), f"the size {size} of the input's axis {axis}"
            yield float(first.size), f"the number of the input's elements {first.size}"
            if first.ndim > 2:
                places = first.size // first.shape[1]
                yield float(places), f"the size {places} of all the input's axes but the second"
        for each in self.dout:
            for axis, size in enumerate(np.shape(each)):
                yield float(size), f"the size {size} of the output's axis {axis}"


def hint_for(key: Any, got: Any, want: Any, context: Context) -> str:
    """The hint for the mistake in `got`; "" if it is none of the known mistakes."""
    if not np.isfinite(want).all():  # finite differences of only some elements, or the edge of a domain
        return ""
    if got.shape != want.shape:
        return _of_shape(got, want, context)
    if not np.isfinite(got).all():
        return f"{int((~np.isfinite(got)).sum())} of its {got.size} elements are not finite"
    error, scale = np.abs(got - want).max(initial=0.0), np.abs(want).max(initial=0.0)
    if error <= 1e-4 * scale:
        return f"it differs by only {error / scale:.0e} of its largest element, as with an epsilon in log() or sqrt()"
    for found in chain(_as_a_whole(key, got, want, context), _in_parts(key, got, want, context)):
        return found
    return ""


def _same(one: Any, other: Any, context: Context) -> bool:
    if np.shape(one) != np.shape(other):
        return False
    scale = max(np.abs(other).max(initial=0.0), np.abs(one).max(initial=0.0))
    return bool(scale > 0 and np.abs(one - other).max(initial=0.0) <= 10 * context.rtol * scale)


def _axes(ndim: int) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(range(ndim), n) for n in range(1, ndim + 1))


def _named(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"


def _of_shape(got: Any, want: Any, context: Context) -> str:
    text = f"its shape is {got.shape} and should be {want.shape}"
    for name, other in context.right.items():
        if _same(got, other, context):
            return f"{text}: {_swapped(name)}"
    if got.ndim == want.ndim and _same(got.T, want, context):
        return f"{text}: it is transposed"
    if got.size == want.size and _same(got.reshape(want.shape), want, context):
        return f"{text}: the values are right"
    for axes in _axes(got.ndim):
        if _same(got.sum(axes), want, context):
            return f"{text}: it is not summed over {_named(axes)}"
        if _same(got.mean(axes), want, context):
            return f"{text}: it is the right one, repeated along {_named(axes)}"
    for axes in _axes(want.ndim):
        if _same(got, want.sum(axes), context):
            return f"{text}: it is summed over {_named(axes)}"
    return text


def _as_a_whole(key: Any, got: Any, want: Any, context: Context) -> Iterator[str]:
    if not got.any():
        yield "it is zero: it is never computed, or computed and not stored"
    if _same(got, -want, context):
        yield "its sign is wrong"
    if got.ndim > 1 and got.size > 1:
        for axes in permutations(range(got.ndim)):
            if axes != tuple(range(got.ndim)) and _same(got.transpose(axes), want, context):
                yield "it is transposed"
    yield from _factor(got, want, context)
    if key in context.others and _same(got, context.others[key], context):
        yield "it is the gradient of the earlier batch: forward() keeps something of an earlier call (a stale cache)"
    if any(_same(got, each, context) for each in context.dout):
        yield "it is the incoming gradient, unchanged: the layer's own derivative is missing"
    for name, other in context.right.items():
        if other is not want and _same(got, other, context):
            yield _swapped(name)
    yield from _missing_transpose(got, context)
    for each in context.dout:
        right = [axes for axes in _axes(np.ndim(each)) if _same(np.sum(each, axes), want, context)]
        for axes in _axes(np.ndim(each)):
            if right and _same(np.sum(each, axes), got, context):
                yield f"it is summed over {_named(axes)} of the incoming gradient, not over {_named(right[0])}"
    mine, other = context.theirs.get(key), context.others.get(key)
    if isinstance(key, str) and mine is not None and other is not None:
        if _same(got, mine, context) and not _same(want, other, context):
            yield "it does not change with the batch: forward() keeps something of an earlier call (a stale cache)"
    for axes in _axes(got.ndim):
        if _same(np.flip(got, axes), want, context):
            yield f"it is reversed along {_named(axes)}"


def _swapped(name: str) -> str:
    return f"it is the gradient by {name}: are the gradients in the right order?"


def _missing_transpose(got: Any, context: Context) -> Iterator[str]:
    """Hints for a gradient by the input that uses W instead of its transpose, or the other way round."""
    for name, weight in context.params.items():
        if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            for each in context.dout:
                if np.ndim(each) and np.shape(each)[-1] == len(weight):
                    if _same(got, each @ weight, context):
                        yield f"it is dout @ {name}, and should be dout @ {name}.T: a transpose is missing"
                    if _same(got, each @ weight.T, context):
                        yield f"it is dout @ {name}.T, and should be dout @ {name}: there is a transpose too many"


def _factor(got: Any, want: Any, context: Context) -> Iterator[str]:
    square = float(np.sum(want * want))
    if not square:
        return
    factor = float(np.sum(got * want)) / square
    if not _same(got, factor * want, context):
        return
    sign = "-" if factor < 0 else ""
    for size, name in context.sizes():
        many = name.startswith("the batch") or " of all" in name or "number" in name
        if size > 1 and np.isclose(abs(factor), size, rtol=1e-5):
            why = "added twice?" if name == "2" else "is a mean over the batch forgotten?" if many else ""
            yield f"it is {sign}{size:g} times the right one{_by(name)}{': ' + why if why else ''}"
        if size > 1 and np.isclose(abs(factor), 1 / size, rtol=1e-5):
            why = "is it divided once too often, a mean instead of a sum?" if many else ""
            yield f"it is {sign}1/{size:g} of the right one{_by(name)}{': ' + why if why else ''}"
    if got.size > 1:
        yield f"it is {factor:.6g} times the right one"


def _by(name: str) -> str:
    return "" if name == "2" else f", by {name}"


def _in_parts(key: Any, got: Any, want: Any, context: Context) -> Iterator[str]:
    scale = np.abs(want).max(initial=0.0)
    wrong = np.abs(got - want) > 10 * context.rtol * scale
    if not wrong.any():
        return
    if isinstance(key, str):  # a parameter
        yield from _repeated(wrong, context)
    for axis in range(got.ndim):
        rows = np.unique(np.nonzero(wrong)[axis])
        if got.shape[axis] > 1 and len(rows) == 1:
            yield f"it is wrong only at {int(rows[0])} of axis {axis}"
    for axes in _axes(got.ndim):
        size = np.prod([got.shape[axis] for axis in axes])
        if size > 1 and _same(np.broadcast_to((got - want).mean(axes, keepdims=True), got.shape), got - want, context):
            yield f"the difference is constant along {_named(axes)}: a term that is summed over it is missing"
    zero = wrong & (got == 0)
    if (zero == wrong).all():
        yield f"it is zero in {int(wrong.sum())} of {got.size} elements where it should not be"
    right = ~wrong & (want != 0)
    if right.any():
        yield f"{int(wrong.sum())} of its {got.size} elements are wrong"


def _repeated(wrong: Any, context: Context) -> Iterator[str]:
    """A hint for rows that are looked up more than once, if only these are wrong."""
    for arg in context.args:
        if isinstance(arg, np.ndarray) and arg.dtype.kind in "iu" and arg.size and wrong.ndim:
            found, counts = np.unique(arg, return_counts=True)
            often = set(found[counts > 1].tolist())
            rows = set(np.nonzero(wrong.reshape(len(wrong), -1).any(1))[0].tolist())
            if rows and rows <= often and often != set(range(len(wrong))):
                yield (
                    "it is wrong in the rows that are looked up more than once: `dW[i] += ...` adds only once for a"
                    " repeated index; np.add.at(dW, i, ...) adds each time"
                )
