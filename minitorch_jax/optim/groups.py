"""Groups of an optimizer: modules that are trained together, with settings of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from ..state.pytree import Stateful


class Group:
    """One group of an optimizer: `modules`, and each of the optimizer's settings, as attributes or (as in torch) by key.

    Assigning a setting gives the group one of its own, effective at the next step; until then it has the optimizer's.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> body, head = nn.Linear(4, 4, key=jax.random.key(0)), nn.Linear(4, 2, key=jax.random.key(1))
        >>> opt = optim.SGD([{"modules": [body], "lr": 0.01}, {"modules": [head]}], lr=0.1)
        >>> opt.groups[0].lr, opt.groups[1]["lr"]
        (0.01, 0.1)
        >>> opt.lr = 0.5
        >>> [group.lr for group in opt.groups]
        [0.01, 0.5]
    """

    __slots__ = ("_optimizer", "_index")
    _leads_to_state = True

    def __init__(self, optimizer: Any, index: int) -> None:
        object.__setattr__(self, "_optimizer", optimizer)
        object.__setattr__(self, "_index", index)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "modules":
            self._optimizer._have_lifted()
            return self._optimizer._lists[self._index]
        return self._optimizer._get_setting(name, self._index)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "modules":
            self._optimizer._set_modules(value, self._index)
        else:
            self._optimizer._set_setting(name, value, self._index)

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.keys():
            raise KeyError(name)
        setattr(self, name, value)

    def keys(self) -> list[str]:
        """`modules` and the names of all settings."""
        return ["modules", *self._optimizer._hyper.given, *self._optimizer._hyper.flags]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __repr__(self) -> str:
        own = self._optimizer._hyper.own[self._index] if self._optimizer._hyper.own else {}
        shown = "".join(f", {name}={self._optimizer._stated(name, self._index)!r}" for name in own)
        return f"Group([{', '.join(type(module).__name__ for module in self.modules)}]{shown})"


jax.tree_util.register_pytree_node(  # as an argument or a result it stands for its optimizer
    Group, lambda group: ((group._optimizer,), group._index), lambda index, children: Group(children[0], index)
)


def as_list(modules: Any) -> list[Any]:
    """The caller's own list, so that changing either changes both; another iterable as a new list."""
    if isinstance(modules, Stateful):
        name = type(modules).__name__
        raise TypeError(f"modules must be a list of modules; got a {name} itself: write `[model]` instead of `model`")
    if isinstance(modules, list):
        return modules
    if isinstance(modules, str | bytes | dict) or not isinstance(modules, Iterable):
        raise TypeError(f"modules must be a list of modules; got {modules!r}")
    return list(modules)


def split(owner: str, modules: list[Any]) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """The list of modules of each group, and its own settings; for a plain list one, without any."""
    groups = [isinstance(item, Mapping) for item in modules]
    if not any(groups):
        return [modules], []
    if not all(groups):
        i = groups.index(False)
        raise TypeError(
            f"{owner}: modules[{i}] is no group, others are: give modules, or groups {{'modules': [...]}}, only"
        )
    return [group_modules(owner, group) for group in modules], [own_settings(group) for group in modules]


def group_modules(owner: str, group: Mapping[str, Any]) -> list[Any]:
    """A group's modules."""
    if "modules" not in group:
        raise ValueError(
            f"{owner}: a group needs 'modules', a list of modules; it has {', '.join(map(repr, group)) or 'nothing'}"
        )
    return as_list(group["modules"])


def own_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings."""
    return {name: value for name, value in group.items() if name != "modules"}
