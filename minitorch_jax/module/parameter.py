"""Parameter and Buffer, and the checks of every value that is assigned to one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime import contexts
from ..runtime.numpy_memory import as_numpy, owned
from ..state import access, dropped_copies
from ..state.cell import Cell, bound_to
from ..state.encoding import Encoding
from ..state.static_values import describe

X64 = 'jax.config.update("jax_enable_x64", True)'


def as_array(value: Any) -> Any:
    """Return `value` as a JAX array that shares no memory with NumPy and has no weak type."""
    if isinstance(value, jax.Array):
        return jnp.array(value, dtype=value.dtype) if value.aval.weak_type else value
    value = owned(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iu":
        value = fitting(value)
    return jnp.array(value, dtype=jnp.result_type(value) if np.shape(value) == () else None)


def fitting(values: Any, dtype: Any = None) -> Any:
    """Return NumPy integers in `dtype`, by default their own dtype, or its 32-bit form if JAX's 64-bit types are off.

    Raises:
        ValueError: if one of the integers does not fit.
    """
    dtype = jax.dtypes.canonicalize_dtype(values.dtype) if dtype is None else dtype
    if dtype == values.dtype:
        return values
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if values.size and not (low <= values.min() and values.max() <= high):
        raise ValueError(
            f"{values.dtype} from {values.min()} to {values.max()} does not fit {dtype}, JAX's integers while its 64 bits"
            f" are off; call {X64} first"
        )
    return values.astype(dtype)


def placed_as(value: Any, old: Any) -> Any:
    """Return a value on the devices, and in the sharding, of `old`, the array that it replaces.

    This is for values without a placement of their own: what is no JAX array, and arrays that are bound to no device. An
    array that is bound to devices stays there, and so moves what it is assigned to.
    """
    where = bound_to(old)
    if where is None or isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, jax.Array):
        if value.committed:
            return value
    else:
        value = as_numpy(owned(value))
        if value.dtype.kind in "iu":
            value = fitting(value)
    return jax.device_put(value, where) if value.shape == old.shape else value


class _Declaration:
    """Base of Parameter and Buffer: a new cell that is to be assigned to a module."""

    __slots__ = ("_cell",)
    _cell: Cell
    _declares = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_cell":
            raise AttributeError(
                f"a {type(self).__name__} is a declaration, with no `{name}` to set. Pass the array when you make it, and"
                " write `Parameter(array, trainable=False)` for one that is not trained"
            )
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self._cell.value)})"


class Parameter(_Declaration):
    """Declares a trainable array of a module.

    If one Parameter object is assigned to two attributes, they are one tied parameter.

    Args:
        array: a floating array of any shape: of JAX, of NumPy (it is copied), or nested lists of numbers.
        trainable: False declares a frozen parameter.

    Raises:
        TypeError: if the array is not floating.

    Example:
        >>> from minitorch_jax import Module, Parameter
        >>> class Scale(Module):
        ...     def __init__(self, size):
        ...         self.weight = Parameter(jnp.ones(size))
        ...     def forward(self, x):
        ...         return self.weight * x
        >>> Scale(3)(2.0)
        Array([2., 2., 2.], dtype=float32)
    """

    __slots__ = ()
    if TYPE_CHECKING:  # the attribute that it is assigned to is read and assigned as an array

        def __new__(cls, array: Any, trainable: bool = True) -> jax.Array: ...  # type: ignore[misc]

    else:

        def __init__(self, array: Any, trainable: bool = True) -> None:
            value = as_array(array)
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise TypeError(
                    f"a Parameter is trained by gradients, so it must be floating; got {describe(value)}. Use"
                    " `Parameter(array.astype(float))`, or `Buffer(array)` for an array that is not trained."
                )
            lent = isinstance(array, jax.Array)  # anything else was copied
            self._cell = Cell(
                value, "parameter", trainable=bool(trainable), lent=lent, birth=dropped_copies.birth_here()
            )


def fresh_parameter(array: jax.Array) -> jax.Array:
    """Return a Parameter of a new array that nobody else holds, so that its first donation needs no copy."""
    parameter: Any = Parameter(array)
    parameter._cell.lent = False
    return parameter


class Buffer(_Declaration):
    """Declares an array of a module that is saved but not trained (running statistics, counts, keys).

    Args:
        array: an array of any dtype and shape, random keys included.

    Example:
        >>> from minitorch_jax import Buffer, Module
        >>> class Counter(Module):
        ...     def __init__(self):
        ...         self.count = Buffer(0)
        ...     def forward(self, x):
        ...         self.count = self.count + 1
        ...         return x
        >>> counter = Counter()
        >>> _ = counter(1.0), counter(1.0)
        >>> int(counter.count)
        2
    """

    __slots__ = ()
    if TYPE_CHECKING:

        def __new__(cls, array: Any) -> jax.Array: ...  # type: ignore[misc]

    else:

        def __init__(self, array: Any) -> None:
            value = as_array(array)
            encoding = Encoding.of(value)
            value = value if encoding is None else encoding.encode(value)
            self._cell = Cell(value, "buffer", lent=True, encoding=encoding, birth=dropped_copies.birth_here())


def wide_dtype(dtype: Any) -> Any:
    """Return the dtype for arithmetic on parameters and gradients of `dtype`: at least float32."""
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32)


@jax.jit
def counted(count: Any) -> Any:
    """Return an integer plus one, or the integer itself if it is the largest of its dtype."""
    return jnp.minimum(count, jnp.iinfo(count.dtype).max - 1) + 1


def is_narrow(value: Any) -> bool:
    """True for a floating array narrower than float32."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4


