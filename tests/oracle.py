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
import hashlib
import importlib.util
import inspect
import json
import operator
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None
FOLDER = Path(__file__).parent / "torch_record"
NEEDS_TORCH = "needs torch"
OF_TORCH = ("test_torch_adapter",)  # how files begin that are left out where there is no torch
ABSENT = "<absent>"  # in place of a name that torch does not have
RTOL = 1e-4  # of the largest number of an array: what another processor may make of the same computation


class Unrecordable(Exception):  # noqa: N818
    """A value that is not plain."""


# -- the record -------------------------------------------------------------------------------------------------------


class Record:
    """What torch gave to the tests of one file: operations by test, names of torch's, and all arrays end to end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, list[Any]] = {}
        self.names: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}  # by dtype
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                index = json.loads(bytes(file["index"]))
                self.arrays = {name: file[name] for name in file.files if name != "index"}
            self.tests, self.names = index["tests"], index["names"]

    def array(self, dtype: str, start: int, shape: list[int]) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64))
        return self.arrays[dtype][start : start + size].reshape(shape).copy()

    def plain(self, value: Any) -> Any:
        """A recorded value with its arrays in it."""
        match value:
            case {"array": [dtype, start, shape]}:
                return self.array(dtype, start, shape)
            case {"tuple": items}:
                return tuple(map(self.plain, items))
            case {"list": items}:
                return list(map(self.plain, items))
            case {"dict": items}:
                return {key: self.plain(item) for key, item in items}
            case {"float": text}:
                return float(text)
        return value


def write(path: Path, tests: dict[str, list[Any]], names: dict[str, Any]) -> None:
    """Write a record; `tests` hold their arrays themselves."""
    parts: dict[str, list[np.ndarray]] = {}
    ends: dict[str, int] = {}
    known: dict[Any, list[Any]] = {}

    def stored(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            dtype = str(value.dtype)
            key = dtype, value.shape, hashlib.sha256(value.tobytes()).digest()
            if key not in known:
                parts.setdefault(dtype, []).append(value.ravel())
                known[key] = [dtype, ends.get(dtype, 0), list(value.shape)]
                ends[dtype] = ends.get(dtype, 0) + value.size
            return {"array": known[key]}
        if isinstance(value, float):
            return {"float": repr(value)}
        if isinstance(value, tuple):
            return {"tuple": list(map(stored, value))}
        if isinstance(value, list):
            return {"list": list(map(stored, value))}
        if isinstance(value, dict):
            return {"dict": [[key, stored(item)] for key, item in value.items()]}
        return {"stand": 0} if value is STAND else value

    index = {
        "tests": {name: [[op, kind, stored(v)] for op, kind, v in ops] for name, ops in sorted(tests.items())},
        "names": dict(sorted(names.items())),
    }
    arrays = {dtype: np.concatenate(found) for dtype, found in sorted(parts.items())}
    text = np.frombuffer(json.dumps(index, separators=(",", ":")).encode(), np.uint8)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, index=text, **arrays)


# -- one run of a test ------------------------------------------------------------------------------------------------


class Session:
    """The operations of one test: `done` so far, and those `recorded`, if there are any."""

    def __init__(self, name: str, record: Record, recordable: bool) -> None:
        self.name, self.record, self.recordable = name, record, recordable
        self.recorded = record.tests.get(name)
        self.passed = self.ends = False  # the test, and whether what runs is its teardown
        self.done: list[tuple[str, str, Any]] = []
        self.count = 0

    def differs(self) -> str | None:
        """How what torch gave differs from the record."""
        if self.recorded is None:
            return "is not in the record"
        if len(self.recorded) != len(self.done):
            return f"makes {len(self.done)} operations; the record has {len(self.recorded)}"
        for (op, kind, value), (old_op, old_kind, old) in zip(self.done, self.recorded, strict=True):
            if (op, kind) != (old_op, old_kind):
                return f"does {op} ({kind}) where the record has {old_op} ({old_kind})"
            if not same(value, STAND if old == {"stand": 0} else self.record.plain(old)):
                return f"gets from {op} what is not in the record"
        return None


def same(new: Any, old: Any) -> bool:
    """Whether torch gives what it gave, but for rounding."""
    if isinstance(new, np.ndarray):
        if not isinstance(old, np.ndarray) or (new.shape, new.dtype) != (old.shape, old.dtype):
            return False
        if new.dtype.kind not in "fc":
            return bool((new == old).all())
        finite = np.isfinite(old)
        scale = np.abs(old[finite]).max(initial=0)
        return bool(
            np.array_equal(new[~finite], old[~finite], equal_nan=True)
            and (np.abs(new[finite] - old[finite]) <= RTOL * scale).all()
        )
    if isinstance(new, float) and isinstance(old, float):
        return same(np.float64(new).reshape(1), np.float64(old).reshape(1))
    if isinstance(new, list | tuple):
        return type(new) is type(old) and len(new) == len(old) and all(map(same, new, old))
    if isinstance(new, dict):
        return isinstance(old, dict) and list(new) == list(old) and all(same(new[k], old[k]) for k in new)
    if old == {"stand": 0}:
        return new is STAND
    return type(new) is type(old) and new == old


class State:
    session: Session | None = None
    records: dict[str, Record] = {}
    new_tests: dict[str, dict[str, Any]] = {}  # by file
    new_names: dict[str, dict[str, Any]] = {}
    file: str = ""  # that is being imported or run
    names: dict[str, Any] | None = None


def record_of(file: str) -> Record:
    if file not in State.records:
        State.records[file] = Record(FOLDER / f"{file}.npz")
    return State.records[file]


def recorded_name(path: str) -> Any:
    """What is recorded of a name of torch's: ABSENT, or its plain value; None if it is an object like others."""
    if State.names is None:
        State.names = {}
        for found in sorted(FOLDER.glob("*.npz")):
            State.names |= record_of(found.stem).names
    return State.names.get(path)


