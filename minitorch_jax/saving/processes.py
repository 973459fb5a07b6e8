"""Arrays that are spread over several processes: all processes gather them, one at a time, and the first one writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def are_spread(arrays: Mapping[str, Any]) -> bool:
    """True if one of the arrays has parts on devices of other processes."""
    return any(isinstance(array, jax.Array) and not array.is_fully_addressable for array in arrays.values())


class Gathering:
    """The arrays by name, in the order in which all processes gather them.

    A process that stops early would leave the others waiting for it: `finish` gathers the rest.
    """

    def __init__(self, path: str, arrays: Mapping[str, Any]) -> None:
        self.path, self._arrays = path, iter(arrays.items())
        facts = repr([(name, str(array.dtype), array.shape) for name, array in arrays.items()])
        mine = np.frombuffer(hashlib.sha256(facts.encode()).digest(), np.uint8)
        if not (multihost_utils.process_allgather(mine) == mine).all():
            raise ValueError(
                f"save(): the processes pass objects with different arrays; nothing was written to {path}. Call mt.save in"
                f" all processes, with the same objects; this one has {len(arrays)} arrays: {', '.join(list(arrays)[:20])}"
            )

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, array in self._arrays:
            yield name, self._whole(name, array)

    def _whole(self, name: str, array: Any) -> Any:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return array
        try:
            return multihost_utils.process_allgather(array, tiled=True)
        except Exception as error:
            raise GatheringError(f"save(): {name} could not be gathered from all processes: {error}") from error

    def finish(self, error: Exception | None) -> None:
        """Take part until the end, and raise in all processes if the first one has failed with `error`."""
        for _ in self:
            pass
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if error is not None:
            raise error
        if failed:
            raise OSError(f"process 0 could not write {self.path}, which is unchanged; its error says why")


class GatheringError(RuntimeError):
    """A process has gone, or has failed, while arrays were gathered."""
