"""`ParametrizationList`, which computes a parametrized attribute, and `cached`. See `parametrize.py`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import jax

from ...module.module import Module
from ...module.parameter import Buffer, Parameter, as_array, declared
from ...runtime.jax_private import trace_state
from ...state import access
from ...state.cell import Cell, get_value
from ...state.static_values import describe, is_array, is_declaration, shown
from ...state.walk import walk_of
from ..container import ModuleList

# -- reading one value several times ----------------------------------------------------------------------------------

_is_cached: Any = jax.make_user_context(False)  # a part of the key of every trace, as the setting of `autocast` is


class _Local(threading.local):
    def __init__(self) -> None:
        self.depth = 0
        self.values: dict[int, list[tuple[Any, ...]]] = {}  # by the list's id: (list, trace, structure, inputs, value)


_local = _Local()


@contextmanager
def cached() -> Iterator[None]:
    """Compute each parametrized attribute once within a `with` block, however often it is read.

    Compiled code computes what is pure only once in any case. The block saves time in eager code, and it has each power
    iteration of `spectral_norm` done once where a loop reads the weight at every step. A value is computed again when the
    originals have changed, after `opt.step()` for example, and in each trace.

    It is part of a compiled function's key, and belongs to the thread.

    Source: torch.nn.utils.parametrize.cached.

    Example:
        >>> import jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.nn.utils import parametrizations, parametrize
        >>> cell, h = parametrizations.spectral_norm(nn.RNNCell(3, 4), "weight_hh"), jnp.zeros((2, 4))
        >>> with parametrize.cached():
        ...     for x in jnp.ones((5, 2, 3)):
        ...         h = cell(x, h)
    """
    context = _is_cached(True)
    context.__enter__()
    _local.depth += 1
    try:
        yield
    finally:
        _local.depth -= 1
        if not _local.depth:
            _local.values.clear()
        context.__exit__(None, None, None)


# -- what computes an attribute ---------------------------------------------------------------------------------------


class ParametrizationList(ModuleList):
    """The parametrizations of one attribute, and the original parameters or buffers, from which they compute it.

    `register_parametrization` makes it, as `module.parametrizations.NAME`. If the first parametrization takes one array,
    that is `original`; if its `right_inverse` returns several, they are `original0`, `original1`, …

    Args:
        modules: the parametrizations, in the order in which they are applied.
        original: the Parameter or Buffer that they replace.
        unsafe: True if the parametrizations may change shape and dtype; nothing is checked then.

    Raises:
        ValueError: if there is no parametrization, or if one returns what does not fit.

    Source: torch.nn.utils.parametrize.ParametrizationList.
    """

    unsafe: bool
    is_tensor: bool  # True for one `original`
    ntensors: int  # how many originals there are
    _computes_attribute = True
    _order: tuple[str, ...]  # the names of the module's parameters and buffers before any was parametrized
    _shape: tuple[int, ...]  # of the attribute

    def __init__(self, modules: Iterable[Module], original: Any, unsafe: bool = False) -> None:
        self._set_up(modules, original._cell, unsafe, trusted=False)

    def _set_up(self, modules: Iterable[Module], cell: Cell, unsafe: bool, trusted: bool) -> None:
        """Hold the originals of the value of `cell`. With `trusted` they are that value, and nothing is checked."""
        super().__init__(modules)
        if not len(self):
            raise ValueError("a ParametrizationList needs at least one parametrization; got none")
        value = access.read(cell)
        new = value if trusted else self._originals_for(value)
        self.unsafe, self._order, self._shape = unsafe, (), tuple(value.shape)
        self.is_tensor = is_array(new)
        self.ntensors = 1 if self.is_tensor else len(new)
        if new is value:  # the same cell: what an optimizer keeps for it, and what is tied to it, stays
            self._cells["original"] = cell
        elif self.is_tensor:
            if new.dtype != value.dtype:
                raise ValueError(f"right_inverse must keep the dtype, {value.dtype}; it has returned {describe(new)}")
            self.original = declared_as(cell.kind, cell.trainable, new)
        else:
            for i, array in enumerate(new):
                setattr(self, f"original{i}", declared_as(cell.kind, cell.trainable, array))
        if not trusted and not unsafe:
            check_same(self(), value, "the parametrization")

    def _originals_for(self, value: Any) -> Any:
        """Return what the `right_inverse`s make of a value: an array, or a list of arrays. Without one, it is the value."""
        new = value
        for module in reversed(self._modules()):
            inverse = getattr(module, "right_inverse", None)
            if inverse is not None:
                try:
                    new = inverse(new)
                except NotImplementedError:
                    pass
        if is_array(new):
            return as_array(new)
        if not isinstance(new, Sequence) or not new or not all(map(is_array, new)):
            raise ValueError(f"right_inverse must return an array, or a list or tuple of arrays; got {shown(new)}")
        return new

    def _originals(self) -> list[Any]:
        return [self.original] if self.is_tensor else [getattr(self, f"original{i}") for i in range(self.ntensors)]

    def forward(self) -> Any:
        first, *rest = self._modules()
        value = first(*self._originals())
        for module in rest:
            value = module(value)
        return value

    def right_inverse(self, value: Any) -> None:
        """Store the originals for which the attribute is `value`: what the `right_inverse`s return, from the last one on.

        Raises:
            RuntimeError: if a parametrization has no `right_inverse`.
            ValueError: if the originals do not fit. Nothing is stored then.
        """
        new: Any = value
        for module in reversed(self._modules()):
            inverse = getattr(module, "right_inverse", None)
            if inverse is None:
                kind = type(module).__name__
                raise RuntimeError(
                    f"the parametrization {kind} has no `right_inverse`, so its attribute cannot be assigned. Write one:"
                    f" it returns the original for which {kind} computes a value. Or assign to `original`."
                )
            new = inverse(new)
        if self.is_tensor:
            if not is_array(new):
                raise ValueError(f"right_inverse must return one array, as it did before; got {shown(new)}")
            self.original = new
            return
        old = self._originals()
        if not isinstance(new, Sequence) or [describe(x) for x in new] != [describe(x) for x in old]:
            got = ", ".join(map(describe, new)) if isinstance(new, Sequence) else shown(new)
            raise ValueError(f"right_inverse must return ({', '.join(map(describe, old))}), as before; got {got}")
        for i, array in enumerate(new):
            setattr(self, f"original{i}", array)

    def _assign(self, value: Any, label: str) -> None:
        """Take a value that was assigned to the attribute, which messages call `label`."""
        if is_declaration(value):
            value = declared(value._cell)
        if not is_array(value):
            raise TypeError(
                f"{label} is computed by a parametrization: it takes an array, for `right_inverse`; got {shown(value)}."
                " `nn.utils.parametrize.remove_parametrizations` makes it a parameter again."
            )
        value = as_array(value)
        if not self.unsafe and value.shape != self._shape:
            raise ValueError(f"{label} has the shape {self._shape}, and was given {describe(value)}")
        self.right_inverse(value)

    def _of_its_dtype(self) -> Any:
        """Return an array of the attribute's dtype, computed only where parametrizations may change the dtype."""
        return self.original if self.is_tensor and not self.unsafe else self._value()

    def _value(self) -> Any:
        """Return the attribute's value. Within a block of `cached`, it is computed once in each trace."""
        if not _is_cached.value:
            return self()
        known, state, walk = _local.values.setdefault(id(self), []), trace_state(), walk_of(self)
        for entry in known:
            made_by, trace, spec, inputs, value = entry
            if made_by is self and trace == state:
                if spec is walk.spec and all(map(is_, inputs, map(get_value, walk.cells))):
                    return value
                known.remove(entry)
                break
        value = self()
        known.append((self, state, walk.spec, list(map(get_value, walk.cells)), value))
        return value


def declared_as(kind: str, trainable: bool, array: Any) -> Any:
    return Buffer(array) if kind == "buffer" else Parameter(array, trainable=trainable)


def check_same(value: Any, old: Any, what: str) -> None:
    """Raise ValueError unless a value is an array of the shape and dtype of `old`."""
    if not is_array(value) or tuple(value.shape) != tuple(old.shape) or value.dtype != old.dtype:
        raise ValueError(
            f"{what} must return an array like the one that is parametrized, {describe(old)}; it has returned"
            f" {describe(value) if is_array(value) else shown(value)}. `unsafe=True` leaves this check out."
        )
