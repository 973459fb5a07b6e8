"""Padding as a function."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .spatial import not_empty

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # torch's name: jax.numpy's


def pad(input: jax.Array, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> jax.Array:
    """Adds elements around an array, or removes some.

    Args:
        input: any shape for "constant". Otherwise `(C, …)` or `(N, C, …)`, and all axes after C are padded.
        pad: the number of elements to add before and after the last axis, then before and after the second last, and so
            on. A negative number removes elements.
        mode: "constant" adds `value`. "reflect" mirrors the array at its edge elements. "replicate" repeats the edge
            elements. "circular" continues with the opposite end.
        value: the added value for "constant"; 0 by default.

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
            f"pad takes two integers for each padded axis, for at most {input.ndim} axes of an input of shape"
            f" {tuple(input.shape)}; got {tuple(pad)}"
        )
    if mode not in ("constant", *_MODES):
        raise ValueError(f"mode must be 'constant', 'reflect', 'replicate' or 'circular'; got {mode!r}")
    untouched = input.ndim - ndim
    sizes = list(zip(input.shape[untouched:], before, after, strict=True))
    whole = [n + low + high for n, low, high in sizes]
    rests = [n + min(low, 0) + min(high, 0) for n, low, high in sizes]
    mirrors = mode in ("reflect", "replicate")  # as in torch, these modes also see the elements that `pad` removes
    if any(n < 0 for n in (whole if mirrors else rests)):
        raise ValueError(f"pad {tuple(pad)} removes more elements than an input of shape {tuple(input.shape)} has")
    if mode == "constant":
        config = [(0, 0, 0)] * untouched + [(low, high, 0) for low, high in zip(before, after, strict=True)]
        return lax.pad(input, jnp.asarray(value or 0, input.dtype), config)
    if value:
        raise ValueError(f"value is for mode='constant'; got value={value} with mode={mode!r}")
    if ndim > 3 or untouched not in (1, 2):
        raise ValueError(
            f"mode={mode!r} pads one to three axes, and the input has one or two axes before them; got {tuple(pad)} for"
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
            f"mode={mode!r} adds at most {tuple(limits)} elements on each side of the padded axes; got {tuple(pad)}"
        )
    taken = (..., *(slice(max(-low, 0), high if high < 0 else None) for low, high in zip(before, after, strict=True)))
    padding = [(0, 0)] * untouched + widths
    return jnp.pad(input, padding, _MODES[mode])[taken] if mirrors else jnp.pad(input[taken], padding, _MODES[mode])
