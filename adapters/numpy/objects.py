"""What the user's networks are made of: objects with attributes, lists, tuples and dicts, to any depth."""

from __future__ import annotations

import sys
import sysconfig
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from minitorch_jax.state.walk import join

_LIBRARIES = {"numpy", "scipy", "jax", "jaxlib", "numba", "cupy", "torch", "tensorflow", "pandas", "sklearn"}
_LIBRARIES |= {"matplotlib", "mpl_toolkits", "PIL", "tqdm", "h5py", "gymnasium", "gym", "wandb"}
_HOLDERS = SimpleNamespace, UserDict, UserList  # Python's own, with attributes as the user's objects have them


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
    """Whether a value is an object of one of the user's classes, or a namespace (no class, function or module)."""
    users = is_users(type(value).__module__) or isinstance(value, _HOLDERS)
    return users and not isinstance(value, type) and not callable_alone(value)


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
    """An object's own attributes, in the order in which they were made; then its classes', without methods and the like."""
    found = {name: getattr(obj, name) for name in slots_of(type(obj)) if hasattr(obj, name)}
    found |= getattr(obj, "__dict__", {})
    for cls in type(obj).__mro__[:-1]:
        if is_users(cls.__module__):
            kept = {n: v for n, v in vars(cls).items() if n[:2] != "__" and not hasattr(type(v), "__get__")}
            found |= {name: value for name, value in kept.items() if name not in found}
    return found


def attribute(obj: Any, name: str) -> Any:
    """An attribute, or None: a class may have a `__getattr__` that raises errors of any kind."""
    try:
        return getattr(obj, name)
    except Exception:
        return None


def items_of(value: Any) -> dict[Any, Any]:
    """What is in a list, tuple, deque, dict or array of objects, by index or key."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | tuple | deque) or (
        isinstance(value, np.ndarray) and value.dtype == object and value.ndim
    ):
        return dict(enumerate(value))
    return {}


def parts_of(value: Any) -> dict[str, Any]:
    """What a value holds, by name: attributes of an object, items of a container."""
    found = {str(key): item for key, item in items_of(value).items()}
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


def held_by(root: Any) -> set[int]:
    """The identities of an object and all that it holds."""
    found: set[int] = set()

    def enter(_: str, value: Any) -> bool:
        found.add(id(value))
        return True

    walk(root, enter)
    return found


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
