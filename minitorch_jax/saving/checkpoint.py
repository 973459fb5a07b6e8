"""Saving modules, optimizers and the random stream to one file, and back: all of it, or nothing.

What is saved is a description in JSON with arrays beside it (`description.py`), in an archive that is not trusted when it
is read (`archive.py`). Other kinds of checkpoint share what is here: `snapshot`, `validated`, `matched`, `bring_back`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from ..module import random
from ..runtime import interrupts
from ..state import access
from ..state.lending import steadily
from ..state.pytree import Stateful
from . import archive
from .description import Schedule, described, text_of, value_of
from .files import replacing


def save(path: str | bytes | os.PathLike[Any], /, **objects: Any) -> None:
    """Write objects to one file, under their names: `mt.save("run.npz", model=model, opt=opt, epoch=3)`.

    Modules, optimizers and whatever else has `state_dict()` and `load_state_dict()` are saved by their state; numbers,
    strings, arrays, random keys, and lists, tuples and dicts of these as they are. The random stream goes with them.
    Arrays are saved in their dtype, bfloat16 and float8 included. A crash at any instant leaves the old file or the new
    one, whole: the new one is written beside it, brought to the disk, and then renamed. A process that is killed while
    it writes may leave its unfinished file there, hidden, as `.NAME.….tmp`.

    Args:
        path: of the file. The name is taken as it is; it is an `.npz`, whatever its ending. What a link points to is
            replaced, not the link; permissions stay.
        **objects: what to save.

    Raises:
        TypeError: if something cannot be saved, naming it; no file is written then.
        OSError: if the file cannot be written; the old one is still there.

    Example:
        >>> import os, tempfile
        >>> import jax.numpy as jnp, minitorch_jax as mt
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
    whole, arrays = snapshot(objects)
    with replacing(path) as (file, _):
        archive.write(file, whole, arrays)


def load(path: str | bytes | os.PathLike[Any], /, **objects: Any) -> dict[str, Any]:
    """Bring objects to the state that `save` wrote, in place; what was saved as it is, is returned.

    Arrays that are bound to a device, or spread over several, stay where they are.

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
    path = os.fsdecode(path)
    with open(path, "rb") as file:
        description, arrays = archive.read(file, path)
    try:
        saved = validated(description)
        values = {name: value_of(entry["value"], arrays) for name, entry in saved.objects.items()}
    except archive.UNREADABLE as error:
        raise ValueError(f"{path} is no file that mt.save has written: {error}") from error
    bring_back(path, saved, *matched(saved, objects), values)
    return {name: values[name] for name, entry in saved.objects.items() if not entry["stateful"]}


class Saved(NamedTuple):
    """What a checkpoint says of itself."""

    objects: dict[str, Any]  # name to {"stateful": bool, "type": str, "value": description}
    impl: str  # of the random stream's keys
    stream: np.ndarray[Any, Any]  # its data


def snapshot(objects: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Objects and the random stream in JSON's terms, and their arrays by place.

    The arrays are as they are: JAX's are lent (a step copies them before it changes them), NumPy's are the caller's own.
    All are of one moment between two calls, whatever other threads do.
    """
    held = [cell for value in objects.values() if isinstance(value, Stateful) for cell in value._held_cells()]
    whole: tuple[dict[str, Any], dict[str, Any]] = steadily([*held, random.current().cell], partial(_snapshot, objects))
    return whole


