"""The values that a compiled function reads by name: a key of what is static among them, and the places of JAX arrays.

The search begins at a function and goes through what its code names (`code_names.py`): globals, closure variables, attributes
of plain objects, items of containers, and the code of functions and methods found there. A plain value is part of what a
program is compiled for. A JAX array is an input of the program if its trace turns out to hold it as a constant.
`closures.py` looks for modules and optimizers in the same way, but everywhere, not only where the code names them.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import pickle
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..state.containers import holds_state
from .code_names import Names, names_in
from .libraries import is_installed, is_library, is_namespace, is_users_code, is_wrapper, top
from .watch import (
    Place,
    Same,
    code_of,
    constant,
    content_of,
    contents,
    defaults_of,
    getter,
    item,
    items,
    keyword_defaults_of,
    length,
)

MAX_ITEMS = 100  # of a container that are looked at one by one
MAX_DEPTH = 12  # of containers and objects in each other
MAX_VALUES = 5_000
MAX_BYTES = 4_096  # of a NumPy array whose content is part of the key

# Special methods that traced code does not call by an operator or a statement.
_NOT_CALLED = frozenset(
    {"__init__", "__new__", "__post_init__", "__repr__", "__str__", "__del__", "__reduce__", "__reduce_ex__", "__dir__"}
    | {"__getstate__", "__setstate__", "__init_subclass__", "__class_getitem__", "__sizeof__", "__subclasshook__"}
)
_OF_INSTANCES = (types.MemberDescriptorType, types.GetSetDescriptorType)  # slots, `__dict__`, `__weakref__`
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
_FUNCTIONS = types.FunctionType | types.MethodType
_CONTAINERS: Any = list | tuple | dict | set | frozenset | deque
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


class Followed:
    """What a search found."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}  # by path: what is static there
        self.places: list[Place] = []  # to be watched
        self.arrays: dict[str, Place] = {}  # where JAX arrays are
        self.fixed: set[int] = set()  # ids of arrays that a rule of the user's for a derivative reads
        self.long: dict[str, Any] = {}  # containers that are too long to look at each item
        self.large: dict[str, Any] = {}  # NumPy arrays of which only the identity counts
        self.generators: dict[str, Any] = {}  # of random numbers
        self.cut: list[str] = []  # where the search ended
        self.num_by_name = (
            0  # of the places and the arrays, the first ones: those not found by way of a module or optimizer
        )
        self.num_arrays_by_name = 0
        self.names = Names()

    @property
    def key(self) -> tuple[Any, ...]:
        """What a program is compiled for."""
        return tuple(self.entries.items())

    def changed_by(self, after: Followed) -> set[str]:
        """The paths at which the code itself has changed something, if `after` was found when it had run.

        What changed without a store in the code was changed by another thread.
        """
        differing = [path for path, entry in self.entries.items() if after.entries.get(path) != entry]
        differing += [path for path in after.entries if path not in self.entries]
        return {path for path in differing if self._stores_to(path, after)}

    def _stores_to(self, path: str, after: Followed) -> bool:
        name = path.rpartition(".")[2]
        plain = isinstance(self.entries.get(path), tuple) and self.entries[path][0] in (bool, int, float, str)
        stores = self.names.stores | after.names.stores
        return not plain or name.endswith("]") or name in stores or "setattr" in self.names.globals

    def named(self, constants: Iterable[Any], inner: set[int]) -> tuple[tuple[str, ...], ...]:
        """The paths of arrays among a trace's constants, those of one array together; not of `inner` ones.

        Also finds them in the long containers.
        """
        wanted = {id(array) for array in constants if isinstance(array, jax.Array)} - inner - self.fixed
        paths: dict[int, list[str]] = {}
        for path, place in self.arrays.items():
            if id(place.was) in wanted:
                paths.setdefault(id(place.was), []).append(path)
        left = wanted - paths.keys()
        for path, container in self.long.items() if left else ():
            for key, value in items(container):
                if id(value) in left:
                    found = f"{path}[{key!r}]"
                    self.arrays[found] = Place(getter(container), container, key, value)
                    paths.setdefault(id(value), []).append(found)
        return tuple(map(tuple, paths.values()))

    def others(self, named: Iterable[Sequence[str]]) -> dict[str, weakref.ref[Any]]:
        """The arrays that are no inputs, by path: whatever the code made of them is part of the program."""
        inputs = {path for group in named for path in group}
        return {path: weakref.ref(place.was) for path, place in self.arrays.items() if path not in inputs}

    def place_of(self, path: str) -> Place:
        """Where an array is; KeyError if there is none at this path."""
        if path not in self.arrays:
            for long, container in self.long.items():
                for key, value in items(container) if path.startswith(f"{long}[") else ():
                    if f"{long}[{key!r}]" == path and isinstance(value, jax.Array):
                        self.arrays[path] = Place(getter(container), container, key, value)
        return self.arrays[path]

    def fits(self, named: Iterable[Sequence[str]], others: dict[str, weakref.ref[Any]]) -> bool:
        """True if the arrays are those that a program takes: equal paths hold one array, no input another."""
        try:
            groups = [[self.place_of(path).was for path in group] for group in named]
        except KeyError:
            return False
        if any(array is not group[0] for group in groups for array in group):
            return False
        return all(path in self.arrays and self.arrays[path].was is ref() for path, ref in others.items())

    def is_value(self, path: str) -> bool:
        """True for a plain value or a NumPy array, which could be an argument instead."""
        entry = self.entries[path]
        return path in self.arrays or (
            isinstance(entry, tuple) and (isinstance(entry[0], type) or entry[0] == "ndarray")
        )

    def describe(self, path: str) -> str:
        """What is at a path, for a message."""
        entry = self.entries.get(path)
        if path in self.arrays:
            return f"another array, {_array(self.arrays[path].was)}"
        if not isinstance(entry, tuple):
            return str(entry)
        if entry[0] == "ndarray":
            return (
                f"a NumPy array, {_array(entry[1])}" if len(entry) == 2 else f"a NumPy array with {entry[3][:8].hex()}…"
            )
        if entry[0] == "container":
            return f"a {entry[1].__name__} of {entry[2] if isinstance(entry[2], int) else len(entry[2])}"
        if entry[0] in _LABELS:
            return _LABELS[entry[0]]
        return str(entry[-1]) if isinstance(entry[-1], str) else repr(entry[-1])


