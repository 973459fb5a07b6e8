"""Saving modules, optimizers and the random stream to one file, and loading all of them or none.

A checkpoint is a description in JSON with separate arrays (`as_json.py`), in an archive that is validated when it is
read (`archive.py`). Other kinds of checkpoint use `snapshot`, `validated`, `matched` and `bring_back` of this file, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Never

import jax
import numpy as np

from ..module import random
from ..module.sizes import sized_by
from ..module.tree import is_module
from ..runtime import interrupts
from ..state import access
from ..state.cell import bound_to
from ..state.concurrent_reads import steadily
from ..state.pytree import Stateful
from ..state.static_values import module_of
from . import archive
from .as_json import Schedule, described, text_of, value_of
from .files import replacing
from .processes import Gathering, GatheringError, are_spread


def save(path: str | bytes | os.PathLike[Any], /, *unnamed: Never, **objects: Any) -> None:
    """Write objects to one file, under their names: `mt.save("run.npz", model=model, opt=opt, epoch=3)`.

    Of modules, optimizers and other objects with `state_dict()` and `load_state_dict()`, the state is saved. Numbers,
    strings, arrays, random keys, and lists, tuples and dicts of these are saved as values. The random stream is saved, too.
    Arrays are saved in their dtype, bfloat16 and float8 included. A crash at any instant leaves either the whole old file
    or the whole new one: the new file is written beside the old one, flushed to the disk, and then renamed. A process that
    is killed while it writes may leave its unfinished file behind, hidden, as `.NAME.….tmp`.

    If arrays are spread over several processes, all processes call `save` with the same objects. They gather one array at a
    time, and process 0 writes the file.

    Args:
        path: the path of the file. No ending is added; the format is `.npz` for every ending. If the path is a link, its
            target is replaced and the link stays. The permissions of an old file are kept.
        **objects: the objects and values to save.

    Raises:
        TypeError: if something cannot be saved, or has no name. The message names it, and no file is written.
        ValueError: if several processes pass objects with different arrays. No file is written.
        OSError: if the file cannot be written. The old file is unchanged.
        RuntimeError: if an array cannot be gathered, since another process has gone. The message names the array.

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
    _refuse_unnamed("save", path, unnamed, "mt.save(path, model=model, opt=opt)")
    whole, arrays = snapshot(objects)
    if not are_spread(arrays):
        _write(path, whole, arrays.items())
        return
    gathering, failure = Gathering(os.fsdecode(path), arrays), None
    try:
        if jax.process_index() == 0:
            _write(path, whole, gathering)
    except GatheringError:
        raise
    except Exception as error:
        failure = error
    gathering.finish(failure)


def _refuse_unnamed(name: str, path: Any, unnamed: tuple[Any, ...], instead: str) -> None:
    """Raise TypeError for `torch.save`'s order of arguments, for objects without a name, and for what is no path."""
    if unnamed or not isinstance(path, str | bytes | os.PathLike):
        given = ", ".join(type(value).__name__ for value in (path, *unnamed))
        raise TypeError(f"mt.{name} takes a path and then objects by name: write `{instead}`; got {given}")


def _write(path: Any, description: Any, arrays: Iterable[tuple[str, Any]]) -> None:
    with replacing(path) as (file, _):
        archive.write(file, description, arrays)


def load(path: str | bytes | os.PathLike[Any], /, *unnamed: Never, **objects: Any) -> dict[str, Any]:
    """Load the states that `save` wrote into objects, in place, and return the saved values.

    Loaded arrays are put on the devices to which the objects' arrays are bound, in the same sharding.

    Args:
        path: the path of the file.
        **objects: every object whose state was saved, under its name; None skips an object.

    Returns:
        The saved values (numbers, strings, arrays, …) by name. Arrays are NumPy arrays.

    Raises:
        ValueError: if `save` did not write the file, if the file is damaged, or if it does not fit the objects. One error
            lists all differences. Nothing is changed then.
        TypeError: if an object has no name.
        OSError: if the file cannot be read.

    Example:
        see `save`.
    """
    _refuse_unnamed("load", path, unnamed, "mt.load(path, model=model, opt=opt)")
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
    """The validated description of a checkpoint."""

    objects: dict[str, Any]  # name to {"stateful": bool, "type": str, "value": description}
    impl: str  # the type of the random stream's keys, such as threefry2x32
    stream: np.ndarray[Any, Any]  # the data of the random stream's key


