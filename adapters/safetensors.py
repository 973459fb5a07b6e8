"""Weights in safetensors files, to exchange with PyTorch, Hugging Face, MLX and others.

`save` writes a module to a file, `load` loads a file into a module, and `read` returns the arrays of any file. Names are
torch's dotted paths, layouts are torch's, and tied parameters are written as torch writes them. So
`safetensors.torch.load_model` loads these files into a torch module of the same architecture, and `load` reads files that
`save_model` wrote. Where names or layouts differ, `load` takes `names`, a dict of the file's names and ours, with `*`, and
`transposed`.

A file holds arrays and a few strings. Use `mt.save` to continue training: it also saves optimizers and the random stream.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import minitorch_jax as mt
from minitorch_jax.module.sizes import sized_by
from minitorch_jax.module.state_dict import IncompatibleKeys, load_state_dict
from minitorch_jax.saving.checkpoint import restored_like
from minitorch_jax.saving.files import filled, replacing
from minitorch_jax.state.static_values import describe

from ._extra import missing
from ._names import Keep, Names, Operations, Renamed, as_globs, renamed
from ._names import transposed as transposed

try:
    from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
except ImportError as error:
    raise missing("safetensors", error) from error

_DTYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32"},
    **{"U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}
_METADATA = "__metadata__"


def save(
    path: str | bytes | os.PathLike[Any],
    content: mt.Module | Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a module's parameters and buffers, or a state dict, to a safetensors file.

    Arrays keep their dtype and every bit. A tied parameter (in a state dict, one array object under several names) is
    written once, under the first of its names in alphabetical order. The metadata maps its other names to that name, as
    `safetensors.torch.save_model` does. An existing file is replaced atomically.

    Args:
        path: the path of the file; no suffix is added.
        content: a Module, or a dict of arrays (JAX's or NumPy's) by name.
        metadata: strings by name, stored in the file. `format` is "pt" by default: names and layouts are torch's.

    Raises:
        ValueError: if the format cannot hold something: float8_e4m3, int4, random keys, metadata that is not a string.
            One error lists all of them, and no file is written.
        OSError: if the file cannot be written; an old file stays as it was.

    Example:
        >>> import os, tempfile
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.adapters import safetensors
        >>> model = nn.Linear(3, 2)
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> safetensors.save(path, model, metadata={"licence": "Apache-2.0"})
        >>> safetensors.load(path, nn.Linear(3, 2))
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        >>> arrays, metadata = safetensors.read(path)
        >>> arrays["weight"].shape, metadata["licence"], metadata["format"]
        ((2, 3), 'Apache-2.0', 'pt')
    """
    values, problems = _arrays(content)
    ties = _ties(content, values)
    kept = {name: value for name, value in values.items() if name not in ties}
    problems += _metadata_problems(metadata or {}, values.keys(), kept.keys())
    if problems:
        raise ValueError(
            f"{os.fsdecode(path)} was not written. A safetensors file cannot hold:\n" + "\n".join(problems)
        )
    written = {name: _in_order(value) for name, value in kept.items()}
    specs = {
        name: TensorSpec(dtype=a.dtype.name, shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, a in written.items()  # the specs point to these arrays, so `written` must live until the file is written
    }
    with replacing(path) as (_, scratch):
        serialize_file(specs, scratch, {"format": "pt", **(metadata or {}), **ties})


def load(
    path: str | bytes | os.PathLike[Any],
    module: mt.Module,
    strict: bool = True,
    *,
    names: Names | None = None,
    keep: Keep = (),
) -> IncompatibleKeys:
    """Replace a module's parameters and buffers by those of a file: all of them, or none.

    Arrays that are bound to a device, or sharded over several, stay there. For a tied parameter, the file needs one of its
    names; if it has several, their arrays must be equal. Integers of 64 bits, such as torch's batch counts, are loaded into
    32 bits if their values fit.

    Args:
        path: the path of a safetensors file, or of the index of a file in several parts (`….safetensors.index.json`).
        module: the module to change. Its lazy layers take their sizes from the file.
        strict: True makes missing and unexpected names an error. Wrong shapes and dtypes are always errors.
        names: where file and module have other names, a dict of the file's names and ours. `*` in a key stands for any
            text, and in its value for the same text; None as a value leaves an array out; `transposed(name)` is for an
            array that the file has the other way round; a tuple as a key is joined, and one as a value is divided, along
            the first axis. The first key that matches counts. A name without a key stays as it is.
        keep: a name of `module`, or several, with globs: these arrays stay as they are, whatever the file has.

    Returns:
        The missing and the unexpected names, as `Module.load_state_dict` does. Those of `keep` are among the missing.

    Raises:
        ValueError: if the file is damaged, does not fit `names`, or, with its names replaced, does not fit the module. One
            error lists all differences.
        TypeError: if `module` is not a Module.
        OSError: if a file cannot be read.

    Example:
        see `save`.
    """
    if not isinstance(module, mt.Module):
        raise TypeError(
            f"load() takes a Module to load into; got a {type(module).__name__}. To get only the arrays, use `read`"
        )
    arrays, tied, _ = _content(Path(os.fsdecode(path)))
    given = arrays | {name: arrays[stored] for name, stored in tied.items()}
    found = renamed(names, given, Operations(np.transpose, np.concatenate, describe))
    if found.problems:
        raise ValueError(
            f"{os.fsdecode(path)}: `names` does not fit the file; nothing was loaded:{_list(found.problems)}"
        )
    ties = _renamed_ties(tied, found)
    for name in ties:
        del found.arrays[name]
    found = found.without(keep)
    with sized_by([(module, found.arrays)]):
        return _load(path, found, ties, module, strict, as_globs(keep))


def _renamed_ties(tied: Mapping[str, str], found: Renamed) -> dict[str, str]:
    """The ties of a file under our names. A tie whose array was changed on the way is one no more."""
    ours = {theirs: name for name, theirs in found.sources.items() if len(theirs) == 1}
    pairs = [(ours.get((name,)), ours.get((stored,))) for name, stored in tied.items()]
    return {a: b for a, b in pairs if a and b and found.arrays[a] is found.arrays[b]}


def _list(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in sorted(lines))


def _load(
    path: Any, found: Renamed, ties: Mapping[str, str], module: mt.Module, strict: bool, keep: list[str]
) -> IncompatibleKeys:
    """Load the arrays of a file, once lazy layers have their sizes."""
    mine = module.state_dict()
    state = {name: _fitted(array, mine.get(name)) for name, array in found.arrays.items()}
    for names in _groups((name, cell) for name, _, _, cell in module._entries()):
        first = next((name for name in names if name in state), None)
        for name in names:
            if first is not None and name not in state:
                state[name] = state[first]
    try:
        return load_state_dict(module, state, strict, keep)
    except ValueError as error:
        hints = [
            f"{name} and {ties[name]} are tied in the file, under the name {ties[name]}: tie them here as well"
            for name in ties.keys() & (mine.keys() - state)
        ]
        there = {name: array.shape for name, array in found.arrays.items()}
        hints += found.notes({name: jnp.shape(array) for name, array in mine.items()}, there)
        raise ValueError(f"{os.fsdecode(path)}: {error}{_list(hints)}") from None


def read(path: str | bytes | os.PathLike[Any]) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """The arrays of any safetensors file, and its metadata.

    `save` and torch's `save_model` note ties in the metadata: a name, and the name of the array that it is tied to. Such a
    name is returned among the arrays, as the same object, and not in the metadata.

    Args:
        path: the path of a file, or of the index of a file in several parts (`….safetensors.index.json`). The parts must
            be in the folder of the index. If two parts have metadata of the same name, that of the first is returned.

    Raises:
        ValueError: if this is not a safetensors file, or it is damaged, or it has values of 4 or 6 bits, for which NumPy
            has no dtype.
        OSError: if a file cannot be read.

    Example:
        see `save`.
    """
    arrays, ties, metadata = _content(Path(os.fsdecode(path)))
    return arrays | {name: arrays[kept] for name, kept in ties.items()}, metadata


# -- writing -----------------------------------------------------------------------------------------------------------


def _arrays(content: Any) -> tuple[dict[str, Any], list[str]]:
    """The arrays by name, and a list of problems."""
    values = content.state_dict() if isinstance(content, mt.Module) else content
    if not isinstance(values, Mapping):
        raise TypeError(f"save() takes a Module or a dict of arrays by name; got a {type(content).__name__}")
    problems = []
    for name, value in values.items():
        if not isinstance(name, str) or name == _METADATA:
            problems.append(f"  the name {name!r}: use another string")
        elif not isinstance(value, jax.Array | np.ndarray | np.generic):
            problems.append(f"  {name}, a {type(value).__name__}: pass arrays of JAX or NumPy")
        elif jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            problems.append(f"  {name}, a random key: leave it out, or pass `jax.random.key_data(key)` in a state dict")
        elif value.dtype.name not in _DTYPES.values():
            problems.append(
                f"  {name}, which has dtype {value.dtype.name}: convert it to one of {', '.join(_DTYPES.values())}"
            )
    return dict(values), problems


def _ties(content: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """For each tied name that is not written, the name that is. Empty arrays are all written: torch does not tie them."""
    if isinstance(content, mt.Module):
        pairs = [(name, cell) for name, _, _, cell in content._entries()]
    else:
        pairs = list(values.items())
    sized = [(name, shared) for name, shared in pairs if getattr(values[name], "size", 0)]
    return {name: min(names) for names in _groups(sized) for name in names if name != min(names)}


def _groups(pairs: Iterable[tuple[str, Any]]) -> list[list[str]]:
    """The names of each object, as groups."""
    groups: dict[int, list[str]] = {}
    for name, shared in pairs:
        groups.setdefault(id(shared), []).append(name)
    return list(groups.values())


def _metadata_problems(metadata: Any, names: Iterable[str], kept: Iterable[str]) -> list[str]:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"save() takes metadata as a dict of strings; got {metadata!r}")
    problems = []
    for key, value in metadata.items():
        label = f"  metadata[{key!r}]"
        if not isinstance(key, str) or not isinstance(value, str):
            problems.append(f"{label} = {value!r}: names and values must be strings; use `str(…)` or `json.dumps(…)`")
        elif key in names:
            problems.append(f"{label}: an array has this name, so it would be read as a tie; use another name")
        elif value in kept:
            problems.append(
                f"{label} = {value!r}: an array has this name, so it would be read as a tie; use another value"
            )
    return problems


def _in_order(value: Any) -> np.ndarray[Any, Any]:
    """A NumPy array with its bytes in the order of the file."""
    array = np.asarray(value, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


# -- reading -----------------------------------------------------------------------------------------------------------


def _fitted(array: np.ndarray[Any, Any], mine: Any) -> Any:
    """An array with the dtype and the devices of the module's array, if it fits."""
    if not isinstance(mine, jax.Array) or jnp.issubdtype(mine.dtype, jax.dtypes.prng_key):
        return array
    if (array.dtype.name, mine.dtype.name) in (("int64", "int32"), ("uint64", "uint32")):
        narrow = array.astype(mine.dtype)
        array = narrow if np.array_equal(narrow, array) else array
    return restored_like(array, mine)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The arrays of one or several files, the names that are tied to another name, and the other metadata."""
    arrays, metadata = _of_index(path) if path.suffix == ".json" else _of_file(path)
    ties = {key: name for key, name in metadata.items() if name in arrays and key not in arrays and key != "format"}
    return arrays, ties, {key: value for key, value in metadata.items() if key not in ties}


def _of_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with open(path, "rb") as file:
        try:
            with safe_open(path, framework="np") as checked:  # checks every offset, size and type of the header
                metadata = checked.metadata() or {}
            header = _json(file.read(int.from_bytes(file.read(8), "little")))
            header.pop(_METADATA, None)
            start = file.tell()
            arrays = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                file.seek(start + begin)
                arrays[name] = _array(filled(file, end - begin), entry, name)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    return arrays, metadata


def _array(data: np.ndarray[Any, Any], entry: Any, name: str) -> np.ndarray[Any, Any]:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"{name} has dtype {entry['dtype']}, which NumPy does not have")
    if dtype == "bool" and (data > 1).any():
        raise ValueError(f"{name} has dtype BOOL, and bytes that are neither 0 nor 1")
    stored = jnp.dtype(dtype).newbyteorder("<")
    return data.view(stored).astype(jnp.dtype(dtype), copy=False).reshape(entry["shape"])


def files_of_index(path: Path) -> dict[str, str]:
    """The file that holds each array of a model in several files. All are in the folder of the index."""
    try:
        places: dict[str, str] = _json(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in places.values()):
            raise TypeError("file names must be strings")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
    outside = [file for file in places.values() if file in ("", ".", "..") or any(c in file for c in "/\\:\0")]
    if outside:
        raise ValueError(f"{path} names files outside its own folder, so nothing was read: {sorted(set(outside))}")
    return places


def _of_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays and metadata of a model in several files. The index maps each array to a file."""
    places = files_of_index(path)
    files = sorted(set(places.values()))
    arrays: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    problems = []
    for file in files:
        found, said = _of_file(path.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        problems += [
            f"  {name}: the index places it in {file}, which lacks it" for name in sorted(wanted - found.keys())
        ]
        problems += [
            f"  {name}: {file} has it, and the index does not list it" for name in sorted(found.keys() - wanted)
        ]
        arrays |= found
        metadata = said | metadata
    if problems:
        raise ValueError(f"{path} and its files differ:\n" + "\n".join(problems))
    return {name: arrays[name] for name in places}, metadata


def _json(data: bytes) -> Any:
    """Parse JSON. A name that occurs twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    return json.loads(data, object_pairs_hook=unique)
