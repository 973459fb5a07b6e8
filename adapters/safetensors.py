"""Weights in safetensors files, for exchange with the wider world: PyTorch, Hugging Face, MLX, and others.

`save` writes a module, `load` brings one to what a file says, `read` gives the arrays of any file. Names are torch's dotted
paths, layouts are torch's, and tied parameters are written as torch does it, so `safetensors.torch.load_model` loads
these files into a torch module of the same architecture, and `load` reads what `save_model` wrote.

A file holds arrays and a few strings. To go on training, with optimizers and the random stream, use `mt.save`.
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
from minitorch_jax.module.module import IncompatibleKeys
from minitorch_jax.saving.checkpoint import restored_like
from minitorch_jax.saving.files import filled, replacing

from ._extra import missing

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

    Arrays keep their dtype and every bit. Of a tied parameter (of a state dict: one array object under several names)
    there is one array in the file, under the first of its names in alphabetical order; the metadata says of each other
    name which that is, as `safetensors.torch.save_model` does it. The file takes the place of an old one in one instant.

    Args:
        path: of the file; the name is taken as it is.
        content: a Module, or a dict of arrays (JAX's or NumPy's) by name.
        metadata: strings by name, to go with them. `format` is "pt" if it is not given: names and layouts are torch's.

    Raises:
        ValueError: one error that lists all that the format cannot hold (float8_e4m3, int4, random keys, metadata that is
            no string); no file is written then.
        OSError: if the file cannot be written; the old one is still there.

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
            f"{os.fsdecode(path)} was not written; a safetensors file cannot hold:\n" + "\n".join(problems)
        )
    written = {name: _in_order(value) for name, value in kept.items()}
    specs = {
        name: TensorSpec(dtype=a.dtype.name, shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, a in written.items()  # which must live until they are written
    }
    with replacing(path) as (_, scratch):
        serialize_file(specs, scratch, {"format": "pt", **(metadata or {}), **ties})


def load(path: str | bytes | os.PathLike[Any], module: mt.Module, strict: bool = True) -> IncompatibleKeys:
    """Replace a module's parameters and buffers by a file's: all of them, or nothing.

    Arrays that are bound to a device, or spread over several, stay where they are. Of a parameter that is tied here, one
    of its names in the file is enough; if there are several, their arrays must be equal. Integers of 64 bits, as torch
    counts batches, fit ones of 32 bits if their values do.

    Args:
        path: of a safetensors file, or of the index of one that is in several parts (`….safetensors.index.json`).
        module: takes the values.
        strict: whether missing and unexpected names are errors. Wrong shapes and dtypes always are.

    Returns:
        The missing and the unexpected names, as `Module.load_state_dict`.

    Raises:
        ValueError: if the file is damaged, or does not fit: one error that lists all that differs.
        TypeError: if `module` is no Module.
        OSError: if a file cannot be read.

    Example:
        see `save`.
    """
    if not isinstance(module, mt.Module):
        raise TypeError(
            f"load() takes a Module to load into; got {type(module).__name__}. `read` gives just the arrays"
        )
    arrays, ties, _ = _content(Path(os.fsdecode(path)))
    mine = module.state_dict()
    state = {name: _fitted(array, mine.get(name)) for name, array in arrays.items()}
    for names in _groups((name, cell) for name, _, _, cell in module._entries()):
        found = next((name for name in names if name in state), None)
        for name in names:
            if found is not None and name not in state:
                state[name] = state[found]
    try:
        return module.load_state_dict(state, strict)
    except ValueError as error:
        hints = [
            f"\n  {name} is {ties[name]} in the file, under which it holds both: tie them here as well"
            for name in ties.keys() & (mine.keys() - state)
        ]
        raise ValueError(f"{os.fsdecode(path)}: {error}{''.join(sorted(hints))}") from None


def read(path: str | bytes | os.PathLike[Any]) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """The arrays of a safetensors file, whoever wrote it, and its metadata.

    A name that the metadata gives for another one in the file (as `save` and torch's `save_model` note ties) is among the
    arrays, as the same object, and not in the metadata.

    Args:
        path: of a file, or of the index of one that is in several parts (`….safetensors.index.json`), which must lie in
            the same folder. Where two parts have metadata of one name, the first one's is given.

    Raises:
        ValueError: if it is no such file, is damaged, or has numbers of 4 or 6 bits, for which NumPy has no dtype.
        OSError: if a file cannot be read.

    Example:
        see `save`.
    """
    arrays, ties, metadata = _content(Path(os.fsdecode(path)))
    return arrays | {name: arrays[kept] for name, kept in ties.items()}, metadata


# -- what is written ---------------------------------------------------------------------------------------------------


def _arrays(content: Any) -> tuple[dict[str, Any], list[str]]:
    """The arrays by name, and what is wrong with them."""
    values = content.state_dict() if isinstance(content, mt.Module) else content
    if not isinstance(values, Mapping):
        raise TypeError(f"save() takes a Module or a dict of arrays by name; got {type(content).__name__}")
    problems = []
    for name, value in values.items():
        if not isinstance(name, str) or name == _METADATA:
            problems.append(f"  {name!r} as a name: use another string")
        elif not isinstance(value, jax.Array | np.ndarray | np.generic):
            problems.append(f"  {name}, a {type(value).__name__}: give arrays of JAX or NumPy")
        elif jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            problems.append(f"  {name}, a random key: leave it out, or give `jax.random.key_data(key)` in a state dict")
        elif value.dtype.name not in _DTYPES.values():
            problems.append(
                f"  {name}, of dtype {value.dtype.name}: convert it to one of {', '.join(_DTYPES.values())}"
            )
    return dict(values), problems


def _ties(content: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """Each name that is not written to the one that is. Empty arrays are all written, since torch ties no memory there."""
    if isinstance(content, mt.Module):
        pairs = [(name, cell) for name, _, _, cell in content._entries()]
    else:
        pairs = list(values.items())
    sized = [(name, shared) for name, shared in pairs if getattr(values[name], "size", 0)]
    return {name: min(names) for names in _groups(sized) for name in names if name != min(names)}


def _groups(pairs: Iterable[tuple[str, Any]]) -> list[list[str]]:
    """The names of each object."""
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
            problems.append(f"{label}: that is the name of an array, and would be read as a tie; use another name")
        elif value in kept:
            problems.append(f"{label} = {value!r}: that is the name of an array, and would be read as a tie of it")
    return problems


def _in_order(value: Any) -> np.ndarray[Any, Any]:
    """A NumPy array with its bytes as in the file."""
    array = np.asarray(value, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


# -- what is read ------------------------------------------------------------------------------------------------------


def _fitted(array: np.ndarray[Any, Any], mine: Any) -> Any:
    """An array as the module has it, if it does."""
    if not isinstance(mine, jax.Array) or jnp.issubdtype(mine.dtype, jax.dtypes.prng_key):
        return array
    if (array.dtype.name, mine.dtype.name) in (("int64", "int32"), ("uint64", "uint32")):
        narrow = array.astype(mine.dtype)
        array = narrow if np.array_equal(narrow, array) else array
    return restored_like(array, mine)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The arrays in a file or in several, the names that are tied to another one, and the other metadata."""
    arrays, metadata = _of_index(path) if path.suffix == ".json" else _of_file(path)
    ties = {key: name for key, name in metadata.items() if name in arrays and key not in arrays and key != "format"}
    return arrays, ties, {key: value for key, value in metadata.items() if key not in ties}


def _of_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with open(path, "rb") as file:
        try:
            with safe_open(path, framework="np") as checked:  # every offset, size and type of the header
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
            raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    return arrays, metadata


def _array(data: np.ndarray[Any, Any], entry: Any, name: str) -> np.ndarray[Any, Any]:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"{name} is of {entry['dtype']}, for which NumPy has no dtype")
    if dtype == "bool" and (data > 1).any():
        raise ValueError(f"{name} is of BOOL, and has bytes that are neither 0 nor 1")
    stored = jnp.dtype(dtype).newbyteorder("<")
    return data.view(stored).astype(jnp.dtype(dtype), copy=False).reshape(entry["shape"])


def _of_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Of a model in several files: the index says which array is in which."""
    try:
        places = _json(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in places.values()):
            raise TypeError("it names files by something else than strings")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of safetensors files: {error!r}") from error
    files = sorted(set(places.values()))
    outside = [file for file in files if file in ("", ".", "..") or any(c in file for c in "/\\:\0")]
    if outside:
        raise ValueError(f"{path} names files that are not in its own folder, so nothing was read: {outside}")
    arrays: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    problems = []
    for file in files:
        found, said = _of_file(path.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        problems += [f"  {name}: not in {file}, where the index has it" for name in sorted(wanted - found.keys())]
        problems += [f"  {name}: in {file}, where the index does not have it" for name in sorted(found.keys() - wanted)]
        arrays |= found
        metadata = said | metadata
    if problems:
        raise ValueError(f"{path} and its files differ:\n" + "\n".join(problems))
    return {name: arrays[name] for name in places}, metadata


def _json(data: bytes) -> Any:
    """What JSON says; a name that is there twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    return json.loads(data, object_pairs_hook=unique)
