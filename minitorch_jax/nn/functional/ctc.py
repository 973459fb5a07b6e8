"""Connectionist temporal classification, as a function."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .autocast import in_float32
from .dtypes import wide
from .loss import reduced

_NEVER = -1e30  # stands for log(0): finite, so that gradients hold no NaN, and below every real log-probability


@in_float32
def ctc_loss(
    log_probs: jax.Array,
    targets: jax.Array,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> jax.Array:
    """-log of the total probability of all alignments of a label sequence with a longer sequence of predictions.

    The recursion over time is one `lax.scan` in float32 or wider.

    Args:
        log_probs: log-probabilities (of `log_softmax`), `(T, N, C)`, or `(T, C)`.
        targets: the labels, without blanks. Either `(N, S)`, padded with any values, or concatenated,
            `(sum(target_lengths),)`.
        input_lengths: the lengths of the predictions, `(N,)` or `()`: an array, or a tuple of ints.
        target_lengths: the lengths of the labels, of the same type. For concatenated labels, pass a tuple or a NumPy
            array: its values are known while tracing, and the program is smaller than for a JAX array.
        blank: the class number of the blank.
        reduction: "mean" (the mean of loss / target length), "sum" or "none".
        zero_infinity: True returns 0 where the input is too short for the labels; False returns infinity.

    Returns:
        The loss, `()`; with "none", `(N,)` or `()`.

    Raises:
        ValueError: if shapes do not fit, or `blank` is not a class. Unlike torch, a length or a label out of range
            cannot raise in compiled code: it makes the loss NaN.

    Source: torch.nn.functional.ctc_loss; Graves et al., "Connectionist temporal classification", 2006.

    Differs from PyTorch: the gradient is exact for any `log_probs`. Torch's gradient assumes that they come from
    `log_softmax`; if they do, both are equal. The gradient of an infinite loss is 0; torch's is NaN.

    Example:
        >>> log_probs = jax.nn.log_softmax(jnp.zeros((2, 1, 3)), axis=2)
        >>> ctc_loss(log_probs, jnp.array([[1]]), (2,), (1,))   # -log(3 / 9): -1, 1-, 11
        Array(1.0986123, dtype=float32)
    """
    batched = log_probs.ndim == 3
    if log_probs.ndim == 2:
        log_probs = log_probs[:, None]
    elif not batched:
        raise ValueError(f"log_probs must have shape (T, N, C) or (T, C); got {tuple(log_probs.shape)}")
    if not log_probs.size:
        raise ValueError(f"ctc_loss needs log_probs that are not empty; got shape {tuple(log_probs.shape)}")
    time, batch, classes = log_probs.shape
    if not 0 <= blank < classes:
        raise ValueError(f"blank must be one of the {classes} classes; got {blank}")
    inputs, lengths = (
        _lengths(value, batch, name)
        for value, name in ((input_lengths, "input_lengths"), (target_lengths, "target_lengths"))
    )
    labels = _padded(jnp.asarray(targets).astype(jnp.int32), target_lengths, lengths)
    real = jnp.arange(labels.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    wrong = (real & ((labels < 0) | (labels >= classes))).any(1)
    wrong |= (inputs < 0) | (inputs > time) | (lengths < 0) | (lengths > labels.shape[1])
    labels = jnp.where(real, labels, blank)
    loss = _negative_log_likelihood(wide(log_probs), labels, inputs, lengths, int(blank))
    loss = jnp.where(loss > -0.5 * _NEVER, 0 if zero_infinity else jnp.inf, loss)
    loss = jnp.where(wrong, jnp.nan, loss).astype(log_probs.dtype)
    if reduction == "mean":
        return (loss / jnp.maximum(lengths, 1).astype(loss.dtype)).mean()
    return reduced(loss if batched else loss[0], reduction)


def _lengths(value: Any, batch: int, name: str) -> jax.Array:
    lengths = jnp.asarray(value)
    shape = lengths.shape
    if shape not in ((batch,), ()) or (shape == () and batch != 1):
        raise ValueError(f"{name} must hold one length for each of the {batch} sequences; got shape {tuple(shape)}")
    return lengths.astype(jnp.int32).reshape(batch)


def _padded(targets: jax.Array, given: Any, lengths: jax.Array) -> jax.Array:
    """The labels as `(N, S)`."""
    batch = len(lengths)
    if targets.ndim == 2 and targets.shape[0] == batch:
        return targets
    if targets.ndim != 1:
        raise ValueError(f"targets must have shape ({batch}, S) or (sum(target_lengths),); got {tuple(targets.shape)}")
    size = targets.shape[0]
    if not any(isinstance(length, jax.Array) for length in jax.tree.leaves(given)):
        if np.sum(given) != size:
            raise ValueError(f"targets must hold sum(target_lengths) = {np.sum(given)} labels; got {size} labels")
        size = int(np.max(given, initial=0))
    if not size:  # `take` fails on an empty array
        return jnp.zeros((batch, 0), targets.dtype)
    places = (jnp.cumsum(lengths) - lengths)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    return jnp.take(targets, places, mode="fill", fill_value=-1)


@partial(jax.jit, static_argnums=4)  # without it, an eager scan compiles at each call: its step is a new function
def _negative_log_likelihood(
    log_probs: jax.Array, labels: jax.Array, input_lengths: jax.Array, target_lengths: jax.Array, blank: int
) -> jax.Array:
    """Run the forward recursion over the states "blank, label, blank, label, …, blank"."""
    batch, size = labels.shape
    states = jnp.full((batch, 2 * size + 1), blank, labels.dtype).at[:, 1::2].set(labels)
    before = jnp.pad(states, ((0, 0), (2, 0)), constant_values=blank)[:, :-2]
    skippable = (states != blank) & (states != before)  # a blank between equal labels cannot be left out
    emitted = jnp.take_along_axis(log_probs, states[None], 2)
    emitted = jnp.where(emitted < _NEVER, _NEVER, emitted)

    def step(alpha: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, log_p = at
        earlier = jnp.pad(alpha, ((0, 0), (2, 0)), constant_values=_NEVER)
        one, two = earlier[:, 1:-1], jnp.where(skippable, earlier[:, :-2], _NEVER)
        top = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(alpha, one), two))
        new = top + jnp.log(jnp.exp(alpha - top) + jnp.exp(one - top) + jnp.exp(two - top)) + log_p
        return jnp.where(t < input_lengths[:, None], new, alpha), None

    start = jnp.full(states.shape, _NEVER, log_probs.dtype).at[:, 0].set(0)  # before the first prediction
    alpha, _ = jax.lax.scan(step, start, (jnp.arange(len(emitted), dtype=jnp.int32), emitted))
    last = jnp.take_along_axis(alpha, 2 * target_lengths[:, None], 1, mode="clip")[:, 0]
    label = jnp.take_along_axis(alpha, jnp.maximum(2 * target_lengths - 1, 0)[:, None], 1, mode="clip")[:, 0]
    return -jnp.logaddexp(last, jnp.where(target_lengths > 0, label, _NEVER))
