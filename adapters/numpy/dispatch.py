"""NumPy's functions on values that may be traced. If one is, JAX's function of the same name runs, otherwise NumPy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .memory import Held, Untraceable, is_tracer, known, widened

# array methods that call the NumPy function of the same name
METHODS = frozenset(
    "all any argmax argmin argsort clip compress conj conjugate cumprod cumsum diagonal dot max mean min nonzero prod ptp"
    " ravel repeat round searchsorted squeeze std sum swapaxes take trace var".split()
)
# functions that only move the elements of their first argument
_MOVING = (
    "array_split broadcast_to delete diagonal dsplit expand_dims flip fliplr flipud hsplit matrix_transpose moveaxis"
    " permute_dims ravel repeat reshape resize roll rollaxis rot90 split squeeze swapaxes take take_along_axis tile"
    " transpose unstack vsplit".split()
)
MOVES = {getattr(np, name) for name in _MOVING if hasattr(np, name)} | {sliding_window_view}
_UNIMPORTANT = ("order", "subok", "casting", "copy", "like", "device")
_RENAMED = {"a_min": "min", "a_max": "max"}


def unwrapped(value: Any) -> Any:
    """A value, with traced arrays replaced by their values, inside tuples, lists and dicts too."""
    if issubclass(type(value), Held):
        return value.value
    if type(value) in (list, tuple):
        return type(value)(map(unwrapped, value))
    if type(value) is dict:
        return {key: unwrapped(item) for key, item in value.items()}
    return value


def plain(value: Any) -> Any:
    """As `unwrapped`, with tracers replaced by NumPy arrays of their values: for shapes, axes and indices."""
    value = unwrapped(value)
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return known(value) if is_tracer(value) else value


def concrete(array: Held, what: str) -> NDArray[Any]:
    """The values of a constant. Raises for a traced value, whose derivative would be lost."""
    value = array.value
    if is_tracer(value):
        raise Untraceable(f"a value with a derivative was passed to {what}")
    return np.asarray(value)


def wrapped(make: Callable[[Any], Any], value: Any) -> Any:
    """A result for the user's code: arrays become traced arrays, and single known numbers become NumPy's."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[wrapped(make, item) for item in value])
    if type(value) in (list, tuple):
        return type(value)(wrapped(make, item) for item in value)
    if issubclass(type(value), Held):
        return value
    if is_tracer(value):
        return make(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.array(value, widened(value.dtype)) if value.dtype.kind in "fiub" else np.array(value)
        return make(array) if array.ndim else array[()]
    return value


def _has_tracer(value: Any) -> bool:
    if type(value) in (list, tuple):
        return any(map(_has_tracer, value))
    return any(map(_has_tracer, value.values())) if type(value) is dict else is_tracer(value)


def call(make: Callable[[Any], Any], function: Any, args: Any, kwargs: Any, method: str = "__call__") -> Any:
    """Call a function, or a ufunc's method, and return its result."""
    args, kwargs = unwrapped(tuple(args)), unwrapped(dict(kwargs))
    if not _has_tracer(args) and not _has_tracer(kwargs):
        return wrapped(make, getattr(function, method)(*args, **kwargs))
    ours = _counterpart(function)
    kwargs = {_RENAMED.get(key, key): item for key, item in kwargs.items() if key not in _UNIMPORTANT}
    if kwargs.get("dtype") is not None:
        kwargs["dtype"] = widened(kwargs["dtype"])
    if isinstance(kwargs.get("weights"), list):
        kwargs["weights"] = jnp.asarray(kwargs["weights"])
    return wrapped(make, getattr(ours, method)(*_arrays(args), **kwargs))


def _arrays(args: Any) -> Any:
    """The arguments, with lists of numbers as arrays: JAX's functions take no lists."""
    return [jnp.asarray(a) if type(a) is list and a and all(map(_is_number, a)) else a for a in args]


def _is_number(value: Any) -> bool:
    return not isinstance(value, list | tuple | str) and getattr(value, "ndim", 0) == 0


def _counterpart(function: Any) -> Any:
    """JAX's function of the same name and meaning."""
    name = function.__name__
    if isinstance(function, np.ufunc):
        space: Any = jnp if getattr(np, name, None) is function else jax.scipy.special
    else:
        space = jnp
        for part in function.__module__.split(".")[1:]:
            space = getattr(space, part, None)
    found = getattr(space, name, None)
    if found is None:
        raise Untraceable(f"JAX has no counterpart of {name}")
    return found


def scattered(make: Callable[[Any], Any], ufunc: np.ufunc, target: Held, key: Any, values: Any) -> None:
    """`ufunc.at`, which applies once for each time that an index occurs."""
    names = {"add": "add", "subtract": "subtract", "multiply": "multiply", "maximum": "max", "minimum": "min"}
    if ufunc.__name__ not in names:
        raise Untraceable(f"np.{ufunc.__name__}.at on a traced array")
    places, whole = np.asarray(target.where()[key]), target.memory.value
    new = jnp.broadcast_to(jnp.asarray(unwrapped(values[0])), places.shape)
    at = jnp.asarray(whole).reshape(-1).at[places]
    result = getattr(at, names[ufunc.__name__])(new).reshape(whole.shape)
    target.memory.value = result if is_tracer(result) else np.asarray(result)


def stacked(value: Any) -> Any:
    """A list of lists as one array, as `np.array` does."""
    if type(value) in (list, tuple):
        items = [stacked(item) for item in value]
        return jnp.stack([jnp.asarray(item) for item in items]) if _has_tracer(items) else np.array(items)
    return value


def fitting(value: Any, shape: tuple[int, ...]) -> Any:
    """A value to assign to elements of this shape. As in NumPy, leading axes of size 1 are dropped."""
    value = unwrapped(value)
    value = stacked(value) if type(value) in (list, tuple) else value
    while np.ndim(value) > len(shape) and value.shape[0] == 1:
        value = value[0]
    return value
