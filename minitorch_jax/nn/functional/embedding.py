"""Lookups in tables as functions.

Torch raises for an index out of range. Compiled code cannot raise: the result for such an index is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from ...runtime.xla_faults import largest
from .distance import norm
from .dtypes import of_one_dtype
from .spatial import floating


@jax.custom_jvp
def _with_value(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the derivative of `x`."""
    return value


_with_value.defjvps(lambda tangent, out, x, value: tangent, None)


def row_number(padding_idx: int | None, rows: int) -> int | None:
    """`padding_idx` counted from the start. Raises ValueError if the table does not have this row."""
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx must be within num_embeddings, {rows}; got {padding_idx}")
    return padding_idx % rows


def check_dense(sparse: bool) -> None:
    """Raise ValueError if `sparse` is True."""
    if sparse:
        raise ValueError("sparse=True is not supported: gradients are dense arrays here; use sparse=False")


def _checked(name: str, input: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    if not jnp.issubdtype(input.dtype, jnp.integer):
        raise TypeError(f"{name} takes indices, which are integers; got {input.dtype}. Convert them: `.astype(int)`.")
    if weight.ndim != 2:
        raise ValueError(f"{name} needs a weight of shape (num_embeddings, embedding_dim); got {tuple(weight.shape)}")
    return jnp.asarray(input), jnp.asarray(weight)


def _rows(input: jax.Array, weight: jax.Array) -> jax.Array:
    return weight.at[input].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _limited(rows: jax.Array, max_norm: float, norm_type: float) -> jax.Array:
    """The rows, with those of a norm above `max_norm` scaled to the norm `max_norm`."""
    wide = rows.astype(wide_dtype(rows.dtype))
    size = norm(wide, norm_type, -1, keepdims=True)
    return jnp.where(size > max_norm, wide * (max_norm / (size + 1e-7)), wide).astype(rows.dtype)


def renormalized(input: jax.Array, weight: jax.Array, max_norm: float, norm_type: float) -> jax.Array:
    """The weight with the looked-up rows renormalised, as torch does in place. Its derivative is that of the old weight."""
    new = _limited(_rows(input, weight), max_norm, norm_type)
    return _with_value(weight, jax.lax.stop_gradient(weight).at[input].set(new, wrap_negative_indices=False))


def _looked_up(
    input: jax.Array, weight: jax.Array, max_norm: float | None, norm_type: float, scale_grad_by_freq: bool
) -> jax.Array:
    rows = _rows(input, weight)
    value = rows if max_norm is None else _limited(rows, max_norm, norm_type)
    if scale_grad_by_freq:
        count = jnp.zeros(weight.shape[0], rows.dtype).at[input].add(1, wrap_negative_indices=False)
        rows = rows / jnp.expand_dims(_rows(input, count), -1)
    return value if value is rows else _with_value(rows, jax.lax.stop_gradient(value))


def embedding(
    input: jax.Array,
    weight: jax.Array,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    """The rows of `weight` at some indices.

    Args:
        input: indices, integers of any shape `(*)`. The row for a negative or too large index is NaN.
        weight: `(num_embeddings, embedding_dim)`.
        padding_idx: the index of a row that gets no gradient. A negative index counts from the end.
        max_norm: rows of a larger norm are scaled to this norm. The scaling does not affect gradients.
        norm_type: the exponent p of that norm.
        scale_grad_by_freq: True divides a row's gradient by the number of times that the row is looked up.
        sparse: must be False.

    Returns:
        `(*, embedding_dim)`.

    Raises:
        TypeError: if `input` does not hold integers.
        ValueError: if `weight` is not a matrix, `padding_idx` is out of range, or `sparse` is True.

    Source: torch.nn.functional.embedding. Differs from PyTorch: gradients are dense. An index out of range cannot raise
    in compiled code. With `max_norm`, the weight itself does not change, since arrays are immutable; nn.Embedding
    updates its weight.

    Example:
        >>> embedding(jnp.array([1, 0, 2]), jnp.array([[1.0], [2.0]]))
        Array([[ 2.],
               [ 1.],
               [nan]], dtype=float32)
    """
    input, weight = _checked("embedding", input, weight)
    check_dense(sparse)
    padding_idx = row_number(padding_idx, weight.shape[0])
    out = _looked_up(input, weight, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        return out
    return jnp.where(jnp.expand_dims(input == padding_idx, -1), jax.lax.stop_gradient(out), out)


def embedding_bag(
    input: jax.Array,
    weight: jax.Array,
    offsets: jax.Array | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> jax.Array:
    """The sum, mean or maximum of the rows of `weight` in each bag of indices; zeros for an empty bag.

    Args:
        input: indices, `(B, N)` for B bags, or `(N,)`. A negative or too large index makes its bag NaN.
        weight: `(num_embeddings, embedding_dim)`.
        offsets: for an input `(N,)`, the position where each bag starts, `(B,)`, ascending from 0. Other offsets make
            the whole result NaN.
        max_norm: rows of a larger norm are scaled to this norm. The scaling does not affect gradients.
        norm_type: the exponent p of that norm.
        scale_grad_by_freq: True divides a row's gradient by the number of times that the row is looked up. Not allowed
            with "max".
        mode: "sum", "mean" or "max".
        sparse: must be False.
        per_sample_weights: a factor for each row, of the shape of `input`; with "sum" only.
        include_last_offset: True if `offsets` has one more entry, the position where the last bag ends.
        padding_idx: the index of a row that is left out and gets no gradient. A negative index counts from the end.

    Returns:
        `(B, embedding_dim)`.

    Raises:
        TypeError: if `input` or `offsets` do not hold integers, if `weight` is not floating, or if `per_sample_weights`
            has another dtype than `weight`.
        ValueError: if shapes do not fit, `padding_idx` is out of range, or options exclude each other.

    Source: torch.nn.functional.embedding_bag. Differs from PyTorch as `embedding` does. Also, if several rows of a bag
    share the maximum, they share its gradient.

    Example:
        >>> embedding_bag(jnp.array([0, 1, 1]), jnp.array([[1.0], [2.0]]), jnp.array([0, 2]), mode="sum")
        Array([[3.],
               [2.]], dtype=float32)
    """
    input, weight = _checked("embedding_bag", input, weight)
    floating(weight, "embedding_bag", "weight")
    check_dense(sparse)
    check_mode(mode, scale_grad_by_freq)
    if per_sample_weights is not None and mode != "sum":
        raise ValueError(f"per_sample_weights need mode='sum'; got mode={mode!r}")
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        raise ValueError(
            f"per_sample_weights must have the shape of the input, {tuple(input.shape)}; got"
            f" {tuple(per_sample_weights.shape)}"
        )
    weight, per_sample_weights = of_one_dtype("embedding_bag", weight=weight, per_sample_weights=per_sample_weights)
    bags = _Bags(input, offsets, include_last_offset)
    padding_idx = row_number(padding_idx, weight.shape[0])
    kept = jnp.expand_dims(jnp.ones_like(input, bool) if padding_idx is None else input != padding_idx, -1)
    rows = _looked_up(input, weight, max_norm, norm_type, scale_grad_by_freq)
    rows = rows.astype(wide_dtype(rows.dtype))
    if per_sample_weights is not None:
        rows = rows * jnp.expand_dims(per_sample_weights.astype(rows.dtype), -1)
    if mode == "max":
        out = bags.max(jnp.where(kept, rows, -jnp.inf))
        out = jnp.where(bags.sum(kept.astype(out.dtype)) > 0, out, 0)
    else:
        out = bags.sum(jnp.where(kept, rows, 0))
    if mode == "mean":
        out = out / jnp.maximum(bags.sum(kept.astype(out.dtype)), 1)
    return bags.checked(out).astype(weight.dtype)


def check_mode(mode: str, scale_grad_by_freq: bool) -> None:
    """Raise ValueError for an unknown mode, and for a mode that cannot scale gradients by frequency."""
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"mode has to be one of 'sum', 'mean' or 'max'; got {mode!r}")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError("mode='max' does not support scaling the gradient by the frequency; use 'sum' or 'mean'")


class _Bags:
    """The bag of each row, and reductions over the rows of each bag."""

    def __init__(self, input: jax.Array, offsets: jax.Array | None, include_last_offset: bool) -> None:
        self.segments: jax.Array | None = None
        if input.ndim == 2:
            if offsets is not None:
                raise ValueError(
                    "embedding_bag takes no offsets with an input (B, N), whose rows are the bags; got offsets for an"
                    f" input of shape {tuple(input.shape)}"
                )
            return
        if input.ndim != 1 or offsets is None or offsets.ndim != 1:
            raise ValueError(
                "embedding_bag takes an input (B, N), or (N,) with offsets (B,); got"
                f" {tuple(input.shape)} and {None if offsets is None else tuple(offsets.shape)}"
            )
        if not jnp.issubdtype(offsets.dtype, jnp.integer):
            raise TypeError(f"embedding_bag takes offsets that are integers; got {offsets.dtype}")
        if include_last_offset and offsets.shape[0] == 0:
            raise ValueError("include_last_offset needs at least one offset; got none")
        self.count = offsets.shape[0] - include_last_offset
        places = jnp.arange(input.shape[0], dtype=offsets.dtype)
        self.segments = jnp.searchsorted(offsets, places, side="right") - 1
        edges = jnp.concatenate([jnp.zeros(1, offsets.dtype), offsets, jnp.full(1, input.shape[0], offsets.dtype)])
        self.valid = (edges[1:2] == 0).all() & (edges[1:] >= edges[:-1]).all()

    def sum(self, rows: jax.Array) -> jax.Array:
        if self.segments is None:
            return rows.sum(1)
        if not self.count:
            return rows[:0]
        return jax.ops.segment_sum(rows, self.segments, self.count, indices_are_sorted=True)

    def max(self, rows: jax.Array) -> jax.Array:
        if self.segments is None:
            return largest(rows, 1, initial=-math.inf)
        if not self.count:
            return rows[:0]
        return jax.ops.segment_max(rows, self.segments, self.count, indices_are_sorted=True)

    def checked(self, out: jax.Array) -> jax.Array:
        """`out`, or NaN if the offsets do not ascend from 0."""
        return out if self.segments is None else jnp.where(self.valid, out, jnp.nan)


def one_hot(tensor: jax.Array, num_classes: int = -1) -> jax.Array:
    """A new last axis with 1 at each class number and 0 elsewhere.

    Args:
        tensor: class numbers, integers of any shape `(*)`. For a negative or too large one the row is all zeros; torch
            raises, but compiled code cannot.
        num_classes: the size of the new axis. -1 means one more than the largest class number; compiled code does not
            know it.

    Returns:
        `(*, num_classes)`, integers.

    Raises:
        TypeError: if `tensor` does not hold integers.
        ValueError: if `num_classes` is neither -1 nor positive. For -1, also in compiled code and for an empty `tensor`.

    Source: torch.nn.functional.one_hot.

    Example:
        >>> one_hot(jnp.array([0, 2]), 3)
        Array([[1, 0, 0],
               [0, 0, 1]], dtype=int32)
    """
    if not jnp.issubdtype(tensor.dtype, jnp.integer):
        raise TypeError(f"one_hot takes class numbers, which are integers; got {tensor.dtype}")
    if num_classes == -1:
        if isinstance(tensor, jax.core.Tracer) or tensor.size == 0:
            raise ValueError(
                "one_hot cannot infer num_classes in compiled code or from an empty array; got num_classes=-1. Pass the"
                " number of classes."
            )
        num_classes = int(tensor.max()) + 1
    if num_classes < 1:
        raise ValueError(f"one_hot needs num_classes > 0, or -1; got {num_classes}")
    one: Any = jax.nn.one_hot(tensor, num_classes, dtype=int)
    return one
