"""Recurrent layers, which run over whole sequences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..nn import functional as F  # noqa: N812
from ..runtime.tracebacks import warn
from .functional.autocast import lowered
from .functional.dropout import probability
from .functional.dtypes import of_one_dtype
from .recurrent_cell import ELMAN, check_input, check_nonlinearity, gru_step, initial_state, lstm_step, uniform
from .recurrent_scan import Kind, Weights, scan
from .utils.packed_sequence import PackedSequence


class _Recurrent(Module):
    """Base of RNN, LSTM and GRU: each layer runs one scan over time, or two if it is bidirectional."""

    _gates: int
    _step: Any  # maps (W_ih x + b_ih, W_hh h + b_hh, state) to the next state; always the same function object
    _has_cell = False
    _takes = PackedSequence  # an input that is no array
    _gates_apart = False  # True if a step does more with W_ih x and W_hh h than to add them. Each then keeps its bias.

    def _declare(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        dtype: Any,
        key: Any,
    ) -> None:
        name = type(self).__name__
        for flag, value in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} takes True or False for {flag}; got {value!r}")
        for size, number in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(number, int) or number <= 0:
                kind = ValueError if isinstance(number, int) else TypeError
                raise kind(f"{name} needs an integer {size} > 0; got {number!r}")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(
                f"proj_size must be 0 (no projection), or positive and less than hidden_size={hidden_size}; got {proj_size}"
            )
        dropout = probability(dropout)
        if dropout and num_layers == 1:
            warn(
                f"dropout acts between layers: dropout={dropout} drops nothing with num_layers=1. Leave it out, or apply"
                " a Dropout to the output.",
            )
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bool(bidirectional)
        self.proj_size = proj_size
        out, rows = proj_size or hidden_size, self._gates * hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(num_layers):
            for end in self._directions(layer):
                width = input_size if layer == 0 else out * (1 + self.bidirectional)
                shapes |= {f"weight_ih{end}": (rows, width), f"weight_hh{end}": (rows, out)}
                if bias:
                    shapes |= {f"bias_ih{end}": (rows,), f"bias_hh{end}": (rows,)}
                if proj_size:
                    shapes |= {f"weight_hr{end}": (proj_size, hidden_size)}
        uniform(self, shapes, hidden_size, dtype, key)

    def _directions(self, layer: int) -> list[str]:
        """The suffixes of the names of a layer's parameters, one for each direction."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.bidirectional]

    def forward(self, input: jax.Array | PackedSequence, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            shapes = "(T, N, H_in), in a PackedSequence,"
            x = check_input(self, input.padded, self.input_size, "weight_ih_l0", (3, 3), shapes)
            output, hidden = self._run_layers(x, hx, input.mask[..., None])
            return input._with(output), hidden
        shapes = "(N, L, H_in) or (L, H_in)" if self.batch_first else "(L, N, H_in) or (L, H_in)"
        x = check_input(self, input, self.input_size, "weight_ih_l0", (2, 3), shapes)
        swap = self.batch_first and x.ndim == 3
        x = jnp.swapaxes(x, 0, 1) if swap else x
        if x.shape[0] == 0:
            raise ValueError(f"{type(self).__name__} needs a sequence of at least one step; got {tuple(input.shape)}")
        output, hidden = self._run_layers(x, hx)
        return jnp.swapaxes(output, 0, 1) if swap else output, hidden

    def _run_layers(self, x: jax.Array, hx: Any, mask: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Run all layers over the steps where the mask is True. Returns the last layer's outputs, and the last states."""
        count = self.num_layers * (1 + self.bidirectional)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self._has_cell else [])]
        starts = initial_state(self, hx, [(count, *x.shape[1:-1], size) for size in sizes], x.dtype)
        finals: list[Any] = []
        for layer in range(self.num_layers):
            outputs = []
            for end in self._directions(layer):
                final, output = self._run(x, tuple(start[len(finals)] for start in starts), end, mask)
                finals.append(final)
                outputs.append(output)
            x = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        hidden = tuple(jnp.stack(states) for states in zip(*finals, strict=True))
        return x, hidden if self._has_cell else hidden[0]

    def _run(self, x: jax.Array, start: tuple[Any, ...], end: str, mask: Any) -> tuple[tuple[Any, ...], jax.Array]:
        """Run one direction of one layer. Returns the last state, and h at every step."""
        w_ih: Any = getattr(self, f"weight_ih{end}")
        b_ih: Any = getattr(self, f"bias_ih{end}") if self.bias else None
        own: dict[str, Any] = {f"{name}{end}": getattr(self, f"{name}{end}", None) for name in Weights._fields}
        if self.bias and not self._gates_apart:
            b_ih, own[f"bias_hh{end}"] = b_ih + own[f"bias_hh{end}"], None
        gates = F.linear(x, w_ih, b_ih)
        own = {name: lowered(array) for name, array in own.items()}
        _, *weights = of_one_dtype(type(self).__name__, input=gates, **own)
        kind = Kind(self._step, end.endswith("_reverse"), self._gates_apart)
        return scan(kind, start, gates, Weights(*weights), mask)

    def extra_repr(self) -> str:
        plain = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        plain |= {"bidirectional": False}
        shown = [f"{name}={getattr(self, name)}" for name, value in plain.items() if getattr(self, name) != value]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *shown])


