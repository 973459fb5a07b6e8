"""A layer of minitorch_jax under `mt.jit`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax import nn

from ..timing import Side
from .by_hand import differentiated
from .kinds import KINDS


def side(name: str, size: Sequence[int]) -> Side:
    """The functions of `nn.functional`, by torch's names; recurrent layers as modules."""
    warnings.simplefilter("ignore", mt.RecompileWarning)  # each kind and size is a program of its own
    kind = KINDS[name]
    call = kind.call
    arrays = {key: jnp.asarray(array) for key, array in kind.arrays(size).items()}
    fixed = {key: jnp.asarray(array) for key, array in kind.fixed(size).items()}
    if kind.module is None:
        return differentiated(lambda arrays, fixed: call(nn, **arrays, **fixed), arrays, fixed, mt.jit)
    x = arrays.pop("x")
    module = kind.module(nn, *size)
    module.load_state_dict(arrays)

    def called(given: Any, fixed: Any) -> jax.Array:
        return call(nn, given["module"], given["x"])

    return differentiated(called, {"module": module, "x": x}, fixed, mt.jit)
