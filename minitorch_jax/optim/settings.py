"""What an optimizer is set to: its modules, its groups, and its hyperparameters, read and assigned as attributes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..module.live_lists import LiveList
from ..module.module import Module
from ..module.torch_names import answer
from ..runtime import interrupts
from ..state import access
from ..state import frame as frames
from ..state.concurrent_reads import using
from ..state.errors import TraceError
from ..state.numpy_parts import Part
from ..state.pytree import Stateful, change_class
from ..state.structure import changed
from .declaration import OPTIONS, Setting, as_flags, as_tuples, default_of, is_optional, is_whole
from .groups import Asked, Group, GroupSpec, as_list, spec_of
from .hyperparameters import Hyperparameters
from .rounding import state_dtype_name
from .selection import listed_modules
from .states import begins_state
from .summary import OptimizerSummary, summary_of


class Configured(Stateful):
    """The part of an optimizer that holds modules, groups and hyperparameters; see `Optimizer`."""

    __slots__ = ()
    _declared: ClassVar[dict[str, Setting]] = {}  # by the class itself; see `declaration.declare`
    _settings: ClassVar[dict[str, Setting]] = {}  # with those of its bases
    _has_groups: ClassVar[bool] = True  # the rule is of each array by itself
    _ranges: ClassVar[dict[str, tuple[float, float]]] = {}

    # -- modules and groups -------------------------------------------------------------------------------------------

    @property
    def modules(self) -> Any:
        """The list given to the constructor; with groups, a tuple of the modules of all of them."""
        self._have_lifted()
        lists = self._lists
        return tuple(listed_modules(lists)) if self._hyper.own else lists[0]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups; without any, one that is the optimizer itself."""
        return tuple([Group(self, i) for i in range(len(self._lists))])

    param_groups = groups  # torch's name

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Do the same as `add_group`."""
        self.add_group(param_group)

    def add_group(self, group: Mapping[str, Any]) -> None:
        """Add `{"modules": [...], ...}` or `{"names": [...], ...}`. What was there so far becomes a group, if it is none.

        Parameters that the group has by name leave the group that they were in, and keep their state, if the rule is the
        same. Groups that were there before come first in what they name.

        Raises:
            ValueError, TypeError: as the constructor; nothing has changed then.
        """
        self._check_groups()
        access.check_restructurable(self._birth, f"{type(self).__name__}.groups", "were changed")
        before, hyper, names = self._lists, self._hyper, self._names
        name = type(self).__name__
        spec = spec_of(name, group, self.modules)
        own = [*(hyper.own or [{}]), self._own_of(spec, hyper.given, hyper.flags)]
        rules = [*(hyper.rules or [None]), spec.rule]
        numbers = {key: self._stated(key) for key in hyper.given}
        owned = [{key: self._stated(key, g) for key in mine} for g, mine in enumerate(own[:-1])]
        lists = [*before, spec.modules]
        new = Hyperparameters(name, self._ranges, numbers, hyper.flags, [*owned, own[-1]], rules=rules)
        with interrupts.deferred:
            vars(self).update(_lists=lists, _names=[*names, spec.names], _hyper=new, _plan=None)
            try:
                self._validate_now()
                self._plan_now()
            except BaseException:
                vars(self).update(_lists=before, _names=names, _hyper=hyper, _plan=None)
                raise
            finally:
                changed(self)

    def _check_groups(self) -> None:
        """Raise ValueError if the rule is of all parameters at once, so that there can be no groups."""

    def _set_modules(self, value: Any, group: int) -> None:
        access.check_restructurable(self._birth, f"{type(self).__name__}.modules", "was assigned")
        lists, foreign, names = self._lists, self._foreign, list(self._names)
        with interrupts.deferred:
            vars(self)["_lists"] = [*lists[:group], as_list(value), *lists[group + 1 :]]
            vars(self)["_names"] = [
                n and n._replace(everywhere=n.everywhere and g != group) for g, n in enumerate(names)
            ]
            vars(self)["_plan"] = None
            try:
                listed = {id(module) for modules in self._lists for module in modules}
                stay = [known for known in foreign if id(known.module) in listed and known.is_as_it_was()]
                vars(self)["_foreign"] = stay
                self._plan_now()
            except BaseException:
                vars(self).update(_lists=lists, _names=names, _foreign=foreign, _plan=None)
                raise
            finally:
                changed(self)

    # -- hyperparameters ----------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Raise ValueError for hyperparameters that do not go together. Called at first and at every assignment."""

    def _validate_now(self) -> None:
        """`_validate` for each group, unless the numbers are traced, or those of an ensemble."""
        if self._hyper.is_plain():
            for g, group in enumerate(self.groups if self._hyper.own else (self,)):
                self._rule_of(g)._validate(group)

    def _stated(self, name: str, group: int | None = None) -> Any:
        """A setting, a schedule as it is."""
        self._touch()
        return self._whole(name, self._hyper.stated(name, lambda: self._counts()[0], group), group)

    def _rule_of(self, group: int | None) -> Any:
        """The class whose rule steps the parameters of a group."""
        return self._hyper.rule_of(group) or type(self)

    def _params_of(self, group: int) -> list[Any]:
        """The trainable arrays of a group."""
        plan = self._plan_now()
        cells = {cell: path for path, cell in plan.named.items() if cell in plan.shapes and plan.groups[cell] == group}
        if plan.foreign:
            return [array for path, array in plan.values().items() if plan.named[path] in cells]
        return LiveList(cells, cells.values(), False, self)

    def _texts_of(self, group: int) -> dict[str, str]:
        """What is to be shown of a group's settings: its own; of a rule of its own, `lr` and what is not the default."""
        rule, own = self._hyper.rule_of(group), self._hyper.own[group] if self._hyper.own else {}
        texts = {name: repr(self._stated(name, group)) for name in own}
        if rule is None:
            return texts
        return {name: text for name, text in texts.items() if name == "lr" or text != repr(default_of(rule, name))}

    def _whole(self, name: str, value: Any, group: int | None) -> Any:
        """A setting that is declared as an integer as one: the vector has floats."""
        if isinstance(value, float) and value.is_integer() and is_whole(self._rule_of(group), name):
            return int(value)
        return value

    def _counts(self) -> tuple[Any, Any]:
        """Steps taken and skipped: integers, or for a traced or stacked optimizer arrays."""
        self._touch()
        held = self._steps.held
        if type(held) is Part:  # NumPy takes the steps
            counts = held.array()
            return int(counts[-2]), int(counts[-1])
        steps = self._steps.value
        steps = steps if isinstance(steps, jax.core.Tracer) else using(self._steps, jax.device_get)
        pair = steps[..., -2], steps[..., -1]
        return pair if steps.ndim > 1 or isinstance(steps, jax.core.Tracer) else (int(pair[0]), int(pair[1]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            self._open()  # of a copy that nobody has looked into so far
            return object.__getattribute__(self, name)
        return self._get_setting(name, None)

    def _get_setting(self, name: str, group: int | None) -> Any:
        if self._hyper.has(name, group):
            self._touch()
            value = self._hyper.get(name, lambda: self._counts()[0], group)
            return jnp.dtype(value) if name == "state_dtype" and value is not None else self._whole(name, value, group)
        instead = answer("Optimizer", name)
        hint = f", as torch has. Instead: {instead}" if instead else self._hint(name, group)
        raise AttributeError(f"{self._rule_of(group).__name__} has no attribute `{name}`{hint}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._hyper.given, *self._hyper.flags})

    def _hint(self, name: str, group: int | None = None) -> str:
        known = [*self._hyper.names_of(group), *(n for n in dir(type(self)) if not n.startswith("_"))]
        near = difflib.get_close_matches(name, known, 1)
        return f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(known)}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            change_class(self, value)
        elif name.startswith("_"):
            if isinstance(getattr(type(self), name, None), property):
                object.__setattr__(self, name, value)
            else:
                vars(self)[name] = value
        elif name == "modules":
            if self._hyper.own:
                raise AttributeError(
                    f"{type(self).__name__} has groups: assign `opt.groups[i].modules`, or change those lists"
                )
            self._set_modules(value, 0)
        elif name in self._hyper.given or name in self._hyper.flags:
            own = self._hyper.own
            if own and all(name in mine or self._hyper.rule_of(g) for g, mine in enumerate(own)):
                raise AttributeError(
                    f"{type(self).__name__}: every group has a `{name}` of its own: assign `opt.groups[i].{name}`"
                )
            self._set_setting(name, value, None)
        elif hasattr(type(self), name) and not isinstance(getattr(type(self), name), property):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"{type(self).__name__} has no `{name}` to set{self._hint(name)}")

    def _set_setting(self, name: str, value: Any, group: int | None) -> None:
        """Assign a setting of the optimizer or of a group; one that does not fit, or goes with no other, changes nothing."""
        hyper, rule = self._hyper, self._rule_of(group)
        owner = rule.__name__
        self._have_lifted()
        if frames.local.undo is not None:
            kept = [(settings, dict(settings)) for settings in (hyper.given, hyper.flags, *hyper.own)]
            frames.on_failure(self._put_back, kept, hyper.exact)
        if hyper.is_number(name, group):
            value = as_tuples(rule, {name: value})[name]
            if not hyper.is_plain() and begins_state(self, self._plan_now(), name, value, group):
                raise TraceError(
                    f"{owner}.{name} was changed from 0 where the state that it needs cannot begin (in compiled code, or for"
                    " an ensemble): assign it before"
                )
            own = dict(hyper._own(group))
            before = self._stated(name, group)
            hyper.set(name, value, self, group)
            self._validate_or(partial(hyper.set, name, before, self, group), name, group, own)
            if isinstance(before, int | float) and not before:
                vars(self).update(_grows=True, _plan=None)  # from zero: the rule may need a state now
                changed(self)
        elif hyper.has(name, group):
            access.check_restructurable(self._birth, f"{owner}.{name}", "was assigned")
            known, own = hyper.flags_of(group)[name], dict(hyper._own(group))
            value = state_dtype_name(owner, value) if name == "state_dtype" else value
            optional = is_optional(rule, name)
            if (isinstance(known, str) or optional) and not isinstance(value, str) and not (optional and value is None):
                raise ValueError(f"{owner}: {name} must be a str{' or None' if optional else ''}; got {value!r}")
            hyper.set_flag(name, as_flags(rule, {name: value})[name], group)
            self._validate_or(partial(hyper.set_flag, name, known, group), name, group, own)
            vars(self).update(_grows=True, _plan=None)
            changed(self)
        else:
            self._get_setting(name, group)  # the error for a name that is not there

    def _put_back(self, kept: list[tuple[dict[str, Any], dict[str, Any]]], exact: Any) -> None:
        """Take assignments back: settings as they were, and the vector that they stood for."""
        for now, before in kept:
            now.clear()
            now.update(before)
        self._hyper.exact = exact
        vars(self)["_plan"] = None
        changed(self)

    def _validate_or(self, undo: Callable[[], None], name: str, group: int | None, own: dict[str, Any]) -> None:
        """Take an assignment back that goes with no other setting; `own` are those that the group had before."""
        try:
            self._validate_now()
        except ValueError:
            undo()
            if group is not None and self._hyper.own and name not in own:
                del self._hyper.own[group][name]
            raise

    def _own_of(self, spec: GroupSpec, given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """A group's own settings, with flags as booleans; with a rule of its own, all settings of that."""
        settings = spec.settings
        if spec.rule is not None:
            asked = Asked()
            spec.rule(asked, **settings)
            own_flags = {name: v for name, v in asked.flags.items() if name not in OPTIONS or name in settings}
            return asked.given | own_flags
        unknown = [name for name in settings if name not in given and name not in flags]
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*given, *flags, "modules"], 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join([*given, *flags])}"
            raise ValueError(f"{type(self).__name__}: a group has {unknown[0]!r}{hint}")
        own = as_tuples(type(self), settings)
        return own | as_flags(type(self), {name: value for name, value in own.items() if name in flags})

    def _check_setting(self, name: str, value: Any, group: int | None) -> None:
        """Raise ValueError for a value that a setting cannot have."""
        if self._hyper.is_number(name, group):
            self._hyper.check(name, value, group)
            self._hyper.check_length(name, value, group)
        else:
            as_flags(self._rule_of(group), {name: value})

    def _load_hyperparameters(self, hyper: dict[str, Any], own: list[dict[str, Any]]) -> None:
        """Assign all of them; if they do not go together, none."""
        before = self._hyper
        given, flags = ({name: hyper[name] for name in names} for names in (before.given, before.flags))
        pairs = zip(before.own, own, strict=True)
        own = [
            {name: mine[name] for name in (*known, *mine) if name in mine and name != "rule"} for known, mine in pairs
        ]
        new = Hyperparameters(type(self).__name__, self._ranges, given, flags, own, before.members, before.rules)
        vars(self)["_hyper"] = new
        try:
            self._validate_now()
        except ValueError:
            vars(self)["_hyper"] = before
            raise
        changed(self)

    def summary(self, model: Module | None = None) -> OptimizerSummary:
        """Return a table of the parameters: each with its group, the settings that differ, its rule, and its state's bytes.

        Args:
            model: a Module, of which the table also lists the trainable parameters that this optimizer does not hold.

        Returns:
            An `OptimizerSummary`: print it, display it in a notebook, or read its `rows`, `not_held` and totals.

        Raises:
            TypeError: if `model` is not a Module.

        Example:
            >>> from minitorch_jax import nn, optim
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 1, bias=False))
            >>> opt = optim.SGD([{"modules": [net[0]]}, {"modules": [net[1].freeze()], "lr": 0.01}], lr=0.1, momentum=0.9)
            >>> opt.summary(net)  # doctest: +ELLIPSIS
            parameter  array          group  rule      own settings  state
            ──────────────────────────────────────────────────────────────
            0.weight   float32[4, 3]      0  SGD                      48 B
            0.bias     float32[4]         0  SGD                      16 B
            1.weight   float32[2, 4]      1  frozen    lr=0.01
            1.bias     float32[2]         1  frozen    lr=0.01
            2.weight   float32[1, 2]         not held
            ──────────────────────────────────────────────────────────────
            4 parameters, 1 not held, 88 B of state: SGD([...
        """
        return summary_of(self, model)

    def __repr__(self) -> str:
        shown = [f"{name}={self._stated(name)!r}" for name in self._hyper.given]
        shown += [
            f"{name}=True" if value is True else f"{name}={value!r}"
            for name, value in self._hyper.flags.items()
            if value
        ]
        names = (type(module).__name__ for module in self.modules)
        listed = ", ".join(map(repr, self.groups) if self._hyper.own else names)
        return f"{type(self).__name__}({', '.join([f'[{listed}]', *shown])})"
