"""The error for an adapter whose library is not installed."""

from __future__ import annotations


def missing(adapter: str, error: ImportError) -> ImportError:
    """The error that an adapter raises if its library cannot be imported. It names the command that installs it.

    Args:
        adapter: the name of the adapter, and of the extra that installs its library.
        error: the error that the import of the library raised.
    """
    return ImportError(
        f"minitorch_jax.adapters.{adapter} needs a library that cannot be imported here ({error}). Install it with:"
        f" pip install 'minitorch_jax[{adapter}]'",
        name=error.name,
    )
