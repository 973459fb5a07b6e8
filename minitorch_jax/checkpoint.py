"""Saving modules, optimizers and the random stream to one file, and back: all of it, or nothing.

The file is an archive of NumPy's (`np.load` opens it), with a description in JSON and a digest of everything at its end.
Nothing in it is pickled, and nothing is trusted: a file that is damaged, foreign or hostile is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from . import cell as cells
from . import interrupts, random

_MAGIC = b"minitorch_jax sha256:"  # then the digest, in hexadecimal: the archive's comment, and so the end of the file
_DIGEST = 64
_DESCRIPTION = "description.json"
_UNREADABLE: tuple[type[Exception], ...] = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
_UNREADABLE += (
    EOFError,
    zipfile.BadZipFile,
    NotImplementedError,
)  # what reading a file may raise that was made to deceive


def save(path: str | os.PathLike[str], /, **objects: Any) -> None:
    """Write objects to one file, under their names: `mt.save("run.npz", model=model, opt=opt, epoch=3)`.

    Modules, optimizers and whatever else has `state_dict()` and `load_state_dict()` are saved by their state; numbers,
    strings, arrays, random keys, and lists, tuples and dicts of these as they are. The random stream goes with them.
    Arrays are saved in their dtype, bfloat16 and float8 included. A crash at any instant leaves the old file or the new
    one, whole: the new one is written beside it, brought to the disk, and then renamed.

    Args:
        path: of the file. The name is taken as it is; it is an `.npz`, whatever its ending.
        **objects: what to save.

    Raises:
        TypeError: if something cannot be saved, naming it; no file is written then.

    Example:
        >>> import os, tempfile
        >>> import minitorch_jax as mt
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1)
        >>> opt = optim.SGD([model], lr=0.1, momentum=0.9)
        >>> path = os.path.join(tempfile.mkdtemp(), "run.npz")
        >>> mt.save(path, model=model, opt=opt, epoch=3)
        >>> before, model.bias = model.bias, jnp.zeros(1)
        >>> mt.load(path, model=model, opt=opt)
        {'epoch': 3}
        >>> bool((model.bias == before).all())
        True
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    described = {}
    for name, value in objects.items():
        stateful = _is_stateful(value)
        content = value.state_dict() if stateful else value
        described[name] = {
            "stateful": stateful,
            "type": type(value).__name__,
            "value": _described(content, name, arrays),
        }
    stream = random.current()
    whole = {
        "version": 1,
        "objects": described,
        "stream": {"impl": stream.impl, "data": np.asarray(stream.cell.value).tolist()},
    }
    with _replacing(Path(path)) as file:
        _write(file, json.dumps(whole), arrays)


def load(path: str | os.PathLike[str], /, **objects: Any) -> dict[str, Any]:
    """Bring objects to the state that `save` wrote, in place; what was saved as it is, is returned.

    Args:
        path: of the file.
        **objects: under the names that they were saved by, for all that have a state; None leaves one as it is.

    Returns:
        The values without a state of their own (numbers, strings, arrays, …), by name; arrays as NumPy's.

    Raises:
        ValueError: if the file is not one of `save`'s, is damaged, or does not fit the objects: one error that says all
            that differs. Nothing has changed then.
        OSError: if the file cannot be read.

    Example:
        see `save`.
    """
    with open(path, "rb") as file:
        saved, values, (saved_impl, stream) = _read(file, str(path))
    problems = [
        f"  {name}: not in the file, which has {', '.join(saved) or 'nothing'}" for name in objects.keys() - saved
    ]
    for name, entry in saved.items():
        if entry["stateful"] and name not in objects:
            problems.append(
                f"  {name}, a {entry['type']}, is in the file: pass {name}=..., or {name}=None to leave it out"
            )
        elif name in objects and not entry["stateful"]:
            problems.append(f"  {name} was saved as a value, and is returned: do not pass it")
        elif name in objects and objects[name] is not None and not _is_stateful(objects[name]):
            problems.append(
                f"  {name}: a {type(objects[name]).__name__} has no state to bring back a {entry['type']}'s"
            )
    impl = random.current().impl
    if saved_impl != impl:
        problems.append(f"  the random stream is of {saved_impl} keys; here JAX makes {impl} keys")
    if problems:
        raise ValueError(f"{path} does not fit; nothing was loaded:\n" + "\n".join(sorted(problems)))
    targets = {name: obj for name, obj in objects.items() if obj is not None}
    _bring_back(str(path), targets, values, stream)
    return {name: values[name] for name, entry in saved.items() if not entry["stateful"]}


