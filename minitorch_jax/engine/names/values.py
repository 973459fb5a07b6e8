"""The search for values that a compiled function reads by name.

It begins at a function and goes through what its code names (`bytecode.py`): globals, closure variables, attributes of
plain objects, items of containers, and the code of functions and methods found there. A plain value is part of what a
program is compiled for. A JAX array is an input of the program if its trace turns out to hold it as a constant.
`modules.py` looks for modules and optimizers from the same roots, but everywhere, not only where the code names them.
"""

from __future__ import annotations

import enum
import functools
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import jax
import numpy as np

from ...module.hooks import Hook
from ...state.static_values import holds_state
from .bytecode import Names, names_in
from .followed import Followed
from .libraries import is_installed, is_library, is_namespace, is_users_code, is_wrapper, top
from .roots import ARGUMENT, ATTRIBUTE, CLOSURE, DEFAULT, GLOBAL, IMPORT, KEYWORD, Root, roots_of
from .watch import (
    Place,
    Same,
    code_of,
    constant,
    content_of,
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
_PATHS = {CLOSURE: "{}", DEFAULT: "__defaults__[{}]", KEYWORD: "__kwdefaults__.{}", GLOBAL: "{}", IMPORT: "{}"}
_DEFAULTS = (DEFAULT, KEYWORD)


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
        self.home = next((package for package in map(_package, _roots(fn, objects)) if not is_library(package)), "")
        for i, obj in enumerate(objects):
            self.objects[id(obj)] = i
        self.callable(fn, "", 0, False, root=True)
        for i, value in enumerate(values):
            self.root_value(Root(ARGUMENT, i, value, None), f"argument {i}", 0, False)
        found = self.found
        found.num_by_name, by_name = len(found.places), set(found.arrays)
        self.pending[:0] = objects
        while self.pending:
            obj = self.pending.pop(0)
            self.object(obj, type(obj).__name__)
        found.paths_of_objects = found.arrays.keys() - by_name

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
                self.value(value, f"{path}.args[{i}]", item(fn.args, i), depth, rule)
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
            ours = top(fn.__module__) == top(__name__) and fn.__closure__ is None  # its defaults are ours, too
            if root and not ours:  # a library's wrappers of one code share programs: what they wrap tells them apart
                entries[path] = "opaque", Same(code)
                for found in roots_of(fn):
                    if found.kind < GLOBAL:
                        self.root_value(found, _PATHS[found.kind].format(found.key), depth, rule)
                return
            entries[path] = "opaque", Same(fn)  # it may wrap a user's, as `jax.vmap(f)` does
            for name, inner in _closed_over(fn):
                if callable(inner) and depth < MAX_DEPTH:
                    self.value(inner, f"{path}.{name}", None, depth + 1, rule)
            return
        # Whoever watches may not keep a function alive. The root's code is known by who asks: it is no part of a key.
        entries[path] = "function", Same(code) if root else code
        watched = weakref.proxy(fn)
        for look in (code_of, defaults_of, keyword_defaults_of):
            if look(fn) is not None:
                self.found.places.append(Place(look, watched, None, look(fn)))
        follow_root = self.root_value if root else self.value_of
        prefix = f"{path}." if path else ""
        self.names.add(names_in(code))
        for found in roots_of(fn):
            if not self.is_library_module(found.value) or found.kind < GLOBAL:
                follow_root(
                    found,
                    f"{prefix if found.kind in _DEFAULTS else ''}{_PATHS[found.kind].format(found.key)}",
                    depth,
                    rule,
                )
        for name in sorted(vars(fn)):
            if self.names.may_be_attribute(name) and name != "__wrapped__":
                place = Place(attrgetter(name), watched, None, vars(fn)[name])
                follow_root(Root(ATTRIBUTE, name, place.was, place), f"{path or fn.__name__}.{name}", depth, rule)

    def value_of(self, root: Root, path: str, depth: int, rule: bool) -> None:
        self.value(root.value, path, root.place, depth, rule)

    def root_value(self, root: Root, path: str, depth: int, rule: bool) -> None:
        """`value` of a root of the function at which the search began: notes what lies behind it."""
        found = self.found
        places, arrays = len(found.places), len(found.arrays)
        self.value(root.value, path, root.place, depth, rule)
        found.slices.add(root, found.places[places:], dict(list(found.arrays.items())[arrays:]))

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
        classes = obj._followed_classes()
        for cls in classes:
            self.of_class(cls, label, 0, False, constructs=False, always=cls._entry_points)
        users = all(map(self.is_users, classes))
        for name, value in obj._follows():
            if holds_state(value):
                self.object(value, f"{label}.{name}")
            elif type(value) is Hook:
                self.value(value.function, f"{label}.{value}", None, 1)
            elif not users or self.names.may_be_attribute(name.partition(".")[0]):
                self.value(value, f"{label}.{name}", None, 1)


def _roots(fn: Any, objects: Sequence[Any]) -> Iterator[Any]:
    """The code at which a search begins: a function of ours comes to the user's by way of its objects."""
    yield fn
    for obj in objects:
        yield from obj._followed_classes()
        yield from (value for _, value in obj._follows() if callable(value) and not holds_state(value))


def _package(value: Any) -> str:
    return top(value.__module__ if isinstance(value, _FUNCTIONS | type) else type(value).__module__)


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
