"""The `orthogonal` parametrization."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from ...module.module import Module
from ...module.parameter import Buffer
from .parametrize import array_of, register_parametrization

M = TypeVar("M", bound=Module)
_MAPS = ("matrix_exp", "cayley", "householder")


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _diagonal(x: jax.Array) -> jax.Array:
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def _eye_like(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(x.shape[-2], x.shape[-1], dtype=x.dtype), x.shape)


def _completed(q: jax.Array) -> jax.Array:
    """A square orthogonal matrix that begins with the columns of `q`, which are made orthonormal if they are not."""
    n, k = q.shape[-2:]
    full, r = jnp.linalg.qr(q, mode="complete")
    signs = jnp.pad(jnp.sign(_diagonal(r)), [(0, 0)] * (q.ndim - 2) + [(0, n - k)], constant_values=1)
    full = full * signs[..., None, :]
    products = _transposed(q) @ q
    far = jnp.abs(products - _eye_like(products)).max(initial=0)
    is_orthogonal = far <= 10 * n * jnp.finfo(q.dtype).eps
    return full.at[..., :k].set(jnp.where(is_orthogonal, q, full[..., :k]))


def _reflected(v: jax.Array) -> jax.Array:
    """The first k columns of the product of k Householder reflections along the columns of `v`, a unit lower triangle.

    The compact form I - V T V' is written with the inverse of T, which is V'V above the diagonal and half of it on it.
    """
    products = _transposed(v) @ v
    inverse = jnp.triu(products, 1) + 0.5 * products * _eye_like(products)
    return _eye_like(v) - v @ jax.scipy.linalg.solve_triangular(inverse, _transposed(v[..., : v.shape[-1], :]))


class _Orthogonal(Module):
    """An orthogonal matrix as a function of any matrix X, of which the triangle below the diagonal counts."""

    def __init__(self, weight: jax.Array, orthogonal_map: str, use_trivialization: bool) -> None:
        self.shape, self.orthogonal_map = tuple(weight.shape), orthogonal_map
        self.use_trivialization = use_trivialization
        if use_trivialization:  # the matrix of a composition with other parametrizations begins as the identity
            *batch, rows, columns = weight.shape
            rows = max(rows, columns)
            self.base = Buffer(jnp.broadcast_to(jnp.eye(rows, dtype=weight.dtype), (*batch, rows, rows)))

    def forward(self, x: jax.Array) -> jax.Array:
        wide = x.shape[-2] < x.shape[-1]
        x = _transposed(x) if wide else x
        n, k = x.shape[-2:]
        if self.orthogonal_map == "householder":
            v = jnp.tril(x, -1) + _eye_like(x)
            q = _reflected(v) * jax.lax.stop_gradient(jnp.sign(_diagonal(x)))[..., None, :]
        else:
            x = jnp.pad(jnp.tril(x), [(0, 0)] * (x.ndim - 1) + [(0, n - k)])
            a = x - _transposed(x)
            if self.orthogonal_map == "matrix_exp":
                q = jax.scipy.linalg.expm(a)
            else:
                eye = _eye_like(a)
                q = jnp.linalg.solve(eye - 0.5 * a, eye + 0.5 * a)
            q = q[..., :k]
        q = self.base @ q if self.use_trivialization else q
        return _transposed(q) if wide else q

    def right_inverse(self, q: jax.Array) -> jax.Array:
        if tuple(q.shape) != self.shape:
            raise ValueError(f"expected a matrix or batch of matrices of shape {self.shape}; got {tuple(q.shape)}")
        q = jax.lax.stop_gradient(q)
        wide = q.shape[-2] < q.shape[-1]
        tall = _transposed(q) if wide else q
        if self.use_trivialization:
            self.base = _completed(tall)
            return -_eye_like(q)
        if self.orthogonal_map != "householder":
            raise NotImplementedError(
                f"a matrix cannot be assigned to the parametrization {self.orthogonal_map!r} with use_trivialization=False:"
                ' leave that out, or take orthogonal_map="householder"'
            )
        packed, tau = jnp.linalg.qr(tall, mode="raw")
        x = _transposed(packed)
        signs = jnp.sign(_diagonal(x)) * jnp.where(
            tau == 0, -1, 1
        )  # no reflection where tau is 0; `_reflected` has one
        x = jnp.where(_eye_like(x) == 1, signs[..., None, :], x)
        return _transposed(x) if wide else x


def orthogonal(
    module: M, name: str = "weight", orthogonal_map: str | None = None, *, use_trivialization: bool = True
) -> M:
    """Keep a matrix orthogonal: its columns are orthonormal, or its rows if it has more columns than rows.

    A weight of more than two axes is a batch of matrices. With trivialization the value at first is the weight itself if it
    is orthogonal, else the Q of its QR decomposition; so it is for "householder" without. `module.weight = q` takes any
    matrix in the same way.

    Args:
        module: the module.
        name: the name of the parameter.
        orthogonal_map: "matrix_exp", exp(A) of a skew-symmetric A; "cayley", (I + A/2)(I - A/2)^-1; or "householder", a
            product of reflections. The first is the default for square matrices, the last for others.
        use_trivialization: True multiplies by a fixed orthogonal matrix, the buffer `base`, so that training begins at
            the identity of the map.

    Returns:
        The module.

    Raises:
        ValueError: if the module has no parameter of that name, it is a vector, or `orthogonal_map` is none of these.

    Source: torch.nn.utils.parametrizations.orthogonal; Lezcano-Casado, "Trivializations for Gradient-Based Optimization on
    Manifolds" (2019). Differs from PyTorch: a matrix that is not square is completed to `base` by its QR decomposition,
    not by random columns; and of the diagonal of the original only the signs count, so that weight decay does not matter.

    Example:
        >>> import jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> q = nn.utils.parametrizations.orthogonal(nn.Linear(20, 40)).weight
        >>> bool(jnp.allclose(q.T @ q, jnp.eye(20), atol=1e-5))
        True
    """
    weight = array_of(module, name)
    if weight.ndim < 2:
        raise ValueError(
            f"orthogonal takes a matrix or a batch of matrices; {name!r} has the shape {tuple(weight.shape)}"
        )
    if orthogonal_map is None:
        orthogonal_map = "matrix_exp" if weight.shape[-2] == weight.shape[-1] else "householder"
    if orthogonal_map not in _MAPS:
        raise ValueError(f"orthogonal_map must be one of {', '.join(map(repr, _MAPS))}; got {orthogonal_map!r}")
    return register_parametrization(module, name, _Orthogonal(weight, orthogonal_map, use_trivialization), unsafe=True)
