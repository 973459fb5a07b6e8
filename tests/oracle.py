"""torch as an oracle, there or not: `from oracle import torch` in a test file.

Where torch is installed this is torch, watched: what a test gets from it in plain Python (arrays, numbers, text) is
compared with the record in `tests/torch_record/`, so that this stays what torch computes. Where torch is not installed, the
same calls give what is recorded. `pytest --record-torch` writes the record.

A tensor or module of torch's is a `Stand` here, and whatever is done with it gives another one, or a plain value. What a
test does with torch is thus a list of operations, in order, and the record of a test holds what each gave. A test cannot be
recorded if torch calls its code (a closure, a subclass of `torch.nn.Module`), or if it needs the very objects (`real`):
such tests, those marked slow, and those not recorded yet are skipped where there is no torch, and counted.
"""

from __future__ import annotations

import builtins
import importlib.util
import inspect
import operator
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from lazily import Lazily
from oracle_record import ABSENT, STAND, Record, State, recorded_name

HAS_TORCH = importlib.util.find_spec("torch") is not None
NEEDS_TORCH = "needs torch"


def needs_torch() -> None:
    pytest.skip(NEEDS_TORCH)


def unrecordable() -> None:
    """Note that the test cannot be recorded; where there is no torch it ends here."""
    if State.session is not None:
        State.session.recordable = False
        if not HAS_TORCH:
            needs_torch()


# -- operations -------------------------------------------------------------------------------------------------------


def describe(value: Any, depth: int = 0) -> tuple[Any, Any]:
    """A value of torch's as the record has it, and as the test gets it."""
    if value is None or value is NotImplemented or isinstance(value, bool | str) or type(value) in (int, float):
        return (None if value is NotImplemented else value), value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        array = np.array(value)
        return array, array.copy()
    if isinstance(value, real_torch().Size):
        value = tuple(value)
    if isinstance(value, tuple | list) and type(value).__name__ != "PackedSequence":
        both = [describe(item, depth + 1) for item in value]
        kind = tuple if isinstance(value, tuple) else list
        return kind(a for a, _ in both), kind(b for _, b in both)
    if type(value).__name__ in ("dict", "OrderedDict") and all(isinstance(key, str | int) for key in value):
        found = {key: describe(item, depth + 1) for key, item in value.items()}
        return {key: a for key, (a, _) in found.items()}, {key: b for key, (_, b) in found.items()}
    if not depth and (
        isinstance(value, Iterator) or type(value).__name__ in ("odict_items", "dict_items", "dict_values")
    ):
        return describe(list(value), depth + 1)
    return STAND, Stand(value)


def rebuilt(value: Any, record: Record) -> Any:
    """What the test gets, from the record."""
    match value:
        case {"stand": 0}:
            return Stand(None)
        case {"tuple": items}:
            return tuple([rebuilt(item, record) for item in items])
        case {"list": items}:
            return [rebuilt(item, record) for item in items]
        case {"dict": items}:
            return {key: rebuilt(item, record) for key, item in items}
    return record.plain(value)


ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError)}
ERRORS |= {kind.__name__: kind for kind in (NotImplementedError, AssertionError, ZeroDivisionError, OverflowError)}


def operate(op: str, compute: Callable[[], Any]) -> Any:
    """One operation on torch: done and noted, or what the record has of it."""
    session = State.session
    if session is None:
        return describe(compute())[1] if HAS_TORCH else Stand(None)
    session.count += 1
    if not HAS_TORCH:
        if session.recorded is None or not session.recordable:
            return Stand(None) if session.ends else needs_torch()
        if session.count > len(session.recorded) or session.recorded[session.count - 1][0] != op:
            pytest.fail(f"the record of {session.name} is of another test: where torch is, run pytest --record-torch")
        _, kind, value = session.recorded[session.count - 1]
        while session.count < len(session.recorded) and session.recorded[session.count][0] == "warning":
            _, category, text = session.recorded[session.count]
            session.count += 1
            warnings.warn(text, getattr(builtins, category, UserWarning), stacklevel=3)
        if kind == "raised":
            raise ERRORS.get(value["tuple"][0], RuntimeError)(value["tuple"][1])
        return NotImplemented if kind == "not implemented" else rebuilt(value, session.record)
    try:
        with warnings.catch_warnings(record=True) as caught:
            result = compute()
    except Exception as error:
        text = re.sub(r"0x[0-9a-f]+|\{[^}]*\}", "…", str(error))  # addresses and sets are others in each process
        session.done.append((op, "raised", (type(error).__name__, text[:200])))
        raise
    noted, given = describe(result)
    session.done.append((op, "not implemented" if result is NotImplemented else "gave", noted))
    for warning in caught:
        session.done.append(("warning", warning.category.__name__, str(warning.message)))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    session.count = len(session.done)
    return given


