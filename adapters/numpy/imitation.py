"""The replacements of `numpy`, `math`, `float` and `import` for functions that run on traced arrays."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import BuiltinFunctionType, ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import as_strided

from .dispatch import stacked, unwrapped, wrapped
from .memory import is_tracer, widened
from .traced import SPECIAL, Traced
from .world import World


def _array(value: Any, dtype: Any = None, *, copy: Any = True, ndmin: int = 0, **_: Any) -> Any:
    """`np.array`."""
    value = unwrapped(value)
    value = stacked(value) if type(value) in (list, tuple) else value
    new = Traced(value) if is_tracer(value) else Traced(_wide(np.array(value)))
    new = new if dtype is None else new.astype(dtype)
    return new.reshape((1,) * (ndmin - new.ndim) + new.shape) if ndmin > new.ndim else new


def _asarray(value: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
    """`np.asarray`: the same array, if it is one."""
    if type(value) is Traced and (dtype is None or widened(dtype) == value.dtype):
        return value
    return _array(value, dtype)


def _full(shape: Any, fill_value: Any, dtype: Any = None, **_: Any) -> Any:
    new = Traced(np.zeros(shape, widened(dtype or getattr(fill_value, "dtype", type(fill_value)))))
    new.write(fill_value)
    return new


def _as_strided(x: Any, shape: Any = None, strides: Any = None, **_: Any) -> Any:
    def move(places: Any) -> Any:
        steps = None if strides is None else [stride * 8 // x.itemsize for stride in strides]
        return as_strided(places, shape, steps)

    return x.moved(move) if type(x) is Traced else as_strided(x, shape, strides)


def _wide(array: Any) -> Any:
    return array.astype(widened(array.dtype)) if array.dtype.kind == "f" else array


_REPLACED: dict[Any, Callable[..., Any]] = {
    np.array: _array,
    np.asarray: _asarray,
    np.asanyarray: _asarray,
    np.ascontiguousarray: _asarray,
    np.asfortranarray: _asarray,
    np.require: _asarray,
    np.full: _full,
    as_strided: _as_strided,
}


class _Function:
    """A NumPy function that returns traced arrays, into which traced values can be written."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replaced = _REPLACED.get(self._real) if getattr(self._real, "__hash__", None) else None
        if replaced is not None:
            return replaced(*args, **kwargs)
        if self._real in SPECIAL and args and type(args[0]) is not Traced and isinstance(args[0], np.ndarray):
            return (
                SPECIAL[self._real](*args, **kwargs) if "like" in self._real.__name__ else self._real(*args, **kwargs)
            )
        return wrapped(Traced, self._real(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Namespace(ModuleType):
    """`numpy`, or one of its modules."""

    def __init__(self, real: ModuleType) -> None:
        super().__init__(real.__name__)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        value = imitated(getattr(self._real, name))
        setattr(self, name, value)
        return value


class _Maths:
    """A function of `math`."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __call__(self, *args: Any) -> Any:
        if not any(is_tracer(unwrapped(arg)) for arg in args):
            return self._real(*args)
        names = {"fabs": "abs", "pow": "power", "gamma": "", "lgamma": "", "erf": ""}
        name = names.get(self._real.__name__, self._real.__name__)
        return Traced(getattr(jnp, name)(*unwrapped(args)))


class _FloatType(type):
    """`float`. It is the same as a dtype and in isinstance(), but float(x) of a traced value is traced."""

    dtype = np.dtype(float)

    def __call__(cls, x: Any = 0.0, /) -> Any:
        value = unwrapped(x)
        return Traced(value.reshape(())) if is_tracer(value) else builtins.float(value)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.float)

    def __eq__(cls, other: Any) -> bool:
        return other is cls or other is builtins.float

    def __hash__(cls) -> int:
        return hash(builtins.float)


class _Float(metaclass=_FloatType):
    """See `_FloatType`."""


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    return imitated(builtins.__import__(name, *args, **kwargs))


def imitated(value: Any) -> Any:
    """The replacement of a value of NumPy or `math`; for any other value, the value itself."""
    if isinstance(value, ModuleType):
        return _Namespace(value) if value.__name__.partition(".")[0] in ("numpy", "math") else value
    if value is builtins.float:
        return _Float
    if isinstance(value, type):
        return value
    home = getattr(value, "__module__", None)
    if isinstance(value, np.ufunc) or (callable(value) and str(home).partition(".")[0] == "numpy"):
        return _Function(value)
    if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, np.random.RandomState):
        return _Function(value)
    if isinstance(value, BuiltinFunctionType) and home == "math":
        return _Maths(value)
    return value


def traced_world(array: Callable[[Any], Any]) -> World:
    """A world in which `array` makes a traced array of each array."""
    return World(array, imitated, {"float": _Float, "__import__": _import})
