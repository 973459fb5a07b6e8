"""Initial distributions, as torch.nn.init defines them.

Functions such as `uniform(key, (3, 2))` take a key and a shape and return an array. Functions with torch's underscore,
such as `uniform_(layer, "weight")`, fill a parameter or buffer of a module.

Fans follow torch. For a weight `(out, in, *kernel)`, fan_in is `in` times the kernel's size, and fan_out is `out` times
the kernel's size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.numpy_arguments import own_arguments
from ..module.random import draw, next_key
from ..runtime.tracebacks import warn
from ..state.static_values import module_of

_GAINS = {
    "linear": 1.0,
    **{f"conv{transposed}{n}d": 1.0 for transposed in ("", "_transpose") for n in (1, 2, 3)},
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4.0,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The recommended factor of the weights' standard deviation for a nonlinearity (torch.nn.init.calculate_gain).

    Example:
        >>> calculate_gain("relu") ** 2
        2.0000000000000004
    """
    if nonlinearity == "leaky_relu":
        return math.sqrt(2.0 / (1 + (0.01 if param is None else param) ** 2))
    if nonlinearity not in _GAINS:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; pass one of {', '.join([*_GAINS, 'leaky_relu'])}")
    return _GAINS[nonlinearity]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape."""
    if len(shape) < 2:
        raise ValueError(f"fans need a weight of at least 2 dimensions; got shape {tuple(shape)}")
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def uniform(key: Any, shape: Sequence[int], a: float = 0.0, b: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """Samples from U(a, b)."""
    return draw(lambda key, shape: jax.random.uniform(key, shape, dtype, a, b), key, shape)


def normal(key: Any, shape: Sequence[int], mean: float = 0.0, std: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """Samples from N(mean, std²)."""
    return draw(lambda key, shape: mean + std * jax.random.normal(key, shape, dtype), key, shape)


def trunc_normal(
    key: Any,
    shape: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Samples from N(mean, std²), truncated to [a, b].

    Example:
        >>> sample = trunc_normal(jax.random.key(0), (1000,), std=0.02, a=-0.04, b=0.04)
        >>> bool(abs(sample).max() <= 0.04)
        True
    """
    if mean < a - 2 * std or mean > b + 2 * std:
        warn(
            f"trunc_normal: the mean is more than 2 std from [a, b], and the samples may be inaccurate; got"
            f" mean={mean}, std={std}, a={a}, b={b}",
        )
    lower, upper = (a - mean) / std, (b - mean) / std

    def sample(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.clip(mean + std * jax.random.truncated_normal(key, lower, upper, shape, dtype), a, b)

    return draw(sample, key, shape)


def constant(shape: Sequence[int], val: float, dtype: Any = jnp.float32) -> jax.Array:
    """An array of one value."""
    return jnp.full(tuple(shape), val, dtype)


def zeros(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """An array of zeros."""
    return constant(shape, 0.0, dtype)


def ones(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """An array of ones."""
    return constant(shape, 1.0, dtype)


def eye(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """The identity matrix. A matrix that is not square has ones on its diagonal and zeros elsewhere."""
    if len(shape) != 2:
        raise ValueError(f"eye needs a shape of 2 dimensions; got shape {tuple(shape)}")
    rows, columns = shape
    return jnp.eye(rows, columns, dtype=dtype)


def dirac(shape: Sequence[int], groups: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    """The weight of a convolution that returns its input. Channels of the output beyond those of the input are 0.

    With `groups`, this holds for each group.

    Example:
        >>> dirac((2, 2, 3))[0]
        Array([[0., 1., 0.],
               [0., 0., 0.]], dtype=float32)
    """
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"dirac needs a shape of 3, 4 or 5 dimensions; got shape {tuple(shape)}")
    if shape[0] % groups:
        raise ValueError(f"dirac needs out_channels divisible by groups; got {shape[0]} and {groups}")
    one_group = jnp.eye(shape[0] // groups, shape[1], dtype=dtype)
    centre = tuple(n // 2 for n in shape[2:])
    return jnp.zeros(tuple(shape), dtype).at[:, :, *centre].set(jnp.tile(one_group, (groups, 1)))


def orthogonal(key: Any, shape: Sequence[int], gain: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """A random matrix with orthonormal rows (or columns, if these are fewer), times gain (Saxe et al., 2013).

    All axes after the first count as one axis.

    Example:
        >>> q = orthogonal(jax.random.key(0), (2, 5))
        >>> bool(jnp.allclose(q @ q.T, jnp.eye(2), atol=1e-6))
        True
    """
    if len(shape) < 2:
        raise ValueError(f"orthogonal needs a shape of at least 2 dimensions; got shape {tuple(shape)}")
    rows, columns = shape[0], math.prod(shape[1:])
    q, r = jnp.linalg.qr(draw(jax.random.normal, key, (max(rows, columns), min(rows, columns))))
    q = q * jnp.sign(jnp.diag(r))[None]  # uniform over all such matrices (Mezzadri, 2006)
    return (gain * (q.T if rows < columns else q)).reshape(tuple(shape)).astype(dtype)


def sparse(key: Any, shape: Sequence[int], sparsity: float, std: float = 0.01, dtype: Any = jnp.float32) -> jax.Array:
    """Samples from N(0, std²). In each column, the share `sparsity` of the elements is 0 (Martens, 2010)."""
    if len(shape) != 2:
        raise ValueError(f"sparse needs a shape of 2 dimensions; got shape {tuple(shape)}")
    value_key, zero_key = jax.random.split(key)
    ranks = jnp.broadcast_to(jnp.arange(shape[0])[:, None], tuple(shape))
    zero = jax.random.permutation(zero_key, ranks, independent=True) < math.ceil(sparsity * shape[0])
    return jnp.where(zero, 0, normal(value_key, shape, 0.0, std, dtype))


def xavier_uniform(key: Any, shape: Sequence[int], gain: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    bound = gain * math.sqrt(6.0 / max(sum(fans(shape)), 1))
    return uniform(key, shape, -bound, bound, dtype)


def xavier_normal(key: Any, shape: Sequence[int], gain: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """N(0, std²) with std = gain sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    return normal(key, shape, 0.0, gain * math.sqrt(2.0 / max(sum(fans(shape)), 1)), dtype)


def _kaiming_std(shape: Sequence[int], a: float, mode: str, nonlinearity: str) -> float:
    if mode.lower() not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out'; got {mode!r}")
    fan = fans(shape)[mode.lower() == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(max(fan, 1))  # fan is 0 for an empty weight


def kaiming_uniform(
    key: Any,
    shape: Sequence[int],
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """U(-b, b) with b = gain sqrt(3 / fan) (He et al., 2015); `a` is the slope of a leaky ReLU.

    Example:
        >>> kaiming_uniform(jax.random.key(0), (8, 2)).shape
        (8, 2)
    """
    bound = math.sqrt(3.0) * _kaiming_std(shape, a, mode, nonlinearity)
    return uniform(key, shape, -bound, bound, dtype)


def kaiming_normal(
    key: Any,
    shape: Sequence[int],
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """N(0, std²) with std = gain / sqrt(fan) (He et al., 2015)."""
    return normal(key, shape, 0.0, _kaiming_std(shape, a, mode, nonlinearity), dtype)


# -- the same, in place ------------------------------------------------------------------------------------------------


def _in_place(initial: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function that fills a parameter or buffer of a module by `initial`, and keeps its shape and dtype."""
    name = f"{initial.__name__}_"
    own = inspect.signature(initial).parameters
    random = "key" in own

    def fill(module: Module, path: str = "", *args: Any, **kwargs: Any) -> jax.Array:
        module = module_of(module)
        if not isinstance(module, Module) or not isinstance(path, str):
            raise TypeError(
                f"{name} takes a module and the name of its parameter, since arrays are immutable: write"
                f" `nn.init.{name}(layer, 'weight', ...)` for torch's `nn.init.{name}(layer.weight, ...)`; got"
                f" a {type(module).__name__} and a {type(path).__name__}"
            )
        given = signature.bind(module, path, *args, **kwargs).arguments
        settings = {name: value for name, value in given.items() if name in own and name != "key"}
        holder, attribute = module._holder(path)
        old = getattr(holder, attribute)
        keys = [next_key(given.get("key"))] if random else []
        setattr(holder, attribute, initial(*keys, shape=old.shape, dtype=old.dtype, **settings))
        return getattr(holder, attribute)

    kinds = inspect.Parameter
    shown = [
        kinds("module", kinds.POSITIONAL_ONLY, annotation="Module"),
        kinds("path", kinds.POSITIONAL_ONLY, annotation="str"),
        *(parameter for parameter in own.values() if parameter.name not in ("key", "shape", "dtype")),
        *([kinds("key", kinds.KEYWORD_ONLY, default=None, annotation="Any")] if random else []),
    ]
    signature = inspect.Signature(shown, return_annotation="jax.Array")
    first = (initial.__doc__ or "").splitlines()[0]
    drawn = " `key` is a `jax.random` key; by default, the next key of the global stream." if random else ""
    fill.__name__ = fill.__qualname__ = name
    fill.__signature__ = signature  # type: ignore[attr-defined]
    fill.__doc__ = (
        f"Fill the parameter or buffer at a dotted path of a module. Its shape and dtype stay. {first}\n\n"
        f"    The other arguments are those of `{initial.__name__}`.{drawn} Returns the new array.\n    "
    )
    return fill


uniform_ = _in_place(uniform)
normal_ = _in_place(normal)
trunc_normal_ = _in_place(trunc_normal)
constant_ = _in_place(constant)
zeros_ = _in_place(zeros)
ones_ = _in_place(ones)
eye_ = _in_place(eye)
dirac_ = _in_place(dirac)
xavier_uniform_ = _in_place(xavier_uniform)
xavier_normal_ = _in_place(xavier_normal)
kaiming_uniform_ = _in_place(kaiming_uniform)
kaiming_normal_ = _in_place(kaiming_normal)
orthogonal_ = _in_place(orthogonal)
sparse_ = _in_place(sparse)

own_arguments(globals())
