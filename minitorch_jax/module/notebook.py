"""A module in a notebook: a tree in HTML that folds, and what treescope shows."""

from __future__ import annotations

import html
import importlib
from typing import Any

import jax
import numpy as np

from ..state.cell import Cell
from ..state.errors import UninitializedError
from ..state.static_values import describe
from ..state.uninitialized import is_unsized
from .hooks import HOOKS
from .parameter import declared
from .tree import children, own_cells, own_text

_STYLE = "font-family: monospace; white-space: nowrap"
_INDENT = "margin-left: 1.5em"


def as_html(model: Any) -> str:
    """Return the model as nested `<details>`: classes, settings, counts, and each array's type, frozen, shared or sharded."""
    return f'<div style="{_STYLE}">{_module("", "", model, {}, {})}</div>'


def _module(name: str, path: str, module: Any, modules: dict[int, str], cells: dict[Cell, str]) -> str:
    """The HTML of a module. `modules` and `cells` hold the paths of those that were shown before."""
    title = f"({html.escape(name)}): " if name else ""
    title += f"<b>{html.escape(type(module).__name__)}</b>"
    if id(module) in modules:
        return f"<div>{title} <i>is {html.escape(modules[id(module)] or 'the model itself')}</i></div>"
    modules[id(module)] = path
    own = [] if is_unsized(module) else own_cells(module)
    below = list(children(module))
    settings = module.extra_repr()
    title += f"({html.escape(settings)})" if is_unsized(module) or settings != own_text(module) else ""
    counted = _counted(module)
    title += f" <i>{counted}</i>" if counted else ""
    inside = [_array(key, f"{path}.{key}".lstrip("."), cell, cells) for key, cell in own]
    inside += [_module(key, f"{path}.{key}".lstrip("."), child, modules, cells) for key, child in below]
    if not inside:
        return f"<div>{title}</div>"
    opened = "" if name else " open"
    return f'<details{opened}><summary>{title}</summary><div style="{_INDENT}">{"".join(inside)}</div></details>'


def _counted(module: Any) -> str:
    """The number of parameters, and how many of them are frozen."""
    try:
        count, trainable = module.num_parameters(), module.num_parameters(trainable_only=True)
    except UninitializedError:
        return "sizes come from the first input"
    frozen = "" if trainable == count else ", all frozen" if not trainable else f", {count - trainable:,} frozen"
    mode = "" if module.training else ", in evaluation mode"
    return f"{count:,} parameter{'' if count == 1 else 's'}{frozen}{mode}" if count else mode.removeprefix(", ")


def _array(name: str, path: str, cell: Cell, cells: dict[Cell, str]) -> str:
    """The line of a parameter or buffer."""
    like = declared(cell)
    notes = [] if cell.kind == "parameter" else ["buffer"]
    if cell.kind == "parameter":
        notes.append(f"{int(np.prod(like.shape)):,}")
        notes += [] if cell.trainable else ["frozen"]
    if cells.setdefault(cell, path) != path:
        notes.append(f"shared with {cells[cell]}")
    notes += _sharding(cell.value)
    return f"<div>{html.escape(f'{name}: {describe(like)}')} <i>{html.escape(', '.join(notes))}</i></div>"


def _sharding(value: Any) -> list[str]:
    """How an array is spread over several devices, as "P('model', None)"; nothing for one device."""
    sharding = getattr(value, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return []
    if isinstance(sharding, jax.sharding.NamedSharding):
        return [f"P({', '.join(map(repr, sharding.spec))})"]
    return [f"{type(sharding).__name__} on {len(sharding.device_set)} devices"]


def as_treescope(module: Any, path: str | None, renderer: Any) -> Any:
    """Return what treescope shows of a module: its class, arrays, submodules and settings."""
    repr_lib = importlib.import_module("treescope.repr_lib")  # treescope, which no user must have, has called this
    names = [] if is_unsized(module) else [name for name, _ in own_cells(module)]
    shown = {name: getattr(module, name) for name in names} | dict(vars(module))
    shown.pop(HOOKS, None)
    if shown.get("training") is True:
        del shown["training"]
    return repr_lib.render_object_constructor(type(module), shown, path, renderer, roundtrippable=False)
