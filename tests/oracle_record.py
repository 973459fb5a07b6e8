"""The record of what torch gave to tests: `oracle.py` says what it is for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "torch_record"
ABSENT = "<absent>"  # in place of a name that torch does not have
RTOL = 1e-4  # of the largest number of an array: what another processor may make of the same computation
ATOL = 1e-15  # what is left of numbers near 1 that cancel: it has other digits on each processor


class _Stand:
    def __repr__(self) -> str:
        return "STAND"


STAND = _Stand()  # in the record, in place of an object of torch's


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
            was = STAND if old == {"stand": 0} else self.record.plain(old)
            if kind == "raised":  # the words are those of the library that torch has for this processor
                value, was = value[0], was[0]
            if not same(value, was):
                return f"gets from {op} what is not in the record: {value!r:.200}, recorded is {was!r:.200}"
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
            and (np.abs(new[finite] - old[finite]) <= RTOL * scale + ATOL).all()
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
