"""Libraries that take long to import, imported by the first test that uses them, not while tests are collected."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest


class Lazily:
    """A module by its name: `optax = Lazily("optax")`. Attributes are read from, and set on, the module itself."""

    __slots__ = ("_load",)

    def __init__(self, name: str, load: Callable[[str], Any] = importlib.import_module) -> None:
        object.__setattr__(self, "_load", functools.partial(load, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._load(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._load(), name)


def needs(*names: str) -> None:
    """Skip the rest of a test file where one of these libraries is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)
