"""Equinox: its modules trained by this library's loop, and this library's modules as equinox modules.

`Equinox(module)` holds an immutable equinox module, and is a Module like others: list it in an optimizer's `modules`, use it
in `mt.backward`, `mt.jit` and `mt.scan`. Its `module` is always the equinox module with the arrays as they are now. The
other way, `to_equinox(module)` gives an equinox module that computes what one of ours does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax.state.pytree import Builder
from minitorch_jax.state.walk import Node, Spec, Walker, walk_of

from ._bridge import TreeHolder, decoded, is_array, run_copy
from ._extra import missing
from ._identity import Same

try:
    import equinox as eqx
except ImportError as error:
    raise missing("equinox", error) from error


class Equinox(TreeHolder):
    """A Module around an equinox module, and its `eqx.nn.State` if it has one.

    Each array of the module is a parameter or a buffer of the holder, under its path in the module (`layers.0.weight`);
    everything else is static: another activation, rate or `inference` flag is another program. Read `module` where you
    need the equinox module, and assign to it what `eqx.tree_at` and the like give: arrays of the same structure are
    written, another structure is taken over, between calls of compiled code only, and arrays that keep their path, shape
    and dtype stay the same parameters with the same optimizer state. A stateful module is called as everywhere in
    equinox: `out, holder.state = jax.vmap(holder.module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x,
    holder.state)`.

    `train()` and `eval()` set all `inference` flags, as `eqx.nn.inference_mode` does; nothing is set before. An array that
    is in two places of a module is two parameters, as in equinox; `eqx.nn.Shared` makes it one.

    Args:
        module: an equinox module, or any pytree of arrays, functions and hashable values.
        state: its `eqx.nn.State`, from `eqx.nn.make_with_state`: buffers, under paths that begin with `state`.
        trainable: which of the module's floating arrays are trained, as for `eqx.partition`: a function of a leaf, or a
            pytree of booleans of the module's structure. The other floating arrays are frozen parameters, and what is not
            floating is a buffer. (`unfreeze()` trains all of them. In another structure, what was frozen under its name
            stays so, and booleans that do not fit choose nothing: the rest is trained.)

    Raises:
        TypeError: if `state` is no `eqx.nn.State`.
        ValueError: if there is anything that cannot be held (a leaf without a hash, a complex array to be trained), all of
            it listed; if `trainable` chooses nothing.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> import minitorch_jax as mt
        >>> from minitorch_jax import optim
        >>> from minitorch_jax.adapters.equinox import Equinox
        >>> model = Equinox(eqx.nn.MLP(2, 1, width_size=8, depth=1, key=jax.random.key(0)))
        >>> opt = optim.SGD([model], lr=0.1)
        >>> def loss_fn(model, x, y):
        ...     return ((jax.vmap(model)(x) - y) ** 2).mean()
        >>> losses = []
        >>> for _ in range(5):
        ...     opt.zero_grad()
        ...     losses.append(float(mt.backward(loss_fn, model, jnp.ones((4, 2)), jnp.ones((4, 1)))))
        ...     opt.step()
        >>> losses[-1] < losses[0], type(model.module).__name__
        (True, 'MLP')
    """

    __slots__ = ("_trainable",)
    _holds = "an equinox module"
    _prefixes = {"module": "", "state": "state"}

    def __init__(self, module: Any, state: Any = None, trainable: Any = eqx.is_inexact_array) -> None:
        if state is not None and not isinstance(state, eqx.nn.State):
            raise TypeError(
                f"Equinox: state must be an eqx.nn.State, as eqx.nn.make_with_state gives one; got a"
                f" {type(state).__name__}. Write `Equinox(module, trainable=...)` to choose what is trained."
            )
        object.__setattr__(self, "_trainable", trainable)
        self.module = module
        if trainable is not eqx.is_inexact_array and not any(c.trainable for c in self._cells.values()):
            raise ValueError(
                "Equinox: trainable chooses none of the module's arrays, so there would be nothing to train"
            )
        self.state = state

    @property
    def module(self) -> Any:
        """The equinox module, with its arrays as they are now: theirs to keep, as any array that is read."""
        return self._get("module")

    @module.setter
    def module(self, value: Any) -> None:
        self._set("module", value)

    @property
    def state(self) -> Any:
        """The `eqx.nn.State`, with its arrays as they are now; None if there is none."""
        return self._get("state")

    @state.setter
    def state(self, value: Any) -> None:
        self._set("state", value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. (Equinox's take one example: `jax.vmap(model)(x)`.)"""
        return self.module(*args, **kwargs)

    def _kinds(self, part: str, tree: Any, names: Sequence[str]) -> dict[str, str]:
        if part == "state":
            return {}
        try:
            chosen = eqx.filter(tree, self._trainable)
        except ValueError:
            if not self._layouts:
                raise
            chosen = eqx.filter(tree, eqx.is_inexact_array)  # booleans for the structure that there was at first
        pairs = zip(_with_nones(tree), _with_nones(chosen), strict=True)
        kept = [taken is not None for leaf, taken in pairs if is_array(leaf)]
        floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(tree) if is_array(leaf)]
        return {
            name: "parameter" if taken else "frozen" if floats else "buffer"
            for name, taken, floats in zip(names, kept, floating, strict=True)
        }

    def _set_mode(self, training: bool) -> None:
        self.module = eqx.nn.inference_mode(self.module, not training)

    def __getstate__(self) -> Any:
        return super().__getstate__(), self._trainable

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        object.__setattr__(self, "_trainable", state[1])

    def _describe(self, walker: Walker, path: str) -> Node:
        return *super()._describe(walker, path), Same(self._trainable)

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Any:
        self = super()._rebuild(payload[:-1], builder)
        object.__setattr__(self, "_trainable", payload[-1].value)
        return self


