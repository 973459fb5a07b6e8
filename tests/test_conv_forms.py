"""A convolution computes the same in every form, and the forms are one operation for JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.nn.functional import conv_forms
from minitorch_jax.runtime import jax_private

F = nn.functional
FORMS = ["pointwise", "shifted", "columns", "products", "correlated", "planes", "turned", "merged", "channels_last"]


def normal(random: np.random.Generator, *shape: int, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(random.standard_normal(shape), dtype)


def settings_for(form: str, seed: int) -> tuple[list[int], list[int], dict[str, Any]]:
    """Draw the sizes (B, F, *S) and (O, I, *K) and the settings of a convolution that the form can compute."""
    random = np.random.default_rng(seed)
    ndim, draw = 3 if form == "planes" else 1 + seed % 3, lambda low, high, n: random.integers(low, high, n).tolist()
    small = form in ("pointwise", "shifted", "columns", "planes", "merged")
    any_groups = form == "channels_last" or (small and form != "columns")
    groups = 4 if form == "merged" else 1 + seed % 2 if any_groups else 1
    batches = 1 if small or groups > 1 else 2 if form == "correlated" else 1 + seed % 2
    each = 1 if form == "correlated" else 2
    kernel = [1] * ndim if form == "pointwise" else draw(1, 4, ndim)
    if form == "planes":
        kernel[0] += 4 * (seed % 2)  # more elements than positions: as in weight gradients
    image = draw(4, 7, ndim)
    lhs, rhs = [batches * each, groups * 3, *image], [batches * groups * 2, 3, *kernel]
    spread = draw(1, 3, ndim) if small or form in ("turned", "channels_last") else [1] * ndim
    order = [tuple(random.permutation(ndim + 2).tolist()) for _ in range(3)]
    return (
        lhs,
        rhs,
        {
            "window_strides": tuple(draw(1, 3, ndim)),
            "padding": tuple(map(tuple, np.reshape(draw(-1, 3, 2 * ndim), (ndim, 2)).tolist())),
            "lhs_dilation": tuple(spread),
            "rhs_dilation": tuple(1 if k > 2 else int(random.integers(1, 3)) for k in kernel),
            "dimension_numbers": lax.ConvDimensionNumbers(*order),
            "feature_group_count": groups,
            "batch_group_count": batches,
            "precision": None,
            "preferred_element_type": None,
            **conv_forms._newer_settings(),
        },
    )


@pytest.mark.parametrize("seed", [1, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, *range(2, 6)))])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_computes_what_xla_does(form: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lhs, rhs, settings = settings_for(form, seed)
    used: list[conv_forms.Shape] = []

    def chosen(s: conv_forms.Shape) -> Any:
        if used and s != used[0]:  # what another form completes is XLA's here
            return conv_forms.channels_last
        fits = dict.fromkeys(("shifted", "columns", "merged"), "fits_taps") | dict.fromkeys(
            FORMS[3:5], "fits_positions"
        )
        assert form == "channels_last" or getattr(conv_forms, fits.get(form, f"fits_{form}"))(s)
        used.append(s)
        return getattr(conv_forms, form)

    monkeypatch.setattr(conv_forms, "form_of", chosen)
    monkeypatch.setattr(conv_forms, "_WIDE", 6)  # two groups as one
    monkeypatch.setattr(conv_forms, "_MANY_POSITIONS", (0, 1000)[seed % 2])  # both branches, at small sizes
    random, (of_lhs, of_rhs, _) = np.random.default_rng(seed), settings["dimension_numbers"]
    dtype = jnp.bfloat16 if seed == 1 else jnp.float32
    x = normal(random, *(lhs[of_lhs.index(i)] for i in range(len(lhs))), dtype=dtype)
    w = normal(random, *(rhs[of_rhs.index(i)] for i in range(len(rhs))), dtype=dtype)
    got = jax.jit(lambda x, w: conv_forms._on_cpu(x, w, **settings))(x, w)
    wide = (a.astype(jnp.float32) for a in (x, w))
    expected = jax.jit(lambda x, w: lax.conv_general_dilated_p.bind(x, w, **settings))(*wide)
    assert used and got.dtype == dtype and got.shape == expected.shape
    error = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    assert_allclose(got.astype(jnp.float32), expected, rtol=error, atol=error)


LAYERS = {
    "1x1": ((2, 8, 5, 4), (6, 8, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "depthwise, stride 2": ((2, 4, 5, 4), (8, 1, 3, 2), (2, 1), ((1, 1), (1, 0)), (1, 1), 4),
    "3x2, groups": ((2, 4, 6, 5), (4, 2, 3, 2), (1, 1), ((1, 1), (1, 0)), (1, 1), 2),
    "3x2, stride 2": ((2, 3, 6, 5), (4, 3, 3, 2), (2, 1), ((1, 1), (1, 0)), (1, 1), 1),
    "3x2, spread 2, groups": ((2, 4, 3, 4), (6, 2, 3, 2), (1, 1), ((2, 1), (1, 3)), (2, 1), 2),
    "2x1, 9 groups": ((2, 18, 3, 2), (18, 2, 2, 1), (1, 2), ((1, 0), (0, 1)), (1, 1), 9),
    "2x1x3, stride 2": ((2, 3, 4, 2, 3), (5, 3, 2, 1, 3), (2, 1, 1), ((1, 0), (0, 0), (1, 1)), (1, 1, 2), 1),
}


def everything(conv: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The value of a convolution, both derivatives by both modes, second derivatives, and batches of either argument."""

    def run(x: jax.Array, w: jax.Array) -> Any:
        y, pullback = jax.vjp(conv, x, w)
        both = (0, 1)

        def size(x: jax.Array, w: jax.Array) -> jax.Array:
            dx, dw = jax.grad(lambda x, w: jnp.sin(conv(x, w)).sum(), both)(x, w)
            return (dx**2).sum() + (dw**2).sum()

        def of_one(x: jax.Array) -> jax.Array:  # the weight gradient of each image
            return jax.grad(lambda w: jnp.sin(conv(x[None], w)).sum())(w)

        pair = jnp.stack([w, 2 * w])
        mapped = jax.vmap(conv, (None, 0))(x, pair), jax.vmap(conv)(jnp.stack([x, -x]), pair), jax.vmap(of_one)(x)
        return y, pullback(jnp.cos(y)), jax.jvp(conv, (x, w), (x / 2, 3 * w)), jax.grad(size, both)(x, w), mapped

    return run


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "name", [pytest.param("1x1", marks=pytest.mark.slow), *[name for name in LAYERS if name != "1x1"]]
)
def test_its_derivatives_and_batches_are_jaxs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x_shape, w_shape, stride, pads, spread, groups = LAYERS[name]
    random, ones = np.random.default_rng(0), (1,) * len(stride)
    x, w = normal(random, *x_shape), normal(random, *w_shape)
    run = everything(lambda x, w: conv_forms.convolution(x, w, stride, pads, spread, ones, groups))
    got = jax.jit(run)(x, w)
    monkeypatch.setattr(conv_forms, "_twin", None)  # what a JAX without the private names does
    expected = jax.jit(lambda x, w: run(x, w))(x, w)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(mine, other, rtol=2e-4, atol=2e-4)