class RNN(_Recurrent):
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), over a sequence, in one or more layers.

    Args:
        input_size: H_in, the size of each x_t.
        hidden_size: H, the size of each h_t.
        num_layers: the number of layers. Each layer takes the outputs of the one before.
        nonlinearity: "tanh" or "relu".
        bias: True adds b_ih and b_hh.
        batch_first: True if batches are `(N, L, H_in)`. Hidden states stay `(layers, N, H)`.
        dropout: in training, the probability of dropping outputs between layers; see `Dropout`.
        bidirectional: True adds a second scan that starts at the end. D is then 2, otherwise 1.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: a call takes an input `(L, N, H_in)` or `(L, H_in)`, and optionally the initial state, `(D num_layers, N, H)`
    or `(D num_layers, H)`; zeros by default. It returns `(output, h_n)`: the last layer's h at every step, `(L, N, D H)`,
    and every layer's h after the last step, shaped as the initial state. A `PackedSequence` returns one: its outputs end at
    each sequence's length, h_n is the state there, and the reverse direction begins there. All parameters are drawn from
    U(-k, k) with k = 1 / sqrt(H).

    Raises:
        ValueError: if an argument is out of its range, or an input or a state does not fit.
        TypeError: if an argument has a wrong type.

    Source: torch.nn.RNN; Elman, "Finding structure in time", 1990.

    Example:
        >>> layer = RNN(3, 5, num_layers=2, key=jax.random.key(0))
        >>> output, h_n = layer(jnp.ones((7, 4, 3)))
        >>> output.shape, h_n.shape
        ((7, 4, 5), (2, 4, 5))
    """

    _gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self.nonlinearity = check_nonlinearity(nonlinearity)
        self._declare(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, dtype, key)

    @property
    def _step(self) -> Any:
        return ELMAN[self.nonlinearity]


class LSTM(_Recurrent):
    """Long short-term memory, over a sequence, in one or more layers.

    i, f, o = σ(W x_t + b + W' h_{t-1} + b'), g = tanh(W x_t + b + W' h_{t-1} + b'), each with its own rows of the weights;
    c_t = f c_{t-1} + i g, h_t = o tanh(c_t). The rows are in the order i, f, g, o.

    Args:
        input_size: H_in, the size of each x_t.
        hidden_size: H, the size of each c_t, and of each h_t without projection.
        num_layers, bias, batch_first, dropout, bidirectional, dtype, key: as in `RNN`.
        proj_size: if not 0, h_t = W_hr (o tanh(c_t)) has this size, which must be less than H.

    Shapes: as in `RNN`, but the state is a pair `(h, c)`. h has the size H_out = `proj_size` or H, c has the size H. A call
    returns `(output, (h_n, c_n))`; the output is `(L, N, D H_out)`.

    Raises:
        ValueError, TypeError: as in `RNN`. ValueError also if `proj_size` is not less than `hidden_size`.

    Source: torch.nn.LSTM; Hochreiter and Schmidhuber, "Long short-term memory", 1997; Sak et al., 2014, for the
    projection.

    Example:
        >>> layer = LSTM(3, 5, batch_first=True, bidirectional=True, key=jax.random.key(0))
        >>> output, (h_n, c_n) = layer(jnp.ones((4, 7, 3)))
        >>> output.shape, h_n.shape, c_n.shape
        ((4, 7, 10), (2, 4, 5), (2, 4, 5))
    """

    _gates = 4
    _has_cell = True
    _step = staticmethod(lstm_step)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self._declare(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, dtype, key
        )


class GRU(_Recurrent):
    """Gated recurrent units, over a sequence, in one or more layers.

    r, z = σ(W x_t + b + W' h_{t-1} + b'), n = tanh(W x_t + b + r (W' h_{t-1} + b')), each with its own rows of the weights;
    h_t = (1 - z) n + z h_{t-1}. The rows are in the order r, z, n. As in cuDNN, r multiplies after W'.

    Args:
        input_size: H_in, the size of each x_t.
        hidden_size: H, the size of each h_t.
        num_layers, bias, batch_first, dropout, bidirectional, dtype, key: as in `RNN`.

    Shapes: as in `RNN`.

    Raises:
        ValueError, TypeError: as in `RNN`.

    Source: torch.nn.GRU; Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.

    Example:
        >>> layer = GRU(3, 5, key=jax.random.key(0))
        >>> output, h_n = layer(jnp.ones((7, 3)))
        >>> output.shape, h_n.shape
        ((7, 5), (1, 5))
    """

    _gates = 3
    _gates_apart = True
    _step = staticmethod(gru_step)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self._declare(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, dtype, key)
