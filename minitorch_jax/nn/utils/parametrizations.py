"""Parametrizations that papers use: `weight_norm`, `spectral_norm`, `orthogonal`, `lora`."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ...module.module import Module
from ...module.parameter import Buffer
from ...module.random import next_key
from .. import functional as F  # noqa: N812
from .. import init
from ..conv import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .lora import lora as lora
from .orthogonal import orthogonal as orthogonal
from .parametrize import array_of, register_parametrization

M = TypeVar("M", bound=Module)


class _WeightNorm(Module):
    """w = g v / ||v||, with one norm for each index of the axis `dim`, or (-1) one for the whole array."""

    def __init__(self, dim: int | None) -> None:
        self.dim = -1 if dim is None else dim

    def _norm(self, v: jax.Array) -> jax.Array:
        if self.dim == -1:
            return jnp.sqrt(jnp.sum(v**2))
        axes = tuple(axis for axis in range(v.ndim) if axis != self.dim)
        return jnp.sqrt(jnp.sum(v**2, axes, keepdims=True))

    def forward(self, weight_g: jax.Array, weight_v: jax.Array) -> jax.Array:
        return weight_v * (weight_g / self._norm(weight_v))

    def right_inverse(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._norm(weight), weight


def weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    """Train the length and the direction of a weight apart: w = g v / ||v||.

    The parameter is replaced by g, `parametrizations.weight.original0`, and v, `parametrizations.weight.original1`.

    Args:
        module: the module.
        name: the name of the parameter.
        dim: the axis of which each index has a norm of its own. None (or -1, as in torch) has one norm for the whole array.

    Returns:
        The module.

    Raises:
        ValueError: if the module has no parameter of that name, or `dim` is no axis of it.

    Source: torch.nn.utils.parametrizations.weight_norm; Salimans and Kingma, "Weight Normalization" (2016).

    Example:
        >>> from minitorch_jax import nn
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(20, 40))
        >>> {name: array.shape for name, array in layer.named_parameters()}
        {'bias': (40,), 'parametrizations.weight.original0': (40, 1), 'parametrizations.weight.original1': (40, 20)}
    """
    weight = array_of(module, name)
    if dim is not None and not -1 <= dim < weight.ndim:
        raise ValueError(f"weight_norm: dim must be None or an axis of {name!r}, 0 to {weight.ndim - 1}; got {dim!r}")
    return register_parametrization(module, name, _WeightNorm(dim), unsafe=True)


class _SpectralNorm(Module):
    """W / sigma(W), with the largest singular value sigma found by power iteration in the buffers `_u` and `_v`."""

    _u: jax.Array
    _v: jax.Array

    def __init__(self, weight: jax.Array, n_power_iterations: int, dim: int, eps: float, key: Any) -> None:
        self.dim, self.eps = dim, eps
        if weight.ndim > 1:
            self.n_power_iterations = n_power_iterations
            matrix = self._matrix(weight)
            for name, k, size in zip(("_u", "_v"), jax.random.split(next_key(key)), matrix.shape, strict=True):
                setattr(self, name, Buffer(self._unit(init.normal(k, (size,), dtype=weight.dtype))))
            self._iterate(matrix, 15)

    def _matrix(self, weight: jax.Array) -> jax.Array:
        return jnp.moveaxis(weight, self.dim, 0).reshape(weight.shape[self.dim], -1)

    def _unit(self, x: jax.Array) -> jax.Array:
        return F.normalize(x, dim=0, eps=self.eps)

    def _iterate(self, matrix: jax.Array, count: int) -> None:
        matrix = jax.lax.stop_gradient(matrix)

        def iterate(_: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            u = self._unit(matrix @ pair[1])
            return u, self._unit(matrix.T @ u)

        pair = (self._u, self._v)
        self._u, self._v = iterate(0, pair) if count == 1 else jax.lax.fori_loop(0, count, iterate, pair)

    def forward(self, weight: jax.Array) -> jax.Array:
        if weight.ndim == 1:
            return self._unit(weight)
        matrix = self._matrix(weight)
        if self.training:
            self._iterate(matrix, self.n_power_iterations)
        return weight / (self._u @ (matrix @ self._v))

    def right_inverse(self, value: jax.Array) -> jax.Array:
        return value


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    key: Any = None,
) -> M:
    """Divide a weight by its largest singular value: W / sigma(W). A vector is divided by its length.

    sigma is found by power iteration, of which reading the weight in training mode does some steps. The vectors are buffers
    of the parametrization, `_u` and `_v`; they change in eager code, in `mt.backward`, in `mt.jit` and in `mt.scan`, and in
    evaluation mode not at all. A weight of more axes is taken as a matrix of the axis `dim` by all others.

    Args:
        module: the module.
        name: the name of the parameter.
        n_power_iterations: the steps of the power iteration at each reading in training mode. It begins with 15 steps.
        eps: the least length by which a vector is divided.
        dim: the axis of the outputs: 1 for transposed convolutions, 0 for others.
        key: a `jax.random` key for the first vectors. By default, the next key of the global stream (`mt.seed`).

    Returns:
        The module.

    Raises:
        ValueError: if the module has no parameter of that name, or `n_power_iterations` is not positive.
        IndexError: if `dim` is no axis of it.

    Source: torch.nn.utils.parametrizations.spectral_norm; Miyato et al., "Spectral Normalization for Generative Adversarial
    Networks" (2018).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 40), key=jax.random.key(0))
        >>> bool(abs(jnp.linalg.norm(layer.weight, 2) - 1) < 0.05)
        True
    """
    weight = array_of(module, name)
    if dim is None:
        dim = 1 if isinstance(module, ConvTranspose1d | ConvTranspose2d | ConvTranspose3d) else 0
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError(f"spectral_norm: dim must be an axis of {name!r}, which has {weight.ndim}; got {dim}")
    if n_power_iterations <= 0:
        raise ValueError(f"spectral_norm: n_power_iterations must be positive; got {n_power_iterations}")
    norm = _SpectralNorm(weight, n_power_iterations, dim % weight.ndim, eps, key)
    return register_parametrization(module, name, norm)
