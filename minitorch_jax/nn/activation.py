"""Activations as layers. They accept `inplace` as torch does, but it has no effect: arrays are immutable."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import fresh_parameter
from ..nn import functional as F  # noqa: N812


class _InPlace(Module):
    """An activation whose last argument is `inplace`."""

    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        self.inplace = inplace

    def extra_repr(self) -> str:
        return ", ".join([*self._settings(), *(["inplace=True"] if self.inplace else [])])

    def _settings(self) -> list[str]:
        """The settings that the repr shows before `inplace`."""
        return []


class Threshold(_InPlace):
    """x where x > threshold, `value` elsewhere.

    Args:
        threshold: elements above it stay as they are.
        value: replaces all other elements.
        inplace: accepted as in torch; it has no effect.

    Example:
        >>> Threshold(1.0, 7.0)(jnp.array([0.5, 2.0]))
        Array([7., 2.], dtype=float32)
    """

    def __init__(self, threshold: float, value: float, inplace: bool = False) -> None:
        self.threshold, self.value, self.inplace = threshold, value, inplace

    def forward(self, input: jax.Array) -> jax.Array:
        return F.threshold(input, self.threshold, self.value)

    def _settings(self) -> list[str]:
        return [f"threshold={self.threshold}", f"value={self.value}"]


class ReLU(_InPlace):
    """max(x, 0), elementwise.

    Args:
        inplace: accepted as in torch; it has no effect, since arrays are immutable.

    Example:
        >>> ReLU()(jnp.array([-1.0, 2.0]))
        Array([0., 2.], dtype=float32)
    """

    def forward(self, input: jax.Array) -> jax.Array:
        return F.relu(input)


class RReLU(_InPlace):
    """A leaky ReLU with a random slope for each element in training, and the mean slope in `eval()` mode.

    Each call in training uses one key of the current stream (`mt.seed`, `mt.rng`).

    Args:
        lower: the smallest slope.
        upper: the largest slope.
        inplace: accepted as in torch; it has no effect.

    Raises:
        ValueError: at a call, if lower > upper.
        TraceError: inside a plain JAX transform without `mt.rng`; see `mt.rng`.

    Source: torch.nn.RReLU; Xu et al., "Empirical evaluation of rectified activations in convolutional network", 2015.

    Example:
        >>> RReLU(0.2, 0.4).eval()(jnp.array([-10.0, 10.0]))
        Array([-3., 10.], dtype=float32)
    """

    def __init__(self, lower: float = 1.0 / 8, upper: float = 1.0 / 3, inplace: bool = False) -> None:
        self.lower, self.upper, self.inplace = lower, upper, inplace

    def forward(self, input: jax.Array) -> jax.Array:
        return F.rrelu(input, self.lower, self.upper, self.training)

    def _settings(self) -> list[str]:
        return [f"lower={self.lower}", f"upper={self.upper}"]


class Hardtanh(_InPlace):
    """x clipped to [min_val, max_val].

    Args:
        min_val: the smallest value.
        max_val: the largest value.
        inplace: accepted as in torch; it has no effect.

    Raises:
        ValueError: unless min_val < max_val.

    Source: torch.nn.Hardtanh. Differs from PyTorch: it does not take torch's deprecated `min_value` and `max_value`.

    Example:
        >>> Hardtanh(-2.0, 2.0)(jnp.array([-3.0, 1.0]))
        Array([-2.,  1.], dtype=float32)
    """

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> None:
        if max_val <= min_val:
            raise ValueError(f"Hardtanh needs min_val < max_val; got {min_val} and {max_val}")
        self.min_val, self.max_val, self.inplace = min_val, max_val, inplace

    def forward(self, input: jax.Array) -> jax.Array:
        return F.hardtanh(input, self.min_val, self.max_val)

    def _settings(self) -> list[str]:
        return [f"min_val={self.min_val}", f"max_val={self.max_val}"]


class ReLU6(Hardtanh):
    """min(max(x, 0), 6), elementwise."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(0.0, 6.0, inplace)

    def _settings(self) -> list[str]:
        return []


class LeakyReLU(_InPlace):
    """x where x > 0, `negative_slope` x elsewhere.

    Example:
        >>> LeakyReLU(0.1)(jnp.array([-10.0, 10.0]))
        Array([-1., 10.], dtype=float32)
    """

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        self.negative_slope, self.inplace = negative_slope, inplace

    def forward(self, input: jax.Array) -> jax.Array:
        return F.leaky_relu(input, self.negative_slope)

    def _settings(self) -> list[str]:
        return [f"negative_slope={self.negative_slope}"]


