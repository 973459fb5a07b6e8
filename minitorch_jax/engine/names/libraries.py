"""Which code is a library's: what a compiled function reaches is searched in the user's code only."""

from __future__ import annotations

import sys
import types
from functools import lru_cache
from typing import Any

# Packages whose functions and objects are not looked into, wherever they lie.
_PACKAGES = frozenset({"jax", "jaxlib", "numpy", "minitorch_jax", "optax", "flax", "equinox", "torch", "orbax"})
_LIBRARIES = _PACKAGES | sys.stdlib_module_names
_MADE_BY_PYTHON = 1 << 9  # the flag of classes that a `class` statement made
_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace", "_thread._local")  # of Python's, for values of the user's


def top(module: Any) -> str:
    """The package of a module's name."""
    return module.partition(".")[0] if isinstance(module, str) else ""


def is_library(module: Any, code: types.CodeType | None = None) -> bool:
    """True for the name of a library's module. What was typed in, or run by `exec`, is the user's."""
    return top(module) in _LIBRARIES and not (code is not None and code.co_filename.startswith("<"))


@lru_cache(maxsize=1024)
def is_installed(package: str) -> bool:
    """True for a package that lies where installers put packages."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def is_wrapper(value: Any) -> bool:
    """True for a library's object around a function, such as `jax.jit` makes one. No user's `__getattr__` is asked."""
    kind = type(value)
    return kind is not types.FunctionType and is_library(kind.__module__) and hasattr(value, "__wrapped__")


def is_users_code(cls: Any) -> bool:
    """True for a class of the user's, also one that `exec` made in a namespace without a name."""
    return not is_library(cls.__module__) or (cls.__module__ == "builtins" and bool(cls.__flags__ & _MADE_BY_PYTHON))


def is_namespace(cls: Any) -> bool:
    """True for a class of Python's own whose attributes are the user's."""
    return f"{cls.__module__}.{cls.__qualname__}" in _NAMESPACES
