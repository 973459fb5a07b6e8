"""Which attributes a layer's `forward` and `backward` assign, read from their code."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from .objects import attribute

_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_ALSO = {"forward": {"__call__", "call", "fprop", "propagate", "predict", "run", "loss", "infer", "apply", "activate"}}
_ALSO["backward"] = {"backprop", "back_prop", "back_propagation", "back_propagate", "bprop", "gradient", "gradients"}
_COPIES = {"copy", "array", "asarray", "astype", "ascontiguousarray", "reshape", "ravel", "flatten", "T"}
_RATES = {"lr", "learning_rate", "learningrate", "eta", "alpha", "step_size", "rate", "l_rate"}


def made_by_forward(owner: Any, keys: tuple[Any, ...]) -> bool:
    """True if `forward` assigns the attribute, or an item of it, at each call: such an array is no parameter.

    An assignment under an `if` may be how the first call makes parameters. It counts only if it keeps the input.
    """
    return not {keys[:1], keys[:2]}.isdisjoint(_made(_original(owner))[0])


def replaced_by_forward(owner: Any, name: Any) -> bool:
    """True if `forward` assigns the attribute at each call, perhaps after reading it, such as a hidden state."""
    return (name,) in _made(_original(owner))[1]


def has_run(owner: Any) -> bool:
    """False if `forward` makes attributes at each call, and none of them exists."""
    made = {keys[0] for keys in _made(_original(owner))[0] if len(keys) == 1}
    return not made or any(attribute(owner, name) is not None for name in made)


def stores(owner: Any) -> bool:
    """True if `backward`, or what it calls, may store anything, such as gradients. True for an object without one."""
    methods = list(_functions(_original(owner), "backward"))
    codes = [method.__code__ for method in methods]
    seen: set[CodeType] = set()
    while codes:
        code = codes.pop()
        if code in seen:
            continue
        seen.add(code)
        if any(ins.opname in ("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE") for ins in dis.get_instructions(code)):
            return True
        if {"append", "extend", "update", "copyto", "setattr", "add", "at", "fill", "put"} & set(code.co_names):
            return True
        called = (getattr(_original(owner), name, None) for name in code.co_names)
        codes += [function.__code__ for function in called if isinstance(function, FunctionType)]
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return not methods


def _original(owner: Any) -> type:
    """The class of an object. That of a copy is the user's class, since each copy has a class of its own."""
    return vars(type(owner)).get("__copy_of__", type(owner))


def updated_by_backward(owner: Any, names: list[str]) -> tuple[str, list[str]] | None:
    """How a layer whose `backward` updates parameters calls it, and which of `names`; None if it updates none."""
    methods = list(_functions(_original(owner), "backward"))
    if not methods:
        return None
    required = [p.name for p in inspect.signature(methods[0]).parameters.values() if p.default is p.empty]
    read = {name for method in _functions(_original(owner), "forward") for name in method.__code__.co_names}
    updated = [name for name in names if name in read & assigned_by_backward(owner)]
    if not updated and not _RATES & set(map(str.lower, required)):
        return None
    return f"backward({', '.join(required[1:])})", updated or names


def assigned_by_backward(owner: Any) -> set[str]:
    """The attributes that `backward` may assign."""
    codes = [dis.get_instructions(method) for method in _functions(_original(owner), "backward")]
    return {ins.argval for code in codes for ins in code if ins.opname == "STORE_ATTR"}


def _functions(cls: type, kind: str) -> Iterator[FunctionType]:
    """The methods of a class and its bases whose names say that they are `forward`, or `backward`."""
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and (kind in name.lower() or name in _ALSO[kind]):
                yield function


