"""What a code object names: globals, attributes, constant keys, imports, and what it stores.

A compiled function follows the values that its code can name, and only those (`values.py`), so that a counter or a
history on the same object compiles nothing.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

_READS_WHOLE = frozenset({"items", "values", "keys", "copy"})  # methods by which all of a dict is read
_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD", "LOAD_CLASSDEREF"})
_GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD", "IMPORT_FROM"})
_STORES = frozenset({"STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_DEREF", "DELETE_ATTR", "DELETE_GLOBAL"})
_IGNORED = frozenset({"CACHE", "EXTENDED_ARG", "PRECALL", "NOP", "RESUME"})


class Names:
    """The names in some code, that of functions defined inside it included."""

    __slots__ = ("globals", "imports", "attributes", "keys", "whole", "stores")

    def __init__(self) -> None:
        self.globals: dict[str, None] = {}  # in the order of the code, which is the same in every process
        self.imports: dict[tuple[str, int], None] = {}  # (module, level) of imports in the body
        self.attributes: set[str] = set()
        self.keys: set[str] = set()  # string constants: keys of dicts, and names for `getattr`
        self.whole: set[str] = set()  # variables and attributes that are iterated, or indexed by a variable
        self.stores: set[str] = set()

    def add(self, other: Names) -> None:
        """Take in what other code names. Its globals are its own."""
        self.attributes |= other.attributes
        self.keys |= other.keys
        self.whole |= other.whole
        self.stores |= other.stores

    def size(self) -> int:
        """Grows whenever `add` finds something new."""
        return len(self.attributes) + len(self.keys) + len(self.whole) + len(self.stores)

    def may_be_attribute(self, name: str) -> bool:
        """True if the code reads an attribute of this name, or may do so by `getattr`."""
        return name in self.attributes or name in self.keys

    def selected(self, name: str, keys: Iterable[Any]) -> list[Any]:
        """Which keys of the dict `name` the code reads: those that it names, or all if it names none or reads it whole."""
        keys = list(keys)
        if name in self.whole or not _READS_WHOLE.isdisjoint(self.attributes):
            return keys
        named = [key for key in keys if type(key) is not str or key in self.keys]
        return named if any(type(key) is str for key in named) else keys


def names_in(code: types.CodeType) -> Names:
    """What `code` names; worked out once per code object."""
    known = _known.get(code)
    if known is None:
        known = _known[code] = Names()
        for inner in _nested(code):
            _collect(inner, known)
    return known


_known: WeakKeyDictionary[types.CodeType, Names] = WeakKeyDictionary()


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _collect(code: types.CodeType, found: Names) -> None:
    for constant in code.co_consts:
        found.keys.update(_strings(constant))
    steps = [step for step in dis.get_instructions(code) if step.opname not in _IGNORED]
    for step, after, next_but_one in zip(steps, [*steps[1:], None], [*steps[2:], None, None], strict=False):
        name: Any = step.argval
        if step.opname in _GLOBALS:
            found.globals[name] = None
        elif step.opname in _ATTRIBUTES:
            found.attributes.add(name)
        elif step.opname in _STORES:
            found.stores.add(name)
        elif step.opname == "IMPORT_NAME":
            found.imports[name, _level(steps, step)] = None
        if step.opname in _LOADS and after is not None and _reads_whole(after, next_but_one):
            found.whole.add(name)


def _reads_whole(after: dis.Instruction, next_but_one: dis.Instruction | None) -> bool:
    """True if what was just loaded is iterated, spread, or indexed by something that is no constant."""
    if after.opname in ("GET_ITER", "DICT_MERGE", "DICT_UPDATE"):
        return True
    indexed = next_but_one is not None and (
        next_but_one.opname == "BINARY_SUBSCR" or (next_but_one.opname == "BINARY_OP" and next_but_one.argrepr == "[]")
    )
    return indexed and after.opname != "LOAD_CONST"


def _level(steps: list[dis.Instruction], step: dis.Instruction) -> int:
    """How many packages up an import begins: the constant that was loaded two instructions before it."""
    level = steps[max(steps.index(step) - 2, 0)].argval
    return level if type(level) is int else 0


def _strings(constant: Any) -> Iterator[str]:
    if type(constant) is str:
        yield constant
    elif isinstance(constant, tuple | frozenset):
        for item in constant:
            yield from _strings(item)
