"""What happens when an attribute of a module is set, deleted, tied, or not found."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from ..state import access
from ..state import frame as frames
from ..state.cell import Cell
from ..state.packed import release
from ..state.pytree import Stateful
from ..state.structure import changed
from ..state.tracked_containers import TrackedDict, TrackedList, convert, stateful_in
from ..state.walk import walk_of
from . import class_attributes, parametrized
from .parameter import Buffer, Parameter, checked
from .torch_names import missing
from .tree import entries, is_module

MISSING = object()  # stands for an attribute that is not there


def not_found(module: Any, name: str) -> AttributeError:
    """The error for an attribute that a module does not have."""
    cls = type(module)
    if isinstance(class_attributes.class_attribute(cls, name), property):
        return AttributeError(
            f"{cls.__name__}.{name} is a property, whose code raised an AttributeError that Python hides. To see it, call"
            f" `type(module).{name}.fget(module)`"
        )
    own = [*dict.keys(module._cells), *parametrized.names(module), *vars(module)]
    known = [*own, *(n for n in dir(cls) if not n.startswith("_") and n != name)]
    return AttributeError(missing(cls.__name__, "Module", name, known))


def set_attribute(module: Any, cell: Cell | None, name: str, value: Any, label: str, reserved: Collection[str]) -> None:
    """Set an attribute to anything but a new value of its cell.

    Args:
        module: the module.
        cell: the parameter or buffer that the module has by that name, if any.
        name: of the attribute.
        value: a Parameter, a Buffer, a module, a container or a static value.
        label: the attribute's name in messages.
        reserved: the names that every module has.
    """
    if class_attributes.settle(type(module), name, value, label, reserved):
        object.__setattr__(module, name, value)
        if name in ("__class__", "__dict__"):
            changed(module)
    elif cell is None and (computed := parametrized.list_of(module, name)) is not None:
        computed._assign(value, label)
    elif isinstance(value, Parameter | Buffer):
        with restructuring(module, label):
            vars(module).pop(name, None)
            module._cells[name] = value._cell
    elif cell is not None and value is not None:
        raise TypeError(
            f"{label} is a {cell.kind}: it takes an array, a Parameter or a Buffer, not a {type(value).__name__}. `del` it"
            " first to use the name for something else."
        )
    else:
        set_static(module, name, value, label)


def set_static(module: Any, name: str, value: Any, label: str) -> None:
    """Set an attribute to a module, a container or a static value."""
    old = vars(module).get(name, MISSING)
    if old is value and not isinstance(value, list | dict):
        return
    new = convert(value, label)
    for other in stateful_in(new):
        if not is_module(other) and id(module) in walk_of(other).objects:
            kind = type(other).__name__
            raise TypeError(
                f"{label}: this {kind} trains the {type(module).__name__} itself, so each would be a part of the other."
                f" Keep the optimizer outside of the module, or have it train the parts: `{kind}([self.net])`."
            )
    if not isinstance(new, Stateful | TrackedList | TrackedDict) and _typed(old) == _typed(new):
        return
    if name in module._cells or _has_structure(new) or _has_structure(old):
        check_restructurable(module, label)
        module._cells.pop(name, None)
        _put_static(module, name, new)
    else:
        put_static(module, name, new, label)


def put_static(module: Any, name: str, new: Any, label: str) -> None:
    """Set an attribute to a static value that has been checked (`MISSING` deletes it). A trace must set it back."""
    old = vars(module).get(name, MISSING)
    if frames.local.frame is None:
        access.check_restructurable(module._birth, label, "was assigned")
        frames.on_failure(_put_static, module, name, old)
    else:
        frames.local.frame.undo.append((_put_static, (module, name, old)))
        frames.local.frame.statics.append((module, name, old))
    _put_static(module, name, new)


def _put_static(module: Any, name: str, value: Any) -> None:
    """Store a static value (`MISSING` deletes the attribute) and record the change.

    `training` is switched back and forth, so each of its two values has a stamp that comes back with it.
    """
    before = vars(module).get(name, MISSING)
    if value is MISSING:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value
    if name == "training" and type(value) is bool and type(before) is bool and module._structure is not None:
        module._structure.switch(before, value)
    else:
        changed(module)


def delete(module: Any, name: str) -> None:
    """Delete an attribute: a parameter, a buffer, a module or a static value."""
    label = f"{type(module).__name__}.{name}"
    if name not in module._cells and parametrized.list_of(module, name) is not None:
        raise AttributeError(
            f"{label} is computed by a parametrization: `nn.utils.parametrize.remove_parametrizations(module, {name!r})`"
            " makes it a parameter again, which can be deleted"
        )
    with restructuring(module, label):
        if module._cells.pop(name, None) is None:
            if name in vars(module):
                del vars(module)[name]
            else:
                object.__delattr__(module, name)


@contextmanager
def restructuring(module: Any, label: str) -> Iterator[None]:
    """A block that adds, removes or replaces cells or modules. The change is recorded at the end of the block."""
    check_restructurable(module, label)
    try:
        yield
    finally:
        changed(module)


def check_restructurable(module: Any, label: str) -> None:
    """Raise TraceError while compiled code is traced, unless that code made this module."""
    frame = frames.local.frame
    own = frame is not None and id(module) in frame.own
    access.check_restructurable(module._birth, label, "was given a new Parameter, Buffer or module", own)


def tie(module: Any, name: str, other: Any, other_name: str) -> None:
    """See `Module.tie`."""
    mine, name = module._holder(name)
    theirs, other_name = other._holder(other_name)
    old, new = mine._cells[name], theirs._cells[other_name]
    checked(new.value, old.value, f"{type(mine).__name__}.{name} (tied to {type(theirs).__name__}.{other_name})")
    if old.kind != new.kind:
        raise ValueError(f"{name} is a {old.kind} and {other_name} a {new.kind}: tie two of a kind")
    with restructuring(mine, f"{type(mine).__name__}.{name}"):
        release(old)
        mine._cells[name] = new


def holder(module: Any, path: str) -> tuple[Any, str]:
    """The module that holds the parameter or buffer at a dotted path, and its name there."""
    prefix, _, name = path.rpartition(".")
    walk_of(module)  # its error has the path of a lazy layer
    found = dict(module.named_modules(remove_duplicate=False)).get(prefix)
    if found is None or name not in found._cells:
        every = [p for p, _, _, _ in entries(module)]
        near = difflib.get_close_matches(path, every, 1)
        hint = f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(every) or 'none'}"
        raise AttributeError(f"{type(module).__name__} has no parameter or buffer `{path}`{hint}")
    return found, name


def _has_structure(value: Any) -> bool:
    """True for a module or a tracked container, and for a tuple that holds one."""
    if type(value) is tuple:
        return any(map(_has_structure, value))
    return isinstance(value, Stateful | TrackedList | TrackedDict)


def _typed(value: Any) -> Any:
    """A static value with its type, so that (1, 2) and (1.0, 2.0) differ."""
    return type(value), tuple(map(_typed, value)) if type(value) is tuple else value