def _is_stateful(value: Any) -> bool:
    kind = type(value)
    return not isinstance(value, type) and hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")


def _bring_back(path: str, targets: dict[str, Any], values: dict[str, Any], stream: Any) -> None:
    """Give all objects their states, modules before the optimizers that know them; or none."""
    ordered = sorted(targets, key=lambda name: hasattr(type(targets[name]), "step"))
    with interrupts.held:
        before = {name: targets[name].state_dict() for name in ordered}
        problems = []
        try:
            for name in ordered:
                try:
                    targets[name].load_state_dict(_with_schedules(values[name], before[name]))
                except (ValueError, TypeError, KeyError) as error:
                    problems.append(f"{name}: {error}")
            if problems:
                raise ValueError(f"{path} does not fit; nothing was loaded.\n" + "\n".join(problems))
            current = random.current()
            cells.write(current.cell, jnp.asarray(stream), "the random stream", current)
        except BaseException:
            for name in ordered:
                targets[name].load_state_dict(before[name])
            raise


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What is saved of a function of the step: its text, if that says what it is."""

    text: str | None


def _with_schedules(saved: Any, mine: Any) -> Any:
    """A saved state, with the schedules of the object that takes it over, which must be the ones that were saved."""
    if isinstance(saved, _Schedule):
        if not callable(mine) or (saved.text is not None and saved.text != _text(mine)):
            raise ValueError(f"a schedule was saved here ({saved.text or 'a function'}), and there is {mine!r}")
        return mine
    if isinstance(saved, dict) and isinstance(mine, Mapping):
        return {key: _with_schedules(value, mine.get(key)) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(mine, list) and len(saved) == len(mine):
        return [_with_schedules(a, b) for a, b in zip(saved, mine, strict=True)]
    return saved


def _text(schedule: Any) -> str | None:
    return repr(schedule) if dataclasses.is_dataclass(schedule) else None


# -- values as JSON, and arrays beside it ------------------------------------------------------------------------------


def _described(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    """A value in JSON's terms; its arrays go into `arrays`."""
    if value is None or isinstance(value, bool | int | str) and type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise TypeError(f"save(): {path} is a dict with keys that are no strings: {list(value)!r}")
        return {"dict": {key: _described(item, f"{path}.{key}", arrays) for key, item in value.items()}}
    if type(value) in (list, tuple):
        items = [_described(item, f"{path}.{i}", arrays) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _described(jax.random.key_data(value), path, arrays)
        return {"key": str(jax.random.key_impl(value)), "data": data}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype.hasobject or array.dtype.names:
            raise TypeError(f"save(): {path} is an array of {array.dtype}, which is no array of numbers")
        place = path
        while place in arrays:
            place += "'"
        plain = array.dtype.isbuiltin == 1
        arrays[place] = array if plain else np.frombuffer(array.tobytes(), np.uint8)
        return {"array": place, "dtype": array.dtype.name, "shape": list(array.shape)}
    if callable(value) and not isinstance(value, type):
        return {"schedule": _text(value)}
    raise TypeError(
        f"save(): {path} is a {type(value).__name__}, which cannot be saved: give modules, optimizers, numbers, strings,"
        " arrays, random keys, or lists, tuples and dicts of these"
    )


def _value(described: Any, arrays: Mapping[str, Any]) -> Any:
    """The value that `_described` described."""
    match described:
        case {"float": text}:
            return float(text)
        case {"dict": items}:
            return {key: _value(item, arrays) for key, item in items.items()}
        case {"list": items}:
            return [_value(item, arrays) for item in items]
        case {"tuple": items}:
            return tuple(_value(item, arrays) for item in items)
        case {"key": impl, "data": data}:
            return jax.random.wrap_key_data(jnp.asarray(_value(data, arrays)), impl=impl)
        case {"array": place, "dtype": dtype, "shape": shape}:
            array, wanted = arrays[place], jnp.dtype(dtype)
            array = array if wanted.isbuiltin == 1 else array.view(wanted)
            if array.dtype != wanted or array.size != math.prod(shape):
                raise ValueError(f"the array {place} is not what the file says of it")
            return array.reshape(shape)
        case {"schedule": text}:
            return _Schedule(text)
    return described


# -- the file ----------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` in one instant, once it is complete and on the disk."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(FileNotFoundError):
            scratch.unlink()
        raise
    with suppress(OSError):  # where a folder cannot be opened, the system keeps its own order
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(file: BinaryIO, description: str, arrays: Mapping[str, Any]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = _MAGIC + b"0" * _DIGEST
        archive.writestr(_DESCRIPTION, description)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
    digest = _digest(file)
    file.seek(-_DIGEST, os.SEEK_END)
    file.write(digest)


def _digest(file: BinaryIO) -> bytes:
    """Of all that comes before the digest."""
    left = file.seek(0, os.SEEK_END) - _DIGEST
    file.seek(0)
    found = hashlib.sha256()
    while left > 0:
        block = file.read(min(left, 1 << 20))
        if not block:
            break
        found.update(block)
        left -= len(block)
    return found.hexdigest().encode()


def _read(file: BinaryIO, path: str) -> tuple[dict[str, Any], dict[str, Any], tuple[str, Any]]:
    """What is said of the objects, their values by name, and the random stream: the kind of its keys, and its data."""
    size = file.seek(0, os.SEEK_END)
    end = len(_MAGIC) + _DIGEST
    file.seek(-min(end, size), os.SEEK_END)
    magic, digest = file.read(len(_MAGIC)), file.read(_DIGEST)
    if magic != _MAGIC:
        raise ValueError(f"{path} is no file of mt.save, or only the beginning of one")
    if _digest(file) != digest:
        raise ValueError(f"{path} is damaged: it is not what mt.save wrote")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            stored = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
            if (
                not stored
                or sum(e.file_size for e in entries) > size
                or len({e.filename for e in entries}) != len(entries)
            ):
                raise ValueError("its entries are compressed, overlap, or have the same name")
            whole = json.loads(archive.read(_DESCRIPTION))
            if whole["version"] != 1:
                raise ValueError("another version of this library wrote it")
            names = [e.filename for e in entries if e.filename != _DESCRIPTION]
            arrays = {name.removesuffix(".npy"): _array(archive, name) for name in names}
            saved, stream = whole["objects"], whole["stream"]
            values = {name: _value(entry["value"], arrays) for name, entry in saved.items()}
            if not all(type(e["stateful"]) is bool and type(e["type"]) is str for e in saved.values()):
                raise ValueError("its description is not understood")
            return saved, values, (str(stream["impl"]), np.asarray(stream["data"], np.uint32))
    except _UNREADABLE as error:
        raise ValueError(f"{path} is no file that mt.save has written: {error}") from error


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    """One array, whose header must say what is there."""
    with archive.open(name) as entry:
        version = np.lib.format.read_magic(entry)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name} is of a format that is not known")
        shape, fortran, dtype = read(entry)
        data = entry.read()
    if dtype.hasobject or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is not the array that its header describes")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
