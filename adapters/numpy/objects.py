"""What the user's networks are made of: objects with attributes, lists, tuples and dicts, to any depth."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minitorch_jax.stateful import join

_LIBRARIES = {"numpy", "scipy", "jax", "jaxlib", "numba", "cupy", "torch", "tensorflow", "pandas", "sklearn"}


def is_users(module_name: Any) -> bool:
    """Whether code of this module is the user's: of no library that we know, though of our own NumPy layers."""
    name = module_name if isinstance(module_name, str) else ""
    top = name.partition(".")[0]
    if top == "minitorch_jax":
        return name.startswith("minitorch_jax.adapters.numpy")
    return bool(top) and top not in _LIBRARIES and not (top in sys.stdlib_module_names and _is_pythons(top))


@cache
def _is_pythons(top: str) -> bool:
    """Whether a module with the name of one of Python's own is that: it has no file, or one in Python's folder."""
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is None or Path(file).is_relative_to(sysconfig.get_path("stdlib"))


def is_object(value: Any) -> bool:
    """Whether a value is an object of one of the user's classes (no class, function or module)."""
    return is_users(type(value).__module__) and not isinstance(value, type) and not callable_alone(value)


def callable_alone(value: Any) -> bool:
    """Whether a value is a function, of whatever kind: it has no attributes to look into."""
    return isinstance(value, np.ufunc) or type(value).__name__ in ("function", "builtin_function_or_method", "method")


def slots_of(cls: type) -> Iterator[str]:
    """The names in `__slots__` of a class and its bases, as attributes."""
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                yield f"_{base.__name__.lstrip('_')}{name}" if private else name


def attributes_of(obj: Any) -> dict[str, Any]:
    """An object's own attributes, in the order in which they were made."""
    found = {name: getattr(obj, name) for name in slots_of(type(obj)) if hasattr(obj, name)}
    return found | getattr(obj, "__dict__", {})


def parts_of(value: Any) -> dict[str, Any]:
    """What a value holds, by name: attributes of an object, items of a list, tuple or dict."""
    found: dict[str, Any] = {}
    if isinstance(value, list | tuple):
        found = {str(i): item for i, item in enumerate(value)}
    elif isinstance(value, dict):
        found = {str(key): item for key, item in value.items()}
    return found | attributes_of(value) if is_object(value) else found


def walk(root: Any, enter: Callable[[str, Any], bool]) -> None:
    """Call `enter` with path and value for all that `root` holds, each object once; go on inside where it says True."""
    seen: dict[int, Any] = {}
    waiting = [("", root)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept, so that no other gets its id
        if enter(path, value):
            waiting += [(join(path, name), part) for name, part in reversed(parts_of(value).items())]


def is_floating(value: Any) -> bool:
    """Whether a value is an array that can be trained."""
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def describe(value: Any) -> str:
    """`float32[3,4]`, or what else it is."""
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def listing(problems: list[str]) -> str:
    return "".join(f"\n  {problem}" for problem in problems)
