"""An optax transformation as an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import minitorch_jax as mt
from minitorch_jax.module.parameter import as_array, checked
from minitorch_jax.optim.joint import JointOptimizer
from minitorch_jax.optim.number_vector import short
from minitorch_jax.runtime import contexts
from minitorch_jax.runtime.numpy_memory import owned
from minitorch_jax.state import access
from minitorch_jax.state import frame as frames

from .transformation import Transformation


class OptaxOptimizer(JointOptimizer):
    """An optax transformation with `step()`, `zero_grad()`, and a list of modules that may change.

    It works in eager code, in `mt.jit` and `mt.scan`, as a pytree, and with `mt.save` and `mt.load`. Each parameter keeps
    its state when modules are added, removed or reordered, and while it is frozen. The transformation's state of all
    parameters together stays too; if it depends on the set of parameters (one vector of all of them), it starts again. Two
    optimizers whose transformations were made by the same calls share their compiled programs.

    Args:
        modules: a list of modules; see `minitorch_jax.Optimizer`. Groups are not supported: use `optax.partition`.
        tx: a `GradientTransformation`, with or without extra arguments, or `MultiSteps`. It gets the trainable parameters,
            their gradients and state as dicts by path: `optax.masked(tx, {"0.weight": True, ...})`. If modules are added,
            removed or frozen later, a mask must be a function of such a dict.
        skip_nonfinite, track_grad_norm: see `minitorch_jax.Optimizer`.

    Raises:
        TypeError: if `tx` has no `init` and `update`. Also if the optimizer is pickled: save its state instead.
        ValueError, TypeError: as `minitorch_jax.Optimizer`.

    Differs from our own optimizers: arithmetic, defaults and the dtypes of the state are optax's. You can read and assign
    `lr` only if the transformation was made with `optax.inject_hyperparams`; otherwise that is an AttributeError. Other
    injected numbers are in `hyperparams`.

    Example:
        >>> import jax, minitorch_jax as mt, optax
        >>> from minitorch_jax import nn
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = OptaxOptimizer([model], optax.inject_hyperparams(optax.adamw)(learning_rate=0.5))
        >>> opt.lr
        0.5
        >>> loss = mt.backward(lambda model: model(jnp.ones((1, 2))).sum(), model)
        >>> before = model.bias
        >>> opt.step()
        >>> (model.bias - before).round(2)
        Array([-0.5], dtype=float32)
    """

    def __init__(self, modules: Any, tx: Any, *, skip_nonfinite: bool = False, track_grad_norm: bool = False) -> None:
        if isinstance(tx, type) or not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise TypeError(
                f"OptaxOptimizer takes an optax transformation, such as `optax.adam(1e-3)`, with `init` and `update`; got"
                f" {tx!r}"
            )
        rule = Transformation(tx)
        super().__init__(modules, rule, skip_nonfinite=skip_nonfinite, track_grad_norm=track_grad_norm)

    @property
    def tx(self) -> Any:
        """The transformation."""
        return self._rule.given

    def step(self, **extra: Any) -> None:  # type: ignore[override]
        """Update every trainable parameter of `modules`, in place: all of them, or none if it raises.

        Args:
            **extra: extra arguments of the transformation. Numbers, arrays and pytrees of them are traced: `value=loss`.
                A function (`value_fn`, for a line search) takes no parameters: while it runs, the modules have the
                parameters to try, `value_fn=lambda: loss_fn(model, x, y)`. In eager code, pass the batch by
                `functools.partial(loss_fn, model, x, y)`, so that it is an input of the compiled program. With a
                `value_fn`, the optimizer adds `grad`.

        Raises:
            TypeError: if the transformation takes no extra arguments, or needs some that are missing.
        """
        if extra and not self._rule.takes_extra:
            raise TypeError(
                f"step() got {', '.join(extra)}, and the transformation takes no extra arguments: it is not a"
                " GradientTransformationExtraArgs. Leave them out."
            )
        functions = {name: value for name, value in extra.items() if callable(value)}
        data = jax.tree.map(as_array, {name: value for name, value in extra.items() if name not in functions})
        if not functions:
            self._step(data)
        elif frames.is_eager():
            taken_apart = {name: _taken_apart(function) for name, function in functions.items()}
            _compiled_step(self, data, taken_apart)
        else:
            self._step(data | {name: self._tried(function) for name, function in functions.items()})

    def _tried(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which takes no parameters, as a function of the parameters that it finds in the modules."""

        def tried(params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            plan = self._plan_now()
            values = [params[path] for path in plan.paths]
            out, _, frame = frames.substituted(plan.params, values, lambda _: function(*args, **kwargs))
            if frame.parent is not None:
                for owner, cell in frame.met.values():
                    frame.parent.touch(cell, owner)
            return out

        return tried

    def _check_moved(self, moved: Mapping[str, str]) -> None:
        if wrong := [f"{old} is {new} now" for old, new in moved.items() if old in self._rule.names]:
            raise ValueError(
                f"the transformation has a dict by path (a mask or labels), and paths changed: {', '.join(wrong[:4])}. Put"
                " the modules back in their order, or use a function, `lambda params: {path: ... for path in params}`"
            )

    # -- optax's state ------------------------------------------------------------------------------------------------

    @property
    def opt_state(self) -> Any:
        """The transformation's state, as optax has it. You can assign a state of the same structure."""
        return jax.tree.map(lambda cell: access.read(cell, self), self._state_cells())

    def _state_cells(self) -> Any:
        """The state, with cells in place of arrays."""
        plan = self._plan_now()
        return self._form.joined([jax.tree.unflatten(*self._state[cell]) for cell in plan.shapes], self._shared)

    def _set_opt_state(self, new: Any) -> None:
        held, form = jax.tree.leaves(self._state_cells()), self._form
        if jax.tree.structure(new) != form.tree:
            raise ValueError(
                f"opt_state has the structure {form.tree}; got {jax.tree.structure(new)}, which is that of another"
                " transformation or of other parameters"
            )
        places = [".".join([*([] if i is None else [form.names[i]]), field]) for i, field in form.places]
        leaves = [
            checked(leaf, cell.value, f"opt_state: {place}")
            for leaf, cell, place in zip(jax.tree.leaves(new), held, places, strict=True)
        ]
        for cell, leaf, place in zip(held, leaves, places, strict=True):
            access.write(cell, leaf, f"opt_state: {place}", self)

    @property
    def hyperparams(self) -> MutableMapping[str, Any]:
        """The hyperparameters that `optax.inject_hyperparams` injected, by name. Assigning a number never recompiles.

        If a name occurs in several transformations, its path comes first: `"1.hyperparams.learning_rate"`.
        """
        self._plan_now()
        return _Hyperparams(self)

    def _get_setting(self, name: str, group: int | None) -> Any:
        return self.hyperparams[self._lr_name()] if name == "lr" else super()._get_setting(name, group)

    def _stated(self, name: str, group: int | None = None) -> Any:
        return self._get_setting(name, group) if name == "lr" else super()._stated(name, group)

    def _set_setting(self, name: str, value: Any, group: int | None) -> None:
        if name == "lr":
            self.hyperparams[self._lr_name()] = value
        else:
            super()._set_setting(name, value, group)

    def _lr_name(self) -> str:
        """The name under which the learning rate was injected."""
        found = self.hyperparams
        for name in ("learning_rate", "lr"):  # optax's name, and the name in rules of `as_optax`
            if name in found:
                return name
        raise AttributeError(
            "the learning rate is inside the transformation. To read and assign it, make the transformation with"
            " `optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)`"
            + (f"; the injected hyperparameters are {', '.join(found)}" if found else "")
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lr":
            self._set_setting(name, value, None)
        elif name == "opt_state":
            self._set_opt_state(value)
        else:
            super().__setattr__(name, value)


class _Hyperparams(MutableMapping[str, Any]):
    """The injected hyperparameters of an optimizer."""

    def __init__(self, opt: OptaxOptimizer) -> None:
        self._opt = opt
        fields = [field for field in opt._shared if "hyperparams" in field.split(".")[:-1]]
        last = [field.rpartition("hyperparams.")[2] for field in fields]
        self._fields = {
            name if last.count(name) == 1 else field: field for field, name in zip(fields, last, strict=True)
        }

    def __getitem__(self, name: str) -> Any:
        return short(access.read(self._opt._shared[self._fields[name]], self._opt))

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._fields:
            raise KeyError(f"{name!r} is not an injected hyperparameter; these are {', '.join(self) or 'none'}")
        field = self._fields[name]
        prefix, _, last = field.rpartition("hyperparams.")
        if any(other.startswith(f"{prefix}hyperparams_states.{last}.") for other in self._opt._shared):
            raise AttributeError(f"{name} follows a schedule, which sets it at each step: inject a number to assign it")
        cell = self._opt._shared[field]
        numeric = isinstance(value, int | float | jax.Array | np.ndarray | np.generic) and not isinstance(value, bool)
        if not numeric or not isinstance(value, jax.core.Tracer) and not np.isfinite(value).all():
            raise ValueError(
                f"{name} must be a finite number; got {value!r}. Pass a schedule to the transformation instead:"
                f" `optax.inject_hyperparams(...)({last}=schedule)`"
            )
        with contexts.full_width([cell.value]):
            new = jnp.asarray(owned(value)).astype(cell.value.dtype)
            if new.shape == ():  # the same for all members of an ensemble
                new = jnp.broadcast_to(new, cell.value.shape)
            access.write(cell, checked(new, cell.value, name), name, self._opt)

    def __delitem__(self, name: str) -> None:
        raise TypeError("injected hyperparameters belong to the transformation: they cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return repr(dict(self))


def _taken_apart(function: Callable[..., Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A function, and the arguments that `functools.partial` has bound."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        args, kwargs, function = (*function.args, *args), {**function.keywords, **kwargs}, function.func
    return function, args, kwargs


@mt.jit
def _compiled_step(opt: OptaxOptimizer, data: dict[str, Any], functions: dict[str, Any]) -> None:
    whole = {name: functools.partial(fn, *args, **kwargs) for name, (fn, args, kwargs) in functions.items()}
    opt.step(**data, **whole)
