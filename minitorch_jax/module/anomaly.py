"""`detect_anomaly`: the module, gradient or parameter that is not finite first is named.

Under it, everything runs as plain Python (`engine/disabled_jit.py`), so values are there to be looked at, a call that raises
changes nothing, and nothing is compiled, now or when it is switched off again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime import contexts
from ..runtime.jax_private import at_top_level, value_behind
from ..state.cell import Cell
from ..state.static_values import describe, holds_state
from ..state.walk import join
from . import hooks, tree
from .hooks import watchers


class _Run:
    """One call of stateful code, or of a module in eager code."""

    def __init__(self, objects: Sequence[Any], where: str = "") -> None:
        self.objects = list(objects)  # in which paths are looked for, in this order
        self.where = where  # the beginning of messages
        self.calls: Counter[int] = Counter()  # how often each module was called, by id


class _Local(threading.local):
    on = False
    run: _Run | None = None


local = _Local()


class detect_anomaly(ContextDecorator):  # noqa: N801 (torch's name)
    """Raise FloatingPointError at the first module whose output is not finite, or parameter whose gradient is not.

    The error names the module by its path, and says what range its input had. If all outputs are finite, it names the
    parameter whose gradient is not, with the loss, or the parameter that a step would make infinite or NaN. A call of
    `mt.backward`, `mt.value_and_grad`, `mt.jit` or `mt.scan` that raises it has changed nothing.

    Under it, all code runs operation by operation, as under `jax.disable_jit()`: slowly, but with every value at hand.
    Compiled programs are kept, and are used again after the block. Outside of the block it costs nothing. Use it as a
    context around a call or a loop, or as a decorator. It nests, and belongs to the thread.

    Raises:
        FloatingPointError: in the block, as said above.
        RuntimeError: if it is entered inside code that JAX traces, where there are no values.

    Differs from PyTorch: outputs are checked too, and infinity counts as NaN does. Modules inside `jax.checkpoint` have no
    values to look at: a module around them is named, or what comes after. Gradients of plain `jax.grad` are not checked.

    Source: torch.autograd.detect_anomaly.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> class Log(mt.Module):
        ...     def forward(self, x):
        ...         return jnp.log(x)
        >>> model = nn.Sequential(nn.ReLU(), Log())
        >>> with mt.detect_anomaly():
        ...     model(jnp.array([-1.0, 1.0]))
        Traceback (most recent call last):
        FloatingPointError: The output of Sequential.1 (Log) is not finite: 1 of 2 values of float32[2]. ...
    """

    def __init__(self) -> None:
        self._entered: list[tuple[bool, Any]] = []

    def __enter__(self) -> None:
        config: Any = jax.config
        if not at_top_level() and not config.jax_disable_jit:
            raise RuntimeError(
                "detect_anomaly was entered inside code that JAX traces, where there are no values to check. Enter it"
                " outside, around the call: `with mt.detect_anomaly(): step(x)`."
            )
        plain: Any = jax.disable_jit()
        plain.__enter__()
        self._entered.append((local.on, plain))
        watchers.append(plain)
        local.on = True

    def __exit__(self, *error: Any) -> None:
        local.on, plain = self._entered.pop()
        watchers.remove(plain)
        plain.__exit__(*error)


@contextmanager
def within(objects: Sequence[Any], where: str = "") -> Iterator[None]:
    """While code runs that uses these objects: errors name paths in them, and begin with `where`."""
    before = local.run
    if local.on:
        local.run = _Run(objects, where)
        if before is not None:
            local.run.objects += before.objects
            local.run.where = before.where + where
    try:
        yield
    finally:
        local.run = before


def checked_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module's `forward`. Raises FloatingPointError if the output is not finite."""
    if local.run is None:
        with within([module]):
            return checked_call(module, args, kwargs)
    run = local.run
    run.calls[id(module)] += 1
    number = run.calls[id(module)]
    out = hooks.run(module, args, kwargs)
    bad = [value for value in _arrays(out) if _num_bad(value)]
    if bad:
        name, kind = _all_paths(_paths(module, run.objects)), type(module).__name__
        name = name if name == kind else f"{name} ({kind})"
        call = f" in its call number {number}" if number > 1 else ""
        inputs = _ranges(_arrays((args, kwargs))) or "no floating array"
        own = [name for name in module._cells if any(map(_num_bad, _arrays(getattr(module, name))))]
        weights = f" Its {' and '.join(own)} {'are' if len(own) > 1 else 'is'} not finite." if own else ""
        raise _error(f"The output of {name} is not finite{call}: {_share(bad[0])}. Its input: {inputs}.{weights}")
    return out


