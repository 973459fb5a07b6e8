"""Sequences of different lengths as one array."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...runtime.numpy_memory import as_numpy
from ...state.static_values import describe, is_array, shown


def pad_sequence(
    sequences: Iterable[Any], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> jax.Array:
    """Stack sequences of different lengths, each padded to the longest.

    Args:
        sequences: arrays of the shapes `(length, *)`, whose other axes agree.
        batch_first: False puts time first, True the batch.
        padding_value: the value of the added elements.
        padding_side: "right" or "left", where they are added.

    Returns:
        An array of shape `(longest, batch, *)`, or `(batch, longest, *)`, in the dtype of the first sequence.

    Raises:
        TypeError: if there is something else than arrays.
        ValueError: if there are no sequences, their shapes do not fit, or `padding_side` is something else.

    Source: torch.nn.utils.rnn.pad_sequence.

    Example:
        >>> from minitorch_jax import nn
        >>> nn.utils.rnn.pad_sequence([jnp.array([1, 2, 3]), jnp.array([4])], batch_first=True)
        Array([[1, 2, 3],
               [4, 0, 0]], dtype=int32)
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"pad_sequence: padding_side must be 'left' or 'right'; got {padding_side!r}")
    if not isinstance(sequences, Iterable):
        raise TypeError(f"pad_sequence takes a list of arrays; got {shown(sequences)} ({type(sequences).__name__})")
    arrays = list(sequences)
    if not arrays:
        raise ValueError("pad_sequence: the list of sequences is empty")
    for i, array in enumerate(arrays):
        if not is_array(array):
            raise TypeError(f"pad_sequence takes arrays; sequence {i} is {shown(array)} ({type(array).__name__})")
        if array.ndim == 0 or array.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(
                f"pad_sequence: sequences are of shape (length, *), and agree in all other axes; sequence 0 is"
                f" {describe(arrays[0])}, sequence {i} is {describe(array)}"
            )
    longest = max(len(array) for array in arrays)
    dtype = jax.dtypes.canonicalize_dtype(arrays[0].dtype)
    # In NumPy where that is possible: JAX would compile the padding of each length for each longest one.
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    library: Any = jnp if traced else np
    padded = []
    for array in arrays:
        added = longest - len(array)
        width = [(added, 0) if padding_side == "left" else (0, added)] + [(0, 0)] * (array.ndim - 1)
        values = jnp.asarray(array, dtype) if traced else as_numpy(array).astype(dtype)
        padded.append(library.pad(values, width, constant_values=library.asarray(padding_value, dtype)))
    return jnp.asarray(library.stack(padded, axis=0 if batch_first else 1))
