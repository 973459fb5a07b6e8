"""The stream of random keys that constructors draw from."""

from __future__ import annotations

from typing import Any

import jax

from . import cell as cells
from .cell import Cell


class Stream:
    """A sequence of random keys: `next()` gives a new one and moves on."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._cell: Cell | None = None  # made at the first use: importing the package starts no device

    def seed(self, seed: int) -> None:
        self._seed, self._cell = seed, None

    def next(self) -> Any:
        """A key that no other draw has given."""
        if not cells.at_top_level():
            raise cells.TraceError(
                "a module was constructed inside a JAX transform without `key=`: the global random stream would advance"
                " only while tracing, so every run would draw the same numbers. Pass a key, e.g."
                " `jax.vmap(lambda key: nn.Linear(3, 2, key=key))(jax.random.split(jax.random.key(0), 8))`."
            )
        if self._cell is None:
            self._cell = Cell(jax.random.key(self._seed), "stream")
        self._cell.value, key = jax.random.split(self._cell.value)
        return key


_global = Stream(0)


def seed(n: int) -> None:
    """Restart the global stream of random keys, from which constructors without `key=` draw.

    Args:
        n: any integer that fits 32 bits; the stream starts as `seed(0)`.

    Raises:
        TypeError: if `n` is not an integer.

    Example:
        >>> import minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> mt.seed(7); a = nn.Linear(2, 2).weight
        >>> mt.seed(7); b = nn.Linear(2, 2).weight
        >>> bool((a == b).all())
        True
    """
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"seed() takes an integer, not {n!r}")
    _global.seed(n.__index__())


def next_key(key: Any = None) -> Any:
    """`key` if it is given, otherwise the next of the global stream."""
    return _global.next() if key is None else key
