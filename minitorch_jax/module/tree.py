"""What a module holds: its submodules, its parameters and buffers, and their paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..state.cell import Cell
from ..state.pytree import Builder, Stateful
from ..state.static_values import describe
from ..state.walk import Node, Walker, join, walk_of
from .parameter import declared


def is_module(value: Any) -> bool:
    """True for a Module. (This file cannot import the class: `module.py` imports this file.)"""
    return isinstance(value, Stateful) and hasattr(value, "_cells")


def items_below(module: Any) -> Iterator[tuple[str, Any]]:
    """`(path, value)` of each attribute that is not an array; for a container, of each item in it."""
    for name, value in list(vars(module).items()):
        yield from _items_in(value, name)


def _items_in(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _items_in(item, join(path, str(i)))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _items_in(item, join(path, key))
    else:
        yield path, value


def children(module: Any) -> Iterator[tuple[str, Any]]:
    """`(path, module)` of each direct submodule, one that has two names under both."""
    return ((path, value) for path, value in items_below(module) if is_module(value))


def named_modules(
    module: Any, prefix: str, seen: set[int], remove_duplicate: bool, above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """`(path, module)` of a module and all below it.

    `seen` holds the ids of the modules that are left out. `remove_duplicate` adds each module that is returned; without it
    a shared module is returned once per path. `above` holds the ids of the modules around this one, so that a cycle ends.
    """
    if id(module) in above or id(module) in seen:
        return
    if remove_duplicate:
        seen.add(id(module))
    yield prefix, module
    for name, child in children(module):
        yield from named_modules(child, join(prefix, name), seen, remove_duplicate, (*above, id(module)))


def named_cells(module: Any, recurse: bool, remove_duplicate: bool) -> Iterator[tuple[str, Cell]]:
    """`(path, cell)` of the parameters and buffers, each once or by each name; with `recurse` those of submodules, too."""
    if recurse and remove_duplicate:
        yield from walk_of(module).named()
        return
    seen: set[Cell] = set()
    found = ((path, cell) for path, _, _, cell in entries(module)) if recurse else own_cells(module)
    for path, cell in found:
        if not remove_duplicate or cell not in seen:
            seen.add(cell)
            yield path, cell


def apply(module: Any, function: Callable[[Any], Any], above: tuple[int, ...] = ()) -> None:
    """Call `function` on every submodule, then on `module`. `above` holds the ids of the modules around this one."""
    for child in list(module.children()):
        if id(child) not in above and child is not module:  # else a cycle
            apply(child, function, (*above, id(module)))
    function(module)


def own_cells(module: Any) -> list[tuple[str, Cell]]:
    """`(name, cell)` of the module's own parameters, then of its own buffers."""
    return sorted(module._cells.items(), key=lambda item: item[1].kind != "parameter")


def entries(module: Any) -> Iterator[tuple[str, Any, str, Cell]]:
    """`(path, holder, name, cell)` of every parameter and buffer under each of its names, as in torch's state_dict."""
    walk_of(module)  # its error has the path of a lazy layer
    for prefix, holder in module.named_modules(remove_duplicate=False):
        for name, cell in own_cells(holder):
            yield join(prefix, name), holder, name, cell


def to_node(module: Any, walker: Walker, path: str) -> Node:
    """The part of a Spec that describes a module: the numbers of its cells, and the nodes of its other attributes."""
    own = tuple([(name, walker.cell(cell, join(path, name))) for name, cell in own_cells(module)])
    items = tuple([(name, walker.visit(value, join(path, name))) for name, value in vars(module).items()])
    return own, items


def from_node(cls: type, node: Node, builder: Builder) -> Any:
    """The module of class `cls` that a node of a Spec describes."""
    module: Any = object.__new__(cls)
    builder.begin(module)
    object.__setattr__(module, "_cells", {name: builder.cells[number] for name, number in node[0]})
    attributes = vars(module)
    for name, inner in node[1]:
        attributes[name] = inner[2] if inner[0] == "static" else builder.build(inner)
    return module


def own_text(module: Any) -> str:
    """The module's own parameters and buffers with their types, for its repr."""
    return ", ".join([f"{name}={describe(declared(cell))}" for name, cell in module._cells.items()])


def text(module: Any) -> str:
    """The module's repr: one indented line for each submodule."""
    name = type(module).__name__
    below = list(children(module))
    if not below:
        return f"{name}({module.extra_repr()})"
    lines = [f"  ({path}): " + repr(child).replace("\n", "\n  ") for path, child in below]
    return "\n".join([f"{name}({module.extra_repr()}", *lines, ")"])
