"""Attributes that a parametrization computes: `module.parametrizations.NAME` is there in place of a parameter `NAME`.

`nn/utils/parametrize.py` has the lists of parametrizations, and says how one is registered. A module finds such an attribute
last, when it has found no parameter, buffer or other attribute of that name; others therefore pay nothing.
"""

from __future__ import annotations

from typing import Any

from .tree import is_module


def list_of(module: Any, name: str) -> Any:
    """Return the list of parametrizations that computes the attribute `name` of a module, or None."""
    lists = vars(module).get("parametrizations")
    found = vars(lists).get(name) if is_module(lists) else None
    return found if getattr(type(found), "_computes_attribute", False) else None


def names(module: Any) -> list[str]:
    """Return the names of the attributes of a module that parametrizations compute."""
    lists = vars(module).get("parametrizations")
    return [name for name in vars(lists) if list_of(module, name) is not None] if is_module(lists) else []


def like(module: Any, name: str) -> Any:
    """Return the attribute `name`, or another array of its dtype if it would have to be computed."""
    found = list_of(module, name)
    return getattr(module, name) if found is None else found._of_its_dtype()
