"""Writing a file so that whoever looks finds the old one or the new one, whole; reading arrays without a second copy."""

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
    """A new file, and its name, that takes the place of `path` in one instant, once it is complete and on the disk.

    A link stays a link: what it points to is replaced. The new file has the old one's permissions.

    Raises:
        PermissionError: if the old file, or its folder, may not be written.
    """
    path = os.fsdecode(path)
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        old = target.stat()
        if stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "this is no regular file, which a new one could take the place of", path)
        if not os.access(target, os.W_OK):  # renaming would not ask
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    scratch = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:  # of a name that nobody has given
        raise OSError(error.errno, error.strerror, path) from None
    try:
        with os.fdopen(descriptor, "w+b") as file:
            with suppress(FileNotFoundError):
                os.chmod(scratch, stat.S_IMODE(target.stat().st_mode))
            mode = stat.S_IMODE(scratch.stat().st_mode)
            yield file, scratch
        with open(scratch, "ab") as file:  # who was given the name may have put another file there
            os.chmod(scratch, mode)
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        with suppress(FileNotFoundError):
            scratch.unlink()
        raise
    with suppress(OSError):  # where a folder cannot be opened, the system keeps its own order
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def filled(stream: Any, size: int) -> np.ndarray[Any, Any]:
    """The next `size` bytes of a stream, where JAX on CPU can use them without a copy: at a multiple of 64.

    Raises:
        ValueError: if there are fewer.
    """
    whole = np.empty(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    data = whole[start : start + size]
    for begin in range(0, size, BLOCK):
        part = data[begin : begin + BLOCK].data
        if stream.readinto(part) != len(part):
            raise ValueError("it ends too early")
    return data
