"""Hints for a wrong gradient: the simple mistakes that lead to exactly these values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, permutations
from typing import Any

import numpy as np

from .differences import Evidence


@dataclass
class Context:
    """The known facts about the call whose gradient is wrong."""

    key: Any
    args: tuple[Any, ...]
    dout: list[Any]
    params: Mapping[Any, Any]
    slopes: Evidence
    fits_another: Callable[[Any], str]  # the name of another input or parameter, if a gradient is right for it
    stale: Callable[[], str]  # the name of a cache of an earlier call that backward uses

    def right(self, grad: Any) -> bool:
        return not self.slopes.zero and self.slopes.fits(grad, 10)

    def factor(self, got: Any) -> float | None:
        """The number that the right gradient is multiplied by; None if it is not one number."""
        mine, right = np.array(self.slopes.products(got)), np.array([each.value for each in self.slopes.found])
        square = float(right @ right)
        if not square or not np.isfinite(mine).all():
            return None
        factor = float(mine @ right) / square
        return factor if abs(factor) > 1e-9 and self.right(got / factor) else None

    def decay(self, got: Any) -> float | None:
        """The number of times that the parameter was added to its gradient."""
        if self.key not in self.params or got.size == 1:
            return None
        param = self.params[self.key]
        theirs = np.array(self.slopes.products(param))
        surplus = np.array(self.slopes.products(got)) - [each.value for each in self.slopes.found]
        if not np.isfinite(surplus).all() or not theirs.any():
            return None
        factor = float(surplus @ theirs / (theirs @ theirs))
        return factor if self.right(got - factor * param) else None

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


def hint_for(got: Any, want: Any, context: Context, right: bool = False) -> str:
    """The hint for the mistake in `got`; "" if it is none of the known mistakes.

    Args:
        got: the gradient from backward.
        want: the right gradient; None if it is not known element by element.
        context: the facts about the call.
        right: True if only the shape is wrong.
    """
    if want is None and got.shape != context.params.get(context.key, _of(context)).shape:
        return _of_shape(got, _of(context), context, right)
    if not np.isfinite(got).all():
        return f"{int((~np.isfinite(got)).sum())} of its {got.size} elements are not finite"
    found = _as_a_whole(got, context)
    if want is not None and np.isfinite(want).all():
        found = chain(found, _in_parts(got, want, context))
    return next(found, "")


def _of(context: Context) -> Any:
    """The parameter or argument by which the gradient is wrong."""
    return context.params[context.key] if context.key in context.params else context.args[context.key]


def _same(one: Any, other: Any) -> bool:
    if np.shape(one) != np.shape(other):
        return False
    scale = max(np.abs(other).max(initial=0.0), np.abs(one).max(initial=0.0))
    return bool(scale > 0 and np.abs(one - other).max(initial=0.0) <= 1e-5 * scale)


def _axes(ndim: int) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(range(ndim), n) for n in range(1, ndim + 1))


def _named(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"


def _of_shape(got: Any, like: Any, context: Context, right: bool) -> str:
    text = f"its shape is {got.shape} and should be {like.shape}"
    kept = [axis for axis, size in enumerate(like.shape) if size == 1]
    if like.size == got.size and got.ndim < like.ndim and got.shape == tuple(s for s in like.shape if s != 1):
        text += f": sum over {_named(tuple(kept))} with keepdims=True"
        if not right:
            more = next(_as_a_whole(got.reshape(like.shape), context), "")
            text += f". Its values are wrong, too{': ' + more if more else ''}"
        return text
    if other := context.fits_another(got):
        return f"{text}: {_swapped(other)}"
    if got.ndim == like.ndim and context.right(got.T):
        return f"{text}: it is transposed"
    if right:
        return f"{text}: the values are right"
    for axes in _axes(got.ndim):
        if context.right(got.sum(axes)):
            return f"{text}: it is not summed over {_named(axes)}"
        if context.right(got.mean(axes)):
            return f"{text}: it is the right one, repeated along {_named(axes)}"
    for axes in _axes(like.ndim):
        if like.sum(axes).shape == got.shape:
            return f"{text}: is it summed over {_named(axes)}?"
    return text


def _as_a_whole(got: Any, context: Context) -> Iterator[str]:
    if not got.any():
        yield "it is zero: it is never computed, or computed and not stored"
    if context.right(-got):
        yield "its sign is wrong"
    if got.ndim > 1 and got.size > 1:
        for axes in permutations(range(got.ndim)):
            if axes != tuple(range(got.ndim)) and context.right(got.transpose(axes)):
                yield "it is transposed"
    yield from _factor(got, context)
    if any(_same(got, each) for each in context.dout):
        yield "it is the incoming gradient, unchanged: the layer's own derivative is missing"
    if other := context.fits_another(got):
        yield _swapped(other)
    yield from _missing_transpose(got, context)
    for each in context.dout:
        right = [axes for axes in _axes(np.ndim(each)) if context.right(np.sum(each, axes))]
        for axes in _axes(np.ndim(each)):
            if right and _same(np.sum(each, axes), got):
                yield f"it is summed over {_named(axes)} of the incoming gradient, not over {_named(right[0])}"
    if name := context.stale():
        yield (
            f"it does not change with the batch: backward() uses {name}, which forward() keeps from an earlier call (a stale"
            " cache)"
        )
    decay = context.decay(got)
    if decay is not None and decay < 0:
        yield (
            f"it is the right one less {-decay:.6g} times {context.key}: forward() has a weight decay that is missing in"
            " backward(), or too small"
        )
    elif decay is not None:
        yield (
            f"it is the right one plus {decay:.6g} times {context.key}: weight decay, which forward() does not have. Leave it"
            " to the optimizer's weight_decay, or add it to the loss"
        )
    for axes in _axes(got.ndim):
        if context.right(np.flip(got, axes)):
            yield f"it is reversed along {_named(axes)}"


def _swapped(name: str) -> str:
    return f"it is the gradient by {name}: are the gradients in the right order?"


def _missing_transpose(got: Any, context: Context) -> Iterator[str]:
    """Hints for a gradient by the input that uses W instead of its transpose, or the other way round."""
    for name, weight in context.params.items():
        if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            for each in context.dout:
                if np.ndim(each) and np.shape(each)[-1] == len(weight):
                    if _same(got, each @ weight):
                        yield f"it is dout @ {name}, and should be dout @ {name}.T: a transpose is missing"
                    if _same(got, each @ weight.T):
                        yield f"it is dout @ {name}.T, and should be dout @ {name}: there is a transpose too many"


def _factor(got: Any, context: Context) -> Iterator[str]:
    factor = context.factor(got)
    if factor is None:
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


def _in_parts(got: Any, want: Any, context: Context) -> Iterator[str]:
    wrong = np.abs(got - want) > 1e-5 * np.abs(want).max(initial=0.0)
    if not wrong.any():
        return
    if context.key in context.params:
        yield from _repeated(wrong, context)
    for axis in range(got.ndim):
        rows = np.unique(np.nonzero(wrong)[axis])
        if got.shape[axis] > 1 and len(rows) == 1:
            yield f"it is wrong only at {int(rows[0])} of axis {axis}"
    for axes in _axes(got.ndim):
        size = np.prod([got.shape[axis] for axis in axes])
        if size > 1 and _same(np.broadcast_to((got - want).mean(axes, keepdims=True), got.shape), got - want):
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
