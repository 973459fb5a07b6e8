"""Equinox: train its modules in our loop, and use our modules as equinox modules.

`Equinox(module)` holds an immutable equinox module. It is a Module like any other: use it in an optimizer's `modules`, in
`mt.backward`, `mt.jit` and `mt.scan`. Its attribute `module` is the equinox module with the current arrays. The other way,
`to_equinox(module)` returns an equinox module that computes what our module computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax.state.pytree import Builder
from minitorch_jax.state.walk import Node, Spec, Walker, walk_of

from ._extra import missing
from ._functional_call import decoded, functional_call
from ._identity import ByIdentity
from ._pytree_wrapper import PytreeWrapper, is_array

try:
    import equinox as eqx
except ImportError as error:
    raise missing("equinox", error) from error


class Equinox(PytreeWrapper):
    """A Module around an equinox module, and its `eqx.nn.State` if it has one.

    Each array of the equinox module is a parameter or a buffer of the wrapper, under its path (`layers.0.weight`).
    Everything else is static: another activation, rate or `inference` flag compiles another program.

    Read `module` where you need the equinox module. Assign to `module` what `eqx.tree_at` and similar functions return.
    Arrays of the same structure are written. Another structure replaces the old one, which is allowed only outside of
    compiled code; arrays that keep their path, shape and dtype stay the same parameters, with their optimizer state. Call a
    stateful module as in equinox: `out, wrapper.state = jax.vmap(wrapper.module, axis_name="batch", in_axes=(0, None),
    out_axes=(0, None))(x, wrapper.state)`.

    `train()` and `eval()` set all `inference` flags, as `eqx.nn.inference_mode` does. Wrapping a module does not set them.
    An array that is in two places of a module is two parameters, as in equinox; `eqx.nn.Shared` makes it one.

    Args:
        module: an equinox module, or any pytree of arrays, functions and hashable values.
        state: its `eqx.nn.State`, from `eqx.nn.make_with_state`. Its arrays are buffers, under paths that begin with
            `state`.
        trainable: the floating arrays to train, as for `eqx.partition`: a function of a leaf, or a pytree of booleans of
            the module's structure. The other floating arrays are frozen parameters; all other arrays are buffers.
            `unfreeze()` trains all floating arrays. In a new structure, arrays that were frozen stay frozen under their
            name; if the booleans do not fit it, all other floating arrays are trained.

    Raises:
        TypeError: if `state` is not an `eqx.nn.State`.
        ValueError: if the wrapper cannot hold part of the module: a leaf without a hash, a complex array to be trained.
            One error lists all such parts. Also if `trainable` selects no array.

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
                f"Equinox: state must be an eqx.nn.State, as eqx.nn.make_with_state returns one; got a"
                f" {type(state).__name__}. Write `Equinox(module, trainable=...)` to select the trained arrays."
            )
        object.__setattr__(self, "_trainable", trainable)
        self.module = module
        if trainable is not eqx.is_inexact_array and not any(c.trainable for c in self._cells.values()):
            raise ValueError(
                f"Equinox: trainable={trainable!r} selects none of the module's arrays, so nothing would be trained. Pass"
                " a filter that selects at least one."
            )
        self.state = state

    @property
    def module(self) -> Any:
        """The equinox module, with the current arrays. They stay valid and unchanged, as any array that you read."""
        return self._get("module")

    @module.setter
    def module(self, value: Any) -> None:
        self._set("module", value)

    @property
    def state(self) -> Any:
        """The `eqx.nn.State`, with the current arrays; None if there is none."""
        return self._get("state")

    @state.setter
    def state(self, value: Any) -> None:
        self._set("state", value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. Equinox's layers take one example: use `jax.vmap(model)(x)` for a batch."""
        return self.module(*args, **kwargs)

    def _kinds(self, part: str, tree: Any, names: Sequence[str]) -> dict[str, str]:
        if part == "state":
            return {}
        try:
            chosen = eqx.filter(tree, self._trainable)
        except ValueError:
            if not self._layouts:
                raise
            chosen = eqx.filter(tree, eqx.is_inexact_array)  # the booleans are for the first structure
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
        return *super()._describe(walker, path), ByIdentity(self._trainable)

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Any:
        self = super()._rebuild(payload[:-1], builder)
        object.__setattr__(self, "_trainable", payload[-1].value)
        return self


def _with_nones(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


# -- our modules as equinox modules -----------------------------------------------------------------------------------


class Ported(eqx.Module):
    """One of our modules as an equinox module: see `to_equinox`."""

    parameters: dict[str, jax.Array]
    inference: bool
    spec: Spec = eqx.field(static=True)

    def __call__(self, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """The module's forward; random layers draw from `key`."""
        out, changed = functional_call(self.spec, self.parameters, not self.inference, key, args, kwargs)
        self._check(changed)
        return out

    def _check(self, changed: Iterable[str]) -> None:
        if wrong := sorted(changed):
            raise RuntimeError(
                f"{self.spec.node[1].__name__}.forward changed the parameters {_listed(wrong)}, and a call cannot change"
                " the parameters of an equinox module: declare them as Buffers"
            )


class StatefulPorted(Ported):
    """One of our modules with buffers as an equinox module: see `to_equinox`."""

    def __call__(self, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """Return `(out, state)`. The state is the last positional argument."""
        state = args[-1] if args else None
        paths = set(self.spec.paths) - self.parameters.keys()
        if not isinstance(state, dict) or state.keys() != paths:
            raise TypeError(
                "this module has a state: call it as `out, state = model(x, state)`, with the state that"
                f" `to_equinox(module, with_state=True)` returned; got a {type(state).__name__} as the last argument"
            )
        values = self.parameters | state
        out, changed = functional_call(self.spec, values, not self.inference, key, args[:-1], kwargs)
        self._check(changed.keys() - paths)
        return out, state | changed


def to_equinox(module: mt.Module, with_state: bool = False) -> Any:
    """One of our modules as an equinox module, for `eqx.filter_jit`, `eqx.filter_grad` and optax.

    Its leaves are the arrays of the trainable parameters, in a dict by path: `model.parameters`. Tied parameters are one
    leaf. The arrays are copies. The equinox module starts in the module's mode; `eqx.nn.inference_mode` sets the mode of
    all layers alike. Our modules take batches, so you need no `jax.vmap`.

    A call cannot change an equinox module. Buffers and frozen parameters are therefore a separate state, a dict by path,
    which each call takes and returns: `out, state = model(x, state)`.

    Args:
        module: the module.
        with_state: True allows buffers and frozen parameters, and returns `(model, state)`.

    Returns:
        An equinox module, called as the module is, with one more argument: `key`, a random key for random layers. Without
        a key they draw from the stream of `mt.seed`, which JAX's transforms do not allow.

    Raises:
        TypeError: if `module` is not a Module of minitorch_jax.
        ValueError: if the module has buffers or frozen parameters and `with_state` is False. The message names them.

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
        raise TypeError(f"to_equinox takes a Module of minitorch_jax; got a {type(module).__name__}")
    walk = walk_of(module)
    arrays = {path: (cell, jnp.copy(decoded(cell))) for path, cell in zip(walk.spec.paths, walk.cells, strict=True)}
    parameters = {path: array for path, (cell, array) in arrays.items() if cell.trainable}
    others = {path: array for path, (cell, array) in arrays.items() if not cell.trainable}
    if with_state:
        return StatefulPorted(parameters, not module.training, walk.spec), others
    if others:
        raise ValueError(
            f"{type(module).__name__} has buffers or frozen parameters ({_listed(others)}), which need a state: convert it"
            " by `model, state = to_equinox(module, with_state=True)`"
        )
    return Ported(parameters, not module.training, walk.spec)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