_LABELS = {"function": "other code", "instance": "another object", "opaque": "another object", "class": "another class"}


def _array(array: Any) -> str:
    array = array._get() if isinstance(array, Same) else array
    return "" if array is None else f"{array.dtype}[{','.join(map(str, array.shape))}]"


def follow(
    fn: Callable[..., Any], values: Sequence[Any] = (), objects: Sequence[Any] = (), without: Iterable[str] = ()
) -> Followed:
    """Find what `fn` reads by name, and what static arguments (`values`) and modules and optimizers (`objects`) lead to.

    `without`: paths that are left out.
    """
    names = Names()
    while True:  # again as long as more names turn up: they may be those of attributes seen before
        size = names.size()
        search = _Search(names, frozenset(without))
        search.root(fn, values, objects)
        if names.size() == size:
            return search.found


class _Search:
    def __init__(self, names: Names, without: frozenset[str]) -> None:
        self.found = Followed()
        self.found.names = self.names = names
        self.without = without
        self.seen: dict[int, str] = {}  # by id: the path at which it was found first
        self.alive: list[Any] = []  # so that no id is used twice
        self.objects: dict[int, int] = {}
        self.pending: list[Any] = []  # modules and optimizers to be looked into
        self.classes: set[tuple[type, bool]] = set()
        self.namespaces: dict[type, Any] = {}
        self.home = ""

    def root(self, fn: Any, values: Sequence[Any], objects: Sequence[Any]) -> None:
        self.home = top(getattr(fn, "__module__", None) if isinstance(fn, _FUNCTIONS) else type(fn).__module__)
        for i, obj in enumerate(objects):
            self.objects[id(obj)] = i
        self.callable(fn, "", 0, False, root=True)
        for i, value in enumerate(values):
            self.value(value, f"argument {i}", None, 0)
        found = self.found
        found.num_by_name, found.num_arrays_by_name = len(found.places), len(found.arrays)
        self.pending[:0] = objects
        while self.pending:
            obj = self.pending.pop(0)
            self.object(obj, type(obj).__name__)

    def is_library(self, module: Any, code: types.CodeType | None = None) -> bool:
        """True for a library's code: also an installed package's, unless the search began in that."""
        package = top(module)
        return is_library(module, code) or (package != self.home and is_installed(package))

    def is_users(self, cls: Any) -> bool:
        return is_users_code(cls) and not self.is_library(cls.__module__ if cls.__module__ != "builtins" else None)

    def is_library_module(self, value: Any) -> bool:
        return isinstance(value, types.ModuleType) and self.is_library(value.__name__)

    # -- one value ----------------------------------------------------------------------------------------------------

    def value(self, value: Any, path: str, place: Place | None, depth: int, rule: bool = False) -> None:
        """Note a value, and look into it. `rule`: it was reached from a user's rule for a derivative."""
        while path in self.found.entries:  # two variables of one name, in different functions
            path += "'"
        if path in self.without:
            return
        entries = self.found.entries
        if isinstance(value, jax.core.Tracer):
            entries[path] = "tracer"
            return
        if isinstance(value, jax.Array):
            entries[path] = "array"
            if place is not None:
                self.found.arrays[path] = place
            if rule:
                self.found.fixed.add(id(value))
            return
        if place is not None:
            self.found.places.append(place)
        if holds_state(value):
            entries[path] = "object", self.objects.setdefault(id(value), len(self.objects))
            self.pending.append(value)
            return
        known = constant(value)
        if known is not None:
            entries[path] = known
            if type(value) is str:
                self.names.keys.add(value)  # it may be the key of a dict, or a name for `getattr`
            return
        if isinstance(value, np.ndarray):
            self.ndarray(value, path)
            return
        if id(value) in self.seen:
            entries[path] = "again", self.seen[id(value)]
            return
        if depth > MAX_DEPTH or len(self.seen) >= MAX_VALUES:
            entries[path] = "cut", type(value)
            self.found.cut.append(path)
            return
        self.seen[id(value)] = path
        self.alive.append(value)
        self.inside(value, path, depth, rule)

    def inside(self, value: Any, path: str, depth: int, rule: bool) -> None:
        entries = self.found.entries
        if isinstance(value, types.ModuleType):
            entries[path] = "module", value.__name__
            if not self.is_library(value.__name__):
                for name in sorted(vars(value).keys() & {n for n in vars(value) if self.names.may_be_attribute(n)}):
                    self.value(vars(value)[name], f"{path}.{name}", item(vars(value), name), depth, rule)
        elif isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            self.callable(value, path, depth, rule)
        elif isinstance(value, type):
            entries[path] = "class", Same(value)
            self.of_class(value, path, depth, rule, constructs=True)
        elif isinstance(value, _CONTAINERS) and type(value).__module__.partition(".")[0] not in ("jax", "jaxlib"):
            self.container(value, path, depth, rule)
            if self.is_users(type(value)):
                self.instance(value, path, depth, rule)
        elif isinstance(value, _GENERATORS):
            entries[path] = "opaque", Same(value)
            self.found.generators[path] = value
        elif isinstance(value, enum.Enum):
            entries[path] = "opaque", Same(value)
        elif self.is_users(type(value)) or is_namespace(type(value)):
            self.instance(value, path, depth, rule)
        elif is_wrapper(value):
            entries[path] = "wrapped", type(value)
            self.value(value.__wrapped__, f"{path}.__wrapped__", None, depth, rule)
            for name in ("jvp", "fwd", "bwd"):
                derivative = vars(value).get(name) if hasattr(value, "__dict__") else None
                if derivative is not None:
                    self.value(derivative, f"{path}.{name}", item(vars(value), name), depth, True)
        else:
            entries[path] = "opaque", _opaque(value)

    def ndarray(self, array: np.ndarray[Any, Any], path: str) -> None:
        if array.dtype == object or array.nbytes > MAX_BYTES:
            self.found.entries[path] = "ndarray", Same(array)
            self.found.large[path] = array
        else:
            content = array.tobytes()
            self.found.entries[path] = "ndarray", array.dtype, array.shape, content
            self.found.places.append(Place(content_of, array, None, content))

    def container(self, value: Any, path: str, depth: int, rule: bool) -> None:
        kind, mutable = type(value), not isinstance(value, tuple | frozenset)
        size = length(value)
        if mutable:
            self.found.places.append(size)
        if isinstance(value, set | frozenset):
            base: Any = set if mutable else frozenset
            held = frozenset(base.__iter__(value))
            self.found.entries[path] = "container", kind, frozenset([constant(each) or Same(each) for each in held])
            if mutable and kind is set:
                self.found.places.append(Place(frozenset, value, None, held))
            return
        inside = list(items(value))
        if isinstance(value, dict):
            name = path.rpartition(".")[2]
            chosen = set(map(id, self.names.selected(name, [key for key, _ in inside])))
            inside = [(key, inner) for key, inner in inside if id(key) in chosen]
            self.found.entries[path] = (
                "container",
                kind,
                tuple([constant(key) or Same(key) for key, _ in inside[:MAX_ITEMS]]),
            )
        else:
            self.found.entries[path] = "container", kind, size.was
        if len(inside) > MAX_ITEMS:
            self.found.long[path] = value
            if any(not isinstance(inner, jax.Array) for _, inner in inside):
                self.found.cut.append(path)
            inside = [(key, inner) for key, inner in inside[:MAX_ITEMS] if not isinstance(inner, jax.Array)]
        for key, inner in inside:
            self.value(inner, f"{path}[{key!r}]", Place(getter(value), value, key, inner), depth + 1, rule)

    # -- code ---------------------------------------------------------------------------------------------------------

    def callable(self, fn: Any, path: str, depth: int, rule: bool, root: bool = False) -> None:
        """A function and what its code names. Functions in functions do not count as depth: code is finite."""
        entries = self.found.entries
        if isinstance(fn, functools.partial):
            entries[path] = "partial"
            self.value(fn.func, f"{path}.func", None, depth, rule)
            for i, value in enumerate(fn.args):
                self.value(value, f"{path}.args[{i}]", None, depth, rule)
            for name, value in fn.keywords.items():
                self.value(value, f"{path}.keywords.{name}", item(fn.keywords, name), depth, rule)
            return
        if isinstance(fn, types.MethodType):
            entries[path] = "method"
            self.value(fn.__self__, f"{path}.self" if path else "self", None, depth, rule)
            self.value(fn.__func__, f"{path}.func" if path else fn.__name__, None, depth, rule)
            return
        if not isinstance(fn, types.FunctionType):
            self.value(fn, path or type(fn).__name__, None, depth, rule)
            return
        self.seen.setdefault(id(fn), path)
        code = fn.__code__
        if self.is_library(fn.__module__, code) or self.is_library(fn.__globals__.get("__name__"), code):
            entries[path] = "opaque", Same(fn)  # it may wrap a user's, as `jax.vmap(f)` does
            for name, inner in _closed_over(fn):
                if callable(inner) and depth < MAX_DEPTH:
                    self.value(inner, f"{path}.{name}", None, depth + 1, rule)
            return
        entries[path] = "function", code
        watched = weakref.proxy(fn) if root else fn  # whoever watches may not keep the function alive
        for look in (code_of, defaults_of, keyword_defaults_of):
            if look(fn) is not None:
                self.found.places.append(Place(look, watched, None, look(fn)))
        prefix = f"{path}." if path else ""
        variables = dict(zip(code.co_freevars, fn.__closure__ or (), strict=True))
        for name, value in _closed_over(fn):
            self.value(value, name, Place(contents, variables[name], None, value), depth, rule)
        for i, value in enumerate(fn.__defaults__ or ()):
            self.value(value, f"{prefix}__defaults__[{i}]", None, depth, rule)
        for name, value in (fn.__kwdefaults__ or {}).items():
            self.value(value, f"{prefix}__kwdefaults__.{name}", item(fn.__kwdefaults__, name), depth, rule)
        named = names_in(code)
        self.names.add(named)
        for name in named.globals:
            if name in fn.__globals__ and not self.is_library_module(fn.__globals__[name]):
                self.value(fn.__globals__[name], name, item(fn.__globals__, name), depth, rule)
        for module, level in named.imports:
            found = _imported(module, level, fn.__globals__.get("__package__"))
            if found is not None and not self.is_library_module(found):
                self.value(found, found.__name__, None, depth, rule)
        for name in sorted(vars(fn)):
            if self.names.may_be_attribute(name) and name != "__wrapped__":
                self.value(vars(fn)[name], f"{path or fn.__name__}.{name}", item(vars(fn), name), depth, rule)

    def of_class(
        self, cls: type, path: str, depth: int, rule: bool, constructs: bool, always: Sequence[str] = ()
    ) -> None:
        """The methods and attributes of a class that are named, or called by operators and statements."""
        if (cls, constructs) in self.classes:
            return
        self.classes.add((cls, constructs))
        for base in cls.__mro__:
            if not self.is_users(base):
                continue
            namespace = self.namespaces.setdefault(base, vars(base))
            self.found.places.append(Place(len, namespace, None, len(namespace)))
            for name, value in list(namespace.items()):
                special = name.startswith("__") and name.endswith("__") and callable(value) and name not in _NOT_CALLED
                counts = special or self.names.may_be_attribute(name) or (constructs and name in _CONSTRUCTORS)
                if (counts or name in always) and not isinstance(value, _OF_INSTANCES) and name != "__class__":
                    self.method(value, f"{base.__name__}.{name}", item(namespace, name), depth, rule)
        for name in always:  # a library's method may be replaced, too
            owner = next((base for base in cls.__mro__ if name in vars(base)), None)
            if owner is not None and not self.is_users(owner):
                namespace = self.namespaces.setdefault(owner, vars(owner))
                self.value(namespace[name], f"{owner.__name__}.{name}", item(namespace, name), depth, rule)

    def method(self, value: Any, path: str, place: Place, depth: int, rule: bool) -> None:
        """What a class has under a name: the function in a method, a property or the like; or a plain value."""
        inner = value
        if isinstance(value, staticmethod | classmethod):
            inner = value.__func__
        elif isinstance(value, property):
            inner = value.fget
        elif isinstance(value, functools.cached_property):
            inner = value.func
        if inner is value:
            self.value(value, path, place, depth, rule)
        else:
            self.found.places.append(place)
            self.value(inner, path, None, depth, rule)

    # -- objects ------------------------------------------------------------------------------------------------------

    def instance(self, value: Any, path: str, depth: int, rule: bool) -> None:
        """An object of a user's class: the attributes that the code names, and the class's methods."""
        cls = type(value)
        self.found.entries.setdefault(path, ("instance", Same(cls)))
        self.found.places.append(Place(type, value, None, cls))
        attributes = _dict_of(value)
        if attributes is not None:
            self.found.places.append(Place(len, attributes, None, len(attributes)))
            for name in sorted([name for name in attributes if type(name) is str]):
                if self.names.may_be_attribute(name):
                    self.value(attributes[name], f"{path}.{name}", item(attributes, name), depth + 1, rule)
        for base in cls.__mro__:
            for name, member in list(vars(base).items()):
                if isinstance(member, types.MemberDescriptorType) and self.names.may_be_attribute(name):
                    look = member.__get__
                    try:
                        inner = look(value)
                    except AttributeError:
                        continue
                    self.value(inner, f"{path}.{name}", Place(look, value, None, inner), depth + 1, rule)
        self.of_class(cls, path, depth, rule, constructs=False)

    def object(self, obj: Any, label: str) -> None:
        """The user's code and plain objects that a module or an optimizer leads to. Its own values are no part of this."""
        if id(obj) in self.seen:
            return
        self.seen[id(obj)] = label
        self.alive.append(obj)
        cls = type(obj)
        self.of_class(cls, label, 0, False, constructs=False, always=cls._entry_points)
        users = self.is_users(cls)
        for name, value in obj._follows():
            if holds_state(value):
                self.object(value, f"{label}.{name}")
            elif not users or self.names.may_be_attribute(name.partition(".")[0]):
                self.value(value, f"{label}.{name}", None, 1)


