"""An array that stands for a traced JAX value and takes NumPy's functions, operators and assignments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dispatch import (
    METHODS,
    MOVES,
    call,
    concrete,
    fitting,
    plain,
    scattered,
    unwrapped,
)
from .memory import Held, Untraceable, is_tracer, known, widened


class Traced(Held):
    """An array that user code takes for a NumPy array. Floating values are float64.

    NumPy moves the elements (see `Held`). All other operations run in NumPy for constants, and in JAX for traced values.
    """

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]  # NumPy arrays have no hash

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for `isinstance(x, np.ndarray)`
        return np.ndarray

    def write(self, new: Any) -> None:
        super().write(unwrapped(fitting(new, self.shape)))

    # -- NumPy's protocols --------------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        out = kwargs.pop("out", (None,))
        where = unwrapped(kwargs.pop("where", True))
        target = out[0] if isinstance(out, tuple) else out
        if (
            target is not None
            and type(target) is not Traced
            or len(out) > 1
            or method == "at"
            and type(args[0]) is not Traced
        ):
            raise Untraceable(f"np.{ufunc.__name__} would write a traced value into an ordinary array")
        if method == "at":
            target, method = args[0], "__call__"
            places, *rest = args[1:]
            return scattered(Traced, ufunc, target, _key(places), rest)
        if where is not True:
            if method != "__call__" or target is None:
                raise Untraceable(f"np.{ufunc.__name__} with `where` and without `out`")
            args = tuple([_call(np.where, (where, arg, 1), {}) if np.ndim(arg) else arg for arg in args])
        result = _call(ufunc, args, kwargs, method)
        if target is None:
            return result
        target.write(result if where is True else _call(np.where, (where, result, target.copy()), {}))
        return target

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        special = SPECIAL.get(function)
        if special is not None:
            return special(*args, **kwargs)
        out = kwargs.pop("out", None)
        if function in MOVES and type(args[0]) is Traced:
            result = args[0].moved(lambda places: function(places, *map(plain, args[1:]), **kwargs))
        else:
            result = _call(function, args, kwargs)
        if out is None:
            return result
        if type(out) is not Traced:
            raise Untraceable(f"np.{function.__name__} would write a traced value into an ordinary array")
        out.write(result)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(concrete(self, "a function that is not NumPy's, or np.asarray in a library"), dtype)

    def __float__(self) -> float:
        return float(concrete(self, "float(), math or a library"))

    def __int__(self) -> int:
        return int(known(self.value))  # it is piecewise constant, so no derivative is lost

    def __index__(self) -> int:
        if not np.issubdtype(self.dtype, np.integer):
            raise TypeError("only integer scalar arrays can be converted to a scalar index")
        return int(known(self.value))

    def __bool__(self) -> bool:
        return bool(known(self.value))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, item: Any) -> bool:
        return bool((self == item).any())

    def __format__(self, spec: str) -> str:
        return format(known(self.value) if self.shape else known(self.value)[()], spec)

    def __repr__(self) -> str:
        return repr(known(self.value))

    def __getitem__(self, key: Any) -> Any:
        key = _key(key)
        found = self.moved(lambda places: places[key])
        return found if found.shape or is_tracer(found.value) else found.value[()]

    def __setitem__(self, key: Any, value: Any) -> None:
        key = _key(key)
        self.at(self.memory, np.asarray(self.where()[key])).write(value)

    def __getattr__(self, name: str) -> Any:
        if name in METHODS:
            function = getattr(np, name)
            return lambda *args, **kwargs: function(self, *args, **kwargs)
        raise AttributeError(f"a traced array has no attribute {name!r}")

    # -- attributes and methods ---------------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=int))

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(stride * self.itemsize // 8 for stride in self.where().strides)

    @property
    def T(self) -> Traced:
        return self.moved(np.transpose)

    @property
    def mT(self) -> Traced:
        return self.moved(np.matrix_transpose)

    @property
    def real(self) -> Traced:
        return self

    @property
    def flat(self) -> Traced:
        flat = self.reshape(-1)
        if flat.memory is not self.memory:
            raise Untraceable("`flat` of a traced array that is not contiguous")
        return flat

    def reshape(self, *shape: Any, order: Any = "C") -> Any:
        wanted = shape[0] if len(shape) == 1 else shape
        return self.moved(lambda places: places.reshape(plain(wanted), order=order))

    def transpose(self, *axes: Any) -> Any:
        return self.moved(lambda places: places.transpose(*axes))

    def flatten(self, order: Any = "C") -> Any:
        return self.moved(lambda places: places.flatten(order))

    def copy(self, order: Any = "C") -> Traced:
        return Traced(self.value)

    def astype(self, dtype: Any, **_: Any) -> Traced:
        wide = widened(dtype)
        if not np.issubdtype(wide, np.floating) or not is_tracer(self.value):
            return Traced(np.array(known(self.value), wide))
        return self.copy()

    def item(self, *index: Any) -> Any:
        return self.reshape(-1)[index or 0] if len(index) < 2 else self[index]

    def tolist(self) -> Any:
        return [row.tolist() for row in self] if self.shape else self

    def fill(self, value: Any) -> None:
        self.write(value)

    def sort(self, axis: int = -1, **_: Any) -> None:
        self.write(_call(np.sort, (self, axis), {}))


def _binary(ufunc: np.ufunc) -> Any:
    return lambda self, other: NotImplemented if other is None else ufunc(self, other)


def _inplace(ufunc: np.ufunc) -> Any:
    def method(self: Traced, other: Any) -> Traced:
        self.write(ufunc(self, other))
        return self

    return method


_OPERATORS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "pow": np.power,
    "matmul": np.matmul,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
for _name, _ufunc in _OPERATORS.items():
    setattr(Traced, f"__{_name}__", _binary(_ufunc))
    setattr(Traced, f"__r{_name}__", lambda self, other, _ufunc=_ufunc: _ufunc(other, self))
    setattr(Traced, f"__i{_name}__", _inplace(_ufunc))
for _name, _ufunc in {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}.items():
    setattr(Traced, f"__{_name}__", lambda self, _ufunc=_ufunc: _ufunc(self))
_COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
for _name, _ufunc in _COMPARISONS.items():
    setattr(Traced, f"__{_name}__", _binary(_ufunc))


_call = partial(call, Traced)


def _key(key: Any) -> Any:
    """An index, with traced arrays replaced by their known values."""
    if isinstance(key, tuple):
        return tuple(map(_key, key))
    return known(key.value) if type(key) is Traced else plain(key) if isinstance(key, list) else key


# -- functions that write to an array, or only need its shape ------------------------------------------------------------


def _like(make: Callable[..., Any]) -> Any:
    def like(array: Any, dtype: Any = None, *_: Any, shape: Any = None, **__: Any) -> Traced:
        return Traced(make(np.shape(array) if shape is None else shape, widened(dtype or array.dtype)))

    return like


def _full_like(array: Any, fill_value: Any, dtype: Any = None, *_: Any, shape: Any = None, **__: Any) -> Traced:
    new = Traced(np.zeros(np.shape(array) if shape is None else shape, widened(dtype or array.dtype)))
    new.write(fill_value)
    return new


def _copyto(target: Any, source: Any, casting: Any = None, where: Any = True) -> None:
    if type(target) is not Traced:
        raise Untraceable("np.copyto would write a traced value into an ordinary array")
    target.write(source if where is True else _call(np.where, (where, source, target), {}))


def _put_along_axis(array: Any, indices: Any, values: Any, axis: int | None) -> None:
    places = np.take_along_axis(array.where(), plain(indices), axis)
    array.at(array.memory, places).write(values)


def _putmask(array: Any, mask: Any, values: Any) -> None:
    _copyto(array, values, where=mask)


SPECIAL: dict[Any, Callable[..., Any]] = {
    np.zeros_like: _like(np.zeros),
    np.empty_like: _like(np.zeros),
    np.ones_like: _like(np.ones),
    np.full_like: _full_like,
    np.copyto: _copyto,
    np.put_along_axis: _put_along_axis,
    np.putmask: _putmask,
    np.copy: lambda array, **_: Traced(unwrapped(array)),
    np.shape: lambda array: array.shape,
    np.ndim: lambda array: array.ndim,
    np.size: lambda array, axis=None: array.size if axis is None else array.shape[axis],
    np.iscomplexobj: lambda array: False,
}
