"""Optimizers whose rule is of all parameters at once, not of one array: those of other libraries, say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, keystr

from ..engine.tracing import unaliased
from ..module.parameter import as_array
from ..runtime import contexts
from ..runtime.numpy_memory import owned
from ..runtime.tracebacks import trimmed
from ..state.cell import Cell
from ..state.pytree import Builder
from ..state.static_values import describe
from ..state.walk import Node
from .hyperparameters import Hyperparameters
from .optimizer import Optimizer

Arrays = dict[str, Any]  # by parameter path


class Rule(Protocol):
    """Two pure functions of all parameters, in dicts by path. It is part of what is compiled for, so it must be hashable."""

    def init(self, params: Arrays) -> Any:
        """The state before the first step: any pytree of arrays."""

    def update(self, params: Arrays, grads: Arrays, state: Any, **extra: Any) -> tuple[Arrays, Any]:
        """One step: the new parameters and state."""


class Form:
    """How the state of a joint rule is made of what is kept for each parameter, and of what is kept for all of them.

    A leaf below a parameter's path belongs to that parameter: it stays with it when modules come, go, or change places.
    This is what an update is compiled for.
    """

    __slots__ = ("owner", "rule", "names", "tree", "places")

    def __init__(self, owner: str, rule: Rule, names: tuple[str, ...], tree: Any, places: tuple[Any, ...]) -> None:
        self.owner, self.rule = owner, rule
        self.names = names  # of the trainable parameters, in their order
        self.tree = tree
        self.places = places  # of each leaf: (number of its parameter, or None for all of them; its field)

    @property
    def __name__(self) -> str:
        return self.owner

    @property
    def shared_names(self) -> list[str]:
        """The fields of what is kept for all parameters, in their order."""
        return sorted(field for i, field in self.places if i is None)

    def _key(self) -> Any:
        return self.owner, self.rule, self.names, self.tree, self.places

    def weakened(self, weaken: Any) -> Any:
        """What stands for it in a key that keeps no functions alive; see `bounded_cache.py`."""
        rule = weaken(self.rule)
        return self if rule is self.rule else (self.owner, rule, self.names, self.tree, self.places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def joined(self, states: Sequence[Any], shared: Any) -> Any:
        """The rule's state, from fields of each parameter and of all."""
        return self.tree.unflatten([(shared if i is None else states[i])[field] for i, field in self.places])

    def split(self, leaves: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The fields of each parameter and of all, from the leaves of a state."""
        states: list[dict[str, Any]] = [{} for _ in self.names]
        shared: dict[str, Any] = {}
        for (i, field), leaf in zip(self.places, leaves, strict=True):
            (shared if i is None else states[i])[field] = leaf
        return states, shared

    def update(
        self, params: Sequence[Any], grads: Sequence[Any], states: Sequence[Any], shared: Any, extra: Mapping[str, Any]
    ) -> tuple[list[Any], list[Any]]:
        """One step: the parameters; the leaves of their states, and of what is kept for all."""
        named = dict(zip(self.names, params, strict=True))
        filled = [jnp.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        old = self.joined(states, shared)
        new_params, new = self.rule.update(named, dict(zip(self.names, filled, strict=True)), old, **extra)
        if jax.tree.structure(new) != self.tree:
            raise ValueError(
                f"{self.owner}: the rule's update gave a state of another structure than its init:"
                f" {jax.tree.structure(new)} for {self.tree}"
            )
        leaves = [
            _kept(new_leaf, leaf, self, place)
            for new_leaf, leaf, place in zip(jax.tree.leaves(new), jax.tree.leaves(old), self.places, strict=True)
        ]
        new_states, new_shared = self.split(leaves)
        kept = [_kept(new_params[name], p, self, (i, "")) for i, (name, p) in enumerate(named.items())]
        return kept, jax.tree.leaves((new_states, new_shared))


def _kept(new: Any, old: Any, form: Form, place: tuple[int | None, str]) -> Any:
    """A new value, in the dtype of the one that it replaces."""
    new = jnp.asarray(new)
    if new.shape != old.shape:
        i, field = place
        what = ".".join(filter(None, ["the state" if i is None else form.names[i], field]))
        raise ValueError(f"{form.owner}: the update makes {describe(old)} of {what} into {describe(new)}")
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def _form_of(owner: str, rule: Rule, names: tuple[str, ...], state: Any) -> Form:
    """The form of a rule's state for some parameters."""
    numbers = {name: i for i, name in enumerate(names)}
    found, tree = jax.tree_util.tree_flatten_with_path(state)
    places: dict[tuple[int | None, str], None] = {}
    for path, leaf in found:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            shown = keystr(path, simple=True, separator=".")
            raise TypeError(f"{owner}: the state has a {type(leaf).__name__} at {shown}, which is no array")
        mine = [k for k, key in enumerate(path) if isinstance(key, DictKey) and key.key in numbers]
        number = numbers[path[mine[-1]].key] if mine else None
        rest = (*path[: mine[-1]], *path[mine[-1] + 1 :]) if mine else path
        field = keystr(rest, simple=True, separator=".") or "state"
        while (number, field) in places:
            field += "'"
        places[number, field] = None
    return Form(owner, rule, names, tree, tuple(places))


class JointOptimizer(Optimizer):
    """Base of optimizers whose rule is of all parameters at once, in dicts by path (`"0.weight"`, as in `state_dict()`).

    Args:
        modules: a list of modules; see `Optimizer`. There are no groups: the rule itself tells parameters apart.
        rule: a hashable object with `init(params)` and `update(params, grads, state, **extra)`; see `Rule`.
        skip_nonfinite, track_grad_norm: see `Optimizer`.
    """

    elementwise = False
    _has_groups = False

    def __init__(
        self, modules: Any, rule: Rule, *, skip_nonfinite: bool = False, track_grad_norm: bool = False
    ) -> None:
        vars(self)["_rule"] = rule
        options = {"skip_nonfinite": skip_nonfinite, "track_grad_norm": track_grad_norm}
        others = {"decay_matrices_only": False, "master_weights": False, "state_dtype": None}
        self._configure(modules, {**options, **others})

    def _validate(self) -> None:
        if self.state_dtype is not None:
            raise ValueError(
                f"{type(self).__name__}: state_dtype does not apply, since the rule makes its own state; leave it None, and"
                " give a dtype to the rule (`mu_dtype` of optax)"
            )

    def _setup(self, lists: list[list[Any]], hyper: Hyperparameters, steps: Cell) -> None:
        super()._setup(lists, hyper, steps)
        vars(self)["_joined"] = []  # the trainable parameters that `_form` and `_shared` are of, in their order

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Self:
        self = super()._rebuild(payload, builder)
        vars(self).update(_rule=self._form.rule, _joined=[builder.cells[param] for param, _ in payload[2]])
        return self

    def _check_groups(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} takes a list of modules, no groups: its rule is of all parameters, and tells them"
            " apart itself"
        )

    @trimmed
    def step(self, **extra: Any) -> None:  # type: ignore[override]  # no `closure` among them
        """Update every trainable parameter of `modules`, in place: all of them, or none if it raises.

        Args:
            **extra: arrays, numbers and pytrees of them, for the rule.
        """
        self._step(extra)

    def _check_moved(self, moved: Mapping[str, str]) -> None:
        """Raise if the rule cannot do with parameters under other names than before: `moved`, from old to new ones."""

    def _begin_states(
        self,
        state: dict[Cell, Any],
        trainable: list[Cell],
        names: Mapping[Cell, str],
        groups: Mapping[Cell, int],
        arrays: Mapping[Cell, Any],
    ) -> set[Cell]:
        listed = tuple([names[cell] for cell in trainable])
        form: Form | None = self._form
        same = self._joined == trainable
        if form is not None and same and form.names == listed:
            return set()
        before = dict(zip(self._joined, form.names, strict=True)) if form is not None else {}
        moved = [cell for cell in trainable if before.get(cell, names[cell]) != names[cell]]
        self._check_moved({before[cell]: names[cell] for cell in moved})
        params = {names[cell]: arrays.get(cell, cell.value) for cell in trainable}
        try:
            with contexts.full_width(arrays.values()):
                begun = self._rule.init({name: jnp.asarray(owned(array)) for name, array in params.items()})
        except Exception as error:
            if params:
                given = ", ".join(listed)
                error.add_note(f"(The rule was given {given}. A mask, or labels, as a dict must name just these.)")
                raise
            raise ValueError(
                f"{type(self).__name__}: every parameter is frozen, and this rule cannot do without any: unfreeze() some"
            ) from error
        form = _form_of(type(self).__name__, self._rule, listed, begun)
        fields, shared = form.split(unaliased(list(map(as_array, jax.tree.leaves(begun))), list(params.values())))
        begin_now = {cell for cell, mine in zip(trainable, fields, strict=True) if mine and cell in self._state}
        begin_now = {cell for cell in begin_now if not self._state[cell][1]}
        for cell, mine in zip(trainable, fields, strict=True):
            known = jax.tree.unflatten(*state[cell]) if state.get(cell, ((), []))[1] else {}
            held, tree = jax.tree.flatten(_merged(known, mine, cell.birth))
            state[cell] = tree, held
        size = sum(array.size for array in params.values())
        known = {
            name: cell
            for name, cell in self._shared.items()
            if same or not cell.value.ndim or not size or cell.value.size % size  # else one vector of other parameters
        }
        vars(self).update(_form=form, _shared=_merged(known, shared, self._steps.birth), _joined=list(trainable))
        return begin_now


def _merged(known: dict[str, Cell], fields: dict[str, Any], birth: Any) -> dict[str, Cell]:
    """Cells for some fields, in order of their names: those that there are, and new ones. (What is of another shape than
    before, a vector of all parameters say, begins anew.)"""
    # lent: the rule may hold an array that it gives, in a closure, say
    merged = {name: Cell(leaf, "state", lent=True, birth=birth) for name, leaf in sorted(fields.items())}
    for name in merged.keys() & known.keys():
        old, new = known[name].value, merged[name].value
        if (old.shape, old.dtype) == (new.shape, new.dtype):
            merged[name] = known[name]
    return merged