class PReLU(Module):
    """x where x > 0, w x elsewhere, with trainable slopes w.

    Args:
        num_parameters: the number of slopes: 1, or the number of channels.
        init: the initial value of the slopes.
        dtype: the dtype of the parameter, floating.

    Shapes: any input, with channels on axis 1; `weight` is `(num_parameters,)`.

    Raises:
        ValueError: at a call, if there are several slopes, and their number is not that of the channels.

    Source: torch.nn.PReLU; He et al., "Delving deep into rectifiers", 2015. Differs from PyTorch: the attribute
    `num_parameters` is the method that all modules have.

    Example:
        >>> PReLU(2, init=0.5)(jnp.array([[-1.0, 1.0]]))
        Array([[-0.5,  1. ]], dtype=float32)
    """

    weight: jax.Array

    def __init__(self, num_parameters: int = 1, init: float = 0.25, *, dtype: Any = jnp.float32) -> None:
        self.init = init
        self.weight = fresh_parameter(jnp.full(num_parameters, init, dtype))

    def forward(self, input: jax.Array) -> jax.Array:
        return F.prelu(input, self.weight)

    def extra_repr(self) -> str:
        return f"num_parameters={self.weight.size}"


class ELU(_InPlace):
    """x where x > 0, alpha (exp(x) - 1) elsewhere (Clevert et al., 2015)."""

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        self.alpha, self.inplace = alpha, inplace

    def forward(self, input: jax.Array) -> jax.Array:
        return F.elu(input, self.alpha)

    def _settings(self) -> list[str]:
        return [f"alpha={self.alpha}"]


class SELU(_InPlace):
    """scale elu(x, alpha), with the constants that keep mean 0 and variance 1 (Klambauer et al., 2017)."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.selu(input)


class CELU(ELU):
    """max(x, 0) + min(0, alpha (exp(x / alpha) - 1)) (Barron, 2017); alpha must not be 0."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.celu(input, self.alpha)


class GELU(Module):
    """x Φ(x), elementwise.

    Args:
        approximate: "none" for the error function, "tanh" for the approximation.

    Raises:
        ValueError: for another `approximate`.

    Example:
        >>> GELU(approximate="tanh")
        GELU(approximate='tanh')
    """

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh'; got {approximate!r}")
        self.approximate = approximate

    def forward(self, input: jax.Array) -> jax.Array:
        return F.gelu(input, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(_InPlace):
    """x sigmoid(x), elementwise; also called swish."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.silu(input)


class Mish(_InPlace):
    """x tanh(softplus(x)), elementwise (Misra, 2019)."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.mish(input)


class GLU(Module):
    """a sigmoid(b), where a and b are the halves of x along `dim`, an axis of even size (Dauphin et al., 2016).

    Example:
        >>> GLU()(jnp.array([3.0, 0.0]))
        Array([1.5], dtype=float32)
    """

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, input: jax.Array) -> jax.Array:
        return F.glu(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Sigmoid(Module):
    """1 / (1 + exp(-x)), elementwise."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.sigmoid(input)


class LogSigmoid(Module):
    """log(sigmoid(x)), elementwise, without overflow."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.logsigmoid(input)


class Hardsigmoid(_InPlace):
    """relu6(x + 3) / 6, elementwise."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.hardsigmoid(input)

    def extra_repr(self) -> str:
        return ""


class Hardswish(_InPlace):
    """x relu6(x + 3) / 6, elementwise (Howard et al., 2019)."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.hardswish(input)

    def extra_repr(self) -> str:
        return ""


class Tanh(Module):
    """The hyperbolic tangent, elementwise."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.tanh(input)


class Tanhshrink(Module):
    """x - tanh(x), elementwise."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.tanhshrink(input)


class Softsign(Module):
    """x / (1 + |x|), elementwise."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.softsign(input)


class Softplus(Module):
    """log(1 + exp(beta x)) / beta, elementwise; x itself where beta x > threshold."""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        self.beta, self.threshold = beta, threshold

    def forward(self, input: jax.Array) -> jax.Array:
        return F.softplus(input, self.beta, self.threshold)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, threshold={self.threshold}"


class Hardshrink(Module):
    """x where |x| > lambd, 0 elsewhere."""

    def __init__(self, lambd: float = 0.5) -> None:
        self.lambd = lambd

    def forward(self, input: jax.Array) -> jax.Array:
        return F.hardshrink(input, self.lambd)

    def extra_repr(self) -> str:
        return f"{self.lambd}"


class Softshrink(Hardshrink):
    """x moved towards 0 by `lambd`, and 0 where |x| <= lambd; `lambd` must be at least 0."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.softshrink(input, self.lambd)
