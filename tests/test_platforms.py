"""Forms of a computation that are chosen by the platform."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import minitorch_jax as mt
from minitorch_jax.runtime.platforms import in_plain_forms, on_cpu


def chosen(x: Any) -> Any:
    return on_cpu(jnp.sin, jnp.cos, x)


def test_on_cpus_alone_the_other_form_is_not_even_traced():
    assert "cos" not in str(jax.make_jaxpr(chosen)(1.0)) and float(chosen(jnp.float32(0))) == 0


@pytest.mark.parametrize(
    "platforms, sines, cosines", [(None, 1, 0), (["cpu"], 1, 0), (["tpu"], 0, 1), (["cpu", "tpu"], 1, 1)]
)
def test_an_exported_program_has_the_forms_of_its_platforms(platforms, sines, cosines):
    text = mt.export(chosen, jnp.ones(2), platforms=platforms).mlir_module()
    assert text.count("stablehlo.sine") == sines and text.count("stablehlo.cosine") == cosines


def test_a_function_that_jax_has_cached_has_the_forms_of_its_platforms_in_each_program():
    cached = jax.jit(chosen)
    x = jnp.ones(2)
    cached(x)
    assert "stablehlo.sine" not in mt.export(lambda x: cached(x), x, platforms=["tpu"]).mlir_module()
    with in_plain_forms():
        assert "cos" in str(jax.make_jaxpr(cached)(x)) and "sin" not in str(jax.make_jaxpr(cached)(x))
    assert "sin" in str(jax.make_jaxpr(cached)(x)) and "cos" not in str(jax.make_jaxpr(cached)(x))
