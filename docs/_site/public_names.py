"""The public names of the package, read from its source, so adapters of libraries that are not installed count too.

A name is public if the file of its package imports it with `as` and the same name, or lists it in `__all__`; in a module
that is one file, also if the file defines it. Names with an underscore are private.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = "minitorch_jax"
FOLDERS = {f"{PACKAGE}.adapters": ROOT / "adapters"}  # a link from the package leads there
PACKAGES = (
    PACKAGE,
    f"{PACKAGE}.nn",
    f"{PACKAGE}.nn.functional",
    f"{PACKAGE}.nn.init",
    f"{PACKAGE}.nn.utils",
    f"{PACKAGE}.nn.utils.parametrizations",
    f"{PACKAGE}.nn.utils.parametrize",
    f"{PACKAGE}.nn.utils.rnn",
    f"{PACKAGE}.optim",
    f"{PACKAGE}.optim.schedules",
)


class Name(NamedTuple):
    """A public name, and the file (without its ending) that defines it: `conv` for `nn.Conv2d`."""

    module: str
    name: str
    file: str

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


def source_of(module: str) -> Path:
    """The file of a module: that of the package, or a file of its own."""
    for prefix, folder in FOLDERS.items():
        if module.startswith(prefix):
            place = folder.joinpath(*module.removeprefix(prefix).strip(".").split("."))
            break
    else:
        place = ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def adapters() -> list[str]:
    """The modules of adapters, by discovery."""
    folder = FOLDERS[f"{PACKAGE}.adapters"]
    found = [path.stem for path in folder.glob("*.py")] + [path.parent.name for path in folder.glob("*/__init__.py")]
    return [f"{PACKAGE}.adapters.{name}" for name in sorted(found) if not name.startswith("_")]


def modules() -> list[str]:
    """Every module that has public names."""
    return [*PACKAGES, *adapters()]


@cache
def public_names(module: str) -> tuple[Name, ...]:
    """The public names of a module, in the order of its source."""
    return tuple(_public_names(module))


def _public_names(module: str) -> Iterator[Name]:
    path = source_of(module)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed = {
        element.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
        for element in node.value.elts
    }
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                again = alias.asname == alias.name or alias.name in listed
                if again and not alias.name.startswith("_") and not _is_module(path, node, alias.name):
                    yield Name(module, alias.name, (node.module or "").rpartition(".")[2])
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield Name(module, node.name, path.stem)


def _is_module(path: Path, node: ast.ImportFrom, name: str) -> bool:
    """True for `from . import nn as nn`."""
    return node.module is None and ((path.parent / name).is_dir() or (path.parent / f"{name}.py").exists())


def all_names() -> list[Name]:
    """Every public name of the package."""
    return [name for module in modules() for name in public_names(module)]


def selected(line: str) -> list[Name]:
    """The names that a line of a `reference` block asks for.

    The line is a module, alone or with a colon and what to take from it: names, or files that end in `.py`.
    """
    module, _, wanted = line.partition(":")
    names = public_names(module.strip())
    if not wanted.strip():
        return list(names)
    found = []
    for word in wanted.split():
        new = [one for one in names if word in (one.name, f"{one.file}.py")]
        if not new:
            raise ValueError(f"{module} has no public name or file {word!r}")
        found += new
    return found