def read_gradient(param: Cell, owner: Any = None) -> Any:
    """Return the accumulated gradient of a parameter, or zeros if there is none."""
    value = access.read(param.grad, owner)
    if value is not None:
        return value
    with contexts.constants():
        return jnp.zeros_like(param.value)


def write_gradient(param: Cell, value: Any, label: str, owner: Any = None) -> None:
    """Check a new value of a parameter's gradient, and store it."""
    access.write(param.grad, checked_gradient(value, param.value, label), label, owner)
    param.grad.reached = True


def checked_gradient(value: Any, param: Any, label: str) -> Any:
    """Return `value` as a gradient of the array `param`, in its sharding. It raises the same errors as `checked`."""
    value = checked(value, param, label)
    if any([isinstance(x, jax.core.Tracer) for x in (value, param)]) or not getattr(param, "committed", False):
        return value
    return value if value.sharding == param.sharding else jax.device_put(value, param.sharding)


def checked(value: Any, old: Any, label: str) -> Any:
    """Return `value` as an array that may replace `old`.

    Raises:
        ValueError: if its shape or dtype is not that of `old`.
    """
    if isinstance(value, bool | int | float) and getattr(old, "shape", None) == ():
        value = jnp.asarray(value, dtype=old.dtype)
    if not isinstance(value, jax.ShapeDtypeStruct):
        value = as_array(placed_as(as_array(value) if isinstance(value, jax.Array) else value, old))
    if hasattr(old, "dtype") and (value.shape != old.shape or value.dtype != old.dtype):
        raise ValueError(f"{label} is {describe(old)}, and was given {describe(value)}: {_misfit(value, old)}.")
    return value


def _misfit(value: Any, old: Any) -> str:
    """What differs between an array and the one that it is to replace, and what to write instead of `array`."""
    found, wanted = tuple(value.shape), tuple(old.shape)
    wrong, fixed = [], "array"
    if found != wanted:
        wrong.append(f"shape {found} for {wanted}")
    differ = str(value.dtype) != str(old.dtype)  # NumPy cannot compare its dtypes with those of random keys
    if differ:
        wrong.append(f"dtype {value.dtype} for {old.dtype}")
    if found != wanted and math.prod(found) == math.prod(wanted):
        is_transposed = found == wanted[::-1] and 1 not in found
        fixed += ".T" if is_transposed else f".reshape({', '.join(map(str, wanted)) or '()'})"
    elif found != wanted:
        line = f"`jnp.full({wanted}, value)`" if found == () else "an array of that shape"
        return f"{', '.join(wrong)}. Give {line}, or assign `Parameter(array)` or `Buffer(array)` for another size"
    if differ and not jnp.issubdtype(old.dtype, jax.dtypes.extended):
        fixed += f".astype({jnp.dtype(old.dtype).name!r})"
    return f"{', '.join(wrong)}. Write `{fixed}`"


def same_values(one: Any, other: Any) -> bool:
    """True if two arrays of one dtype are equal. NaN is equal to itself."""
    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other) or (one.shape == other.shape and one.tobytes() == other.tobytes())


def assign(cell: Cell, value: Any, label: str, owner: Any = None) -> None:
    """Check a new value of a parameter or buffer, and store it."""
    access.write(cell, encode_checked(cell, value, label), label, owner)


def encode_checked(cell: Cell, value: Any, label: str) -> Any:
    """Check the shape and dtype of `value`, and return it in the form that `cell` stores."""
    new = checked(value, declared(cell), label)
    if cell.encoding is None:
        return new
    if isinstance(new, jax.ShapeDtypeStruct):
        return jax.eval_shape(cell.encoding.encode, new, cell.value).update(sharding=new.sharding)
    return placed_as(cell.encoding.encode(new, cell.value), cell.value)


def declared(cell: Cell) -> Any:
    """Return an array, or a `jax.ShapeDtypeStruct`, of the shape and dtype that readers of the cell see."""
    if cell.encoding is None or not hasattr(cell.value, "dtype"):
        return cell.value
    if isinstance(cell.value, jax.ShapeDtypeStruct):
        return cell.encoding.decode(cell.value)
    return jax.eval_shape(cell.encoding.decode, cell.value)