def snapshot(objects: Mapping[str, Any], abstract: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a description of the objects and the random stream in JSON types, and their arrays by name.

    The arrays are not copied: those of JAX are lent (a step copies them before it donates them), those of NumPy belong to
    the caller. All are of one moment between two calls, even if other threads train.

    Raises:
        TypeError: if something cannot be saved. With `abstract`, there may be `jax.ShapeDtypeStruct`s among the arrays.
    """
    objects = {name: module_of(value) for name, value in objects.items()}
    cells = [cell for value in objects.values() if isinstance(value, Stateful) for cell in value._held_cells()]
    whole: tuple[dict[str, Any], dict[str, Any]] = steadily(
        [*cells, random.current().cell], partial(_snapshot, objects)
    )
    shapes = [name for name, array in whole[1].items() if isinstance(array, jax.ShapeDtypeStruct)]
    if shapes and not abstract:
        raise TypeError(
            f"save(): {shapes[0]} is only a shape (a jax.ShapeDtypeStruct), with no numbers to save. Load or make the arrays"
            " first"
        )
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
    """Check a description of `snapshot` that was read from a checkpoint.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: if `snapshot` did not write it.
    """
    if description["version"] != 1:
        raise ValueError("another version of this library wrote it")
    objects, stream = description["objects"], description["stream"]
    if not all(type(e["stateful"]) is bool and type(e["type"]) is str and "value" in e for e in objects.values()):
        raise ValueError("its description is not understood")
    return Saved(objects, str(stream["impl"]), np.asarray(stream["data"], np.uint32))


def matched(saved: Saved, objects: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the objects for which a state was saved, by name, and the problems with all names and types."""
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
                f"  {name}: a {type(objects[name]).__name__} has no state, and the state of a {entry['type']} was saved"
            )
    impl = random.current().impl
    if saved.impl != impl:
        problems.append(f"  the random stream is of {saved.impl} keys; here JAX makes {impl} keys")
    stateful = {name for name, entry in saved.objects.items() if entry["stateful"]}
    known = {name: module_of(obj) for name, obj in objects.items() if name in stateful and _is_stateful(obj)}
    return known, sorted(problems)


def _is_stateful(value: Any) -> bool:
    kind = type(module_of(value))
    return not isinstance(value, type) and hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")


def bring_back(
    source: str, saved: Saved, targets: Mapping[str, Any], problems: list[str], values: Mapping[str, Any]
) -> None:
    """Load the states into all objects and the random stream, or change nothing. Modules are loaded before optimizers.

    Args:
        source: the name of the checkpoint in messages.
        saved: its validated description.
        targets: the objects, as `matched` returns them.
        problems: the problems that `matched` has found.
        values: the saved states by name.

    Raises:
        ValueError: if there are problems, or a state does not fit its object. One error lists them all.
    """
    ordered = sorted(targets, key=lambda name: hasattr(type(targets[name]), "step"))
    modules = [(targets[name], values[name]) for name in ordered if is_module(targets[name])]
    with sized_by(modules), interrupts.deferred:
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
                    error.add_note(f"the earlier state of {name} could not be restored: {failure}")
            raise


def _fitted(saved: Any, mine: Any, path: str, problems: list[str]) -> Any:
    """Return a saved state in the form of `mine`, the state that it replaces: with its schedules, and on its devices.

    The schedules must be those that were saved. If one is not, this is added to `problems`.
    """
    if isinstance(saved, Schedule) or (callable(mine) and not isinstance(saved, dict | list | tuple)):
        if not callable(mine) or not isinstance(saved, Schedule) or saved.text not in (None, text_of(mine)):
            there = Schedule(text_of(mine)) if callable(mine) else mine
            what = "a schedule" if isinstance(saved, Schedule) else "a number"
            problems.append(f"  {path}: {what} was saved here ({saved!r}), and there is {there!r}")
        return mine
    if isinstance(saved, np.ndarray | jax.Array) and isinstance(mine, jax.Array | jax.ShapeDtypeStruct):
        return restored_like(saved, mine)
    if isinstance(saved, dict) and isinstance(mine, Mapping):
        return {key: _fitted(value, mine.get(key), f"{path}.{key}", problems) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and type(saved) is type(mine) and len(saved) == len(mine):
        pairs = enumerate(zip(saved, mine, strict=True))
        return type(saved)([_fitted(a, b, f"{path}.{i}", problems) for i, (a, b) in pairs])
    return saved


def restored_like(saved: np.ndarray[Any, Any] | jax.Array, mine: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Return a saved array as a JAX array on the devices, and in the sharding, of `mine`. Nobody else may change `saved`.

    Its dtype is kept, even float64, which JAX would narrow to float32. A later check of dtypes can then report it.
    """
    where = bound_to(mine) if mine.shape == saved.shape else None
    with jax.enable_x64(True) if saved.dtype.itemsize >= 8 else nullcontext():
        if where is None or where.is_fully_addressable or not isinstance(saved, np.ndarray):
            return jax.device_put(saved, where)
        return jax.make_array_from_callback(saved.shape, where, saved.__getitem__)  # `device_put` would send all of it
