"""`autocast`: matrix products in a lower type, and what needs float32 in float32, without a change of the model.

Each function of `nn.functional` says by a decorator what it does under `autocast`; one without a decorator computes in the
dtypes that it gets. The choice is torch's for CUDA, list by list (ATen/autocast_mode.h of torch 2.13). The state is one of
JAX's own contexts, which are part of the key of every trace: a program is never used under another setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")

_LOWER: Any = jax.make_user_context(None)  # the lower dtype while `autocast` is on, else None


class autocast:  # noqa: N801 (torch's name)
    """Compute matrix products, convolutions and attention in a lower type; parameters and gradients keep theirs.

    Under it, `linear`, convolutions, attention, `prelu` and recurrent layers convert their inputs and weights to `dtype`,
    accumulate in float32 and return `dtype`. Softmax, normalisation over features, losses and norms convert inputs of
    16 bits to float32, and return float32. `bilinear` and `grid_sample` take the widest of their types. Everything else,
    plain `jnp` code too, computes in the types that it gets; float64 is never converted. The conversions are part of the
    computation, so gradients arrive in the parameters' own type.

    Use it around a call, inside a compiled function, or as a decorator of the loss. It nests, and belongs to the thread.
    It is part of a compiled function's key: the first call under another setting compiles once more.

    Args:
        dtype: `jnp.bfloat16`, or `jnp.float16`, whose small range needs an `mt.LossScaler`.
        enabled: False switches `autocast` off in the block, to keep a part of a model in float32.

    Raises:
        TypeError: if `dtype` is no floating type of 16 bits. `binary_cross_entropy` raises it under `autocast`, as in
            torch: use `binary_cross_entropy_with_logits`.

    Source: torch.autocast, with the lists of CUDA.

    Example:
        >>> import minitorch_jax as mt
        >>> layer = mt.nn.Linear(3, 2)
        >>> with mt.autocast(jnp.bfloat16):
        ...     y = layer(jnp.ones((4, 3)))
        >>> y.dtype, layer.weight.dtype
        (dtype(bfloat16), dtype('float32'))
    """

    def __init__(self, dtype: Any = jnp.bfloat16, enabled: bool = True) -> None:
        if isinstance(dtype, str) and dtype.partition(":")[0] in ("cuda", "cpu", "tpu", "gpu", "mps", "xpu"):
            raise TypeError(
                f"autocast takes a dtype, and no device; got {dtype!r}. Write `mt.autocast(jnp.bfloat16)`: it acts on the"
                " device on which the arrays are."
            )
        try:
            kind = jnp.dtype(dtype)
        except TypeError:
            kind = None
        if kind is None or kind not in (jnp.bfloat16, jnp.float16):
            raise TypeError(f"autocast takes jnp.bfloat16 or jnp.float16; got {dtype!r}")
        self.dtype, self.enabled = kind, bool(enabled)
        self._setting = kind.name if self.enabled else None
        self._entered: list[Any] = []

    def __enter__(self) -> None:
        context = _LOWER(self._setting)
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return the function, which computes under this setting."""
        setting = self._setting  # a string in the closure: compiled functions compare it

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with _LOWER(setting):
                return function(*args, **kwargs)

        return call

    def __repr__(self) -> str:
        return f"autocast({self.dtype.name}{'' if self.enabled else ', enabled=False'})"


def lower_dtype() -> Any:
    """The type of matrix products under `autocast`; None outside."""
    name = _LOWER.value
    return None if name is None else jnp.dtype(name)


def lowered(array: Any) -> Any:
    """An array in the lower type under `autocast`. Outside, and for float64 and what is no floating array, unchanged."""
    return array if _LOWER.value is None else _converted(array, lower_dtype(), _is_castable)


def product_dtype(array: Any) -> Any:
    """The dtype in which a matrix product with this weight runs."""
    return lower_dtype() if _LOWER.value is not None and _is_castable(array) else array.dtype


def _width(array: Any) -> int | None:
    """The number of bytes of each element of a floating array that `autocast` converts; None for anything else."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)):
        return None
    size: int = jax.dtypes.canonicalize_dtype(array.dtype).itemsize
    return size if size in (2, 4) else None


def _is_castable(array: Any) -> bool:
    return _width(array) is not None


def _is_narrow(array: Any) -> bool:
    return _width(array) == 2


def _converted(array: Any, dtype: Any, chosen: Callable[[Any], bool]) -> Any:
    return jnp.asarray(array).astype(dtype) if chosen(array) else array


class _Decorator(Protocol):
    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...


def _casting(choose: Callable[[Iterable[Any]], tuple[Any, Callable[[Any], bool]]], policy: str) -> _Decorator:
    """A decorator for functions that convert their arrays under `autocast`, and then run without it."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _LOWER.value is None:
                return function(*args, **kwargs)
            dtype, chosen = choose([*args, *kwargs.values()])
            cast: Any = [_converted(arg, dtype, chosen) for arg in args]
            named: Any = {name: _converted(value, dtype, chosen) for name, value in kwargs.items()}
            with _LOWER(None):
                return function(*cast, **named)

        call.autocast_policy = policy  # type: ignore[attr-defined]
        return call

    return decorate


def _widest(arrays: Iterable[Any]) -> tuple[Any, Callable[[Any], bool]]:
    widths = [_width(array) for array in arrays]
    return (jnp.dtype(jnp.float32) if 4 in widths else lower_dtype()), _is_castable


in_lower_type = _casting(lambda _: (lower_dtype(), _is_castable), "lower type")
in_float32 = _casting(lambda _: (jnp.dtype(jnp.float32), _is_narrow), "float32")
in_widest_type = _casting(_widest, "widest type")


def refused(instead: str) -> _Decorator:
    """A decorator for a function that is not safe in a lower type."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _LOWER.value is not None:
                raise TypeError(
                    f"{function.__name__} is not safe under autocast, since probabilities near 0 and 1 are lost in 16 bits:"
                    f" use {instead}, or write `with mt.autocast(enabled=False):` around it and pass float32"
                )
            return function(*args, **kwargs)

        call.autocast_policy = "refused"  # type: ignore[attr-defined]
        return call

    return decorate
