"""Compute in the form that is fastest on a platform.

XLA on CPUs runs some plain operations (a pool's windows, a convolution of groups) many times slower than an equal formula.
On GPUs and TPUs the plain operation is the fastest, so it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax

_elsewhere = ContextVar("elsewhere", default=False)


def on_cpu(cpu: Callable[..., Any], plain: Callable[..., Any], *operands: Any) -> Any:
    """Return `cpu(*operands)` on CPUs, and `plain(*operands)` on other platforms. Both give the same shapes and dtypes.

    Where JAX has no device but CPUs, the plain form is not traced. Else JAX traces both, and takes one of them when it
    lowers the program. Call this outside of functions that `jax.jit` caches by themselves.

    Example:
        >>> import jax.numpy as jnp
        >>> on_cpu(lambda x: x + x, lambda x: 2 * x, jnp.ones(3))
        Array([2., 2., 2.], dtype=float32)
    """
    if jax.default_backend() == "cpu" and not _elsewhere.get():
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=plain)


@contextmanager
def for_other_platforms() -> Iterator[None]:
    """Around the tracing of a program that may run on another platform than this process has."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)
