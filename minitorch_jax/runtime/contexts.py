"""JAX settings for code of this package, independent of the settings that the user has made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from .jax_private import is_debugging


def full_width(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """A context that keeps float64 and complex128 values, if there are any. Outside of x64 mode JAX would narrow them."""
    wide = any([getattr(value, "dtype", None) in (np.float64, np.complex128) for value in values])
    return jax.enable_x64(True) if wide else nullcontext()


def unchecked() -> AbstractContextManager[Any]:
    """Around code that only moves values: JAX is not to look for NaN or infinity in them."""
    return _undebugged() if is_debugging() else nullcontext()


@contextmanager
def _undebugged() -> Iterator[None]:
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def constants() -> AbstractContextManager[Any]:
    """A context in which code of this package may move its own numbers to and from a device, despite `jax.transfer_guard`."""
    config: Any = jax.config
    guards = config.jax_transfer_guard_host_to_device, config.jax_transfer_guard_device_to_host
    return nullcontext() if guards == (None, None) else jax.transfer_guard("allow")


@lru_cache(maxsize=64)
def number(value: float) -> Any:
    """Return a number as a float32 scalar array for a compiled call outside of traces. Equal numbers share one array."""
    with constants():
        return jax.device_put(np.float32(value))