def begin(file: str, name: str, recordable: bool) -> None:
    State.file, State.session = file, Session(name, record_of(file), recordable)


def end() -> Session | None:
    session, State.session = State.session, None
    return session


def keep(session: Session) -> None:
    """Take a test's operations into the record that is being made."""
    State.new_tests.setdefault(State.file, {})[session.name] = (
        list(session.done) if session.done and session.recordable else None
    )


def save() -> None:
    """Write the records of the files that were run; tests of theirs that were not run keep theirs."""
    for file in {*State.new_tests, *State.new_names}:
        old = Record(FOLDER / f"{file}.npz")
        tests = {
            name: [
                (op, kind, STAND if value == {"stand": 0} else _with_stands(old.plain(value)))
                for op, kind, value in ops
            ]
            for name, ops in old.tests.items()
        }
        tests |= State.new_tests.get(file, {})
        tests = {name: ops for name, ops in tests.items() if ops}
        names = old.names | State.new_names.get(file, {})
        if tests or names:
            write(old.path, tests, names)


def _with_stands(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_with_stands, value))
    if isinstance(value, dict):
        return STAND if value == {"stand": 0} else {key: _with_stands(item) for key, item in value.items()}
    return value


def needs_torch() -> None:
    pytest.skip(NEEDS_TORCH)


def unrecordable() -> None:
    """Note that the test cannot be recorded; where there is no torch it ends here."""
    if State.session is not None:
        State.session.recordable = False
        if not HAS_TORCH:
            needs_torch()


# -- operations -------------------------------------------------------------------------------------------------------


class _Stand:
    def __repr__(self) -> str:
        return "STAND"


STAND = _Stand()  # in the record, in place of an object of torch's


def describe(value: Any, depth: int = 0) -> tuple[Any, Any]:
    """A value of torch's as the record has it, and as the test gets it."""
    if value is None or value is NotImplemented or isinstance(value, bool | str) or type(value) in (int, float):
        return (None if value is NotImplemented else value), value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        array = np.array(value)
        return array, array.copy()
    if isinstance(value, real_torch().Size):
        value = tuple(value)
    if isinstance(value, tuple | list):
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
        session.done.append((op, "raised", (type(error).__name__, str(error)[:200])))
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


def real_torch() -> Any:
    import torch

    return torch


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


actual: Any = real_torch() if HAS_TORCH else Absent()  # for tests that need the very objects


# -- what pytest has to do --------------------------------------------------------------------------------------------


class Plugin:
    """Begins and ends the sessions, compares or writes the record, and says how many tests need torch."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.session: Session | None = None
        self.records = bool(config.getoption("--record-torch"))
        if self.records and not HAS_TORCH:
            raise pytest.UsageError("--record-torch needs torch: pip install -e '.[oracles]'")

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: Any) -> Any:
        if isinstance(collector, pytest.Module):
            State.file = collector.path.stem
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        hypothetical = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        slow = item.get_closest_marker("slow") is not None
        begin(item.path.stem, item.nodeid.partition("::")[2], not (slow or hypothetical))
        self.session = State.session
        try:
            return (yield)
        finally:
            end()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        out = yield
        if self.session is not None:
            self.session.passed = True
        return out

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: Any) -> Any:
        session = self.session
        if session is not None:
            session.ends = True
        out = yield
        if session is None or not session.passed or not HAS_TORCH:
            return out
        if self.records:
            keep(session)
        elif session.recordable and session.done and (why := session.differs()) is not None:
            pytest.fail(f"{session.name} {why}: if that is right, run pytest --record-torch", pytrace=False)
        return out

    def pytest_sessionfinish(self, session: Any) -> None:
        if self.records:
            save()
        if not HAS_TORCH and not hasattr(self.config, "workerinput") and self._is_whole():
            ran, least = self._count("passed") + self._count("failed"), self._least()
            if ran < least and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if HAS_TORCH:
            return
        reasons = [str(report.longrepr[2]) for report in self._stats("skipped") if isinstance(report.longrepr, tuple)]
        needing = sum(NEEDS_TORCH in reason or "could not import 'torch'" in reason for reason in reasons)
        ran, least = self._count("passed") + self._count("failed"), self._least()
        left_out = sum(path.name.startswith(OF_TORCH) for path in Path(__file__).parent.glob("test_*.py"))
        terminalreporter.write_line(
            f"{ran} tests ran without torch; {needing} more, and {left_out} files, need it: pip install -e '.[oracles]'"
        )
        if self._is_whole() and ran < least:
            terminalreporter.write_line(f"of the whole suite at least {least} must run (pyproject.toml)", red=True)

    def _stats(self, outcome: str) -> list[Any]:
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        return [report for report in reporter.stats.get(outcome, []) if hasattr(report, "longrepr")]

    def _count(self, outcome: str) -> int:
        return len(self._stats(outcome))

    def _least(self) -> int:
        return int(self.config.getini("least_without_torch"))

    def _is_whole(self) -> bool:
        """Whether these are all the tests that `pytest` alone runs."""
        given = self.config.invocation_params.args
        return not any(arg in ("-k", "-m", "--lf", "--deselect") or not arg.startswith("-") for arg in given)
