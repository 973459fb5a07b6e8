"""Attributes of a module's class that have the name of an attribute of its objects: defaults, methods, properties, slots.

Python looks for data descriptors on the class, then in the object, then for anything else on the class, and calls
`__getattr__` last. `__getattr__` finds parameters and buffers, so a class attribute of the same name would hide them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any

from ..state import cell as cells
from ..state import frame as frames
from ..state.static_values import find_hidden, holds_state, is_array, is_declaration
from ..state.structure import changed
from ..state.tracked_containers import convert, stateful_in
from ..state.walk import walk_of
from . import parametrized

_MISSING = object()
_SLOTS = ("_cells", "_walk", "_birth", "_structure")


class Declared:
    """Replaces a class attribute whose name is also a parameter or buffer. It returns the object's array, or the default."""

    __slots__ = ("name", "default")

    def __init__(self, name: str, default: Any) -> None:
        self.name, self.default = name, default

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None or not _is_array_of(instance, self.name):
            return self.default
        return instance.__getattr__(self.name)


class Derived(functools.cached_property):  # type: ignore[type-arg]
    """A cached_property of a module. It caches no arrays, and nothing while code is traced: such values would go stale."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value, name = self.func(instance), str(self.attrname)
        label = f"{type(instance).__name__}.{name}"
        if _leads_to_arrays(value):
            return value
        try:
            kept = convert(value, label)
        except TypeError:  # a module cannot store this value
            return value
        parts = list(stateful_in(kept))
        made = [part for part in parts if id(part) not in walk_of(instance).objects] if parts else []
        if made and not frames.is_eager():
            raise TypeError(
                f"{label} is a cached_property that made a {type(made[0]).__name__} while code was traced. The module would"
                " not keep it, and nothing would train it. Make it in `__init__`"
            )
        if frames.is_eager() and (made or not parts):  # a part that the module has already would get a second name
            value = vars(instance)[name] = kept
            changed(instance)
        return value


def _is_array_of(module: Any, name: str) -> bool:
    """True if the attribute of a module is a parameter, a buffer, or computed by a parametrization."""
    return name in module._cells or parametrized.list_of(module, name) is not None


def _leads_to_arrays(value: Any) -> bool:
    found = None if is_array(value) or holds_state(value) else find_hidden(value)
    return is_array(value) or (found is not None and is_array(found.value))


def class_attribute(cls: type, name: str) -> Any:
    """Return a class attribute without calling descriptors, or `_MISSING`."""
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return _MISSING


def declare(cls: type, name: str) -> None:
    """Make objects find a parameter or buffer of this name, even if the class has a plain value of that name."""
    existing = class_attribute(cls, name)
    if existing is not _MISSING and type(existing) not in (Declared, types.MemberDescriptorType):
        setattr(cls, name, Declared(name, existing))


def settle(cls: type, name: str, value: Any, label: str, reserved: Collection[str]) -> bool:
    """Check an assignment against the class attribute of that name. True if a property or the like takes the value.

    Args:
        cls: the module's class.
        name: of the attribute.
        value: the value that is assigned.
        label: the attribute's name in messages.
        reserved: the names that every module has.

    Raises:
        TypeError: if a method would hide the value, or if the value would hide a method that modules need.
    """
    tracked = is_declaration(value) or holds_state(value) or isinstance(value, list | tuple | dict)
    special = name.startswith("__") and name.endswith("__")
    if (name in reserved and name.startswith("_") and not special) or (tracked and name == "training"):
        raise TypeError(f"{label}: every module has an attribute of its own by that name; choose another one")
    existing = class_attribute(cls, name)
    if existing is _MISSING or type(existing) in (Declared, types.MemberDescriptorType):
        return False
    if hasattr(type(existing), "__set__"):
        return True
    if hasattr(type(existing), "__get__"):
        kind = "cached_property" if isinstance(existing, functools.cached_property) else "method"
        if tracked or special or (name in reserved and not callable(value)):
            raise TypeError(
                f"{label}: {cls.__name__} has a {kind} `{name}`. It and the {type(value).__name__} assigned by that name"
                " would hide each other. Choose another name."
            )
    elif is_declaration(value):
        declare(cls, name)
    return False


def prepare(cls: type, module: type) -> None:
    """Check the attributes of a subclass of Module when its first object is made: decorators have run by then.

    Raises:
        TypeError: if the class itself holds a module, a Parameter or a Buffer, or is a frozen dataclass.
    """
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is not None and parameters.frozen:
        raise TypeError(
            f"{cls.__name__} is a frozen dataclass, but modules change (in training steps, train(), load_state_dict())."
            " Remove `frozen=True`."
        )
    seen: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(module)]:
        for name, value in list(vars(base).items()):
            if name not in seen and not name.startswith("__"):
                _check_class_attribute(value, f"{base.__name__}.{name}")
                if isinstance(value, functools.cached_property) and type(value) is not Derived:
                    derived = Derived(value.func)
                    derived.__set_name__(cls, name)
                    setattr(cls, name, derived)
            seen.add(name)
    users = class_attribute(cls, "__getattr__")
    if isinstance(users, types.FunctionType) and users.__code__ not in (_code_of(module), _CELLS_FIRST):
        cls.__getattr__ = _cells_first(users, module.__getattr__)  # type: ignore[attr-defined]
    cls._is_prepared = True  # type: ignore[attr-defined]


def _check_class_attribute(value: Any, label: str) -> None:
    found = find_hidden(value) if isinstance(value, list | tuple | set | dict) else None
    inner = value if found is None else found.value
    if holds_state(inner) or is_declaration(inner) or isinstance(inner, cells.Cell):
        kind = "Parameter" if isinstance(inner, cells.Cell) else type(inner).__name__
        raise TypeError(
            f"{label} is or holds a {kind}, which belongs to the class: no optimizer would train it, train(), eval() and"
            " state_dict() would not reach it, and all objects would share it. Assign it in `__init__`"
            " (`self.name = ...`), and call `freeze()` if it is not trained. In a dataclass use"
            " `field(default_factory=...)`."
        )


def _cells_first(users: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a user's `__getattr__` so that it is not called for declared attributes."""

    @functools.wraps(users)
    def __getattr__(self: Any, name: str) -> Any:
        if not name.startswith("__") and name not in _SLOTS and (name in vars(self) or _is_array_of(self, name)):
            return ours(self, name)
        return users(self, name)

    return __getattr__


def _code_of(module: Any) -> types.CodeType:
    code: types.CodeType = module.__getattr__.__code__
    return code


_CELLS_FIRST = _cells_first(lambda self, name: None, lambda self, name: None).__code__
