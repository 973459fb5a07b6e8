"""Pooling against torch's."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, compare_arguments, integers, numbers
from oracle import signature, torch

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.nn.functional import pooling
from minitorch_jax.runtime.platforms import for_other_platforms

F = nn.functional

TIES = integers(3, 2, 2, 6, 5).astype(np.float32)
PLACES = np.array([[[0, 3], [5, 10]]], np.int32)
PLACES_OF_5 = np.array([[[0, 3], [4, 1]]], np.int32)


def samples(*shape):
    return np.random.default_rng(3).random(shape).astype(np.float32)


CASES = [
    Case("MaxPool1d", (2,), inputs=(numbers(2, 3, 7),)),
    Case("MaxPool1d", (3, 2, 1, 2, True, True), inputs=(numbers(2, 9),)),
    Case("MaxPool1d", (2, 3), inputs=(numbers(2, 8),)),
    Case("MaxPool2d", (2,), inputs=(numbers(2, 3, 5, 4),)),
    Case("MaxPool2d", (3, 2, 1), inputs=(numbers(2, 6, 5),)),
    Case("MaxPool2d", ((2, 3), (3, 1), (1, 0)), {"ceil_mode": True}, inputs=(numbers(2, 2, 6, 5),)),
    Case("MaxPool2d", (2, 2, 1), {"ceil_mode": True}, inputs=(numbers(1, 1, 3, 4),)),
    Case("MaxPool2d", (2,), inputs=(TIES,), id="MaxPool2d-ties"),
    Case("MaxPool2d", (3, 1, 1), {"return_indices": True}, inputs=(TIES,), id="MaxPool2d-indices-of-ties"),
    Case("MaxPool2d", (2, 1, 1, (2, 3)), inputs=(numbers(1, 2, 5, 6),)),
    Case("MaxPool2d", (3, 2), {"return_indices": True, "ceil_mode": True}, inputs=(numbers(2, 1, 6, 4),)),
    *(
        Case(f"{kind}Pool{n}d", (2, ()), inputs=(numbers(1, 2, *[4] * n),))
        for kind in ("Max", "Avg")
        for n in (1, 2, 3)
    ),
    *(
        Case(f"{kind}_pool{n}d", (2, []), inputs=(numbers(1, 2, *[4] * n),))
        for kind in ("max", "avg")
        for n in (1, 2, 3)
    ),
    *(Case(f"LPPool{n}d", (2, 2, ()), inputs=(numbers(1, 2, *[4] * n),)) for n in (1, 2, 3)),
    Case("MaxPool3d", (2,), inputs=(numbers(2, 1, 4, 3, 2),)),
    Case("MaxPool3d", ((1, 2, 3), 1, (0, 1, 1), (2, 1, 1), True), inputs=(numbers(1, 2, 3, 4),)),
    Case("MaxUnpool1d", (2,), inputs=(numbers(1, 2), PLACES[:, 0])),
    Case("MaxUnpool1d", (2, 3, 1), inputs=(numbers(1, 2, 2), PLACES_OF_5), call={"output_size": (5,)}),
    Case("MaxUnpool2d", (2, 3), inputs=(numbers(1, 2, 2), PLACES)),
    Case("MaxUnpool2d", (2,), inputs=(numbers(1, 1, 2, 2), PLACES[None]), call={"output_size": (1, 1, 5, 3)}),
    Case("MaxUnpool3d", ((1, 2, 2),), inputs=(numbers(1, 1, 1, 2, 2), PLACES[None, None])),
    Case("AvgPool1d", (2,), inputs=(numbers(2, 3, 7),)),
    Case("AvgPool1d", (3, 2, 1, True, False), inputs=(numbers(2, 8),)),
    Case("AvgPool2d", (2,), inputs=(numbers(2, 3, 5, 4),)),
    Case("AvgPool2d", (3, 2, 1), inputs=(numbers(2, 6, 5),)),
    Case("AvgPool2d", (3, 2, 1, True), inputs=(numbers(2, 1, 6, 4),)),
    Case("AvgPool2d", ((2, 3), (3, 1), (1, 0), True, False), inputs=(numbers(2, 2, 6, 5),)),
    Case("AvgPool2d", (2, 1, 1), {"divisor_override": 3}, inputs=(numbers(2, 3, 3),)),
    Case("AvgPool3d", (2,), inputs=(numbers(2, 1, 4, 3, 2),)),
    Case("AvgPool3d", ((1, 2, 3), 2, (0, 1, 1), True, False), inputs=(numbers(1, 3, 4, 5),)),
    Case("AvgPool3d", (2, 1, 1, False, True, -2), inputs=(numbers(1, 2, 2, 2),)),
    Case("LPPool1d", (2, 3), inputs=(numbers(2, 3, 7),)),
    Case("LPPool1d", (3.0, 2, 1, True), inputs=(np.abs(numbers(2, 8)),)),
    Case("LPPool2d", (2, 2), inputs=(numbers(2, 3, 5, 4),)),
    Case("LPPool2d", (1.5, (2, 3), (3, 2), True), inputs=(np.abs(numbers(2, 6, 5)),)),
    Case("LPPool2d", (4, 2), inputs=(np.zeros((1, 2, 4, 4), np.float32),), id="LPPool2d-zeros"),
    Case("LPPool2d", (float("inf"), 2), inputs=(numbers(1, 4, 4),)),
    Case("LPPool2d", (-float("inf"), 2), inputs=(numbers(1, 4, 4),)),
    Case("LPPool3d", (2, (1, 2, 2)), inputs=(numbers(1, 1, 2, 4, 3),)),
    Case("AdaptiveAvgPool1d", (3,), inputs=(numbers(2, 3, 7),)),
    Case("AdaptiveAvgPool1d", (1,), inputs=(numbers(2, 5),)),
    Case("AdaptiveAvgPool2d", ((2, 3),), inputs=(numbers(2, 2, 4, 6),)),
    Case("AdaptiveAvgPool2d", ((None, 7),), inputs=(numbers(2, 2, 4, 3),)),
    Case("AdaptiveAvgPool2d", (1,), inputs=(numbers(2, 3, 4, 5),)),
    Case("AdaptiveAvgPool3d", ((2, None, 3),), inputs=(numbers(1, 1, 3, 2, 5),)),
    Case("AdaptiveMaxPool1d", (3,), inputs=(numbers(2, 3, 7),)),
    Case("AdaptiveMaxPool1d", (2, True), inputs=(numbers(2, 6),)),
    Case("AdaptiveMaxPool2d", ((2, 3),), inputs=(numbers(2, 2, 4, 6),)),
    Case("AdaptiveMaxPool2d", ((4, 3), True), inputs=(TIES,), id="AdaptiveMaxPool2d-indices-of-ties"),
    Case("AdaptiveMaxPool2d", ((None, 7), True), inputs=(numbers(2, 2, 4, 3),)),
    Case("AdaptiveMaxPool3d", ((2, None, 3), True), inputs=(numbers(1, 3, 2, 5),)),
    Case("FractionalMaxPool2d", (2, 3), {"_random_samples": samples(2, 3, 2)}, inputs=(numbers(2, 3, 7, 6),)),
    Case(
        "FractionalMaxPool2d",
        ((2, 3),),
        {"output_ratio": (0.7, 0.5), "return_indices": True, "_random_samples": samples(1, 3, 2)},
        inputs=(numbers(3, 7, 6),),
    ),
    Case(
        "FractionalMaxPool3d", (2, (1, 3, 2)), {"_random_samples": samples(1, 2, 3)}, inputs=(numbers(1, 2, 4, 5, 4),)
    ),
    Case("max_pool1d", (3, 1, 1, 1, False, True), inputs=(numbers(1, 2, 4),)),
    Case("max_pool2d", (2, 2), {"return_indices": True}, inputs=(numbers(1, 4, 4),)),
    Case("max_unpool2d", (2,), inputs=(numbers(1, 2, 2), PLACES)),
    Case("avg_pool2d", (2, 1, 1, False, False), inputs=(numbers(1, 3, 3),)),
    Case("lp_pool1d", (2, 2, 1), inputs=(numbers(1, 2, 4),)),
    Case("adaptive_avg_pool3d", (2,), inputs=(numbers(1, 2, 3, 4),)),
    Case("adaptive_max_pool1d", (2, True), inputs=(numbers(1, 3),)),
]

IMAGE = (numbers(2, 3, 5, 5),)

REFUSALS = [
    Refusal("MaxPool2d", (0,), inputs=IMAGE, match="kernel_size must be at least 1"),
    Refusal("MaxPool2d", (2, 0), inputs=IMAGE, match="stride must be at least 1"),
    Refusal("MaxPool2d", ((1, 2, 3),), inputs=IMAGE, match="integer or a tuple of 2"),
    Refusal("MaxPool2d", (2, 1, 2), inputs=IMAGE, match="at most half of the kernel"),
    Refusal("MaxPool2d", (6,), inputs=IMAGE, match=r"a window of \(6, 6\) does not fit"),
    Refusal("MaxPool2d", (2,), inputs=(numbers(5, 5),), match="3 or 4 dimensions"),
    Refusal("MaxPool2d", (2, 1, 0, 0), inputs=IMAGE, match="dilation must be at least 1"),
    Refusal("AvgPool2d", (2, 1, 2), inputs=IMAGE, match="at most half of the kernel"),
    Refusal("AvgPool2d", (2, 1), {"divisor_override": 0}, inputs=IMAGE, match="divisor_override must not be 0"),
    Refusal("AvgPool1d", ((2, 2),), inputs=(numbers(2, 5),), match="integer or a tuple of 1"),
    Refusal("AvgPool2d", (2,), inputs=(integers(3, 1, 4, 4),), match="floating input", torch_too=False),
    Refusal("LPPool2d", (0, 2), inputs=IMAGE, match="norm_type must not be 0"),
    Refusal("lp_pool2d", (0, 2), inputs=IMAGE, match="norm_type must not be 0"),
    Refusal("MaxUnpool2d", (2,), inputs=(numbers(1, 2, 2), PLACES[:, :1]), match="of the input's shape"),
    Refusal("MaxUnpool2d", (2,), inputs=(numbers(1, 2, 2), numbers(1, 2, 2)), match="integer indices"),
    Refusal("MaxUnpool2d", (1, 1, 2), inputs=(numbers(1, 2, 2), PLACES), match="use less padding"),
    Refusal(
        "MaxUnpool2d",
        (2,),
        inputs=(numbers(1, 2, 2), PLACES),
        call={"output_size": (6, 4)},
        match=r"differ from \(4, 4\)",
    ),
    Refusal(
        "MaxUnpool2d", (2,), inputs=(numbers(1, 2, 2), PLACES), call={"output_size": (4,)}, match="2 or 4 integers"
    ),
    Refusal("AdaptiveAvgPool2d", ((2, 2, 2),), inputs=IMAGE, match="integer or a tuple of 2"),
    Refusal("AdaptiveAvgPool2d", (-1,), inputs=IMAGE, match="output_size must be at least 1"),
    Refusal("AdaptiveMaxPool2d", (2.5,), inputs=IMAGE, match="output_size must be an integer"),
    Refusal("AdaptiveMaxPool2d", (2,), inputs=(numbers(1, 0, 3),), match="not empty"),
    Refusal("FractionalMaxPool2d", (2,), match="either output_size or output_ratio"),
    Refusal("FractionalMaxPool2d", (2, 3, 0.5), match="either output_size or output_ratio"),
    Refusal("FractionalMaxPool2d", (2,), {"output_ratio": 1.5}, match="between 0 and 1"),
    Refusal("FractionalMaxPool2d", (3, 4), inputs=IMAGE, match="cannot pool"),
    Refusal(
        "FractionalMaxPool2d", (2, 2), {"_random_samples": samples(1, 3, 2)}, inputs=IMAGE, match="_random_samples of"
    ),
]


class TestLayers(LayerContract):
    pass


DISPATCHED = [f"{name}{n}d" for name in ("max_pool", "adaptive_max_pool") for n in (1, 2, 3)]


@pytest.mark.parametrize("name", [*DISPATCHED, "fractional_max_pool2d", "fractional_max_pool3d"])
def test_functions_that_may_give_indices_take_torchs_arguments(name):
    compare_arguments(getattr(F, name), getattr(torch.nn.functional, f"{name}_with_indices"))


def test_average_pooling_takes_torchs_arguments():
    """torch's own are written in C, without a signature."""
    for n in (1, 2, 3):
        layer, function = getattr(torch.nn, f"AvgPool{n}d"), getattr(F, f"avg_pool{n}d")
        names = [name for name in signature(layer).parameters if name != "self"]
        assert list(inspect.signature(function).parameters) == ["input", *names]
    assert list(inspect.signature(F.adaptive_avg_pool1d).parameters) == ["input", "output_size"]