def check_gradients(loss: Any, grads: Mapping[Any, Any], objects: Sequence[Any], name: str) -> None:
    """Raise FloatingPointError if one of the gradients, or the loss, is not finite.

    The gradients are those by cells, or by the arrays among the arguments, which are numbered.
    """
    if not local.on:
        return
    values = list(_arrays(loss))  # none, if the loss has no value to look at
    text = " ".join([f" The loss is {float(value):.6g}." for value in values])
    lost = any(map(_num_bad, values))
    after = " No module's output was seen to be so: look at the code after the modules." if lost else ""
    for cell, grad in grads.items():
        for array in _arrays(grad):
            if _num_bad(array):
                by_cell = isinstance(cell, Cell)
                path = _all_paths(_cell_paths(cell, objects)) if by_cell else f"array {cell} among the arguments"
                raise _error(f"The gradient of {path} is not finite: {_share(array)}.{text}{after}")
    if lost:
        raise _error(f"The loss of {name} is not finite.{text}{after}")


def check_step(
    name: str, cells: Sequence[Cell], before: Sequence[Any], new: Sequence[Any], grads: Sequence[Any]
) -> None:
    """Raise FloatingPointError if a step makes a parameter not finite that was finite.

    `new` and `grads` begin with those of the first cells, which are the parameters.
    """
    objects = local.run.objects if local.run is not None else ()
    for cell, old, value, grad in zip(cells, before, new, grads, strict=False):
        if not any(map(_num_bad, _arrays(value))) or any(map(_num_bad, _arrays(old))):
            continue
        for path, values in _parts(cell, (old, value, grad), objects):
            was, now, slope = (list(_arrays(part)) for part in values)
            if any(map(_num_bad, now)):
                raise _error(
                    f"{name} would make {path} not finite: {_share(now[0])}. Before: {_ranges(was)}. Its gradient:"
                    f" {_ranges(slope) or 'none'}."
                )


def _error(text: str) -> FloatingPointError:
    return FloatingPointError((local.run.where if local.run is not None else "") + text)


# -- names ------------------------------------------------------------------------------------------------------------


def _roots(objects: Sequence[Any]) -> Iterator[Any]:
    """The modules among some objects, then those of optimizers among them."""
    yield from filter(tree.is_module, objects)
    for obj in objects:
        if not tree.is_module(obj):
            yield from filter(tree.is_module, getattr(obj, "modules", ()))


def _paths(module: Any, objects: Sequence[Any]) -> list[str]:
    """All paths of a module in the first object that has it."""
    for root in _roots(objects):
        found = [path for path, inner in tree.named_modules(root, "", set(), False) if inner is module]
        if found:
            return [join(type(root).__name__, path) if path else type(root).__name__ for path in found]
    return [type(module).__name__]


def _cell_paths(cell: Cell, objects: Sequence[Any]) -> list[str]:
    """All paths of a parameter in the first object that has it."""
    for root in _roots(objects):
        found = [path for path, _, _, inner in tree.entries(root) if inner is cell]
        if found:
            return [join(type(root).__name__, path) for path in found]
    return ["a parameter"]


def _parts(cell: Cell, values: Sequence[Any], objects: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """A cell's paths and its `values`; of the flat array of a pack, those of each of its parameters."""
    found = [inner for root in _roots(objects) for _, _, _, inner in tree.entries(root)]
    views = [inner for inner in dict.fromkeys(found) if inner.pack is not None and inner.pack.cell is cell]
    for view in views:
        place = view.pack.places[view]
        cut = [None if part is None else part[place.start : place.end].reshape(place.shape) for part in values]
        yield _all_paths(_cell_paths(view, objects)), cut
    if not views:
        yield _all_paths(_cell_paths(cell, objects)), values


def _all_paths(paths: list[str]) -> str:
    shown = " and ".join(paths[:4])
    return f"{shown} and {len(paths) - 4} more" if len(paths) > 4 else shown


# -- values -----------------------------------------------------------------------------------------------------------


def _arrays(values: Any) -> Iterator[Any]:
    """The floating and complex arrays in a pytree, as far as their values are known."""
    for leaf in jax.tree.leaves(values, is_leaf=holds_state):
        leaf = value_behind(leaf)
        if isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex):
            leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                yield leaf


@contextmanager
def _reading() -> Iterator[None]:
    """Compute with values now, whatever is traced or guarded around."""
    with jax.ensure_compile_time_eval(), contexts.constants(), contexts.unchecked():
        yield


def _num_bad(array: Any) -> int:
    """How many numbers are not finite."""
    with _reading(), contexts.full_width([array]):
        return int(array.size - jnp.isfinite(array).sum())


def _share(array: Any) -> str:
    return f"{_num_bad(array)} of {array.size} values of {describe(array)}"


def _ranges(arrays: Iterable[Any]) -> str:
    return "; ".join(map(_range, arrays))


def _range(array: Any) -> str:
    """The least and the largest finite number, and how many are not finite."""
    bad = _num_bad(array)
    state = f"{bad} of {array.size} not finite" if bad else "all finite"
    if bad == array.size or jnp.issubdtype(array.dtype, jnp.complexfloating):
        return f"{describe(array)}, {state}"
    with _reading(), contexts.full_width([array]):
        finite, wide = jnp.isfinite(array), jnp.asarray(array)
        least = jnp.where(finite, wide, jnp.array(jnp.inf, wide.dtype)).min()
        largest = jnp.where(finite, wide, jnp.array(-jnp.inf, wide.dtype)).max()
        return f"{describe(array)} from {float(least):.6g} to {float(largest):.6g}, {state}"
