"""Work around what XLA computes wrongly, or slowly, on CPUs (jaxlib 0.10.2 to 0.12).

XLA passes reductions, products and convolutions to a library, YNNPACK. Its reductions have three faults (`FAULTS`), and its
convolutions use one core only. A compiler option says what the library may compute. Without its reductions many programs
are slower, so only those with a faulty operation do without them. The reductions in this file keep NaN in any program.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jax_core

from .platforms import takes_plain

OPTION = "xla_cpu_experimental_ynn_fusion_type"
KINDS = {"product": "INDIVIDUAL_DOT", "reduction": "REDUCE", "convolution": "INDIVIDUAL_CONVOLUTION"}  # XLA's default


class Fault(NamedTuple):
    """A fault of jaxlib on CPUs."""

    text: str
    issues: tuple[int, ...]  # of https://github.com/jax-ml/jax
    fixed: tuple[int, int] | None  # the first version without it

    def __str__(self) -> str:
        return self.text + "".join(f", jax issue {number}" for number in self.issues)


FAULTS = (
    Fault("max and min reductions of float32 lose NaN", (), None),
    Fault("jnp.sum((W @ row) ** 2), mapped over more than 32,768 rows of 3 numbers, is wrong", (39103,), (0, 12)),
    Fault("reductions of products with seven or more axes crash", (39257, 40412), (0, 12)),
)


def known(jaxlib: str) -> list[Fault]:
    """Return the known faults of a version of jaxlib.

    Example:
        >>> [str(fault) for fault in known("0.12.1")]
        ['max and min reductions of float32 lose NaN']
    """
    major, minor = jaxlib.split(".")[:2]
    return [fault for fault in FAULTS if fault.fixed is None or (int(major), int(minor)) < fault.fixed]


# -- reductions that keep NaN ------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("axis", "keepdims", "initial"))
def largest(x: Any, axis: int | None = None, keepdims: bool = False, initial: float | None = None) -> Any:
    """`jnp.max`, which returns NaN if one of the numbers is NaN."""
    out = jnp.max(x, axis, keepdims=keepdims, initial=initial)
    return _with_nan(out, x, lambda lost: lost.any(axis, keepdims=keepdims))


@partial(jax.jit, static_argnames=("start", "kernel", "stride", "pads"))
def largest_in_windows(
    x: Any, start: float, kernel: tuple[int, ...], stride: tuple[int, ...], pads: tuple[tuple[int, int], ...]
) -> Any:
    """Return the largest number of each window, or NaN if the window holds one. `x` is padded with `start`."""
    out = lax.reduce_window(x, np.asarray(start, x.dtype), lax.max, kernel, stride, pads)
    return _with_nan(out, x, lambda lost: lax.reduce_window(lost, False, lax.bitwise_or, kernel, stride, pads))


def _with_nan(out: Any, x: Any, where: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating) or jax.default_backend() != "cpu" or takes_plain():
        return out
    return jnp.where(where(jnp.isnan(lax.stop_gradient(x))), jnp.asarray(jnp.nan, out.dtype), out)


# -- what is compiled without the library ------------------------------------------------------------------------------

_OURS = ("largest", "largest_in_windows")
_LOSING = ("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min")
# Operations that may stand between a maximum and `stop_gradient`, as in softmax. A NaN that the maximum lost returns later,
# when the maximum is subtracted from the numbers.
_PASSING = ("broadcast_in_dim", "reshape", "squeeze", "select_n", "max", "convert_element_type", "expand_dims")
_MANY = 2**14  # vectors: half of the smallest number that is multiplied wrongly
_RANK = 7  # reductions of products with this many axes or more crash


def avoided_in(jaxpr: Any) -> frozenset[str]:
    """Return the kinds of operations that the library is not to compute in a traced program."""
    if jax.default_backend() != "cpu" or not _is_known():
        return frozenset()
    return frozenset(_found_in(jaxpr))


def options_without(avoided: frozenset[str]) -> dict[str, Any] | None:
    """Return the compiler options for a program in which the library computes no `avoided` kinds. None for the defaults."""
    kinds = [f"LIBRARY_FUSION_TYPE_{name}" for kind, name in KINDS.items() if kind not in avoided]
    return {OPTION: ",".join(kinds)} if avoided else None


@cache
def _is_known() -> bool:
    """True if this XLA has the option. To pass an unknown option is an error."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={OPTION: ""}).lower().compile()
    except Exception:  # JAX documents no type for this error; programs are then compiled without the option
        return False
    return True


def _found_in(jaxpr: Any) -> Iterator[str]:
    readers: dict[Any, list[Any]] = {}  # filled at the first maximum
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("jit", "pjit") and eqn.params.get("name") in _OURS:
            continue
        if name in _LOSING:
            readers = readers or _readers(jaxpr)
            if eqn.invars[0].aval.dtype in (jnp.float32, jnp.float64) and not _only_shifts(readers, eqn.outvars[0]):
                yield "reduction"
        elif name == "dot_general":
            if _is_small_product(eqn):
                yield "reduction"
        elif name == "conv_general_dilated":
            if OPTION not in os.environ.get("XLA_FLAGS", ""):  # what the user chose stays, where results are right
                yield "convolution"
        elif any(map(_has_many_axes, eqn.invars)):
            yield "reduction"
        for inner in jax_core.jaxprs_in_params(eqn.params):
            yield from _found_in(inner)


def _readers(jaxpr: Any) -> dict[Any, list[Any]]:
    """Return the equations that read each variable. None in a list says that the variable is a result of the program.

    Equations whose results nobody reads are left out, since XLA does not compute them. JAX's derivatives of a maximum leave
    such equations behind.
    """
    readers: dict[Any, list[Any]] = {}
    for var in jaxpr.outvars:
        if isinstance(var, jax_core.Var):
            readers.setdefault(var, []).append(None)
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in readers for var in eqn.outvars):
            for var in eqn.invars:
                if isinstance(var, jax_core.Var):
                    readers.setdefault(var, []).append(eqn)
    return readers


def _only_shifts(readers: dict[Any, list[Any]], var: Any) -> bool:
    """True if a maximum only shifts its numbers, as in softmax: every use of it ends in `stop_gradient` or `is_finite`."""
    for eqn in readers.get(var, ()):
        name = None if eqn is None else eqn.primitive.name
        if name not in ("stop_gradient", "is_finite"):
            if name not in _PASSING or not _only_shifts(readers, eqn.outvars[0]):
                return False
    return True


def _has_many_axes(var: Any) -> bool:
    return len(getattr(var.aval, "shape", ())) >= _RANK and jnp.issubdtype(var.aval.dtype, jnp.floating)


def _is_small_product(eqn: Any) -> bool:
    """True for the product of a matrix of 2 or 3 rows of 3 numbers with many vectors."""
    (contracted, of_vectors), (batch, batch_of_vectors) = eqn.params["dimension_numbers"]
    shape, vectors = (var.aval.shape for var in eqn.invars)
    rows = math.prod(n for i, n in enumerate(shape) if i not in (*contracted, *batch))
    count = math.prod(n for i, n in enumerate(vectors) if i not in (*of_vectors, *batch_of_vectors))
    return _size(shape, contracted) == 3 and rows in (2, 3) and count >= _MANY


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
