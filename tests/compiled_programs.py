"""What the tests do with XLA's compiled programs, which take most of their time and memory: keep them on disk, forget them.

Of what a worker's memory grows by, all but a few percent are programs in JAX's caches, at 0.3 to 0.5 MB each. Once they
are forgotten their memory is free, but stays with the process until `malloc_trim` returns it.
"""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import jax

STATM, MAPPED = Path("/proc/self/statm"), Path("/proc/self/maps")  # Linux; elsewhere nothing is forgotten
MOST_AREAS = 20_000  # that Linux maps for the process, of which it allows 65,530: two or three are a program
CHECKED_EVERY = 20  # tests, since counting areas takes milliseconds


def keep_on_disk(folder: str) -> None:
    """Take programs from a folder, and write those that are not there yet."""
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Programs:
    """Forgets the compiled programs once the process has grown by so many bytes since it last did."""

    def __init__(self) -> None:
        self.before: int | None = None
        self.checks = 0

    def forget_if_grown(self, limit: int) -> None:
        if not STATM.exists():
            return
        size, self.checks = _resident_bytes(), self.checks + 1
        if self.before is None:
            self.before = size
        many = self.checks % CHECKED_EVERY == 0 and MAPPED.read_bytes().count(b"\n") > MOST_AREAS
        if many or size - self.before > limit:
            gc.unfreeze()
            jax.clear_caches()
            gc.collect()
            trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc's
            trim(0)
            self.before = _resident_bytes()


def _resident_bytes() -> int:
    return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
