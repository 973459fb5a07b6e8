"""Compute in the form that is fastest on a platform.

XLA on CPUs runs some plain operations (a pool's windows, a convolution of groups) many times slower than an equal formula.
On GPUs and TPUs the plain operation is the fastest, so it stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# The forms that a trace takes: those of this process's platform ("here"), of every one ("everywhere"), or the "plain" ones.
# It is part of the key of every trace, as the setting of `autocast` is.
_FORMS: Any = jax.make_user_context("here")


def on_cpu(cpu: Callable[..., Any], plain: Callable[..., Any], *operands: Any) -> Any:
    """Return `cpu(*operands)` on CPUs, and `plain(*operands)` on other platforms. Both give the same shapes and dtypes.

    Where JAX has no device but CPUs, the plain form is not traced. Else JAX traces both, and takes one of them when it
    lowers the program.

    Example:
        >>> import jax.numpy as jnp
        >>> on_cpu(lambda x: x + x, lambda x: 2 * x, jnp.ones(3))
        Array([2., 2., 2.], dtype=float32)
    """
    if takes_plain():
        return plain(*operands)
    if jax.default_backend() == "cpu" and _FORMS.value == "here":
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=plain)


def takes_plain() -> bool:
    """True in `in_plain_forms`."""
    return bool(_FORMS.value == "plain")


def for_other_platforms() -> Any:
    """Around the tracing of a program that may run on another platform than this process has."""
    return _FORMS("everywhere")


def in_plain_forms() -> Any:
    """Around the tracing of a program whose operations are counted, and not run."""
    return _FORMS("plain")
