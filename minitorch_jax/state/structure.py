"""The version of the static structure of all modules and optimizers."""

from __future__ import annotations


class _Structure:
    __slots__ = ("version",)

    def __init__(self) -> None:
        self.version = object()


structure = _Structure()


def structure_changed() -> None:
    """Record that a static part of some module or optimizer has changed. A fresh object cannot lose a race."""
    structure.version = object()
