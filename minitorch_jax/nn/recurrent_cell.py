"""Recurrent cells, which run one step, and the functions that they share with the recurrent layers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import fresh_parameter
from ..module.parametrized import like
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from ..state.static_values import describe
from . import init
from .functional.autocast import lowered, product_dtype
from .functional.dtypes import DtypeMismatch, with_dtype

# One step of each kind. It maps W_ih x + b_ih, W_hh h + b_hh and the state, (h,) or (h, c), to the next state.


def tanh_step(x: Any, gates: Any, state: Any) -> Any:
    return (jnp.tanh(x + gates),)


def relu_step(x: Any, gates: Any, state: Any) -> Any:
    return (jax.nn.relu(x + gates),)


def lstm_step(x: Any, gates: Any, state: Any) -> Any:
    i, f, g, o = jnp.split(x + gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_step(x: Any, gates: Any, state: Any) -> Any:
    (h,) = state
    x_r, x_z, x_n = jnp.split(x, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(gates, 3, axis=-1)
    n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
    return (n + jax.nn.sigmoid(x_z + h_z) * (h - n),)


ELMAN = {"tanh": tanh_step, "relu": relu_step}


def check_nonlinearity(name: str) -> str:
    if name not in ELMAN:
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu'; got {name!r}")
    return name


def uniform(module: Module, shapes: dict[str, tuple[int, ...]], hidden_size: int, dtype: Any, key: Any) -> None:
    """Add parameters of these names and shapes to a module, drawn from U(-k, k) with k = 1 / sqrt(hidden_size)."""
    bound = 1 / math.sqrt(hidden_size) if hidden_size else 0.0
    for (name, shape), k in zip(shapes.items(), jax.random.split(next_key(key), len(shapes)), strict=True):
        setattr(module, name, fresh_parameter(init.uniform(k, shape, -bound, bound, dtype)))


def check_input(layer: Module, input: Any, size: int, name: str, ranks: tuple[int, int], shapes: str) -> Any:
    """Check the input and return it. A weakly typed input takes the dtype of the weight `name`."""
    if not hasattr(input, "ndim"):
        raise TypeError(f"{type(layer).__name__} takes an array of shape {shapes}; got a {type(input).__name__}")
    if input.ndim not in ranks or input.shape[-1] != size:
        raise ValueError(f"{layer!r} takes inputs of shape {shapes} with H_in = {size}; got {tuple(input.shape)}")
    dtype = product_dtype(like(layer, name))
    input = with_dtype(lowered(input), dtype)
    if input.dtype != dtype:
        raise DtypeMismatch(
            f"{layer!r} has a {name} of {dtype}, and got an input of {input.dtype}: convert one of them,"
            f" `input.astype({dtype})` or `layer.astype({input.dtype})`; or compute in a lower type with"
            " `mt.autocast(jnp.bfloat16)`"
        )
    return input


def initial_state(layer: Module, hx: Any, shapes: list[tuple[int, ...]], dtype: Any) -> tuple[Any, ...]:
    """Check the initial state `hx` and return it, or return zeros if it is None."""
    if hx is None:
        return tuple(jnp.zeros(shape, dtype) for shape in shapes)
    given = tuple(with_dtype(lowered(x), dtype) for x in (hx if isinstance(hx, tuple | list) else (hx,)))
    expected = [f"{dtype}{list(shape)}" for shape in shapes]
    if [describe(x) for x in given] != expected:
        names = "(h, c)" if len(shapes) == 2 else "h"
        got = ", ".join(map(describe, given))
        raise ValueError(f"for this input, {layer!r} takes a state {names} of {', '.join(expected)}; got {got}")
    return given


class _Cell(Module):
    """Base of the cells: it computes W_ih x + b_ih, then one step."""

    weight_ih: jax.Array
    weight_hh: jax.Array
    bias_ih: jax.Array | Any
    bias_hh: jax.Array | Any
    _gates: int
    _has_cell = False
    _step: Any

    def _declare(self, input_size: int, hidden_size: int, bias: bool, dtype: Any, key: Any) -> None:
        if input_size < 0 or hidden_size < 0:
            raise ValueError(
                f"{type(self).__name__} needs sizes >= 0; got input_size={input_size}, hidden_size={hidden_size}"
            )
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        rows = self._gates * hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, input_size), "weight_hh": (rows, hidden_size)}
        if bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        else:
            self.bias_ih = self.bias_hh = None
        uniform(self, shapes, hidden_size, dtype, key)

    def forward(self, input: jax.Array, hx: Any = None) -> Any:
        input = check_input(self, input, self.input_size, "weight_ih", (1, 2), "(N, H_in) or (H_in,)")
        shape = (*input.shape[:-1], self.hidden_size)
        state = initial_state(self, hx, [shape] * (1 + self._has_cell), input.dtype)
        gates = F.linear(state[0], self.weight_hh, self.bias_hh)
        new = self._step(F.linear(input, self.weight_ih, self.bias_ih), gates, state)
        return new if self._has_cell else new[0]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias is True else f", bias={self.bias}")


class RNNCell(_Cell):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Args:
        input_size: H_in, the size of x.
        hidden_size: H, the size of h.
        bias: True adds b_ih and b_hh.
        nonlinearity: "tanh" or "relu".
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: a call takes x, `(N, H_in)` or `(H_in,)`, and optionally h; zeros by default. It returns h', `(N, H)` or
    `(H,)`. All parameters are drawn from U(-k, k) with k = 1 / sqrt(H).

    Raises:
        ValueError: if an argument is out of its range, or an input or a state does not fit.

    Source: torch.nn.RNNCell.

    Example:
        >>> cell = RNNCell(3, 5, key=jax.random.key(0))
        >>> cell(jnp.ones((4, 3))).shape
        (4, 5)
    """

    _gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self.nonlinearity = check_nonlinearity(nonlinearity)
        self._declare(input_size, hidden_size, bias, dtype, key)

    def _step(self, x: Any, gates: Any, state: Any) -> Any:
        return ELMAN[self.nonlinearity](x, gates, state)

    def extra_repr(self) -> str:
        tanh = self.nonlinearity == "tanh"
        return super().extra_repr() + ("" if tanh else f", nonlinearity={self.nonlinearity}")


