"""The parts of the user's networks: objects with attributes, lists, tuples and dicts, to any depth."""

from __future__ import annotations

import sys
import sysconfig
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np

from minitorch_jax.state.walk import join

_LIBRARIES = {"numpy", "scipy", "jax", "jaxlib", "numba", "cupy", "torch", "tensorflow", "pandas", "sklearn"}
_LIBRARIES |= {"matplotlib", "mpl_toolkits", "PIL", "tqdm", "h5py", "gymnasium", "gym", "wandb"}
_HOLDERS = SimpleNamespace, UserDict, UserList  # Python's own classes with attributes


def is_users(module_name: Any) -> bool:
    """True if this module is the user's code: not of a library that we know. Our own NumPy layers count as the user's."""
    name = module_name if isinstance(module_name, str) else ""
    top = name.partition(".")[0]
    if top == "minitorch_jax":
        return name.startswith("minitorch_jax.adapters.numpy")
    return bool(top) and top not in _LIBRARIES and not (top in sys.stdlib_module_names and _is_pythons(top))


@cache
def _is_pythons(top: str) -> bool:
    """True if a module with the name of a standard module is that module: its file is in Python's folder, if it has one."""
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is None or Path(file).is_relative_to(sysconfig.get_path("stdlib"))


def is_users_class(cls: type) -> bool:
    """True if a class is the user's. One that is made by a call of `type`, or of a metaclass, may name another module."""
    if is_users(cls.__module__):
        return True
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
        return False
    functions = (value for value in vars(cls).values() if isinstance(value, FunctionType))
    return any(map(is_users_class, cls.__bases__)) or any(is_users(f.__globals__.get("__name__")) for f in functions)


def is_object(value: Any) -> bool:
    """True if a value is an object of a user's class, or a namespace, and not a class, function or module."""
    users = is_users_class(type(value)) or isinstance(value, _HOLDERS)
    return users and not isinstance(value, type) and not callable_alone(value)


def callable_alone(value: Any) -> bool:
    """True if a value is a function of any kind, without attributes to search."""
    return isinstance(value, np.ufunc) or type(value).__name__ in ("function", "builtin_function_or_method", "method")


def slots_of(cls: type) -> Iterator[str]:
    """The attribute names in `__slots__` of a class and its bases."""
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                yield f"_{base.__name__.lstrip('_')}{name}" if private else name


def attributes_of(obj: Any) -> dict[str, Any]:
    """An object's own attributes in order of creation, then those of its classes, without methods and descriptors."""
    found = {name: getattr(obj, name) for name in slots_of(type(obj)) if hasattr(obj, name)}
    found |= getattr(obj, "__dict__", {})
    for cls in type(obj).__mro__[:-1]:
        if is_users_class(cls):
            kept = {n: v for n, v in vars(cls).items() if n[:2] != "__" and not hasattr(type(v), "__get__")}
            found |= {name: value for name, value in kept.items() if name not in found}
    return found


def attribute(obj: Any, name: str, missing: Any = None) -> Any:
    """An attribute, or `missing` if reading it raises. A user's `__getattr__` may raise any error."""
    try:
        return getattr(obj, name)
    except Exception:
        return missing


def items_of(value: Any) -> dict[Any, Any]:
    """The items of a list, tuple, deque, dict or array of objects, by index or key."""
    if not is_container(value):
        return {}
    return dict(value) if isinstance(value, dict) else dict(enumerate(value))


def is_container(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(value.dtype == object and value.ndim)
    return isinstance(value, dict | list | tuple | deque)


def part(value: Any, key: Any, missing: Any = None) -> Any:
    """The item or the attribute `key` of a value; `missing` if there is none."""
    if isinstance(value, dict) and key in value:
        return value[key]
    if not isinstance(value, dict) and isinstance(key, int):
        return value[key] if key < len(items_of(value)) else missing
    return attribute(value, key, missing) if is_object(value) else missing


def parts_of(value: Any) -> dict[str, Any]:
    """The parts of a value, by name: the attributes of an object, and the items of a container."""
    found = {str(key): item for key, item in items_of(value).items()}
    return found | attributes_of(value) if is_object(value) else found


def walk(root: Any, enter: Callable[[str, Any], bool], parts_of: Callable[[Any], dict[str, Any]] = parts_of) -> None:
    """Call `enter(path, value)` for each object that `root` holds, once. The walk enters an object if it returns True."""
    seen: dict[int, Any] = {}
    waiting = [("", root)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept alive, so that no new object gets its id
        if enter(path, value):
            waiting += [(join(path, name), part) for name, part in reversed(parts_of(value).items())]


def all_in(root: Any) -> list[Any]:
    """A value, and everything that it holds."""
    found: list[Any] = []

    def enter(_: str, value: Any) -> bool:
        found.append(value)
        return True

    walk(root, enter)
    return found


def is_floating(value: Any) -> bool:
    """True if a value is a floating NumPy array, which can be trained."""
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def describe(value: Any) -> str:
    """`float32[3, 4]` for an array, otherwise the name of the type."""
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def listing(problems: list[str]) -> str:
    return "".join(f"\n  {problem}" for problem in problems)
