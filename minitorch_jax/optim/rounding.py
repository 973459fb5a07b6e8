"""Optimizer state in bfloat16 (`state_dtype`): stochastic rounding, and the noise that it takes.

A running average moves by a small share of itself in each step. Rounding to nearest loses a move of less than half a unit in
the last place, so in bfloat16 (8 significant bits) an average with β = 0.999 stands still. Stochastic rounding goes up with
the probability of the part that is cut off: each step is right on average, and so is their sum.

The noise is a hash of a seed, the step count, the parameter's path, the element's row-major index and the name of the state.
It draws from no random stream, and integers are the same on every device, in every program and in any sharding.

Sources: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015; Zamirai et al., "Revisiting BFloat16 Training",
2020. Integer noise added to the bits before they are cut: `_fp32_to_bf16_sr` of torchao. The hash is lowbias32 of
Wellons, "Prospecting for Hash Functions", 2018.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..module import random
from ..state import access
from ..state.cell import is_concrete
from ..state.static_values import shown

Part = tuple[str, tuple[int, ...]]  # a parameter's path and shape

_EXPONENT = np.uint32(0x7F800000)  # all ones: infinity or NaN
_UPPER = np.uint32(0xFFFF0000)


def rounds(flags: Mapping[str, Any]) -> bool:
    """Whether these flags of a group have its state rounded stochastically."""
    return bool(flags["state_dtype"] == "bfloat16")


def state_dtype_name(owner: str, value: Any) -> str | None:
    """The name of a `state_dtype`, which is how an optimizer keeps it.

    Raises:
        ValueError: unless it is bfloat16, float32 or None.
    """
    if value is None:
        return None
    try:
        name = jnp.dtype(value).name
    except TypeError:
        name = ""
    if name in ("bfloat16", "float32"):
        return name
    why = ""
    if name == "float16":
        why = ". float16 cannot hold it: the square of a gradient of 1e-4 is below its smallest number. Write jnp.bfloat16"
    raise ValueError(f"{owner}: state_dtype must be jnp.bfloat16, jnp.float32 or None; got {shown(value)}{why}")


def is_rounded(state: Any, p: Any) -> bool:
    """True for an array of a parameter's state that is kept in `state_dtype`: floats, one for each of the parameter's.

    Numbers and Adafactor's rows and columns take no memory to speak of, so they stay in float32.
    """
    return state.ndim > 0 and state.shape == p.shape and jnp.issubdtype(state.dtype, jnp.floating)


# -- noise -------------------------------------------------------------------------------------------------------------


def seed_now() -> Any:
    """A seed from the random stream as it is now, which is not advanced: a uint32, traced if the stream is."""
    stream = random.current()
    words = access.read(stream.cell, stream)
    words = np.asarray(words) if is_concrete(words) else words
    seed = words[..., :1] ^ np.uint32(0x9E3779B9)  # the hash of 0 is 0
    for i in range(1, words.shape[-1]):
        seed = _mixed(seed) ^ words[..., i : i + 1]
    return _mixed(seed)[..., 0]


def _begun(x: Any) -> Any:
    """The first half of `_mixed`."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    return x ^ (x >> np.uint32(15))


def _mixed(x: Any) -> Any:
    """lowbias32 of 32-bit integers, arrays of NumPy or JAX: one bit more or less changes half of the bits."""
    x = _begun(x) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _words(text: str) -> np.ndarray[Any, Any]:
    """Two integers for a name, the same in every process."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4").astype(np.uint32)


def place_of(parts: Sequence[Part], size: int) -> Any:
    """What tells the elements of a parameter from all others: its path's words; for a pack, a word of each element."""
    if len(parts) == 1:
        return tuple(_words(parts[0][0]))
    each = [_of_elements(_words(path), np.arange(np.prod(shape), dtype=np.uint32)) for path, shape in parts]
    words = np.concatenate(each)
    return np.pad(words, (0, size - len(words)))


def _of_elements(path: Any, index: Any) -> Any:
    return _begun(index ^ path[0]) + path[1]


def _indices(shape: tuple[int, ...]) -> Any:
    """Row-major indices, modulo 2³². Made axis by axis, so that they are sharded as the parameter is."""
    index, step = jnp.uint32(0), 1
    for axis in reversed(range(len(shape))):
        index = index + np.uint32(step % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        step *= shape[axis]
    return index


# -- rounding ----------------------------------------------------------------------------------------------------------


def rounded(x: Any, noise: Any) -> Any:
    """float32 numbers in bfloat16: their upper 16 bits, after `noise` was added: integers below 2**16, in uint32.

    With evenly distributed noise the mean of the results is x. A number that bfloat16 has stays as it is: zeros of both
    signs and infinities among them. NaN stays NaN. Nothing finite becomes infinite: above the largest bfloat16, numbers are
    rounded down. Subnormal numbers are rounded like others, where the device does not take them for zeros.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + noise
    up = jnp.where((up & _EXPONENT) == _EXPONENT, bits, up) & _UPPER
    # The cast comes last, and is exact. After other operations XLA on CPU would compute all of it twice, and copy the state.
    return jnp.where(x != x, x, jax.lax.bitcast_convert_type(up, jnp.float32)).astype(jnp.bfloat16)


class Rounding:
    """The rounding of one parameter's state in one step."""

    def __init__(self, seed: Any, place: Any, t: Any, p: Any, state: Any) -> None:
        self._names = {name for name, old in _named(state) if is_rounded(old, p) and old.dtype == jnp.bfloat16}
        self._key = _mixed(_mixed(t.astype(jnp.uint32)) ^ seed)
        self._elements = _of_elements(place, _indices(p.shape)) if isinstance(place, tuple) else place
        self._done: dict[int, tuple[Any, Any]] = {}  # what `in_place` returned, by id, and what of it is stored

    def _rounded(self, name: str, x: Any) -> Any:
        key = _mixed(self._key ^ _words(name)[0])
        return rounded(x, _mixed(self._elements ^ key) >> np.uint32(16))

    def in_place(self, p: Any, state: dict[str, Any]) -> tuple[Any, ...]:
        """What `pieces.in_place` returns: new state as it will be stored, and the parameter."""
        chosen = [name in self._names for name in state]
        low = [self._rounded(name, x) if name in self._names else x for name, x in state.items()]
        *low, p = jax.lax.optimization_barrier((*low, p))
        found = [x.astype(jnp.float32) if one else x for x, one in zip(low, chosen, strict=True)]
        self._done |= {id(x): (x, stored) for x, stored, one in zip(found, low, chosen, strict=True) if one}
        return *found, p

    def stored(self, new: Any, old: Any) -> Any:
        """A rule's new state, in the dtypes of the old one."""
        values = []
        for (name, x), (_, before) in zip(_named(new), _named(old), strict=True):
            known = self._done.get(id(x))
            if known is not None:
                values.append(known[1])
            elif name in self._names:
                values.append(self._rounded(name, x))
            else:
                values.append(x.astype(before.dtype))
        return jax.tree.unflatten(jax.tree.structure(old), values)


def _named(state: Any) -> list[tuple[str, Any]]:
    return [(keystr(path, simple=True, separator="."), x) for path, x in tree_flatten_with_path(state)[0]]
