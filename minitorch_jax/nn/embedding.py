"""Lookup tables as layers."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import Parameter, fresh_parameter
from ..module.parametrized import list_of
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from . import init
from .functional.embedding import check_dense, check_mode, renormalized, row_number


class _Table(Module):
    """Base of the lookup tables: a weight, and the settings that both kinds of table have."""

    weight: jax.Array

    def _set_up(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        sparse: bool,
    ) -> None:
        if num_embeddings < 0 or embedding_dim < 0:
            raise ValueError(f"{type(self).__name__} needs sizes >= 0; got {num_embeddings} and {embedding_dim}")
        check_dense(sparse)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = row_number(padding_idx, num_embeddings)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse

    def _draw(self, dtype: Any, key: Any) -> None:
        weight = init.normal(next_key(key), (self.num_embeddings, self.embedding_dim), dtype=dtype)
        self.weight = fresh_parameter(weight if self.padding_idx is None else weight.at[self.padding_idx].set(0))

    @classmethod
    def _around(cls, embeddings: Any, freeze: bool) -> Self:
        """A table with this weight. The caller must still call `_set_up`."""
        weight = Parameter(embeddings, trainable=not freeze)
        table = cls.__new__(cls)
        table.weight = weight
        if table.weight.ndim != 2:
            raise ValueError(
                f"{cls.__name__}.from_pretrained takes an array of shape (num_embeddings, embedding_dim); got"
                f" {tuple(table.weight.shape)}"
            )
        return table

    def _renormalized(self, input: jax.Array) -> jax.Array:
        """The weight, after the looked-up rows whose norm is above `max_norm` were scaled in it, as torch does.

        A weight that a parametrization computes is scaled for this call only, as in torch.
        """
        weight = self.weight
        if self.max_norm is not None:
            weight = renormalized(input, weight, self.max_norm, self.norm_type)
            if list_of(self, "weight") is None:
                self.weight = weight
        return weight


class Embedding(_Table):
    """The rows of a table at some indices.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: the size of a row.
        padding_idx: the index of a row that starts at zero and gets no gradient. A negative index counts from the end.
        max_norm: the largest norm of a row. A looked-up row of a larger norm is scaled to it, in the weight.
        norm_type: the exponent p of that norm.
        scale_grad_by_freq: True divides a row's gradient by the number of times that the row is looked up.
        sparse: must be False.
        dtype: the dtype of the weight, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: input `(*)`, integers; output `(*, embedding_dim)`. `weight` is `(num_embeddings, embedding_dim)`, drawn from
    N(0, 1). The row for a negative or too large index is NaN.

    Raises:
        ValueError: if a size is negative, `padding_idx` is out of range, or `sparse` is True.
        TypeError: if an input does not hold integers.

    Source: torch.nn.Embedding. Differs from PyTorch: gradients are dense, and an index out of range cannot raise in
    compiled code.

    Example:
        >>> layer = Embedding(10, 3, key=jax.random.key(0))
        >>> layer(jnp.array([[1, 2], [4, 9]])).shape
        (2, 2, 3)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self._set_up(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        self._draw(dtype, key)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Any,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Self:
        """A layer with a given weight, `(num_embeddings, embedding_dim)`. It is trained only with `freeze=False`.

        Example:
            >>> Embedding.from_pretrained(jnp.array([[1.0, 2.0], [3.0, 4.0]]))(jnp.array(1))
            Array([3., 4.], dtype=float32)
        """
        table = cls._around(embeddings, freeze)
        rows, columns = table.weight.shape
        table._set_up(rows, columns, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return table

    def forward(self, input: jax.Array) -> jax.Array:
        weight = self._renormalized(input)
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def extra_repr(self) -> str:
        shown = f"{self.num_embeddings}, {self.embedding_dim}"
        shown += f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        shown += f", max_norm={self.max_norm}" if self.max_norm is not None else ""
        shown += f", norm_type={self.norm_type}" if self.norm_type != 2 else ""
        return shown + (f", scale_grad_by_freq={self.scale_grad_by_freq}" if self.scale_grad_by_freq else "")


class EmbeddingBag(_Table):
    """The sum, mean or maximum of the rows of a table in each bag of indices; zeros for an empty bag.

    Args:
        num_embeddings: the number of rows.
        embedding_dim: the size of a row.
        max_norm: the largest norm of a row. A looked-up row of a larger norm is scaled to it, in the weight.
        norm_type: the exponent p of that norm.
        scale_grad_by_freq: True divides a row's gradient by the number of times that the row is looked up. Not allowed
            with "max".
        mode: "sum", "mean" or "max".
        sparse: must be False.
        include_last_offset: True if offsets have one more entry, the position where the last bag ends.
        padding_idx: the index of a row that starts at zero, is left out, and gets no gradient. A negative index counts
            from the end.
        dtype: the dtype of the weight, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: input `(B, N)`, or `(N,)` with offsets `(B,)`: the position where each bag starts, ascending from 0.
    `per_sample_weights` has the input's shape. Output `(B, embedding_dim)`. `weight` is `(num_embeddings,
    embedding_dim)`, drawn from N(0, 1). A negative or too large index makes its bag NaN.

    Raises:
        ValueError: if a size is negative, `padding_idx` is out of range, or options or shapes do not fit.
        TypeError: if an input or offsets do not hold integers.

    Source: torch.nn.EmbeddingBag. Differs from PyTorch as Embedding does. Also, if several rows of a bag share the
    maximum, they share its gradient.

    Example:
        >>> layer = EmbeddingBag(10, 3, mode="sum", key=jax.random.key(0))
        >>> layer(jnp.array([1, 2, 4, 9]), jnp.array([0, 3])).shape
        (2, 3)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        *,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self._set_up(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        self._set_up_bags(mode, include_last_offset)
        self._draw(dtype, key)

    def _set_up_bags(self, mode: str, include_last_offset: bool) -> None:
        check_mode(mode, self.scale_grad_by_freq)
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Any,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> Self:
        """A layer with a given weight, `(num_embeddings, embedding_dim)`. It is trained only with `freeze=False`.

        Example:
            >>> EmbeddingBag.from_pretrained(jnp.array([[1.0, 2.0], [3.0, 4.0]]))(jnp.array([[1, 0]]))
            Array([[2., 3.]], dtype=float32)
        """
        table = cls._around(embeddings, freeze)
        rows, columns = table.weight.shape
        table._set_up(rows, columns, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        table._set_up_bags(mode, include_last_offset)
        return table

    def forward(
        self, input: jax.Array, offsets: jax.Array | None = None, per_sample_weights: jax.Array | None = None
    ) -> jax.Array:
        weight = self._renormalized(input)
        return F.embedding_bag(
            input,
            weight,
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )

    def extra_repr(self) -> str:
        shown = f"{self.num_embeddings}, {self.embedding_dim}"
        shown += f", max_norm={self.max_norm}" if self.max_norm is not None else ""
        shown += f", norm_type={self.norm_type}" if self.norm_type != 2 else ""
        shown += f", scale_grad_by_freq={self.scale_grad_by_freq}" if self.scale_grad_by_freq else ""
        shown += f", mode={self.mode!r}"
        return shown + (f", padding_idx={self.padding_idx}" if self.padding_idx is not None else "")