@pytest.mark.parametrize("indices", [False, True])
def test_maxima_that_are_not_finite_are_torchs(indices):
    x = numbers(1, 2, 6, 6)
    x[0, 0, 1, 1], x[0, 0, 2:4, 2:4], x[0, 1] = np.nan, np.inf, -np.inf
    got = F.max_pool2d(jnp.asarray(x), 3, 2, 1, return_indices=indices)
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(x), 3, 2, 1, return_indices=indices)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_max_pooling_of_integers():
    for options in ({}, {"return_indices": True}):
        out = jax.tree.leaves(F.max_pool1d(jnp.array([[3, -5, -7, -9]]), 2, padding=1, **options))[0]
        assert out.dtype == jnp.int32 and out.tolist() == [[3, -5, -9]]


# axes, then kernel_size, stride, padding, dilation and ceil_mode
HARD = [
    ((9,), (3, 2, 1, 2, True)),
    ((7, 6), (2, 2, 0, 1, False)),
    ((7, 6), (3, 2, 1, 1, False)),
    ((6, 5), ((3, 2), (1, 3), (1, 0), 1, True)),
    ((7, 8), ((2, 3), (3, 1), 1, (2, 1), False)),
    ((4, 3, 5), (2, (1, 2, 3), (0, 1, 1), (1, 1, 2), False)),
]


