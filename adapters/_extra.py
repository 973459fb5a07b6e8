"""The error for an adapter whose library is not installed."""

from __future__ import annotations

from minitorch_jax.runtime.install import command


def missing(adapter: str, error: ImportError) -> ImportError:
    """The error that an adapter raises if its library cannot be imported. It names the command that installs it.

    Args:
        adapter: the name of the adapter, and of the extra that installs its library.
        error: the error that the import of the library raised.
    """
    return ImportError(
        f"minitorch_jax.adapters.{adapter} needs a library that cannot be imported here ({error}). Install it"
        f" {command(adapter)}",
        name=error.name,
    )