class LSTMCell(_Cell):
    """One step of an `LSTM`. It maps x and (h, c) to (h', c').

    Args:
        input_size, hidden_size, bias, dtype, key: as in `RNNCell`.

    Shapes: a call takes x, `(N, H_in)` or `(H_in,)`, and optionally the pair (h, c); zeros by default. It returns
    (h', c'), each `(N, H)` or `(H,)`.

    Raises:
        ValueError: as in `RNNCell`.

    Source: torch.nn.LSTMCell.

    Example:
        >>> cell = LSTMCell(3, 5, key=jax.random.key(0))
        >>> h, c = cell(jnp.ones((4, 3)))
        >>> h, c = cell(jnp.ones((4, 3)), (h, c))
        >>> h.shape, c.shape
        ((4, 5), (4, 5))
    """

    _gates = 4
    _has_cell = True
    _step = staticmethod(lstm_step)

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, dtype: Any = jnp.float32, key: Any = None
    ) -> None:
        self._declare(input_size, hidden_size, bias, dtype, key)


class GRUCell(_Cell):
    """One step of a `GRU`. It maps x and h to h'.

    Args:
        input_size, hidden_size, bias, dtype, key: as in `RNNCell`.

    Shapes: as in `RNNCell`.

    Raises:
        ValueError: as in `RNNCell`.

    Source: torch.nn.GRUCell.

    Example:
        >>> cell = GRUCell(3, 5, key=jax.random.key(0))
        >>> cell(jnp.ones(3)).shape
        (5,)
    """

    _gates = 3
    _step = staticmethod(gru_step)

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, dtype: Any = jnp.float32, key: Any = None
    ) -> None:
        self._declare(input_size, hidden_size, bias, dtype, key)
