"""Groups of an optimizer: modules that are trained together, with settings of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from glob import escape
from typing import Any, NamedTuple

import jax

from ..module.live_lists import LiveList
from ..module.module import Module
from ..state.pytree import Stateful
from ..state.static_values import is_array, shown
from .declaration import GROUP_KEYS
from .selection import Names


class Group:
    """One group of an optimizer: what it has, and each of the optimizer's settings, as attributes or (as in torch) by key.

    A group is given as a dict with any settings, and with one or more of these:

    - `"modules"`: a list of modules, whose parameters it has.
    - `"names"`: a glob, or a list of them, over names of `state_dict`. The group has what they match: of its modules, or, if
      it lists none, of all modules in the optimizer's list. The first group that matches a parameter has it.
    - `"params"`: in place of `names`, a list of arrays that were just read from the modules.
    - `"rule"`: a class of optimizers that updates these parameters, with its own settings and defaults. The group has no
      parameter that this class does not take (Muon takes matrices); without names and modules, it has what no other takes.

    Assigning a setting gives the group one of its own, effective at the next step; until then it has the optimizer's.
    `params` is the list of the group's trainable arrays: a live list, as `module.parameters()`. `names` are the globs that
    choose them, or None, and `rule` is the class whose rule steps them.

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
        >>> model = nn.Sequential(body, head)
        >>> opt = optim.AdamW([model, {"names": "*bias", "weight_decay": 0.0}], lr=0.1)
        >>> [array.shape for array in opt.param_groups[1]["params"]]
        [(4,), (2,)]
        >>> optim.Muon([model, {"rule": optim.AdamW, "lr": 3e-4}], lr=0.02).groups
        (Group([Sequential]), Group(lr=0.0003, rule=AdamW))
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
            names = self.names
            everywhere = names is not None and self._optimizer._names[self._index].everywhere
            return self._optimizer.modules if everywhere else self._optimizer._lists[self._index]
        if name == "names":
            names = self._optimizer._names[self._index]
            return None if names is None else names.globs
        if name == "rule":
            return self._optimizer._rule_of(self._index)
        if name == "params":
            return self._optimizer._params_of(self._index)
        return self._optimizer._get_setting(name, self._index)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "modules":
            self._optimizer._set_modules(value, self._index)
        elif name in GROUP_KEYS:
            raise AttributeError(f"the {name} of a group cannot be assigned: make the optimizer anew, or add a group")
        else:
            self._optimizer._set_setting(name, value, self._index)

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys() and name not in GROUP_KEYS:
            raise KeyError(name)
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.keys() and name not in GROUP_KEYS:
            raise KeyError(name)
        setattr(self, name, value)

    def keys(self) -> list[str]:
        """`params`, `modules` and the names of all settings."""
        return [
            "params",
            "modules",
            *self._optimizer._hyper.names_of(self._index if self._optimizer._hyper.own else None),
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.keys()})

    def __repr__(self) -> str:
        names = self.names
        listed = self._optimizer._lists[self._index]
        what = [f"[{', '.join(type(module).__name__ for module in listed)}]"] if listed or names is None else []
        what += [repr(names[0] if len(names) == 1 else list(names))] if names else []
        what += [f"{name}={text}" for name, text in self._optimizer._texts_of(self._index).items()]
        own_rule = self._optimizer._hyper.rule_of(self._index)
        return f"Group({', '.join([*what, *([] if own_rule is None else [f'rule={own_rule.__name__}'])])})"


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
    if isinstance(modules, str | bytes | dict) or is_array(modules) or not isinstance(modules, Iterable):
        raise TypeError(f"modules must be a list of modules; got {shown(modules)}: write `[model]`")
    return list(modules)


def no_module(owner: str, i: int, module: Any) -> TypeError | None:
    """The error for an item of `modules` that cannot be trained, with what to list instead; None if it can."""
    lacking = [name for name in ("parameters", "grads") if not callable(getattr(module, name, None))]
    if not lacking and not isinstance(module, type):
        return None
    what = f"{owner}: modules[{i}] is {shown(module)} ({type(module).__name__})"
    wrapped = "`minitorch_jax.adapters.numpy.wrap(network)`"
    if isinstance(module, type):
        return TypeError(f"{what}: list an instance of it")
    if any(map(is_array, module if isinstance(module, list | tuple) else [module])):
        return TypeError(
            f"{what}. An optimizer takes modules and finds their parameters itself: write `{owner}([model])`, not"
            f" `{owner}(model.parameters())`. To train some only, list their modules, or `freeze()` the others. For"
            f" arrays of a NumPy network, list {wrapped}."
        )
    what += f", which has no {' and '.join([f'`{name}()`' for name in lacking])}."
    if any(base.__module__.partition(".")[0] == "torch" for base in type(module).__mro__):
        return TypeError(
            f"{what} It is torch's: build the same model of `minitorch_jax.nn`, and copy the weights with"
            " `minitorch_jax.adapters.torch.load_from_torch(model, torch_model)`."
        )
    return TypeError(f"{what} List Modules, or {wrapped}, which finds the arrays of a network in NumPy.")


