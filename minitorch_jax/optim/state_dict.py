"""An optimizer's state as a plain dict, keyed by parameter path, and back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..module.parameter import checked
from ..runtime import contexts
from ..runtime.jax_private import at_top_level
from ..state import access
from ..state.cell import Cell
from ..state.concurrent_reads import lend
from ..state.structure import changed
from .plan import Plan
from .states import field_names
from .update import LAST


def state_dict(opt: Any, plan: Plan) -> dict[str, Any]:
    """What `Optimizer.state_dict` gives."""
    steps = jax.device_get(opt._steps.value)
    state = {}
    for path, param in plan.named.items():
        tree, held = opt._state.get(param, (None, []))
        fields = dict(zip(field_names(tree), [access.read(cell, opt) for cell in held], strict=True)) if held else {}
        state[path] = {"step": _number(steps[..., opt._order.index(param)]), **fields}
    hyper = opt._hyper
    own = [
        {
            **({} if rule is None else {"rule": rule.__name__}),
            **{name: opt._stated(name, g) for name in mine if name != "state_dtype"},
        }
        for g, (rule, mine) in enumerate(zip(hyper.rules, hyper.own, strict=True))
    ]
    return {
        "num_steps": _number(steps[..., -2]),
        "skipped": _number(steps[..., -1]),
        "hyperparameters": {name: opt._stated(name) for name in (*hyper.given, *hyper.flags) if name != "state_dtype"},
        **({"groups": own} if own else {}),
        "fingerprints": _fingerprints(plan.values()),
        "state": state,
        **({"shared": {name: access.read(cell, opt) for name, cell in opt._shared.items()}} if opt._shared else {}),
        **({} if opt._seed is None else {"seed": _number(jax.device_get(opt._seed.value))}),
    }


def load_state_dict(opt: Any, plan: Plan, given: Mapping[str, Any]) -> None:
    """What `Optimizer.load_state_dict` does."""
    access.check_writable(opt._steps, f"the state of {type(opt).__name__}", opt)
    misplaced = _malformed(given)
    if misplaced:
        raise _unfit(opt, misplaced)
    hyper = dict(given.get("hyperparameters", {}))
    own = [dict(mine) for mine in given.get("groups", [])]
    new, steps, problems = _new_state(opt, plan, given)
    wanted = {"num_steps", "skipped", "hyperparameters", "state"}
    wanted |= {key for key, there in (("groups", opt._hyper.own), ("shared", opt._shared)) if there}
    keys = sorted(wanted ^ (given.keys() - {"fingerprints", "seed"}))
    problems = [f"  {'missing' if key in wanted else 'unexpected'}: {key}" for key in keys] + problems
    problems += _moved(plan, given.get("fingerprints", {}))
    problems += _misfits(opt, hyper, own)
    seeds, wrong = _new_seed(opt, given)
    problems += wrong
    if problems:
        raise _unfit(opt, problems)
    kept = [{"state_dtype": mine["state_dtype"]} if "state_dtype" in mine else {} for mine in opt._hyper.own]
    own = [mine | more for mine, more in zip(own, kept, strict=True)]
    opt._load_hyperparameters(hyper | {"state_dtype": opt._hyper.flags["state_dtype"]}, own)
    new += seeds
    for cell, _ in new:
        lend(cell)
    access.store_all(
        [*(cell for cell, _ in new), opt._steps], [*(v for _, v in new), jax.device_put(steps, may_alias=False)]
    )
    changed(opt)  # other parameters may have taken as many steps as each other


def _unfit(opt: Any, problems: list[str]) -> ValueError:
    listed = "\n".join(problems)
    return ValueError(f"state_dict does not fit this {type(opt).__name__}; nothing was loaded:\n{listed}")


def _malformed(given: Any) -> list[str]:
    """What is no dict where one must be, or no list, or no pair of numbers: all else is looked at entry by entry."""
    if not isinstance(given, Mapping):
        return [f"  it must be a dict, as `state_dict()` gives; got a {type(given).__name__}"]
    entries = [(name, given[name]) for name in ("hyperparameters", "state", "shared", "fingerprints") if name in given]
    if isinstance(given.get("state"), Mapping):
        entries += [(f"state.{path}", fields) for path, fields in given["state"].items()]
    groups = given.get("groups", [])
    if isinstance(groups, list | tuple):
        entries += [(f"groups.{i}", settings) for i, settings in enumerate(groups)]
    else:
        entries.append(("groups", groups))
    problems = [
        f"  {name} must be a {'list of dicts' if name == 'groups' else 'dict'}; got {value!r}"
        for name, value in entries
        if not isinstance(value, Mapping)
    ]
    strange = [(name, key) for name, value in [*entries, ("it", given)] if isinstance(value, Mapping) for key in value]
    problems += [f"  {name}: {key!r} is no name" for name, key in strange if type(key) is not str]
    prints = given.get("fingerprints", {})
    for path, pair in prints.items() if isinstance(prints, Mapping) else ():
        try:
            right = np.shape(pair) == (2,) and np.isfinite(np.asarray(pair, float)).size == 2
        except (TypeError, ValueError):
            right = False
        if not right:
            problems.append(f"  fingerprints.{path} must be two numbers; got {pair!r}")
    return problems


def _new_state(opt: Any, plan: Plan, given: Mapping[str, Any]) -> tuple[list[tuple[Cell, Any]], Any, list[str]]:
    """New values of states and step counts, and what is wrong with them."""
    state = given.get("state", {})
    problems = [f"  missing: state of {path}" for path in plan.named if path not in state]
    problems += [f"  unexpected: state of {path}" for path in state if path not in plan.named]
    new: list[tuple[Cell, Any]] = []
    steps = np.array(opt._steps.value)
    problems += _count(steps, -2, given.get("num_steps", 0), "num_steps")
    problems += _count(steps, -1, given.get("skipped", 0), "skipped")
    for path, param in plan.named.items():
        tree, held = opt._state.get(param, (None, []))
        names = ["step", *(field_names(tree) if held else [])]
        fields = state.get(path, dict.fromkeys(names))
        if set(names) != set(fields):
            hint = "" if param.trainable else "; it is frozen here: load it unfrozen, and freeze it then"
            problems.append(f"  {path}: fields {sorted(fields)} were given for {sorted(names)}{hint}")
        elif path in state:
            problems += _count(steps, opt._order.index(param), fields["step"], f"{path}.step")
            converts = opt._seed is not None or "seed" in given
            problems += _take(dict(zip(names[1:], held, strict=True)), fields, path, new, converts)
    if opt._shared and "shared" in given:  # where it is missing, that has been said
        shared = given["shared"]
        if shared.keys() != opt._shared.keys():
            problems.append(f"  shared: fields {sorted(shared)} were given for {sorted(opt._shared)}")
        else:
            problems += _take(opt._shared, shared, "shared", new)
    return new, steps, problems


def _count(steps: Any, place: int, given: Any, label: str) -> list[str]:
    """Put a count (those of an ensemble: an array) among the others; what is wrong with it."""
    try:
        count = np.asarray(given)
    except (TypeError, ValueError):
        count = np.asarray(None)
    whole = isinstance(given, int | np.integer | np.ndarray | jax.Array) and count.dtype.kind in "iu"
    if not whole or isinstance(given, bool) or count.shape != steps.shape[:-1]:
        what = f"an array {steps.shape[:-1]} of integers" if steps.ndim > 1 else "an integer"
        return [f"  {label} must be {what}; got {given!r}"]
    if not ((count >= 0) & (count <= LAST)).all():
        return [f"  {label} must be in [0, {LAST}], where counts end; got {given!r}"]
    steps[..., place] = count
    return []


def _take(
    held: Mapping[str, Cell], fields: Mapping[str, Any], path: str, new: list[tuple[Cell, Any]], converts: bool = False
) -> list[str]:
    """Add to `new` what fields give some cells, floats `converts` to their dtypes; what is wrong with them."""
    problems = []
    for name, cell in held.items():
        try:
            with contexts.full_width([cell.value]):
                value = fields[name]
                if converts and all([_is_floating(x) for x in (value, cell.value)]):
                    value = value.astype(cell.value.dtype)
                new.append((cell, checked(value, cell.value, f"{path}.{name}")))
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(_named(f"{path}.{name}", error))
    return problems


def _is_floating(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating)


def _new_seed(opt: Any, given: Mapping[str, Any]) -> tuple[list[tuple[Cell, Any]], list[str]]:
    """The cell of the seed with the one given, if state is rounded here and it was there; what is wrong with it."""
    if opt._seed is None or "seed" not in given:
        return [], []
    seed, members = given["seed"], opt._seed.value.shape
    try:
        numbers = np.asarray(seed)
    except (TypeError, ValueError):
        numbers = np.asarray(None)
    fits = numbers.dtype.kind in "iu" and numbers.shape == members and ((numbers >= 0) & (numbers < 2**32)).all()
    if not fits:
        what = f"an array {members} of integers" if members else "an integer"
        return [], [f"  seed must be {what} in [0, 2**32); got {seed!r}"]
    return [(opt._seed, jax.device_put(numbers.astype(np.uint32), may_alias=False))], []


def _misfits(opt: Any, hyper: dict[str, Any], own: list[dict[str, Any]]) -> list[str]:
    """What is wrong with hyperparameters, and with those that groups have of their own."""
    known = {**opt._hyper.given, **opt._hyper.flags}
    del known["state_dtype"]  # this optimizer's own
    different = sorted(known.keys() ^ hyper.keys())
    problems = [f"  {'missing' if name in known else 'unexpected'}: hyperparameter {name}" for name in different]
    if len(own) != len(opt._hyper.own):
        problems.append(f"  {len(own)} groups were given for {len(opt._hyper.own)}")
    for group, settings in enumerate((hyper, *own), -1):
        g = group if 0 <= group < len(opt._hyper.own) else None
        rule = opt._hyper.rule_of(g)
        names = known if rule is None else opt._hyper.names_of(g)
        if settings.get("rule") != (None if rule is None else rule.__name__) and settings is not hyper:
            ours, theirs = opt._rule_of(g).__name__, settings.get("rule", "the optimizer's")
            problems.append(f"  groups[{group}]: its rule is {theirs} there, and {ours} here")
            continue
        if rule is not None and (missing := sorted(opt._hyper.own[g].keys() - settings.keys() - {"state_dtype"})):
            problems.append(f"  missing: {', '.join(missing)} of groups[{g}]")
        for name, value in settings.items():
            try:
                if name in names:
                    opt._check_setting(name, value, g)
                elif settings is not hyper and name != "rule":
                    problems.append(f"  unexpected: hyperparameter {name} of a group")
            except (ValueError, TypeError, OverflowError) as error:
                problems.append(_named(name, error))
    return problems


def _named(label: str, error: Exception) -> str:
    """What an error says, with what it is about."""
    return f"  {error}" if label in str(error) else f"  {label}: {error}"


def _number(count: Any) -> Any:
    """A count as an integer; those of an ensemble as an array."""
    return int(count) if count.ndim == 0 else count


# -- which parameter a state belongs to --------------------------------------------------------------------------------


@jax.jit
def _fingerprint(value: Any) -> Any:
    size, weight = jnp.abs(value.astype(jnp.float32)), jnp.float32(0.5)
    step = 0.5 / max(value.size - 1, 1)  # the weights go from 0.5 to 1, in row-major order
    for axis in reversed(range(value.ndim)):  # never flattened: of a divided array, each device would need the whole
        weight = weight + step * jax.lax.broadcasted_iota(jnp.float32, value.shape, axis)
        step *= value.shape[axis]
    return jnp.stack([size.sum(), (size * weight).sum()])


def _fingerprints(values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Two numbers of each parameter that tell it from others of its shape."""
    eager = nullcontext() if at_top_level() else jax.ensure_compile_time_eval()
    with eager:
        concrete = {path: value for path, value in values.items() if not isinstance(value, jax.ShapeDtypeStruct)}
        found = {path: _fingerprint(value) for path, value in concrete.items()}
    return {path: (float(pair[0]), float(pair[1])) for path, pair in jax.device_get(found).items()}


def _moved(plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """Parameters whose state was saved beside values that another one of them has now."""
    if not saved:
        return []
    values = plan.values()
    now = _fingerprints(values)
    problems = []
    for path in now.keys() & saved.keys():
        if _same(now[path], saved[path]):
            continue
        for other in (p for p in now if p in saved and p != path and values[p].shape == values[path].shape):
            if _same(now[other], saved[path]) and not _same(now[other], saved[other]):
                problems.append(
                    f"  {path}: its state was saved for the parameter that is {other} now. List the modules in the"
                    " order that they had"
                )
    return sorted(problems)


def _same(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=1e-4, atol=0))