def test_a_jax_that_does_not_show_how_has_no_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise AttributeError("fancy_primitive_batchers")

    monkeypatch.setattr(jax_private, "_twin_of", missing)
    assert jax_private.twin_of(lax.conv_general_dilated_p, conv_forms._on_cpu) is None
    assert conv_forms._twin is not None


def test_other_platforms_get_the_plain_convolution() -> None:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return F.conv2d(x, w, groups=8)

    arguments = jnp.ones((2, 8, 6, 6)), jnp.ones((8, 1, 3, 3))
    text = {
        platform: jax.jit(run).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert "stablehlo.convolution" in text["cuda"] and "stablehlo.convolution" not in text["cpu"]


TRANSPOSED = [  # the sizes of the image and the weight, the arguments after the bias
    ((3, 4, 5, 4), (4, 2, 4, 4), (2, 1)),
    ((2, 3, 4, 3), (3, 4, 3, 2), ((3, 2), (1, 0), (2, 1))),
    ((2, 4, 3, 4), (4, 3, 3, 3), (2, 1, 1, 2)),
    ((2, 4, 3, 4), (4, 2, 2, 3), (2, 1, 0, 2, (1, 2))),
    ((2, 10, 4, 3), (10, 1, 4, 4), (2, 1, 0, 10)),
    ((2, 20, 4, 3), (20, 2, 3, 3), (2, 1, 1, 10)),
    ((2, 3, 4, 2, 3), (3, 4, 3, 2, 2), ((2, 1, 3), (1, 0, 1), (1, 0, 0))),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("x_shape", "w_shape", "arguments"), TRANSPOSED)
def test_the_gradients_of_transposed_convolutions_are_jaxs(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    arguments: tuple[Any, ...],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conv = F.conv_transpose2d if len(x_shape) == 4 else F.conv_transpose3d
    random = np.random.default_rng(0)

    def run(x: jax.Array, w: jax.Array) -> Any:
        y, pullback = jax.vjp(lambda x, w: conv(x, w, None, *arguments), x, w)
        return y, *pullback(jnp.cos(y))

    with jax.enable_x64(dtype == "float64"):
        x, w = (normal(random, *shape, dtype=dtype) for shape in (x_shape, w_shape))
        got = jax.jit(run)(x, w)
        monkeypatch.setattr(conv_forms, "_twin", None)
        wide = (a if dtype == "float64" else a.astype(jnp.float32) for a in (x, w))
        expected = jax.jit(lambda x, w: run(x, w))(*wide)
    error = {"float32": 1e-4, "bfloat16": 1e-1, "float64": 1e-11}[dtype]
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert_allclose(np.asarray(mine, other.dtype), other, rtol=error, atol=error)


def convolutions(run: Callable[..., Any], *shapes: tuple[int, ...]) -> list[str]:
    """The lines of the convolutions in a program for CPUs."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    return [line for line in text.splitlines() if "stablehlo.convolution" in line]


def test_no_convolution_is_over_three_axes() -> None:
    def run(x: jax.Array, w: jax.Array) -> Any:
        return jax.value_and_grad(lambda x, w: jnp.sin(F.conv3d(x, w, None, 1, 1)).sum(), (0, 1))(x, w)

    lines = convolutions(run, (2, 16, 8, 8, 8), (16, 16, 3, 3, 3))
    assert lines and not any("0, 1, 2" in line for line in lines)


@pytest.mark.parametrize(
    ("conv", "stride", "kernel"), [(F.conv2d, 1, (3, 3)), (F.conv2d, 2, (5, 5)), (F.conv1d, 1, (9,))]
)
def test_every_convolution_has_the_layout_of_xla_s_library(conv: Any, stride: int, kernel: tuple[int, ...]) -> None:
    """XLA turns arrays around for it, but not within loops, where other layouts take 50 times as long."""

    def run(x: jax.Array, w: jax.Array) -> Any:
        return jax.grad(lambda x, w: jnp.sin(conv(x, w, None, stride)).sum(), (0, 1))(x, w)

    lines = convolutions(run, (8, 8, *[24] * len(kernel)), (16, 8, *kernel))
    axes = ", ".join(map(str, range(len(kernel))))
    assert len(lines) == 3 and all(f"[b, {axes}, f]x[{axes}, i, o]->[b, {axes}, f]" in line for line in lines)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(1, 6, 5)], ids=repr)
def test_a_sum_over_the_kernel_is_computed_once(layer: Any) -> None:
    """As a part of what reads it, XLA would compute it for each reader."""

    def several(x: jax.Array) -> tuple[jax.Array, ...]:
        y = layer(x)
        return F.relu(y), y.swapaxes(2, 3) + 1.0, y[:, :, ::2] - y[:, :, 1::2]

    x = jnp.ones((2, layer.in_channels, 12, 12))
    text = jax.jit(several).lower(x).compile().as_text()
    assert text.count(" call(") == 1
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    assert text.count(" multiply(") <= taps + 2


def test_the_weight_gradient_of_a_transposed_convolution_sets_in_no_zeros() -> None:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sin(F.conv_transpose2d(x, w, None, 2, 1)).sum())(w)

    lines = convolutions(run, (8, 16, 8, 8), (16, 8, 4, 4))
    zeros = [line for line in lines if "lhs_dilate = [2" in line]
    assert len(zeros) == 1 and len(lines) > 1  # one for the layer itself


def test_a_model_of_convolutions_is_exported_for_any_batch() -> None:
    mt.seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 3, 2), nn.Conv2d(2, 6, 2))
    (n,) = jax.export.symbolic_shape("n")
    exported = mt.export(model, jax.ShapeDtypeStruct((n, 6, 7, 7), jnp.float32))
    x = normal(np.random.default_rng(0), 3, 6, 7, 7)
    assert_allclose(exported.call(x), model(x), rtol=1e-5, atol=1e-5)

    def gradient(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sin(F.conv2d(x, w)).sum())(w)

    weight = normal(np.random.default_rng(1), 12, 6, 3, 2, 2)
    exported = jax.export.export(jax.jit(F.conv3d))(jax.ShapeDtypeStruct((n, 6, 7, 7, 7), jnp.float32), weight)
    x3 = normal(np.random.default_rng(0), 3, 6, 7, 7, 7)
    assert_allclose(exported.call(x3, weight), F.conv3d(x3, weight), rtol=1e-4, atol=1e-4)

    w = model[0].weight
    exported = jax.export.export(jax.jit(gradient))(w, jax.ShapeDtypeStruct((n, 6, 7, 7), jnp.float32))
    assert_allclose(exported.call(w, x), gradient(w, x), rtol=1e-4, atol=1e-4)


def test_a_precision_that_the_user_sets_is_kept() -> None:
    x, w = jnp.ones((1, 2, 3, 3)), jnp.ones((2, 2, 1, 1))
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in str(jax.make_jaxpr(F.conv2d)(x, w))


def test_a_product_of_three_channels_is_none() -> None:
    """XLA multiplies many vectors of three numbers wrongly (see xla_faults.py)."""
    x, w = jnp.ones((2, 3, 4, 4)), jnp.ones((3, 3, 1, 1))
    assert "dot_general" not in jax.jit(F.conv2d).lower(x, w).as_text()
