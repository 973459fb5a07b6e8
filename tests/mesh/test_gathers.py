"""Norms, clipping and elementwise rules never gather an array that is divided over devices, nor need its memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import P, mesh
from numpy.testing import assert_allclose
from optimizers import OPTIMIZERS

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.optim import state_dict

ROWS, COLUMNS = 64, 512
GATHERED = re.compile(r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")
OVER_ALL = ("LBFGS", "Muon")  # a rule over the vector of all parameters, and one that multiplies matrices


def layer(*spec: Any) -> nn.Linear:
    """A matrix divided over 8 devices, with a gradient."""
    made = nn.Linear(COLUMNS, ROWS, bias=False, key=jax.random.key(0))
    made.weight = jax.device_put(made.weight, NamedSharding(mesh(8), P(*spec)))
    made.accumulate([jnp.linspace(-1, 1, ROWS * COLUMNS).reshape(ROWS, COLUMNS)])
    return made


def check_divided(compiled: Any) -> None:
    """No device gets the whole of an array, and all temporary arrays together are smaller than one.

    Adafactor gathers its means of columns, which are a vector.
    """
    sizes = [int(np.prod([*map(int, shape.split(","))])) for shape in GATHERED.findall(compiled.as_text()) if shape]
    assert max(sizes, default=0) <= COLUMNS
    assert compiled.memory_analysis().temp_size_in_bytes < ROWS * COLUMNS * 4


def test_the_check_sees_a_gather() -> None:
    whole = jax.jit(lambda x: jnp.vdot(x.reshape(-1), x.reshape(-1)))
    with pytest.raises(AssertionError):
        check_divided(whole.lower(layer(None, "data").weight).compile())


CLIPPINGS: dict[str, Callable[..., Any]] = {
    "2-norm": lambda model: mt.clip_grad_norm(model, 1.0),
    "1-norm": lambda model: mt.clip_grad_norm(model, 1.0, norm_type=1.0),
    "3-norm": lambda model: mt.clip_grad_norm(model, 1.0, norm_type=3.0),
    "infinite norm": lambda model: mt.clip_grad_norm(model, 0.5, norm_type=float("inf")),
    "value": lambda model: mt.clip_grad_value(model, 0.5),
    "scale": lambda model: mt.scale_grads(model, 0.5),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CLIPPINGS)
@pytest.mark.parametrize("spec", [("data",), (None, "data")], ids=["rows", "columns"])
def test_clipping(name: str, spec: tuple[Any, ...]) -> None:
    clip = CLIPPINGS[name]
    divided, alone = layer(*spec), layer()
    check_divided(mt.jit(clip, keep_grads=True).lower(divided).compile())
    results = clip(divided), clip(alone)
    assert_allclose(divided.grads()[0], alone.grads()[0], rtol=1e-5)
    if results[0] is not None:
        assert_allclose(*results, rtol=1e-5)
    assert divided.grads()[0].sharding.is_equivalent_to(divided.weight.sharding, 2)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in OVER_ALL])
def test_a_step(name: str) -> None:
    model = layer(None, "data")
    opt = OPTIMIZERS[name]([model], track_grad_norm=True, skip_nonfinite=True)
    check_divided(mt.jit(lambda opt: opt.step()).lower(opt).compile())


def test_the_fingerprint_of_a_state() -> None:
    model = layer(None, "data")
    lowered = state_dict._fingerprint.lower(model.weight)
    check_divided(lowered.compile())
    flat = np.abs(np.asarray(model.weight)).reshape(-1).astype(np.float64)
    assert_allclose(
        state_dict._fingerprint(model.weight), [flat.sum(), flat @ np.linspace(0.5, 1, flat.size)], rtol=1e-5
    )
