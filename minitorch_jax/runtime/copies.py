"""Copies of JAX's arrays, where the arrays lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def fresh_copies(arrays: Sequence[Any]) -> list[Any]:
    """Return copies that share no buffer with `arrays`, each on the devices and in the sharding of its array.

    One call of JAX copies them all, but for arrays of which other processes hold a part: that call refuses those.
    """
    if all([getattr(array, "is_fully_addressable", True) for array in arrays]):
        return jax.device_put(list(arrays), may_alias=False)
    return [jnp.copy(array) for array in arrays]


def everywhere(sharding: Any) -> Any:
    """Return the sharding of whole copies on all devices of another sharding."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