def hard_input(axes, finite):
    """Many ties. If not `finite`, also NaN, and -inf in whole windows."""
    draw = np.random.default_rng(4)
    x = draw.integers(0, 3, (2, 2, *axes)).astype(np.float32)
    if not finite:
        x[0][draw.random(x[0].shape) < 0.1] = np.nan
        x[1][draw.random(x[1].shape) < 0.7] = -np.inf
    return x


@pytest.fixture(params=["axis by axis", "whole windows"])
def form(request, monkeypatch):
    """Both ways in which windows are reduced on a CPU: the first is for short windows."""
    if request.param == "whole windows":
        monkeypatch.setattr(pooling, "LONGEST", 0)
    return request.param


@pytest.mark.one_in(8)
@pytest.mark.parametrize("axes, settings", HARD)
def test_the_gradient_of_a_maximum_goes_where_torchs_does(axes, settings, form):
    name = f"max_pool{len(axes)}d"
    for finite in (True, False) if form == "axis by axis" else (True,):
        x = hard_input(axes, finite)
        theirs = torch.from_numpy(x).requires_grad_()
        expected, places = getattr(torch.nn.functional, name)(theirs, *settings, return_indices=True)
        weights = numbers(*expected.shape)
        expected.backward(torch.from_numpy(weights))
        pool = lambda x: getattr(F, name)(x, *settings, return_indices=True)
        (got, at), back = jax.vjp(pool, jnp.asarray(x))
        np.testing.assert_array_equal(got, expected.detach().numpy())
        np.testing.assert_array_equal(at, places.numpy())
        gradient = back((jnp.asarray(weights), np.zeros(at.shape, jax.dtypes.float0)))[0]
        np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("settings", [(2,), ((3, 2), (2, 3), (1, 0)), ((2, 3), 1, 1, True, False)])
