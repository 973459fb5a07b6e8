"""Which states an optimizer keeps: made for parameters that are new, grown, and dropped with those that have gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..engine.tracing import unaliased
from ..module.parameter import is_narrow, wide_dtype
from ..runtime import contexts
from ..runtime.numpy_memory import owned
from ..state.cell import Cell, is_concrete
from ..state.concurrent_reads import using
from ..state.static_values import describe
from .numpy_modules import Foreign
from .rounding import is_rounded, rounds, seed_now
from .update import Master


def keep_state(
    opt: Any, names: dict[Cell, str], trainable: list[Cell], foreign: list[Foreign], groups: dict[Cell, int]
) -> None:
    """Bring `opt._state`, `_order` and `_steps` in line with the parameters that there are."""
    arrays = {c: a for module in foreign for c, a in zip(module.cells, module.arrays(), strict=True)}
    every = list(names)
    state = {cell: opt._state[cell] for cell in every if cell in opt._state}
    begun = opt._begin_states(state, trainable, names, groups, arrays)  # they count their steps from here
    if every != opt._order or begun:
        old = {cell: i for i, cell in enumerate(opt._order) if cell not in begun}
        steps = opt._steps.value
        if isinstance(steps, jax.core.Tracer) or np.ndim(steps) != 1:
            columns = [steps[..., old[c]] if c in old else jnp.zeros_like(steps[..., -1]) for c in every]
            new = jnp.stack([*columns, steps[..., -2], steps[..., -1]], axis=-1)
        else:
            counts = np.asarray(steps)
            new = jnp.asarray([*(counts[old[c]] if c in old else 0 for c in every), counts[-2], counts[-1]], jnp.int32)
        opt._steps.value = new
        opt._steps.lent = False
    opt._clocks = _clocks(opt, every, trainable)
    opt._state, opt._order, opt._grows = state, list(every), False
    ticking = set(trainable)  # a frozen parameter keeps its state, and with it the group whose rule has made that
    opt._homes = {cell: g if cell in ticking else opt._homes.get(cell, g) for cell, g in groups.items()}


def begin_states(
    opt: Any,
    state: dict[Cell, Any],
    trainable: list[Cell],
    names: Mapping[Cell, str],
    groups: Mapping[Cell, int],
    arrays: Mapping[Cell, Any],
) -> set[Cell]:
    """Ask the rule for the states of parameters that have none, or may have more now; gives those that begin now."""
    settings = [_settings(opt, g) for g in range(len(opt._lists))]
    begun = set()
    for cell in trainable:
        rule, mine = opt._rule_of(groups[cell]), settings[groups[cell]]
        lent = not rule.__module__.startswith("minitorch_jax.")  # a user's rule may hold an array that it gives
        if mine.state_dtype is not None:
            refuse_wide(rule.__name__, names[cell], arrays.get(cell, cell.value))
        if opt._hyper.own and opt._rule_of(opt._homes.get(cell, groups[cell])) is not rule:
            state.pop(cell, None)  # it was in a group of another rule
            begun.add(cell)
        if cell not in state or not state[cell][1] or opt._grows or _outlived(state[cell][1], cell):
            with contexts.full_width([arrays.get(cell, cell.value)]):
                p = jnp.asarray(owned(arrays[cell])) if cell in arrays else cell.value
                made_by = partial(first_state, rule, settings=mine)
                abstract = isinstance(p, jax.ShapeDtypeStruct)
                leaves, tree = jax.tree.flatten(jax.eval_shape(made_by, p) if abstract else made_by(p))
            made = [Cell(leaf, "state", lent=lent, birth=cell.birth) for leaf in unaliased(leaves, [p])]
            if cell in state and state[cell][1] and not _outlived(state[cell][1], cell):
                tree, made = _grown(state[cell], tree, made)
            elif leaves and cell in opt._state:
                begun.add(cell)
            state[cell] = tree, made
        _keep_dtypes(state, cell, arrays.get(cell, cell.value), mine, partial(first_state, rule, settings=mine))
        _keep_master(state, cell, mine.master_weights and is_narrow(cell.value))
    return begun


def first_state(rule: Any, p: Any, settings: Any) -> Any:
    """The state with which a class of optimizers begins, in the dtypes in which it is kept."""
    wanted = settings.state_dtype
    if (settings.master_weights or wanted is not None) and is_narrow(p):
        p = p.astype(jnp.float32)
    state = rule.init_state(p, settings)
    return state if wanted is None else jax.tree.map(lambda x: x.astype(wanted) if is_rounded(x, p) else x, state)


def refuse_wide(owner: str, path: str, p: Any) -> None:
    """Raise ValueError for a parameter that takes no `state_dtype`."""
    if p.dtype.itemsize > 4:
        raise ValueError(
            f"{owner}: state_dtype is for parameters of at most 32 bits, and {path} is {describe(p)}: leave state_dtype out,"
            " or put the module into a group without it"
        )


def _outlived(held: Sequence[Cell], param: Cell) -> bool:
    """True if the states are those of an abstract parameter, and it has an array by now."""
    return is_concrete(param.value) and any([isinstance(cell.value, jax.ShapeDtypeStruct) for cell in held])


def _settings(opt: Any, group: int) -> SimpleNamespace:
    """What decides which states there are."""
    hyper = opt._hyper
    numbers = {name: hyper.given_number(name, group) for name, _, _ in hyper.layout_of(group)}
    return SimpleNamespace(**numbers, **hyper.flags_of(group))


def begins_state(opt: Any, plan: Any, name: str, value: Any, group: int | None) -> bool:
    """Whether the rule, with another value of a setting, would keep more of some parameter than it does now."""
    asked = set()
    for cell in plan.params:
        g, (tree, held) = plan.groups[cell], opt._state.get(cell, (None, []))
        like = jax.ShapeDtypeStruct(cell.value.shape, cell.value.dtype)
        followed = group is None and opt._hyper.rule_of(g) is None
        follows = g == group or (followed and not (opt._hyper.own and name in opt._hyper.own[g]))
        if not follows or (g, like, tree) in asked:
            continue
        asked.add((g, like, tree))
        settings = _settings(opt, g)
        setattr(settings, name, value if isinstance(value, int | float) else 1.0)
        needed = jax.eval_shape(lambda p, g=g, h=settings: opt._rule_of(g).init_state(p, h), like)
        now = jax.tree.unflatten(tree, held) if held else ()
        if len(jax.tree.leaves(needed)) > len(jax.tree.leaves(now.rule_state if isinstance(now, Master) else now)):
            return True
    return False


def keep_seed(opt: Any) -> None:
    """Make the cell of the seed of what is rounded stochastically, or drop it."""
    if not any([rounds(opt._hyper.flags_of(g)) for g in range(len(opt._lists))]):
        opt._seed = None
    elif opt._seed is None:
        seed, members = seed_now(), opt._steps.value.shape[:-1]
        opt._seed = Cell(jnp.array(np.broadcast_to(seed, members) if members else seed), "seed", birth=opt._steps.birth)


def keep_seen(opt: Any) -> None:
    """Make the cell of what a step sees of its gradients, if it is to, or drop it."""
    if not any(opt._hyper.flags_of(g)["track_grad_norm"] for g in range(len(opt._lists))):
        opt._seen = None
    elif opt._seen is None:
        one = jnp.ones_like(opt._steps.value[..., -1], jnp.float32)  # of an ensemble, one each
        opt._seen = Cell(jnp.stack([0 * one, one], axis=-1), "seen", birth=opt._steps.birth)


def _clocks(opt: Any, every: list[Cell], trainable: Iterable[Cell]) -> tuple[int, ...]:
    """For each parameter, the place of the first that ticks with it: what depends on t is computed once for all."""
    steps, ticking = opt._steps.value, set(trainable)
    first: dict[Any, int] = {}
    counts: Any
    if isinstance(steps, jax.Array | np.ndarray) and not isinstance(steps, jax.core.Tracer):
        columns = using(opt._steps, np.asarray)
        counts = [columns[..., i].tobytes() for i in range(len(every))]
    else:  # within a trace nothing begins to tick apart, or together
        known = dict(zip(opt._order, opt._clocks, strict=True))
        counts = [known.get(cell) for cell in every]
    return tuple([first.setdefault(counts[i], i) if cell in ticking else i for i, cell in enumerate(every)])


def field_names(tree: Any) -> list[str]:
    """Names of the leaves of a rule's state: `momentum_buffer` of a NamedTuple's field."""
    state = jax.tree.unflatten(tree, range(tree.num_leaves))
    names = [keystr(path, simple=True, separator=".") or "state" for path, _ in tree_flatten_with_path(state)[0]]
    names = [name.removeprefix("rule_state.") for name in names]  # beside a master weight
    return ["state.step" if name == "step" else name for name in names]  # "step" is the parameter's step count


def _grown(known: tuple[Any, list[Cell]], tree: Any, made: list[Cell]) -> tuple[Any, list[Cell]]:
    """A parameter's state, with what a rule's new one has besides."""
    now = jax.tree.unflatten(*known)
    rule_state = now.rule_state if isinstance(now, Master) else now
    leaves, old_tree = jax.tree.flatten(rule_state)
    old, new = dict(zip(field_names(old_tree), leaves, strict=True)), dict(zip(field_names(tree), made, strict=True))
    if new.keys() <= old.keys():
        return known
    rule_state = jax.tree.unflatten(tree, [old.get(name, cell) for name, cell in new.items()])
    leaves, tree = jax.tree.flatten(now._replace(rule_state=rule_state) if isinstance(now, Master) else rule_state)
    return tree, leaves


def _keep_master(state: dict[Cell, Any], cell: Cell, wanted: bool) -> None:
    """Add a float32 copy to a parameter's state, or drop it."""
    tree, held = state[cell]
    now = jax.tree.unflatten(tree, held)
    if wanted and not isinstance(now, Master):
        value = cell.value
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        master = Cell(
            value.update(dtype=jnp.float32) if abstract else value.astype(jnp.float32), "state", birth=cell.birth
        )
        leaves, tree = jax.tree.flatten(Master(master, now))
        state[cell] = tree, leaves
    elif isinstance(now, Master) and not wanted:
        leaves, tree = jax.tree.flatten(now.rule_state)
        state[cell] = tree, leaves