class Asked:
    """What the constructor of a group's rule is given in place of modules: it leaves its settings here, and makes nothing."""

    given: dict[str, Any]
    flags: dict[str, Any]


class GroupSpec(NamedTuple):
    """A group as it was given."""

    modules: list[Any]
    names: Names | None  # None for all parameters of the modules
    rule: Any  # a class of optimizers; None for the optimizer's own
    settings: dict[str, Any]


def specs_of(owner: str, modules: list[Any]) -> list[GroupSpec]:
    """The groups in a list of groups and modules. The modules beside groups are one group; a plain list has none."""
    if not any(isinstance(item, Mapping) for item in modules):
        return []
    parts: list[GroupSpec] = []
    beside: list[Any] = []
    for item in modules:
        if isinstance(item, Mapping):
            parts.append(spec_of(owner, item, modules))
        elif not beside:
            parts.append(GroupSpec(beside, None, None, {}))
            beside.append(item)
        else:
            beside.append(item)
    return parts


def spec_of(owner: str, group: Mapping[str, Any], others: Iterable[Any]) -> GroupSpec:
    """A group. `others` are the modules and groups in which the arrays of its `params` may be found."""
    rule = group.get("rule")
    if "rule" in group and not (isinstance(rule, type) and getattr(rule, "_has_groups", False)):
        raise TypeError(
            f"{owner}: the rule of a group must be a class of optimizers that updates each array by itself, such as"
            f" `optim.AdamW`; got {shown(rule)}"
        )
    settings = {name: value for name, value in group.items() if name not in GROUP_KEYS}
    listed = as_list(group["modules"]) if "modules" in group else []
    if "names" in group and "params" in group:
        raise ValueError(f"{owner}: a group has 'names' and 'params': leave one of them out")
    globs: Any = ()
    if "names" in group:
        globs = _as_globs(owner, group["names"])
    elif "params" in group:
        globs = _names_of(owner, group["params"], listed or _modules_in(others))
    elif "modules" not in group and rule is None:
        raise ValueError(
            f"{owner}: a group needs 'modules', a list of modules, or 'names' of parameters in the modules beside it; it"
            f" has {', '.join(map(repr, group)) or 'nothing'}"
        )
    whole = "modules" in group and not globs
    return GroupSpec(listed, None if whole else Names(globs, "modules" not in group), rule, settings)


def _as_globs(owner: str, names: Any) -> tuple[str, ...]:
    globs = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, list | tuple) else ()
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            f"{owner}: the names of a group must be a glob or a list of globs over the names in `state_dict()`, such as"
            f' `["*bias", "norm*"]`; got {shown(names)}'
        )
    return globs


def _modules_in(others: Iterable[Any]) -> list[Any]:
    modules = [
        module for item in others for module in (item.get("modules", ()) if isinstance(item, Mapping) else (item,))
    ]
    return list({id(module): module for module in modules}.values())


def _names_of(owner: str, params: Any, modules: Iterable[Any]) -> tuple[str, ...]:
    """The names of parameters that are given as arrays, as torch's are: those of which the modules hold these arrays now."""
    given = list(params) if isinstance(params, Iterable) and not isinstance(params, str | LiveList | Mapping) else []
    there = [(name, cell, array) for module in modules for name, cell, array in _arrays_in(module)]
    if not given or not there or not all(map(is_array, given)):
        raise ValueError(
            f"{owner}: a group needs 'modules', and has 'params'. It finds the parameters itself: write"
            ' `{"modules": [layer], ...}`, not `{"params": layer.parameters(), ...}`. For some of a model\'s parameters list'
            ' it beside the group, `[model, {"names": ["*bias", "norm*"], ...}]`; a list of arrays that were just read'
            " from it is understood there, too"
        )
    wanted = set(map(id, given))
    chosen = {name: cell for name, cell, array in there if id(array) in wanted}
    found = {id(array) for _, _, array in there}
    lost = [i for i, array in enumerate(given) if id(array) not in found]
    if lost:
        raise ValueError(
            f"{owner}: params[{lost[0]}] of a group, {shown(given[lost[0]])}, is not the array of a parameter of the modules"
            " beside the group: a copy, or one that has been updated since. Name the parameters:"
            ' `{"names": ["*bias", "norm*"], ...}`'
        )
    others = [name for name, cell, _ in there if name in chosen and chosen[name] is not cell]
    if others or len({id(cell) for cell in chosen.values()}) > len(wanted):
        raise ValueError(
            f"{owner}: it is not clear which parameters the arrays in `params` of a group are: {', '.join(chosen)}. Name"
            ' them: `{"modules": [layer], "names": [...], ...}`'
        )
    return tuple(map(escape, chosen))


def _arrays_in(module: Any) -> Iterator[tuple[str, Any, Any]]:
    """Of each parameter under each of its names: the name, what tells it from others, and its array."""
    if isinstance(module, Module):
        for name, _, _, cell in module._entries():
            if cell.kind == "parameter":
                yield name, cell, cell.value if cell.pack is None else cell.pack.known_part(cell)
    elif no_module("", 0, module) is None:
        found = module.parameters()
        names = found._paths if isinstance(found, LiveList) else map(str, range(len(found)))
        for name, array in zip(names, found, strict=False):
            yield name, array, array