def test_both_ways_to_average_are_one(settings, monkeypatch):
    x = jnp.asarray(numbers(2, 2, 7, 8))
    both = [jax.vjp(lambda x: F.avg_pool2d(x, *settings), x)]
    monkeypatch.setattr(pooling, "LONGEST", 0)
    both.append(jax.vjp(lambda x: F.avg_pool2d(x, *settings), x))
    (one, back), (other, other_back) = both
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(back(jnp.cos(one))[0], other_back(jnp.cos(one))[0], atol=1e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("pool", ["max_pool2d", "avg_pool2d"])
def test_pools_take_jaxs_transformations(pool, form):
    x, dx = (jnp.asarray(numbers(2, 2, 5, 6, seed=seed)) for seed in (0, 1))
    function = lambda x: getattr(F, pool)(x, 3, 2, 1)
    out, tangent = jax.jvp(function, (x,), (dx,))
    back = jax.vjp(function, x)[1]
    np.testing.assert_allclose(jnp.vdot(tangent, jnp.sin(out)), jnp.vdot(dx, back(jnp.sin(out))[0]), rtol=1e-4)
    # the second derivative of Σ y² / 2 along dx is the transpose of the tangent
    second = jax.jvp(jax.grad(lambda x: (function(x) ** 2).sum() / 2), (x,), (dx,))[1]
    np.testing.assert_allclose(second, back(tangent)[0], atol=1e-5)
    np.testing.assert_array_equal(jax.vmap(function)(jnp.stack([x, dx]))[1], function(dx))


def test_short_windows_are_reduced_axis_by_axis_on_cpus_alone():
    def text(kernel):
        return str(jax.make_jaxpr(lambda x: F.max_pool2d(x, kernel, 2, 1))(jnp.ones((1, 2, 16, 16))))

    short, long = text(3), text(pooling.LONGEST + 1)
    with for_other_platforms():
        elsewhere = text(3)
    assert "reduce_window" not in short and "gather" not in short
    assert all("reduce_window_max" in jaxpr and "gather" not in jaxpr for jaxpr in (long, elsewhere))


@pytest.mark.slow
def test_a_place_out_of_range_is_seen_in_the_result():
    for place in (-1, 4):
        out = F.max_unpool1d(jnp.array([[1.0, 2.0]]), jnp.array([[1, place]]), 2)
        assert jnp.isnan(out).sum() == 1 and out[0, 1] == 1


@pytest.mark.slow
def test_unpooling_undoes_pooling_of_overlapping_windows():
    x = jnp.asarray(numbers(2, 3, 5, 5))
    pooled, indices = F.max_pool2d(x, 3, 1, return_indices=True)
    out = F.max_unpool2d(pooled, indices, 3, 1)
    expected = torch.nn.functional.max_unpool2d(
        torch.from_numpy(np.array(pooled)), torch.from_numpy(np.array(indices)).long(), 3, 1
    )
    np.testing.assert_array_equal(out, expected)


class TestFractionalMaxPool:
    @pytest.mark.slow
    def test_windows_differ_from_call_to_call_and_a_key_repeats_them(self):
        x = jnp.asarray(numbers(4, 5, 20))
        pool = lambda **k: F.fractional_max_pool2d(x[:, :, None], (1, 2), (1, 9), return_indices=True, **k)[1]
        assert not (pool() == pool()).all()
        assert (pool(key=jax.random.key(1)) == pool(key=jax.random.key(1))).all()

    @pytest.mark.slow
    def test_every_channel_has_its_own(self):
        x = jnp.broadcast_to(jnp.asarray(numbers(20)), (2, 30, 1, 20))
        indices = F.fractional_max_pool2d(x, (1, 2), (1, 9), return_indices=True)[1].reshape(60, -1)
        assert len(np.unique(np.asarray(indices), axis=0)) > 2

    @pytest.mark.slow
    def test_windows_cover_the_input(self):
        x = jnp.asarray(numbers(8, 7, 9))
        mt.seed(0)
        values, indices = nn.FractionalMaxPool2d(3, output_size=(4, 5), return_indices=True)(x)
        assert values.shape == indices.shape == (8, 4, 5)
        rows, columns = indices // 9, indices % 9
        assert (rows[:, -1] >= 4).all() and (columns[..., -1] >= 6).all()
        assert (rows[:, 0] < 3).all() and (columns[..., 0] < 3).all()
        np.testing.assert_array_equal(values, x.reshape(8, -1)[np.arange(8)[:, None, None], indices])

    def test_it_draws_under_jit_from_the_stream(self):
        layer, x = nn.FractionalMaxPool3d(2, output_ratio=0.5), jnp.asarray(numbers(1, 2, 6, 6, 6))
        with mt.rng(3):
            expected = layer(x)
        with mt.rng(3):
            np.testing.assert_array_equal(mt.jit(layer)(x), expected)