def _with_nones(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


# -- the other way ----------------------------------------------------------------------------------------------------


class Ported(eqx.Module):
    """One of our modules as an equinox module: see `to_equinox`."""

    parameters: dict[str, jax.Array]
    inference: bool
    spec: Spec = eqx.field(static=True)

    def __call__(self, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """The module's forward; random layers draw from `key`."""
        out, changed = run_copy(self.spec, self.parameters, not self.inference, key, args, kwargs)
        self._check(changed)
        return out

    def _check(self, changed: Iterable[str]) -> None:
        if wrong := sorted(changed):
            raise RuntimeError(
                f"{self.spec.node[1].__name__}.forward changed the parameters {_listed(wrong)}, and an equinox module cannot"
                " change while it is called: declare them as Buffers"
            )


class StatefulPorted(Ported):
    """One of our modules with buffers as an equinox module: see `to_equinox`."""

    def __call__(self, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """`(out, state)`, given the module's arguments and, as the last positional one, the state."""
        state = args[-1] if args else None
        paths = set(self.spec.paths) - self.parameters.keys()
        if not isinstance(state, dict) or state.keys() != paths:
            raise TypeError(
                "this module has a state: call it as `out, state = model(x, state)`, with the state that"
                " `to_equinox(module, with_state=True)` gave beside it"
            )
        values = self.parameters | state
        out, changed = run_copy(self.spec, values, not self.inference, key, args[:-1], kwargs)
        self._check(changed.keys() - paths)
        return out, state | changed


def to_equinox(module: mt.Module, with_state: bool = False) -> Any:
    """One of our modules as an equinox module, for `eqx.filter_jit`, `eqx.filter_grad` and optax.

    Its leaves are the trainable parameters' arrays, each once (tied ones stay tied), in a dict by path: `model.parameters`.
    The arrays are copies. The module's mode comes along, and `eqx.nn.inference_mode` changes it (for all layers alike). As
    our modules take batches, no `jax.vmap` is needed.

    Equinox modules do not change when they are called. So what the module has besides trainable parameters, its buffers
    and frozen parameters, is a state of its own, a dict by path, that goes in and comes out: `out, state = model(x, state)`.

    Args:
        module: the module.
        with_state: whether it may have buffers and frozen parameters; then `(model, state)` is returned.

    Returns:
        An equinox module, called as the module is, with one argument more: `key`, a random key for its random layers
        (without one they draw from the stream of `mt.seed`, which no transform of JAX's allows).

    Raises:
        TypeError: if it is no Module of ours.
        ValueError: if there are buffers or frozen parameters, naming them, and no `with_state`.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.adapters.equinox import to_equinox
        >>> model = to_equinox(nn.Linear(2, 1, key=jax.random.key(0)))
        >>> grads = eqx.filter_grad(lambda model, x: model(x).sum())(model, jnp.ones((3, 2)))
        >>> grads.parameters["bias"]
        Array([3.], dtype=float32)
        >>> model, state = to_equinox(nn.BatchNorm1d(2), with_state=True)
        >>> out, state = eqx.filter_jit(model)(jnp.ones((3, 2)), state)
        >>> int(state["num_batches_tracked"])
        1
    """
    if not isinstance(module, mt.Module):
        raise TypeError(f"to_equinox takes a Module of minitorch_jax, not a {type(module).__name__}")
    walk = walk_of(module)
    arrays = {path: (cell, jnp.copy(decoded(cell))) for path, cell in zip(walk.spec.paths, walk.cells, strict=True)}
    parameters = {path: array for path, (cell, array) in arrays.items() if cell.trainable}
    others = {path: array for path, (cell, array) in arrays.items() if not cell.trainable}
    if with_state:
        return StatefulPorted(parameters, not module.training, walk.spec), others
    if others:
        raise ValueError(
            f"{type(module).__name__} has buffers or frozen parameters ({_listed(others)}), which an equinox module keeps in"
            " a state: convert it by `model, state = to_equinox(module, with_state=True)`"
        )
    return Ported(parameters, not module.training, walk.spec)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
