"""How to install an optional library. Publishing the package changes it here, and in the README's section "Install"."""

from __future__ import annotations


def command(extra: str) -> str:
    """Return the words of an error, after "Install it".

    Args:
        extra: the name of an extra in `pyproject.toml`.

    Example:
        >>> command("flax")
        "in a clone of the project, with: pip install '.[flax]'"
    """
    return f"in a clone of the project, with: pip install '.[{extra}]'"
