"""Whether devices have the memory that a compiled program needs besides its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def has_room(compiled: Any, inputs: Sequence[Any]) -> bool:
    """True if there is memory for the results and intermediate values of a program; False where nobody can tell.

    Another process, or thread, may take it before the program runs. Then the program fails all the same.
    """
    devices: set[Any] = {d for value in inputs if isinstance(value, jax.Array) for d in value.sharding.device_set}
    devices = {device for device in devices if device.process_index == jax.process_index()}
    try:
        plan = compiled.memory_analysis()  # bytes on each device
    except Exception:  # a backend that does not tell
        return False
    if plan is None:
        return False
    size = plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    on_host = [device for device in devices if device.platform == "cpu"]
    return _host_has(size * len(on_host)) and all([_has(device, size) for device in devices.difference(on_host)])


def _host_has(size: int) -> bool:
    try:
        np.empty(size, np.uint8)  # the system is asked, and no page is touched
    except MemoryError:
        return False
    return True


def _has(device: Any, size: int) -> bool:
    stats = device.memory_stats() or {}
    return bool(size <= stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))