def _keep_dtypes(state: dict[Cell, Any], cell: Cell, p: Any, settings: Any, made_by: Callable[[Any], Any]) -> None:
    """Convert a parameter's state if its `state_dtype` is another than when the state began."""
    tree, held = state[cell]
    first = 1 if isinstance(jax.tree.unflatten(tree, held), Master) else 0
    wanted, named = settings.state_dtype, list(zip(field_names(tree), held, strict=True))[first:]
    if wanted is not None:
        dtypes = {name: wanted if is_rounded(c.value, p) else wide_dtype(c.value.dtype) for name, c in named}
    elif any([_is_lower(c.value, p) for _, c in named]):  # by its rule, or by a `state_dtype` that was taken back
        begun = jax.eval_shape(made_by, jax.ShapeDtypeStruct(p.shape, p.dtype))
        leaves, begun_tree = jax.tree.flatten(begun)
        dtypes = {name: p.dtype for name, _ in named}
        dtypes |= dict(zip(field_names(begun_tree), [leaf.dtype for leaf in leaves], strict=True))
    else:
        return
    new = [c if c.value.dtype == dtypes[name] else _converted(c, dtypes[name]) for name, c in named]
    state[cell] = tree, [*held[:first], *new]


def _is_lower(value: Any, p: Any) -> bool:
    return value.dtype.itemsize < p.dtype.itemsize and jnp.issubdtype(value.dtype, jnp.floating)


def _converted(cell: Cell, dtype: Any) -> Cell:
    """A cell of a state with its value in another floating type; integers stay as they are."""
    value = cell.value
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return cell
    abstract = isinstance(value, jax.ShapeDtypeStruct)
    return Cell(value.update(dtype=dtype) if abstract else value.astype(dtype), "state", birth=cell.birth)
