"""Padding as a function."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .spatial import not_empty

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # and their names in jax.numpy


def pad(input: jax.Array, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> jax.Array:
    """Adds numbers around an array, or takes some off.

    Args:
        input: any shape for "constant"; else `(C, …)` or `(N, C, …)`, with as many axes more as are padded.
        pad: how many numbers to add before and after the last axis, then before and after the one before it, and so
            on; negative numbers take off.
        mode: "constant"; "reflect", which mirrors what is inside without the edge; "replicate", the edge; "circular",
            what is at the other end.
        value: of the added numbers, for "constant"; 0.

    Raises:
        ValueError: if `pad` does not fit the input or the mode.

    Source: torch.nn.functional.pad.

    Example:
        >>> pad(jnp.array([[1, 2, 3]]), (1, 2), mode="reflect")
        Array([[2, 1, 2, 3, 2, 1]], dtype=int32)
    """
    before, after = tuple(pad[::2])[::-1], tuple(pad[1::2])[::-1]
    ndim = len(before)
    if len(before) != len(after) or ndim > input.ndim:
        raise ValueError(
            f"pad takes two numbers for each padded axis, and at most {input.ndim} axes of an input of shape"
            f" {tuple(input.shape)}; got {tuple(pad)}"
        )
    if mode not in ("constant", *_MODES):
        raise ValueError(f"mode must be 'constant', 'reflect', 'replicate' or 'circular'; got {mode!r}")
    untouched = input.ndim - ndim
    sizes = list(zip(input.shape[untouched:], before, after, strict=True))
    whole = [n + low + high for n, low, high in sizes]
    rests = [n + min(low, 0) + min(high, 0) for n, low, high in sizes]
    mirrors = mode in ("reflect", "replicate")  # which see all numbers, those that are then taken off too, as in torch
    if any(n < 0 for n in (whole if mirrors else rests)):
        raise ValueError(f"pad {tuple(pad)} takes off more than an input of shape {tuple(input.shape)} has")
    if mode == "constant":
        config = [(0, 0, 0)] * untouched + [(low, high, 0) for low, high in zip(before, after, strict=True)]
        return lax.pad(input, jnp.asarray(value or 0, input.dtype), config)
    if value:
        raise ValueError(f"value is for mode='constant'; got {value} with mode={mode!r}")
    if ndim > 3 or untouched not in (1, 2):
        raise ValueError(
            f"mode={mode!r} pads one to three axes of an input with one or two more before them; got {tuple(pad)} for"
            f" an input of shape {tuple(input.shape)}"
        )
    if mirrors:
        not_empty(input, f"mode={mode!r}", ndim + 1)
        if 0 in whole:
            raise ValueError(f"pad {tuple(pad)} leaves nothing of an input of shape {tuple(input.shape)}")
    widths = [(max(low, 0), max(high, 0)) for low, high in zip(before, after, strict=True)]
    limits = [n - 1 for n, _, _ in sizes] if mode == "reflect" else rests
    if mode != "replicate" and any(max(width) > limit for width, limit in zip(widths, limits, strict=True)):
        raise ValueError(
            f"mode={mode!r} adds at most {tuple(limits)} numbers on each side of this input; got {tuple(pad)}"
        )
    taken = (..., *(slice(max(-low, 0), high if high < 0 else None) for low, high in zip(before, after, strict=True)))
    padding = [(0, 0)] * untouched + widths
    return jnp.pad(input, padding, _MODES[mode])[taken] if mirrors else jnp.pad(input[taken], padding, _MODES[mode])
