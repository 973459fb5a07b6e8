"""Donating data: an array that a cell or another argument also holds is copied before it is donated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..state.cell import all_cells, is_concrete
from ..state.packed import View


def safe_to_donate(donated: Sequence[Any], others: Any) -> list[Any]:
    """Return the arrays to donate. An array that is also in `others` (a pytree), passed twice, or in a cell is copied."""
    if not donated:
        return []
    stored_ids, lent = _arrays_in_cells()
    theirs = [leaf for leaf in jax.tree.leaves(others) if is_concrete(leaf)]
    taken = {*stored_ids, *map(id, theirs)}
    known: dict[Any, list[Any]] = {}  # arrays that users have had, so that other arrays may share their buffers
    for array in (*lent, *theirs):
        _add(known, array)
    result = []
    for array in donated:
        if is_concrete(array):
            if id(array) in taken or _shares(known, array):
                array = jnp.copy(array)
            else:
                taken.add(id(array))
                _add(known, array)
        result.append(array)
    return result


def _arrays_in_cells() -> tuple[set[int], list[Any]]:
    """Return the ids of all arrays in cells and packs, and those of these arrays that are lent."""
    ids: set[int] = set()
    lent: list[Any] = []
    packs = set()
    for cell in all_cells():
        if isinstance(cell, View):
            packs.add(cell.pack)
        elif is_concrete(cell.stored):
            ids.add(id(cell.stored))
            if cell.lent:
                lent.append(cell.stored)
    for pack in packs - {None}:
        lent += pack.parts()
    return ids.union(map(id, lent)), lent


def _add(known: dict[Any, list[Any]], array: Any) -> None:
    if not array.is_deleted():
        known.setdefault(_kind(array), []).append(array)


def _shares(known: dict[Any, list[Any]], array: Any) -> bool:
    """True if an array shares a buffer with a known one (`jax.device_put` returns such arrays)."""
    alike: Iterable[Any] = () if array.is_deleted() else known.get(_kind(array), ())
    return any(not _buffers(array).isdisjoint(_buffers(other)) for other in alike)


def _kind(array: Any) -> Any:
    """Return a key that is equal for arrays that may share a buffer."""
    data = _data(array)
    return data.dtype, data.sharding.shard_shape(data.shape)


def _buffers(array: Any) -> set[tuple[Any, int]]:
    shards = _data(array).addressable_shards
    return {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in shards if shard.data.size}


def _data(array: Any) -> Any:
    """Return the array, or the data of an array of random keys."""
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