def _closed_over(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The closure variables that are bound by now."""
    for name, variable in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield name, variable.cell_contents
        except ValueError:
            continue


def _dict_of(value: Any) -> dict[str, Any] | None:
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if type(attributes) is dict else None


def _imported(name: str, level: int, package: Any) -> Any:
    """The module that an import in a function's body finds, if it has been imported already."""
    if level:
        try:
            name = importlib.util.resolve_name("." * level + name, package)
        except (ImportError, TypeError, ValueError):
            return None
    return sys.modules.get(name)


def _opaque(value: Any) -> Any:
    """A library's object as a key: by value where the library compares by value, else by identity."""
    by_value: Any = type(value).__hash__
    if is_library(type(value).__module__) and by_value is not object.__hash__:
        try:
            hash(value)
        except TypeError:
            return Same(value)
        return type(value), value
    return Same(value)


def random_state(generators: dict[str, Any]) -> dict[str, Any]:
    """The states of generators of random numbers, and of the two global ones, to be compared."""
    states: dict[str, Any] = {"np.random": np.random.get_state(), "random": random.getstate()}  # noqa: NPY002
    for path, generator in generators.items():
        if isinstance(generator, np.random.Generator):
            states[path] = generator.bit_generator.state
        else:
            states[path] = (
                generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()
            )
    return {name: pickle.dumps(state) for name, state in states.items()}