def _snapshot(objects: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays: dict[str, Any] = {}
    entries = {}
    for name, value in objects.items():
        stateful = _is_stateful(value)
        content = value.state_dict() if stateful else value
        entries[name] = {
            "stateful": stateful,
            "type": type(value).__name__,
            "value": described(content, name, arrays, schedules=stateful),
        }
    stream = random.current()
    data = np.asarray(stream.cell.value).tolist()
    return {"version": 1, "objects": entries, "stream": {"impl": stream.impl, "data": data}}, arrays


def validated(description: Any) -> Saved:
    """What `snapshot` described, read from somewhere.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: if it is something else.
    """
    if description["version"] != 1:
        raise ValueError("another version of this library wrote it")
    objects, stream = description["objects"], description["stream"]
    if not all(type(e["stateful"]) is bool and type(e["type"]) is str and "value" in e for e in objects.values()):
        raise ValueError("its description is not understood")
    return Saved(objects, str(stream["impl"]), np.asarray(stream["data"], np.uint32))


def matched(saved: Saved, objects: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The objects that a state was saved for, by name, and what is wrong with the names and kinds of all."""
    problems = [
        f"  {name}: nothing was saved by that name; there is {', '.join(saved.objects) or 'nothing at all'}"
        for name in objects.keys() - saved.objects
    ]
    for name, entry in saved.objects.items():
        if entry["stateful"] and name not in objects:
            problems.append(f"  {name}, a {entry['type']}, was saved: pass {name}=..., or {name}=None to leave it out")
        elif name in objects and not entry["stateful"]:
            problems.append(f"  {name} was saved as a value, and is returned: do not pass it")
        elif name in objects and objects[name] is not None and not _is_stateful(objects[name]):
            problems.append(
                f"  {name}: a {type(objects[name]).__name__} has no state to bring back a {entry['type']}'s"
            )
    impl = random.current().impl
    if saved.impl != impl:
        problems.append(f"  the random stream is of {saved.impl} keys; here JAX makes {impl} keys")
    stateful = {name for name, entry in saved.objects.items() if entry["stateful"]}
    return {name: obj for name, obj in objects.items() if name in stateful and _is_stateful(obj)}, sorted(problems)


def _is_stateful(value: Any) -> bool:
    kind = type(value)
    return not isinstance(value, type) and hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")


def bring_back(
    source: str, saved: Saved, targets: Mapping[str, Any], problems: list[str], values: Mapping[str, Any]
) -> None:
    """Give all objects their states, modules before the optimizers that know them, and the random stream its; or none.

    Args:
        source: what the errors call the checkpoint.
        saved: what it says of itself.
        targets, problems: of `matched`.
        values: the states, by name.
    """
    ordered = sorted(targets, key=lambda name: hasattr(type(targets[name]), "step"))
    with interrupts.deferred:
        before = {name: targets[name].state_dict() for name in ordered}
        try:
            for name in ordered:
                try:
                    targets[name].load_state_dict(_fitted(values[name], before[name], name, problems))
                except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
                    problems.append(f"  {name}: {error}")
            if problems:
                raise ValueError(f"{source} does not fit; nothing was loaded:\n" + "\n".join(problems))
            current = random.current()
            if saved.stream.shape != current.cell.value.shape:
                raise ValueError(f"{source} does not fit; nothing was loaded. Its random stream is no {saved.impl} key")
            access.write(current.cell, jax.device_put(saved.stream, may_alias=False), "the random stream", current)
        except BaseException as error:
            for name in ordered:
                try:
                    targets[name].load_state_dict(before[name])
                except Exception as failure:
                    error.add_note(f"{name} could not be given back the state that it had: {failure}")
            raise


def _fitted(saved: Any, mine: Any, path: str, problems: list[str]) -> Any:
    """A saved state as the object that takes it over has it: with its own schedules, and with JAX's arrays in their place.

    Its schedules must be those that were saved; where they are not, that is added to `problems`.
    """
    if isinstance(saved, Schedule) or (callable(mine) and not isinstance(saved, dict | list | tuple)):
        if not callable(mine) or not isinstance(saved, Schedule) or saved.text not in (None, text_of(mine)):
            there = Schedule(text_of(mine)) if callable(mine) else mine
            what = "a schedule" if isinstance(saved, Schedule) else "a number"
            problems.append(f"  {path}: {what} was saved here ({saved!r}), and there is {there!r}")
        return mine
    if isinstance(saved, np.ndarray | jax.Array) and isinstance(mine, jax.Array):
        return restored_like(saved, mine)
    if isinstance(saved, dict) and isinstance(mine, Mapping):
        return {key: _fitted(value, mine.get(key), f"{path}.{key}", problems) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and type(saved) is type(mine) and len(saved) == len(mine):
        pairs = enumerate(zip(saved, mine, strict=True))
        return type(saved)([_fitted(a, b, f"{path}.{i}", problems) for i, (a, b) in pairs])
    return saved


def restored_like(saved: np.ndarray[Any, Any] | jax.Array, mine: jax.Array) -> jax.Array:
    """An array, which nobody else changes, as one of JAX's that lies where `mine` does.

    Its dtype stays, float64 too where JAX would make it float32, so that whoever compares dtypes sees it.
    """
    where = mine.sharding if mine.committed and mine.shape == saved.shape else None
    with jax.enable_x64(True) if saved.dtype.itemsize >= 8 else nullcontext():
        return jax.device_put(saved, where)
