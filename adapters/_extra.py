"""The error for an adapter whose library is not installed."""

from __future__ import annotations


def missing(adapter: str, error: ImportError) -> ImportError:
    """What an adapter raises when its library cannot be imported: which command installs it.

    Args:
        adapter: the adapter's name, which is also that of the extra that brings its library.
        error: what importing the library raised.
    """
    return ImportError(
        f"minitorch_jax.adapters.{adapter} needs a library that cannot be imported here ({error}). Install it with:"
        f" pip install 'minitorch_jax[{adapter}]'",
        name=error.name,
    )