def unwrapped(value: Any) -> Any:
    """Arguments as torch is to have them."""
    if isinstance(value, Stand):
        return value._real
    if isinstance(value, Name):
        return value._real()
    if type(value) in (list, tuple):
        return type(value)([unwrapped(item) for item in value])
    if isinstance(value, dict):
        return type(value)((key, unwrapped(item)) for key, item in value.items())
    if isinstance(value, slice):
        return slice(*map(unwrapped, (value.start, value.stop, value.step)))
    if callable(value) and not isinstance(value, type) and type(value).__module__ != "torch":
        return _called_back(value)
    return value


def _called_back(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the test's for torch to call. What it does with torch's objects cannot be recorded."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = State.session.count if State.session is not None else 0
        given = [describe(arg)[1] for arg in args]
        out = function(*given, **{name: describe(value)[1] for name, value in kwargs.items()})
        changed = State.session is not None and State.session.count != before
        if changed or any(isinstance(arg, Stand) for arg in given) or not args:
            if State.session is not None:
                State.session.recordable = False
        return unwrapped(out)

    return call


class Stand:
    """A tensor, module or optimizer of torch's."""

    __slots__ = ("_real", "_known", "__weakref__")

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_known", (None, None, None))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return operate(f".{name}", lambda: getattr(self._real, name))

    def __setattr__(self, name: str, value: Any) -> None:
        operate(f".{name} =", lambda: setattr(self._real, name, unwrapped(value)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return operate("()", lambda: self._real(*unwrapped(args), **unwrapped(kwargs)))

    def _once(self, op: str, compute: Callable[[], Any]) -> Any:
        """An operation that changes nothing: if nothing was done since, it is the same again, and noted once."""
        session = State.session
        known, at, of = self._known
        if session is not None and known == op and at == session.count:
            return of
        value = operate(op, compute)
        object.__setattr__(self, "_known", (op, session.count if session is not None else None, value))
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self._once("array", lambda: np.array(self._real.detach().numpy()))
        return np.array(array, dtype)

    def __repr__(self) -> str:
        return self._once("repr", lambda: repr(self._real))

    def __format__(self, spec: str) -> str:
        return operate("format", lambda: format(self._real, spec))

    def __iter__(self) -> Iterator[Any]:
        return iter(operate("iter", lambda: list(self._real)))

    def __reversed__(self) -> Iterator[Any]:
        return iter(operate("reversed", lambda: list(reversed(self._real))))

    def __instancecheck__(self, value: Any) -> bool:
        return operate("isinstance", lambda: isinstance(unwrapped(value), self._real))

    def __exit__(self, *error: Any) -> Any:
        return operate("exit", lambda: self._real.__exit__(*error))

    def __deepcopy__(self, memo: Any) -> Any:
        import copy

        return operate("deepcopy", lambda: copy.deepcopy(self._real))

    __hash__ = object.__hash__


def _unary(name: str, function: Callable[..., Any]) -> None:
    def method(self: Stand, *args: Any) -> Any:
        return operate(name, lambda: function(self._real, *unwrapped(args)))

    setattr(Stand, name, method)


def _reversed(name: str, function: Callable[..., Any]) -> None:
    def method(self: Stand, other: Any) -> Any:
        return operate(name, lambda: function(unwrapped(other), self._real))

    setattr(Stand, name, method)


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
for _name in _BINARY:
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    _unary(f"__{_name}__", _function)
    _reversed(f"__r{_name}__", _function)
for _name in ("neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "contains"):
    _unary(f"__{_name}__", getattr(operator, f"__{_name}__"))
for _name, _function in (("bool", bool), ("float", float), ("int", int), ("len", len), ("index", operator.index)):
    _unary(f"__{_name}__", _function)
_unary("__enter__", lambda real: real.__enter__())


def real_torch(name: str = "torch") -> Any:
    """torch itself, imported by the first test that uses it."""
    if name in sys.modules:
        return sys.modules[name]
    torch = importlib.import_module(name)
    set_up(torch)
    return torch


def set_up(torch: Any) -> None:
    """What each test finds: torch's random numbers from the start; one thread, since a second one would only wait."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Missing:
    """The base of a test's subclass of a class of torch's, which is not there."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        needs_torch()


class Name:
    """A name of torch's: a module, class or function, the same in every test, so that looking it up is no operation."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        object.__setattr__(self, "_path", path)

    def _real(self) -> Any:
        found = real_torch()
        for part in self._path.split(".")[1:]:
            found = getattr(found, part)
        return found

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}"
        if name.startswith("__") and name not in ("__all__", "__version__"):
            if name == "__name__":
                return self._path.rpartition(".")[2]
            raise AttributeError(path)
        if not HAS_TORCH:
            value = recorded_name(path)
            if value == ABSENT:
                raise AttributeError(path)
            return Name(path) if value is None else value
        try:
            value = getattr(self._real(), name)
        except AttributeError:
            State.new_names.setdefault(State.file, {})[path] = ABSENT
            raise
        if isinstance(value, bool | int | float | str | list):
            State.new_names.setdefault(State.file, {})[path] = value
            return value
        return Name(path)

    def __setattr__(self, name: str, value: Any) -> None:
        unrecordable()
        setattr(self._real(), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return operate(self._path, lambda: self._real()(*unwrapped(args), **unwrapped(kwargs)))

    def __instancecheck__(self, value: Any) -> bool:
        if not isinstance(value, Stand | Name):
            return HAS_TORCH and isinstance(value, self._real())
        return operate(f"isinstance {self._path}", lambda: isinstance(unwrapped(value), self._real()))

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (self._real(),) if HAS_TORCH else (Missing,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Name) and self._path == other._path

    def __hash__(self) -> int:
        return hash(self._path)

    def __repr__(self) -> str:
        return self._path


torch: Any = Name("torch")


def real(value: Any) -> Any:
    """torch itself, or what a Stand or a Name stands for; the test cannot be recorded."""
    unrecordable()
    return unwrapped(value) if HAS_TORCH else Stand(None)


def says(question: Callable[..., Any], *args: Any) -> Any:
    """`question(*args)` on the very objects, one operation; the answer is plain."""
    return operate("says", lambda: question(*[unwrapped(arg) for arg in args]))


def signature(function: Any) -> inspect.Signature:
    """`inspect.signature`, of torch's too; defaults that are not plain are there by name."""
    if not isinstance(function, Name | Stand):
        return inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [
        inspect.Parameter(name, inspect._ParameterKind(kind), default=default[0] if default else empty)
        for name, kind, default in says(_parameters, function)
    ]
    return inspect.Signature(parameters, __validate_parameters__=False)


def _parameters(function: Any) -> list[Any]:
    is_class = isinstance(function, type)
    function = function.__init__ if is_class else function
    function = next(iter(typing.get_overloads(function)), function)  # where it is (*args, **kwargs), as LSTM's is
    found = []
    for p in [*inspect.signature(function).parameters.values()][is_class:]:
        plain = p.default is None or isinstance(p.default, bool | int | float | str | tuple)
        default = [p.default if plain else getattr(p.default, "__name__", str(p.default))]
        found.append([p.name, int(p.kind), [] if p.default is p.empty else default])
    return found


class Absent:
    """torch itself, where it is not installed: a test that uses it is skipped."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if State.session is not None:
            needs_torch()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__getattr__("called")

    def __instancecheck__(self, value: Any) -> bool:
        return False

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (Missing,)


actual: Any = Lazily("torch", real_torch) if HAS_TORCH else Absent()  # for tests that need the very objects
