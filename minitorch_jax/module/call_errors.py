"""What is added to an error that leaves the call of a module: the module's path, and what to write for a list."""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress
from typing import Any

import jax

from ..runtime import tracebacks
from ..state.static_values import describe
from ..state.walk import join
from . import torch_arrays as torch_arrays  # adds its notes to the errors that `trim` is given
from .numpy_arguments import copied_arguments
from .tree import is_module, items_below

_START, _IN_A_HOOK = "while calling ", "in the forward "


def explain(error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Add a note with the path of the innermost module that was called, once. Call it in `Module.__call__` only."""
    if not _is_noted(error):
        chain = _modules_above(sys._getframe(1))
        with suppress(Exception):  # of the user's `__getattribute__`, say: it must not hide the error
            error.add_note(_note(chain, args, kwargs))
    tracebacks.trim(error)


def refuse_no_array(error: Exception, module: Any, args: tuple[Any, ...]) -> None:
    """Raise TypeError in place of an error of a layer of this package that was given no array as its input."""
    if _is_noted(error, (_START, _IN_A_HOOK)) or not args or (hasattr(args[0], "shape") and hasattr(args[0], "dtype")):
        return  # noted: the layer has passed on an error of code that it called, or a hook has raised it
    entry: Any = error.__traceback__ and error.__traceback__.tb_next
    if entry is None or entry.tb_frame.f_code is copied_arguments.__code__:
        return  # its arguments were refused before it ran
    if isinstance(args[0], getattr(type(module), "_takes", ())):
        return
    if isinstance(error, AttributeError | TypeError | ValueError) and type(module).__module__.startswith(
        f"{tracebacks.PACKAGE}.nn."
    ):
        kind = type(args[0]).__name__
        fix = ": write `jnp.asarray(x)`" if isinstance(args[0], list | tuple | int | float | complex) else ""
        if kind == "PackedSequence":
            fix = ": write `pad_packed_sequence(x)[0]`"
        raise TypeError(
            f"{_name(module)} takes an array; it was given {'an' if kind[0] in 'aeiou' else 'a'} {kind}{fix}"
        ) from None


def note_hook(error: Exception, hook: str) -> None:
    """Add a note that an error comes from a hook, `forward hook ...`. The module's path follows, in a note of `explain`."""
    error.add_note(f"in the {hook}")


def path_of_call(module: Any) -> str:
    """Return the path of a module that is being called, from the outermost module that is."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_name != "__call__" or frame.f_locals.get("self") is not module:
        frame = frame.f_back
    path, outermost = _path(_modules_above(frame))
    return join(type(outermost).__name__, path) if path else type(outermost).__name__


def _is_noted(error: Exception, starts: str | tuple[str, ...] = _START) -> bool:
    return any(note.startswith(starts) for note in getattr(error, "__notes__", ()))


def _modules_above(frame: Any) -> list[Any]:
    """Return the modules that are being called, the innermost first. `frame` is that of the innermost `Module.__call__`."""
    code, chain = frame.f_code, []
    while frame is not None:
        if frame.f_code is code:
            chain.append(frame.f_locals["self"])
        frame = frame.f_back
    return chain


def _note(chain: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return "while calling blocks.3.proj: Linear(8, 8), given float32[4, 8]". The path begins at the outermost module."""
    module, (path, _) = chain[0], _path(chain)
    arrays = [describe(leaf) for leaf in jax.tree.leaves((args, kwargs)) if hasattr(leaf, "shape")]
    given = f", given {', '.join(arrays[:4])}{', …' if len(arrays) > 4 else ''}" if arrays else ""
    return f"{_START}{path}{': ' if path else ''}{_name(module)}{given}"


def _path(chain: list[Any]) -> tuple[str, Any]:
    """Return the path of the first of some modules, each of which calls the one before, and the module where it begins."""
    path, inner = "", chain[0]
    for outer in chain[1:]:
        found = _path_of(inner, outer)
        if found is not None:
            path, inner = join(found, path) if path else found, outer
    return path, inner


def _path_of(inner: Any, outer: Any, above: tuple[int, ...] = ()) -> str | None:
    """Return the path of a module in another; None if it is not there. `above`: the ids of the modules around `outer`."""
    children = [(path, value) for path, value in items_below(outer) if is_module(value)]
    for path, module in children:
        if module is inner:
            return path
    above = (*above, id(outer))
    for path, module in children:
        found = None if id(module) in above else _path_of(inner, module, above)
        if found is not None:
            return join(path, found)
    return None


def _name(module: Any) -> str:
    """Return the class with the arguments that it cannot do without, such as `Linear(8, 8)`. Else the class alone."""
    kind = type(module)
    with suppress(ValueError, TypeError, KeyError):
        parameters = inspect.signature(kind).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        values = [vars(module)[name] for name in needed]
        text = f"{kind.__name__}({', '.join(map(repr, values))})"
        if values and len(text) <= 80 and all(isinstance(value, int | float | str | tuple) for value in values):
            return text
    return kind.__name__