@lru_cache(maxsize=512)
def _made(cls: type) -> tuple[frozenset[tuple[str, ...]], frozenset[tuple[str, ...]]]:
    """The attributes, and items of attributes, that `forward` assigns at each call: before it reads them, and all."""
    made: set[tuple[str, ...]] = set()
    replaced: set[tuple[str, ...]] = set()
    seen: set[CodeType] = set()
    waiting = [function.__code__ for function in _functions(cls, "forward")]
    while waiting:
        code = waiting.pop()
        if code in seen or not code.co_varnames:
            continue
        seen.add(code)
        read: set[tuple[str, ...]] = set()
        for keys, is_read, certain, given, is_argument in _of_self(code):
            if is_read:
                read.add(keys)
                method = getattr(cls, keys[0], None)
                if certain and isinstance(method, FunctionType) and "backward" not in keys[0]:
                    waiting.append(method.__code__)
            elif is_argument or (certain and keys not in read):
                made.add(keys)
            elif certain and given:
                replaced.add(keys)
    return frozenset(made), frozenset(made | replaced)


def _of_self(code: CodeType) -> Iterator[tuple[tuple[str, ...], bool, bool, bool, bool]]:
    """What code reads (True) and stores (False) of its first argument.

    Then False if a jump may skip it, True if the value comes from the other arguments, and True if it is the first of them,
    or a copy of it.
    """
    end = 0  # of what a jump may skip
    given = set(code.co_varnames[1 : code.co_argcount])  # the names of values that come from the arguments
    is_given = False  # of the value of the last statement
    statement: list[dis.Instruction] = []
    for ins in dis.get_instructions(code):
        if ins.opcode in _JUMPS and ins.opname not in ("FOR_ITER", "SEND") and ins.argval > ins.offset:
            end = max(end, ins.argval)
        certain = ins.offset >= end
        if statement:  # else it stores a further value of the last statement
            is_given = not given.isdisjoint(name for each in statement for name in _loaded(each))
        match ins.opname:
            case "LOAD_ATTR" | "LOAD_METHOD" if statement and _is_self(statement[-1], code):
                yield (ins.argval,), True, certain, False, False
            case "STORE_ATTR" if statement and _is_self(statement[-1], code):
                yield (ins.argval,), False, certain, is_given, _is_argument(statement, code)
            case "STORE_SUBSCR" if len(statement) > 2 and statement[-2].opname == "LOAD_ATTR":
                if _is_self(statement[-3], code) and statement[-1].opname == "LOAD_CONST":
                    yield (statement[-2].argval, statement[-1].argval), False, certain, is_given, False
        if ins.opname.startswith("STORE_FAST") and is_given:
            given |= {*_names(ins)} - {*_loaded(ins)}
        if ins.opname in ("CACHE", "EXTENDED_ARG", "NOP", "RESUME"):
            continue
        if ins.opcode in _JUMPS or ins.opname.startswith(("STORE", "POP")):
            statement = [ins] if _loaded(ins) else []
        else:
            statement.append(ins)


def _names(ins: dis.Instruction) -> tuple[str, ...]:
    return ins.argval if isinstance(ins.argval, tuple) else (ins.argval,)


def _loaded(ins: dis.Instruction) -> tuple[str, ...]:
    """The names of the local variables that an instruction loads."""
    if ins.opname.startswith("STORE_FAST_LOAD_FAST"):
        return _names(ins)[-1:]
    return _names(ins) if ins.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else ()


def _is_argument(statement: list[dis.Instruction], code: CodeType) -> bool:
    """True if a statement `self.name = ...` stores the first argument after self, which is the input, or a copy of it."""
    for ins in statement:
        if ins.opname in ("LOAD_ATTR", "LOAD_METHOD") and ins.argval not in _COPIES:
            return False
        if not ins.opname.startswith(("LOAD_", "PRECALL", "CALL", "PUSH_NULL", "STORE_FAST_LOAD_FAST")):
            return False
    loaded = [name for ins in statement for name in _loaded(ins)]
    return code.co_argcount > 1 and tuple(loaded) == (code.co_varnames[1], code.co_varnames[0])


def _is_self(ins: dis.Instruction, code: CodeType) -> bool:
    """True if an instruction loads the first argument of a function last."""
    return _loaded(ins)[-1:] == code.co_varnames[:1]
