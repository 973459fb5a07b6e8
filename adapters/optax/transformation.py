"""optax's transformations as rules of all parameters. Two are equal if the same calls made them."""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._extra import missing
from .._identity import ByIdentity

try:
    import optax
except ImportError as error:
    raise missing("optax", error) from error


class Transformation:
    """A transformation as a rule of all parameters. Two made by the same calls are equal, and share compiled programs."""

    def __init__(self, tx: Any) -> None:
        self.given = tx
        self.tx = tx if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx)
        self.takes_extra = isinstance(tx, optax.GradientTransformationExtraArgs | optax.MultiSteps)
        self.parts = self.takes_extra, tx.init, tx.update
        seen: dict[int, tuple[int, Any]] = {}
        self.likeness = _likeness(self.parts, seen)
        dicts = [value for _, value in seen.values() if isinstance(value, dict)]
        self.names = {
            key for found in dicts for key in found
        }  # the keys of its dicts, which may be paths of parameters

    def init(self, params: dict[str, Any]) -> Any:
        return self.tx.init(params)

    def update(
        self, params: dict[str, Any], grads: dict[str, Any], state: Any, **extra: Any
    ) -> tuple[dict[str, Any], Any]:
        if _likeness(self.parts, {}) != self.likeness:  # checked while tracing only
            raise RuntimeError(
                "the transformation holds a dict, list or other object that was changed after OptaxOptimizer was made."
                " Make a new transformation and a new optimizer."
            )
        if "value_fn" in extra:
            extra = {"grad": grads, **extra}
        updates, state = self.tx.update(grads, state, params, **extra)
        new: Any = optax.apply_updates(params, updates)
        return new, state

    def weakened(self, weaken: Any) -> Any:
        """A stand-in for a key that must not keep the user's functions alive."""
        likeness = weaken(self.likeness)
        return self if likeness is self.likeness else (Transformation, likeness)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transformation) and self.likeness == other.likeness

    def __hash__(self) -> int:
        return hash(self.likeness)

    def __deepcopy__(self, memo: dict[int, Any]) -> Transformation:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optax transformation is made of nested functions, which cannot be pickled. Save the optimizer's state with"
            " `mt.save(path, model=model, opt=opt)`, and load it into a new optimizer"
        )


# -- likeness -----------------------------------------------------------------------------------------------------------


def _likeness(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """A value that is equal for two functions of the same code with equal contents.

    optax makes new nested functions at each call, and they have no equality of their own. Their contents are numbers,
    functions, tuples and dicts of these. Any other object, and any user's function (which may read globals), equals only
    itself.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic | np.dtype):
        return type(value), repr(value)
    if id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value  # kept alive, so that no new object gets its id
    match value:
        case types.FunctionType() if _package(value.__globals__.get("__name__")) in ("optax", "jax", "minitorch_jax"):
            contents = [_contents(variable) for variable in value.__closure__ or ()]
            parts = value.__defaults__, value.__kwdefaults__, contents
            return value.__module__, value.__code__, _likeness(parts, seen)
        case types.MethodType() if _package(type(value.__self__).__module__) == "optax":
            return _likeness((type(value.__self__), value.__func__, vars(value.__self__)), seen)
        case functools.partial() if type(value) in (functools.partial, jax.tree_util.Partial) and not vars(value):
            return functools.partial, _likeness((value.func, value.args, value.keywords), seen)
        case tuple() | list():
            return type(value), tuple([_likeness(item, seen) for item in value])
        case dict() | types.MappingProxyType():
            return type(value), tuple([(_likeness(k, seen), _likeness(v, seen)) for k, v in value.items()])
        case jax.Array() if not isinstance(value, jax.core.Tracer) and value.size <= 64:
            if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                return jax.Array, value.aval, value.sharding, np.asarray(value).tobytes()
    return ByIdentity(value)


def _package(module: Any) -> str:
    return str(module).partition(".")[0]


def _contents(variable: Any) -> Any:
    try:
        return variable.cell_contents
    except ValueError:  # not yet bound
        return None
