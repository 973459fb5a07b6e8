"""Our rules as optax transformations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

import minitorch_jax as mt
from minitorch_jax.module.parameter import as_array, is_narrow
from minitorch_jax.optim import LBFGS, Optimizer
from minitorch_jax.optim.hyperparameters import is_schedule
from minitorch_jax.optim.joint import JointOptimizer
from minitorch_jax.optim.number_vector import complement
from minitorch_jax.optim.rounding import place_of
from minitorch_jax.optim.states import first_state, refuse_wide
from minitorch_jax.optim.update import Master, Settings, lifted, masked_decay

from .._extra import missing

try:
    import optax
except ImportError as error:
    raise missing("optax", error) from error


class RuleState(NamedTuple):
    """The state of `as_optax`."""

    num_steps: jax.Array  # (), int32: the number of steps so far
    hyperparams: dict[str, Any]  # numbers by name, without those that follow a schedule; they may change between steps
    states: Any  # the parameters' pytree, with the rule's state in place of each parameter


class _Probe(mt.Module):
    """A module with one parameter, for an optimizer that only checks its settings."""

    def __init__(self) -> None:
        self.weight = mt.Parameter(jnp.zeros((1, 1)))

    def forward(self) -> Any:
        return self.weight


def as_optax(rule: type[Optimizer], *args: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    """One of our rules, or your own, as an optax transformation.

    Args:
        rule: a class: `mt.Optimizer`, any optimizer of `minitorch_jax.optim` except LBFGS, or a subclass with `init_state`
            and `update`.
        *args, **settings: the arguments of its constructor after `modules`, schedules included. They are checked as there.
            With `state_dtype=jnp.bfloat16`, the seed of the rounding is 0.

    Returns:
        A transformation, which needs `params`. Use it alone or in `optax.chain`. Its updates are the differences that a
        step makes, so `optax.apply_updates` returns the step's result up to the rounding of one addition. Numbers are in
        its state, such as `state.hyperparams["lr"]`, and may be changed there.

    Raises:
        TypeError: if `rule` is not such a class, or its constructor does not take the settings.
        ValueError: if a setting is out of range. Also for `skip_nonfinite` and `track_grad_norm`: use
            `optax.apply_if_finite` instead. `update` raises it without `params`.

    Example:
        >>> import optax
        >>> from minitorch_jax import optim
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), as_optax(optim.AdamW, lr=0.1, weight_decay=0.0))
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
        >>> updates["w"].round(3)
        Array([-0.1, -0.1], dtype=float32)
    """
    if not (isinstance(rule, type) and issubclass(rule, Optimizer)) or issubclass(rule, LBFGS | JointOptimizer):
        raise TypeError(
            "as_optax takes the class of an optimizer that updates each array by itself, such as `optim.AdamW` (not an"
            f" instance, and not LBFGS); got {rule!r}"
        )
    probe = rule([_Probe()], *args, **settings)
    flags, given = probe._hyper.flags_of(None), dict(probe._hyper.given)
    for name in ("skip_nonfinite", "track_grad_norm"):
        if flags[name]:
            raise ValueError(
                f"as_optax does not take {name}: leave it out, and wrap the transformation in `optax.apply_if_finite`"
            )
    schedules = {name: value for name, value in given.items() if is_schedule(value)}
    numbers = {name: value for name, value in given.items() if name not in schedules}

    def one_minus(given: float, now: Any) -> Any:  # 1 - given has more correct digits than 1 - now
        rounded = jnp.asarray(given, now.dtype)
        return jnp.where(now == rounded, jnp.asarray(1 - given, now.dtype), 1 - now)

    only_matrices = Settings(rule, tuple(flags.items()), (), (), 0)

    def begin(p: Any) -> Any:
        settings, p = SimpleNamespace(**given, **flags), as_array(p)
        if flags["state_dtype"] is not None:
            refuse_wide(f"as_optax({rule.__name__})", "a parameter", p)
        state = first_state(rule, p, settings)
        return Master(p.astype(jnp.float32), state) if flags["master_weights"] and is_narrow(p) else state

    def init(params: Any) -> RuleState:
        states = jax.tree.map(begin, params)
        hyperparams = jax.tree.map(lambda number: jnp.asarray(number, jnp.result_type(float)), numbers)
        return RuleState(jnp.zeros((), jnp.int32), hyperparams, states)

    def update(updates: Any, state: RuleState, params: Any = None, **_: Any) -> tuple[Any, RuleState]:
        if params is None:
            raise ValueError(
                f"as_optax({rule.__name__}) needs the parameters; got params=None: call `tx.update(grads, state, params)`"
            )
        now = dict(state.hyperparams) | {
            name: jax.tree.map(jnp.asarray, schedule(state.num_steps)) for name, schedule in schedules.items()
        }
        now["one_minus"] = jax.tree.map(complement, now) | jax.tree.map(one_minus, numbers, dict(state.hyperparams))

        def one(path: str, g: Any, p: Any, s: Any) -> tuple[Any, Any]:
            mine = now | masked_decay(now, only_matrices.decayed((p.shape,)))
            noise = (np.uint32(0), place_of([(path, p.shape)], p.size)) if flags["state_dtype"] == "bfloat16" else ()
            new_p, new_s = lifted(rule, p, g, s, mine, flags, state.num_steps + 1, *noise)
            return new_p - p, new_s

        tree: Any
        named, tree = jax.tree_util.tree_flatten_with_path(updates)
        inner = tree.flatten_up_to(state.states)
        pairs = [
            one(keystr(path, simple=True, separator="."), g, p, s)
            for (path, g), p, s in zip(named, tree.flatten_up_to(params), inner, strict=True)
        ]
        changed, states = (tree.unflatten([pair[i] for pair in pairs]) for i in (0, 1))
        return changed, RuleState(state.num_steps + 1, state.hyperparams, states)

    return optax.GradientTransformationExtraArgs(init, update)
