"""A world of copies: the user's objects, functions and classes, copied so that runs change none of the originals.

Everything that the user's function reads (globals, closures, classes) comes from the same world. So a cache in a module's
dict, or a generator that several layers share, is copied too. A world decides what arrays and numbers become. That is how
`forward` runs in float64. The code of libraries is not copied.
"""

from __future__ import annotations

import builtins
import copy
import functools
import random
from abc import ABCMeta
from array import array as array_type
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .objects import attribute, is_users, is_users_class, slots_of

_BASES = (list, deque, OrderedDict, defaultdict, dict, set, SimpleNamespace)
_MODULES = (
    "abc",
    "collections",
    "contextlib",
    "types",
    "typing",
)  # modules of Python's base classes
_NOT_COPIED = {"__dict__", "__weakref__", "__module__", "__qualname__", "__slots__", "__orig_bases__"}
_NOT_COPIED |= {"__init_subclass__", "_abc_impl"}
_GENERATORS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_WHOLE = (*_GENERATORS, bytearray, array_type)


class World:
    """Copies of values. Each is made once, when it is first needed.

    Args:
        array: copies an array.
        replaced: returns the replacement of a value, or the value itself. It also gets the numbers in functions' code.
        built_in: replacements of builtin functions, by name.
    """

    def __init__(
        self,
        array: Callable[[Any], Any],
        replaced: Callable[[Any], Any] = lambda value: value,
        built_in: Mapping[str, Any] | None = None,
    ) -> None:
        self._array, self._replaced = array, replaced
        self._builtins = {**vars(builtins), **(built_in or {})}
        self._known: dict[int, tuple[Any, Any]] = {}  # by id: the original, which stays alive, and its copy

    def of(self, value: Any) -> Any:
        """The copy of a value."""
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        new = self._replaced(value)
        return new if new is not value else self._copied(value)

    def remember(self, value: Any, new: Any) -> Any:
        """Make `new` the copy of `value`, and return it."""
        self._known[id(value)] = value, new
        return new

    def originals(self) -> dict[int, Any]:
        """The original of each copied array, by the id of the copy."""
        return {id(new): old for old, new in self._known.values() if isinstance(old, np.ndarray)}

    def _copied(self, value: Any) -> Any:
        match value:
            case np.ndarray():
                return self.remember(value, self._object_array(value) if value.dtype.hasobject else self._array(value))
            case FunctionType() if is_users(value.__globals__.get("__name__")):
                return self._function(value)
            case MethodType():
                return MethodType(self.of(value.__func__), self.of(value.__self__))
            case functools.partial():
                return functools.partial(
                    self.of(value.func), *map(self.of, value.args), **{k: self.of(v) for k, v in value.keywords.items()}
                )
            case functools._lru_cache_wrapper():
                cached = functools.lru_cache(**value.cache_parameters())(self.of(value.__wrapped__))
                return self.remember(value, cached)
            case type():
                return self._class(value) if _is_plain(value) else value
            case ModuleType() if is_users(value.__name__):
                return self.remember(value, _Module(value.__name__, self._globals(vars(value))))
        kind = type(value)
        if isinstance(value, _WHOLE):
            return self.remember(value, copy.deepcopy(value))
        if isinstance(attribute(value, "__self__"), _GENERATORS):  # `rng.normal`
            return getattr(self.of(value.__self__), value.__name__)
        if kind in (tuple, frozenset):
            return self.remember(value, kind(map(self.of, value)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
            return self.remember(value, tuple.__new__(kind, map(self.of, value)))
        if kind in _BASES or kind.__module__ == "collections" or _is_plain(kind):
            return self._instance(value)
        if callable(attribute(value, "backward")):  # a layer of a class that cannot be copied
            return self.remember(value, copy.deepcopy(value))
        return value  # a number, a string, or a library's object

    def _object_array(self, value: Any) -> Any:
        new = np.empty_like(value)
        for index in np.ndindex(value.shape):
            new[index] = self.of(value[index])
        return new

    def _instance(self, value: Any) -> Any:
        cls = self.of(type(value))
        base: Any = next((base for base in _BASES if issubclass(cls, base)), object)
        new = self.remember(value, base.__new__(cls))
        if base is deque:
            deque.__init__(new, (), value.maxlen)
        if base is defaultdict:
            new.default_factory = self.of(value.default_factory)
        if base in (list, deque):
            base.extend(new, map(self.of, base.__iter__(value)))
        elif base is set:
            set.update(new, map(self.of, set.__iter__(value)))
        elif issubclass(base, dict):
            for key, item in base.items(value):
                base.__setitem__(new, self.of(key), self.of(item))
        for name in slots_of(type(value)):
            if hasattr(value, name):
                object.__setattr__(new, name, self.of(getattr(value, name)))
        if hasattr(value, "__dict__"):
            vars(new).update({name: self.of(item) for name, item in vars(value).items()})
        return new

    # -- code ---------------------------------------------------------------------------------------------------------

    def _function(self, function: FunctionType) -> Any:
        """A function of the same code, whose names refer to this world's copies."""
        closure = function.__closure__ or ()
        fresh = [(self.remember(cell, CellType()), cell) for cell in closure if id(cell) not in self._known]
        cells = tuple([self._known[id(cell)][1] for cell in closure])
        scope = self._globals(function.__globals__)
        new = FunctionType(self._code(function.__code__), scope, function.__name__, None, cells)
        self.remember(function, new)
        new.__defaults__ = self.of(function.__defaults__)
        new.__kwdefaults__ = self.of(function.__kwdefaults__)
        new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
        new.__module__ = function.__module__
        vars(new).update({name: self.of(value) for name, value in vars(function).items()})
        for mine, theirs in fresh:
            try:
                mine.cell_contents = self.of(theirs.cell_contents)
            except ValueError:  # the variable has no value yet
                pass
        return new

    def _code(self, code: CodeType) -> CodeType:
        """Code with other numbers, if they are replaced."""
        new = tuple([self._code(c) if isinstance(c, CodeType) else self._replaced(c) for c in code.co_consts])
        same = all(a is b for a, b in zip(new, code.co_consts, strict=True))
        return code if same else code.replace(co_consts=new)

    def _globals(self, scope: dict[str, Any]) -> dict[str, Any]:
        known = self._known.get(id(scope))
        return self.remember(scope, _Globals(self, scope)) if known is None else known[1]

    def _class(self, cls: type) -> type:
        """A class with copies of the methods, and copies of the bases."""
        early = ("__module__", "__qualname__", "__slots__", "__orig_bases__")
        names = {name: vars(cls)[name] for name in early if name in vars(cls)}
        new = self.remember(cls, type(cls)(cls.__name__, tuple(map(self.of, cls.__bases__)), names))
        type.__setattr__(new, "__copy_of__", cls)
        slots_here = set(slots_of(cls)) & vars(cls).keys()
        for name, value in list(vars(cls).items()):
            if name not in _NOT_COPIED and name not in slots_here:
                type.__setattr__(new, name, self._member(value))
        return new

    def _member(self, value: Any) -> Any:
        match value:
            case staticmethod() | classmethod():
                return type(value)(self.of(value.__func__))
            case property():
                return property(self.of(value.fget), self.of(value.fset), self.of(value.fdel), value.__doc__)
            case functools.cached_property():
                new = functools.cached_property(self.of(value.func))
                new.attrname = value.attrname
                return new
        return self.of(value)


class _Globals(dict[str, Any]):
    """A module's names. Each value is copied when it is first looked up."""

    def __init__(self, world: World, original: dict[str, Any]) -> None:
        super().__init__(__builtins__=world._builtins, __name__=original["__name__"])
        self._world, self._original = world, original

    def __missing__(self, name: str) -> Any:
        value = self[name] = self._world.of(self._original[name])
        return value


class _Module(ModuleType):
    """A module whose names refer to a world's copies."""

    def __init__(self, name: str, scope: dict[str, Any]) -> None:
        super().__init__(name)
        self._scope = scope

    def __getattr__(self, name: str) -> Any:
        try:
            return self._scope[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


def _is_plain(cls: type) -> bool:
    """True if a class consists of the user's code only, or derives from Python's containers."""
    users = [base for base in cls.__mro__ if is_users_class(base)]
    return (
        type(cls) in (type, ABCMeta, type(Protocol))
        and cls in users
        and all(b in (*users, *_BASES, object) or b.__module__.partition(".")[0] in _MODULES for b in cls.__mro__)
    )


class Copies:
    """Copies of arrays. Copies share memory where the arrays do. Floating arrays get the dtype `dtype`, if it is not None."""

    def __init__(self, dtype: Any = None) -> None:
        self._dtype = dtype
        self._roots: dict[int, tuple[Any, Any]] = {}

    def __call__(self, array: Any) -> Any:
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        dtype = self._dtype if self._dtype is not None and np.issubdtype(array.dtype, np.floating) else array.dtype
        size = array.dtype.itemsize
        offset = _address(array) - _address(root)
        whole = root.dtype == array.dtype and not offset % size and all(stride % size == 0 for stride in array.strides)
        if root is array or not whole or not root.flags.forc:
            return self._root(array, dtype) if root is array else array.astype(dtype)
        memory = self._root(root, dtype, array is root).reshape(-1, order="A")
        strides = [stride // size * memory.itemsize for stride in array.strides]
        new = as_strided(memory[offset // size :], array.shape, strides)
        new[...] = array
        return new

    def _root(self, root: Any, dtype: Any, filled: bool = True) -> Any:
        """The copy of an array that views may refer to. Without `filled`, the views fill it with their values."""
        known = self._roots.get(id(root))
        if known is None:
            known = self._roots[id(root)] = root, np.empty_like(root, dtype, subok=False)
        if filled:
            known[1][...] = root
        return known[1]


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


# -- float64 -------------------------------------------------------------------------------------------------------------

SMALL = 1e-4  # the largest number in code that counts as an epsilon
_NARROW = (np.float16, np.float32, np.longdouble)


class _WideNumpy(ModuleType):
    """`numpy`, with float64 for every floating type."""

    def __getattr__(self, name: str) -> Any:
        return _wide(getattr(np, name))


_WIDE_NUMPY = _WideNumpy("numpy")


def _wide(value: Any) -> Any:
    """`value`, with float64 in place of a narrower type."""
    if value is np:
        return _WIDE_NUMPY
    if isinstance(value, type) and value in _NARROW:
        return np.float64
    return np.dtype(np.float64) if isinstance(value, np.dtype) and value.type in _NARROW else value


def wide_world(tiny: float = 1.0) -> World:
    """A world in float64: its arrays, and `np.float32` in its code, are float64. Small numbers are multiplied by `tiny`."""

    def replaced(value: Any) -> Any:
        small = tiny != 1.0 and isinstance(value, float) and 0 < abs(value) <= SMALL
        return value * tiny if small else _wide(value)

    built_in = {"__import__": lambda *args, **kw: _wide(builtins.__import__(*args, **kw))}
    return World(Copies(np.float64), replaced, built_in)
