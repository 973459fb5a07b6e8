"""The file format of `mt.save`: an `.npz` archive of NumPy with a description in JSON, and a digest of the file at its end.

Nothing in it is pickled, and everything is checked: a damaged, foreign or hostile file is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from .files import BLOCK, filled

_MAGIC = b"minitorch_jax sha256:"  # followed by the digest in hexadecimal: the archive's comment, which ends the file
_DIGEST = 64
_DESCRIPTION = "description.json"
# What the reading of a hostile file may raise. LookupError includes KeyError and IndexError; RuntimeError includes
# NotImplementedError and RecursionError.
UNREADABLE = (
    *(ValueError, TypeError, AttributeError, LookupError, OverflowError, RuntimeError, EOFError),
    *(struct.error, zipfile.BadZipFile),
)


def write(file: BinaryIO, description: Any, arrays: Iterable[tuple[str, Any]]) -> None:
    """Write a description, which is JSON, and arrays by name into an empty file, one array at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = _MAGIC + b"0" * _DIGEST
        archive.writestr(_DESCRIPTION, json.dumps(description))
        for name, value in arrays:
            array = np.asarray(value)
            if np.dtype(array.dtype.name).isbuiltin != 1:  # NumPy's format has no name for bfloat16 and similar dtypes
                array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    digest = _digest(file)
    file.seek(-_DIGEST, os.SEEK_END)
    file.write(digest)


def _digest(file: BinaryIO) -> bytes:
    """Return the digest of all bytes before the digest."""
    left = file.seek(0, os.SEEK_END) - _DIGEST
    file.seek(0)
    found = hashlib.sha256()
    while left > 0:
        block = file.read(min(left, BLOCK))
        if not block:
            break
        found.update(block)
        left -= len(block)
    return found.hexdigest().encode()


def read(file: BinaryIO, path: str) -> tuple[Any, dict[str, Any]]:
    """Return the description, and the arrays by name.

    Raises:
        ValueError: if `write` did not write the file, or if it is damaged. The message names `path`.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(-min(len(_MAGIC) + _DIGEST, size), os.SEEK_END)
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
            description = json.loads(archive.read(_DESCRIPTION))
            arrays = {
                e.filename.removesuffix(".npy"): _array(archive, e) for e in entries if e.filename != _DESCRIPTION
            }
            return description, arrays
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an offset before the file's beginning
            raise
        raise ValueError(f"{path} is no file that mt.save has written: {error}") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """Read one array. Its header must fit the size of the entry."""
    with archive.open(info) as entry:
        version = np.lib.format.read_magic(entry)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise ValueError(f"{info.filename} has a version of NumPy's format that is not known")
        shape, fortran, dtype = header(entry)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size != info.file_size - entry.tell():
            raise ValueError(f"{info.filename} is not the array that its header describes")
        array = filled(entry, size).view(dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
