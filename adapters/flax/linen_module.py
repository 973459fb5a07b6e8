"""`Linen`: a Module around a linen module and its variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen

import minitorch_jax as mt

from .._pytree_wrapper import PytreeWrapper
from .._wrapper import without_numbers


class Linen(PytreeWrapper):
    """A Module around a linen module and its variables.

    The arrays of the collection `params` are parameters; those of other collections (`batch_stats`, …) are buffers. Their
    names are their paths (`params.Dense_0.kernel`). A call runs `module.apply` on the current variables and writes back
    the collections that it changes. Linen modules take their mode as an argument of the call: pass `train=model.training`,
    or the argument that the module has. `train()` and `eval()` only set `training`.

    Args:
        module: a linen module.
        variables: the dict of collections that `module.init` returned.
        mutable: the collections that a call may change; by default, all collections except `params`.
        rngs: the names of the module's random streams, such as `"dropout"`. Each call passes keys for them, drawn from
            the stream of `mt.seed`.

    Raises:
        TypeError: if `module` is not a linen module, or `variables` is not a dict of collections.
        ValueError: if the wrapper cannot hold a variable (one error lists all of them), or `mutable` names a collection
            that `variables` does not have.

    Example:
        >>> import flax.linen, jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import optim
        >>> from minitorch_jax.adapters.flax import Linen
        >>> dense = flax.linen.Dense(1)
        >>> model = Linen(dense, dense.init(jax.random.key(0), jnp.ones((1, 2))))
        >>> opt = optim.SGD([model], lr=0.1)
        >>> loss = mt.backward(lambda model, x: (model(x) ** 2).mean(), model, jnp.ones((4, 2)))
        >>> opt.step()
        >>> [name for name, _ in model.named_parameters()]
        ['params.bias', 'params.kernel']
    """

    __slots__ = ()
    _holds = "the variables of a linen module"
    _inside = "variables"
    _prefixes = {"variables": "", "settings": "settings"}

    def __init__(
        self, module: Any, variables: Any, mutable: Sequence[str] | None = None, rngs: Sequence[str] = ()
    ) -> None:
        if not isinstance(module, flax.linen.Module):
            raise TypeError(f"Linen takes a linen module; got a {type(module).__name__}")
        self.variables = variables
        if mutable is not None and not isinstance(mutable, str | list | tuple | set | frozenset):
            raise TypeError(f"Linen: mutable must be a list of collection names; got {mutable!r}")
        mutable = (mutable,) if isinstance(mutable, str) else mutable
        mutable = [name for name in variables if name != "params"] if mutable is None else list(mutable)
        if absent := [name for name in mutable if name not in variables]:
            raise ValueError(f"Linen: mutable must name collections out of {list(variables)}; got {absent}")
        rngs = (rngs,) if isinstance(rngs, str) else tuple(rngs)
        self._set("settings", (module, tuple(mutable), rngs))

    @property
    def module(self) -> Any:
        """The linen module."""
        return self._get("settings")[0]

    @property
    def variables(self) -> Any:
        """The variables, with the current arrays."""
        return self._get("variables")

    @variables.setter
    def variables(self, value: Any) -> None:
        is_dict = hasattr(value, "keys")
        wrong = [name for name, collection in value.items() if not hasattr(collection, "keys")] if is_dict else []
        if not is_dict or wrong:
            inside = f" whose entries {', '.join(map(repr, wrong))} are not collections" if wrong else ""
            raise TypeError(
                "Linen: variables must be a dict of collections, as `module.init` returns it; got a"
                f" {type(value).__name__}{inside}. Pass all that `init` returned."
            )
        self._set("variables", without_numbers(value))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module. All arguments are those of linen's `apply`, `method=` included.

        With `mutable=`, the call returns `(output, changed collections)`, as in linen. The wrapper writes back those of the
        changed collections that it may change.
        """
        module, mutable, streams = self._get("settings")
        if streams and "rngs" not in kwargs:
            kwargs["rngs"] = {name: mt.next_key() for name in streams}
        variables, asked = self.variables, "mutable" in kwargs
        kwargs.setdefault("mutable", list(mutable) or False)
        out = module.apply(variables, *args, **kwargs)
        if kwargs["mutable"] is False:
            return out
        result, changed = out
        merged = {**variables, **{name: changed[name] for name in mutable if name in changed}}
        self.variables = flax.core.freeze(merged) if isinstance(variables, flax.core.FrozenDict) else merged
        return out if asked else result

    def _kinds(self, part: str, tree: Any, names: Sequence[str]) -> dict[str, str]:
        return {name: "parameter" for name in names if name.startswith("params.")}
