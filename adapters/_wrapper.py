"""Base of the Modules that wrap another library's module, and the cells that hold its arrays."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

import minitorch_jax as mt
from minitorch_jax.module.parameter import as_array
from minitorch_jax.state import access, dropped_copies
from minitorch_jax.state import frame as frames
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.encoding import Encoding
from minitorch_jax.state.static_values import describe

_config: Any = jax.config


class Wrapper(mt.Module):
    """Base of Modules around another library's module. Its arrays are their parameters and buffers, under its paths."""

    __slots__ = ()
    _holds = "a module"  # in messages: the thing that is wrapped
    _inside = "module"  # the attribute that returns it

    def _set_mode(self, training: bool) -> None:
        """Put the wrapped module in training or evaluation mode."""

    def __setattr__(self, name: str, value: Any) -> None:
        label = f"{type(self).__name__}.{name}"
        if name == "training":
            own = frames.local.frame is not None and id(self) in frames.local.frame.own
            access.check_restructurable(self._birth, label, "was changed", own)
            self._set_mode(bool(value))
            super().__setattr__(name, bool(value))
        elif getattr(getattr(type(self), name, None), "fset", None) is not None:  # a property with a setter
            object.__setattr__(self, name, value)
        elif name in self._cells and not isinstance(value, mt.Parameter | mt.Buffer):
            super().__setattr__(name, value)
        else:
            raise AttributeError(
                f"{label}: {type(self).__name__} holds {self._holds} and takes no attributes of its own. Assign to"
                f" `.{self._inside}`, or write a Module that holds both."
            )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__}.{name} cannot be deleted: {type(self).__name__} only holds {self._holds}. Change"
            f" `.{self._inside}`."
        )

    def tie(self, name: str, other: mt.Module, other_name: str) -> NoReturn:
        """Raise TypeError: parameters must be tied in the other library."""
        raise TypeError(
            f"{type(self).__name__}.{name} cannot be tied: it belongs to {self._holds}. Share it there before you wrap"
            " the module."
        )

    def _holder(self, path: str) -> tuple[mt.Module, str]:
        return (self, path) if path in self._cells else super()._holder(path)


def problems_of(path: str, value: Any, trained: bool) -> str | None:
    """The problem if a cell cannot hold `value`, as a parameter (`trained`) or as a buffer. None if it can."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape") or isinstance(value, jax.ShapeDtypeStruct):
        return f"  {path} is {value!r}, which is not an array"
    if trained and not jnp.issubdtype(value.dtype, jnp.floating):
        return f"  {path} is {describe(value)}, which cannot be trained: parameters must be floating"
    if value.dtype == np.float64 and not _config.jax_enable_x64:
        return f"  {path} is float64, which JAX would convert to float32: convert it, or set jax_enable_x64"
    return None


def hidden(path: str, module: mt.Module) -> str:
    """The problem with one of our Modules inside another library's module: nobody would find its parameters."""
    return (
        f"  {path} is a Module of minitorch_jax ({type(module).__name__}): write a Module that holds both, or convert it"
        " first (`to_flax`, `to_equinox`)"
    )


def without_numbers(tree: Any) -> Any:
    """The pytree, with arrays in place of Python numbers."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, bool | int | float | complex) else x, tree)


def new_cell(value: Any, kind: str, trainable: bool = False) -> Cell:
    """A cell for an array that another library's module also keeps."""
    value = as_array(value)
    encoding = None if kind == "parameter" else Encoding.of(value)
    value = value if encoding is None else encoding.encode(value)
    birth = dropped_copies.birth_here()
    return Cell(value, kind, trainable=trainable, lent=True, encoding=encoding, birth=birth)
