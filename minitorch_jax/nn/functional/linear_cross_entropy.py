"""The cross-entropy of a linear map, all at once or by blocks of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .cross_entropy import Losses, cross_entropies, reduced_losses
from .dtypes import wide
from .linear import linear

# The fewest rows of a block by default. Each block adds to the whole gradient of the weight: few rows do not pay for that.
LEAST = 64


@dataclass(frozen=True)
class LinearCrossEntropyOptions:
    """How `linear_cross_entropy` goes through its rows. Pass at most one of the first two.

    Args:
        batch_chunk_size: the number of rows of a block.
        chunking_method: "aspect_ratio:n" takes blocks whose scores are 1 / n of the input's size, rounded up to a power of
            two before it is divided; "auto" takes n = 2 and at least 64 rows, if `batch_chunk_size` is None; None takes
            `batch_chunk_size`, or all rows.
        allow_retain_graph: either value; gradients may always be taken again.
        acc_policy: "auto" or "accurate": gradients of blocks add up in float32 or wider.
        acc_dtype: None or float32.

    Raises:
        ValueError: if an argument has another value.

    Source: torch.nn.LinearCrossEntropyOptions. Differs from PyTorch: it has no other policies. In PyTorch, "auto" may take
    fewer rows.

    Example:
        >>> LinearCrossEntropyOptions(batch_chunk_size=64).rows(1000, 8, 50_000)
        64
    """

    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: str = "auto"
    acc_dtype: Any = None

    def __post_init__(self) -> None:
        size, method = self.batch_chunk_size, self.chunking_method
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"batch_chunk_size must be a positive integer or None; got {size!r}")
        name, _, factor = (method or "aspect_ratio:1").partition(":")
        if method != "auto" and (name != "aspect_ratio" or not (factor or "1").isdigit() or not int(factor or "1")):
            raise ValueError(
                f"chunking_method must be 'auto', 'aspect_ratio', 'aspect_ratio:n' or None; got {method!r}"
            )
        if size is not None and method not in ("auto", None):
            raise ValueError(f"pass batch_chunk_size or chunking_method, not both; got {size} and {method!r}")
        if self.acc_policy not in ("auto", "accurate"):
            raise ValueError(
                f"acc_policy must be 'auto' or 'accurate', since blocks add up so; got {self.acc_policy!r}"
            )
        if self.acc_dtype is not None and jnp.dtype(self.acc_dtype) != jnp.float32:
            raise ValueError(f"acc_dtype must be None or float32; got {self.acc_dtype!r}")

    def rows(self, count: int, in_features: int, classes: int) -> int:
        """The number of rows of a block."""
        if self.batch_chunk_size is not None or self.chunking_method is None:
            return max(1, min(self.batch_chunk_size or count, count))
        method = "aspect_ratio:2" if self.chunking_method == "auto" else self.chunking_method
        target = -(-count // max(1, -(-classes // max(1, in_features))))
        power = 1 << max(0, target - 1).bit_length()
        least = LEAST if self.chunking_method == "auto" else 1
        return max(1, min(max(power // int(method.partition(":")[2] or 1), least), count))


def linear_cross_entropy(
    input: jax.Array,
    linear_weight: jax.Array,
    target: jax.Array,
    *,
    linear_bias: jax.Array | None = None,
    weight: jax.Array | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> jax.Array:
    """The cross-entropy of x W^T + b.

    Args:
        input: `(in_features,)` or `(N, in_features)`.
        linear_weight: `(C, in_features)`, or `(C, d1, …, in_features)` for a batch.
        target: class numbers, `()`, `(N,)` or `(N, d1, …)`; or probabilities, `(C,)`, `(N, C)` or `(N, C, d1, …)`.
        linear_bias: `(C,)` or `(C, d1, …)`.
        weight: the weight of each class, `(C,)`.
        reduction: "mean", "sum" or "none".
        ignore_index: targets of this class number do not count; -100 by default. Not allowed for probabilities.
        label_smoothing: the share of a uniform target, between 0 and 1.
        options: None computes all scores at once. `LinearCrossEntropyOptions()` goes through the rows in blocks, forward
            and backward: the memory then holds the scores of one block, which are computed twice.

    Raises:
        ValueError: if shapes do not fit, or an argument is out of range.

    Source: torch.nn.functional.linear_cross_entropy. Differs from PyTorch: blocks are there for all arguments, and for
    forward mode and second derivatives.

    Example:
        >>> linear_cross_entropy(jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.array([0, 3]))
        Array(1.3862944, dtype=float32)
    """
    shape = linear_weight.shape[:-1]
    if not 1 <= input.ndim <= 2 or not shape or input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy takes an input (in_features,) or (N, in_features) and a linear_weight"
            f" (C, ..., in_features); got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if len(shape) > 1 and input.ndim == 1:
        raise ValueError(
            f"a linear_weight of shape {tuple(linear_weight.shape)} needs an input (N, in_features); got shape"
            f" {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != shape:
        raise ValueError(f"linear_bias must have shape {tuple(shape)}; got {tuple(linear_bias.shape)}")
    flat: Any = None if linear_bias is None else linear_bias.reshape(-1)
    target, matrix = jnp.asarray(target), linear_weight.reshape(math.prod(shape), input.shape[-1])
    if ignore_index is not None and target.shape == input.shape[:-1] + shape:
        raise ValueError(
            f"ignore_index is for class numbers; the targets are probabilities; got ignore_index={ignore_index}"
        )
    dtype: Any = None

    def losses_of(input: jax.Array, target: jax.Array, matrix: jax.Array) -> Losses:
        nonlocal dtype
        scores = linear(input, matrix.astype(linear_weight.dtype), flat).reshape(input.shape[:-1] + shape)
        ignored = -100 if ignore_index is None else ignore_index
        losses, dtype = cross_entropies(scores, target, weight, ignored, label_smoothing)
        return losses

    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if options is None or input.ndim == 1:
        losses = losses_of(input, target, matrix)
    elif target.shape[:1] != input.shape[:1]:
        raise ValueError(
            f"input and target must have one batch size; got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    else:
        rows = options.rows(input.shape[0], input.shape[1], shape[0])
        losses = _by_rows(losses_of, rows, input, target, wide(matrix))  # the blocks' gradients add up in float32
    return reduced_losses(losses, reduction, dtype)


def _by_rows(function: Any, rows: int, input: jax.Array, target: jax.Array, matrix: jax.Array) -> Losses:
    """`function(input, target, matrix)`, computed for some rows at a time and computed again in the backward pass."""
    block = jax.checkpoint(function, prevent_cse=False)
    whole = input.shape[0] // rows
    parts = []
    if whole:
        blocks = [a[: whole * rows].reshape(whole, rows, *a.shape[1:]) for a in (input, target)]
        found = lax.map(lambda block_of: block(*block_of, matrix), tuple(blocks))
        parts.append(jax.tree.map(lambda a: a.reshape(whole * rows, *a.shape[2:]), found))
    if whole * rows < input.shape[0] or not whole:
        parts.append(block(input[whole * rows :], target[whole * rows :], matrix))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
