"""Replacing a file at once, so that a reader finds the whole old or new file, and reading arrays without a second copy."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK = 1 << 20  # bytes that are read at once


@contextmanager
def replacing(path: str | bytes | os.PathLike[Any]) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new file, and return it with its name. At the end of the block it is on the disk and replaces `path` at once.

    If `path` is a link, its target is replaced and the link stays. The new file has the permissions of the old one.

    Raises:
        PermissionError: if the old file, or its folder, may not be written.
        OSError: if the old file is a folder or not a regular file.
    """
    path = os.fsdecode(path)
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        old = target.stat()
        if stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "this is no regular file, so a new one cannot replace it", path)
        if not os.access(target, os.W_OK):  # a rename would not check this
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    scratch = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:  # it names the scratch file, which the user does not know
        raise OSError(error.errno, error.strerror, path) from None
    try:
        with os.fdopen(descriptor, "w+b") as file:
            with suppress(FileNotFoundError):
                os.chmod(scratch, stat.S_IMODE(target.stat().st_mode))
            mode = stat.S_IMODE(scratch.stat().st_mode)
            yield file, scratch
        with open(scratch, "ab") as file:  # opened again: the block may have put another file under the name
            os.chmod(scratch, mode)
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        with suppress(FileNotFoundError):
            scratch.unlink()
        raise
    with suppress(OSError):  # some systems cannot open a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def filled(stream: Any, size: int) -> np.ndarray[Any, Any]:
    """Read the next `size` bytes of a stream into memory that begins at a multiple of 64, which JAX on CPU need not copy.

    Raises:
        ValueError: if the stream holds fewer bytes.
    """
    whole = np.empty(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    data = whole[start : start + size]
    for begin in range(0, size, BLOCK):
        part = data[begin : begin + BLOCK].data
        if stream.readinto(part) != len(part):
            raise ValueError("it ends too early")
    return data
