"""`to_flax`: one of our modules as an nnx module."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

import minitorch_jax as mt
from minitorch_jax.state.walk import walk_of

from .._functional_call import decoded, functional_call


class Frozen(nnx.BatchStat[Any]):
    """A frozen parameter: nnx does not train it."""


class Ported(nnx.Module):
    """One of our modules as an nnx module: see `to_flax`."""

    def __init__(self, module: mt.Module, rngs: Any) -> None:
        walk = walk_of(module)
        self._spec = walk.spec
        self._rngs = rngs
        self.deterministic = not module.training
        for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
            kind: Any = nnx.Param if cell.trainable else Frozen if cell.kind == "parameter" else nnx.BatchStat
            *outer, name = path.split(".")
            node: Any = self
            for part in outer:
                if not hasattr(node, part):
                    setattr(node, part, nnx.Dict())
                node = getattr(node, part)
                if not isinstance(node, nnx.Dict):
                    raise _name_taken(path)
            if hasattr(node, name):
                raise _name_taken(path)
            setattr(node, name, kind(jnp.copy(decoded(cell))))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        variables = {path: self._variable(path) for path in self._spec.paths}
        values = {path: variable[...] for path, variable in variables.items()}
        key = None if self._rngs is None else self._rngs()
        out, changed = functional_call(self._spec, values, not self.deterministic, key, args, kwargs)
        for path, value in changed.items():
            variables[path][...] = value
        return out

    def _variable(self, path: str) -> Any:
        found: Any = self
        for part in path.split("."):
            found = getattr(found, part)
        return found


def _name_taken(path: str) -> ValueError:
    return ValueError(
        f"to_flax: an nnx module has an attribute of the name {path} already. Rename the parameter or buffer."
    )


def to_flax(module: mt.Module, rngs: Any = None) -> Any:
    """One of our modules as an nnx module, for `nnx.jit`, `nnx.grad` and `nnx.Optimizer`.

    The nnx module has a Variable for each parameter and buffer, under our paths. Parameters are `nnx.Param`s, buffers are
    `nnx.BatchStat`s, and frozen parameters are `BatchStat`s that never change. Tied parameters are one Variable, under the
    first of their names. The arrays are copies. A call runs our forward and writes back the buffers that change. The nnx
    module starts in the module's mode; its `train()` and `eval()` set the mode of all layers alike.

    Args:
        module: the module.
        rngs: an `nnx.Rngs`. Random layers draw from a fork of its stream `dropout`. Without `rngs` they draw from the
            stream of `mt.seed`, which JAX's transforms do not allow.

    Raises:
        TypeError: if `module` is not a Module of minitorch_jax, or `rngs` is not an `nnx.Rngs`.
        ValueError: if a parameter has the name of an attribute of nnx modules.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.adapters.flax import to_flax
        >>> net = to_flax(nn.Sequential(nn.Linear(2, 3, key=jax.random.key(0)), nn.BatchNorm1d(3)))
        >>> grads = nnx.grad(lambda net, x: (net(x) ** 2).sum())(net, jnp.ones((4, 2)))
        >>> grads["0"]["weight"].shape, int(getattr(net, "1").num_batches_tracked[...])
        ((3, 2), 1)
    """
    if not isinstance(module, mt.Module):
        raise TypeError(f"to_flax takes a Module of minitorch_jax; got a {type(module).__name__}")
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"to_flax: rngs must be an nnx.Rngs; got a {type(rngs).__name__}")
    return Ported(module, None if rngs is None else rngs.dropout.fork())
