"""Reading and loading the dict of all arrays of a module: `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ..runtime.numpy_memory import as_numpy
from ..state import access
from ..state import frame as frames
from ..state.cell import Cell
from ..state.concurrent_reads import lend, steadily
from ..state.static_values import describe, shown
from ..state.uninitialized import is_unsized
from ..state.walk import join, walk_of
from .globs import kept
from .parameter import declared, encode_checked, same_values
from .sizes import sized_by
from .torch_methods import TorchMethods
from .tree import own_cells

EXTRA = "_extra_state"  # torch's name
_NONE = object()


class IncompatibleKeys(NamedTuple):
    """The names that `load_state_dict(strict=False)` skipped."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def read_state_dict(module: Any, prefix: str) -> dict[str, Any]:
    """See `Module.state_dict`."""
    found: list[tuple[str, Any, Cell | None]] = []
    walk_of(module)  # its error has the path of a lazy layer
    for path, holder in module.named_modules(remove_duplicate=False):
        found += [(prefix + join(path, name), holder, cell) for name, cell in own_cells(holder)]
        if _writes(holder, "get_extra_state"):
            found.append((prefix + join(path, EXTRA), holder, None))

    def read_all() -> dict[str, Any]:
        return {
            path: holder.get_extra_state() if cell is None else access.read(cell, holder)
            for path, holder, cell in found
        }

    return steadily([cell for *_, cell in found if cell is not None], read_all) if frames.is_eager() else read_all()


def _writes(module: Any, method: str) -> bool:
    """True if the module's class, and not only Module itself, has one of the methods of extra state."""
    return getattr(type(module), method) is not getattr(TorchMethods, method)


def load_state_dict(
    module: Any, state_dict: Mapping[str, Any], strict: bool, keep: Sequence[str] = ()
) -> IncompatibleKeys:
    """See `Module.load_state_dict`. Names that a glob of `keep` matches may be missing."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict takes a dict of arrays by path, such as `other.state_dict()`; got {shown(state_dict)}. For a"
            " file of `mt.save` write `mt.load(path, model=model)`"
        )
    with sized_by([(module, state_dict)]):
        return _load(module, state_dict, strict, keep)


def _load(module: Any, state_dict: Mapping[str, Any], strict: bool, keep: Sequence[str]) -> IncompatibleKeys:
    """Do what `load_state_dict` does, once the lazy layers whose arrays are loaded have their sizes."""
    modules = list(module.named_modules(remove_duplicate=False))
    left = [(path, layer) for path, layer in modules if is_unsized(layer)]
    known = [(path, holder) for path, holder in modules if not is_unsized(holder)]
    found = [(join(path, name), holder, name, cell) for path, holder in known for name, cell in own_cells(holder)]
    extra = {join(path, EXTRA): holder for path, holder in modules if _writes(holder, "set_extra_state")}
    lacking = [join(path, name) for path, layer in left for name in layer._cells.like._cells]
    paths = dict.fromkeys([*(path for path, _, _, _ in found), *lacking, *extra])
    missing = [path for path in paths if path not in state_dict]
    unexpected = [path for path in state_dict if path not in paths]
    may_miss, types = kept(keep, paths) if keep else (), {path: cell for path, _, _, cell in found}
    problems = [f"  missing: {path}{_typed(types.get(path))}" for path in missing if path not in may_miss]
    problems += [f"  unexpected: {path}{_typed(state_dict[path])}" for path in unexpected]
    problems = problems if strict else []
    problems += [
        f"  {path}: {shown(state_dict[path])} does not tell the sizes" for path in lacking if path in state_dict
    ]
    new: dict[Cell, tuple[str, Any]] = {}
    for path, holder, _, cell in found:
        if path in state_dict:
            given = state_dict[path]
            try:
                array = given if isinstance(given, jax.Array | jax.ShapeDtypeStruct) else as_numpy(given)
                value = encode_checked(cell, array, path)
            except (ValueError, TypeError) as error:
                problems.append(f"  {error}" if str(error).startswith(path) else f"  {path}: {error}")
                continue
            access.check_writable(cell, path, holder)
            if cell in new and not same_values(new[cell][1], value):
                problems.append(f"  {path} and {new[cell][0]} are one tied parameter, but their arrays differ")
            new.setdefault(cell, (path, value))
    if problems:
        listed = "\n".join(problems)
        raise ValueError(f"state_dict does not fit this {type(module).__name__}; nothing was loaded:\n{listed}")
    extra = {path: holder for path, holder in extra.items() if path in state_dict}
    before = [cell.value for cell in new] if extra else []
    for cell in new:
        lend(cell)
    _store(new, [value for _, value in new.values()])
    try:
        _set_extra_states(extra, state_dict)
    except BaseException:
        _store(new, before)
        raise
    return IncompatibleKeys(missing, unexpected)


def _typed(value: Any) -> str:
    """`, float32[3, 4]` of an array or a cell; nothing of another value."""
    value = declared(value) if isinstance(value, Cell) else value
    return f", {describe(value)}" if hasattr(value, "shape") and hasattr(value, "dtype") else ""


def _store(cells: Iterable[Cell], values: list[Any]) -> None:
    access.store_all(list(cells), values)
    for cell in cells:
        access.moved(cell)


def _set_extra_states(extra: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Set all extra states, or none if one is refused."""
    before = [(h, h.get_extra_state() if _writes(h, "get_extra_state") else _NONE) for h in extra.values()]
    try:
        for path, holder in extra.items():
            holder.set_extra_state(state_dict[path])
    except BaseException:
        for holder, state in before:
            if state is not _NONE:
                holder.set_extra_state(state)
        raise
