"""Normalisation against torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, numbers
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.nn.functional import batchnorm

F = nn.functional


def scrambled(layer):
    """Statistics and parameters that are not what a new layer has."""
    generator = torch.Generator().manual_seed(3)
    for array in [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]:
        array.data = 0.5 + torch.rand(array.shape, generator=generator)


def norm(name, *args, inputs, **kwargs):
    return Case(name, args, kwargs, inputs=(inputs,), prepare=scrambled)


FLAT, LINE, IMAGE, VOLUME = numbers(6, 3), numbers(4, 3, 5), numbers(3, 2, 4, 5), numbers(2, 2, 3, 4, 2)
CHANNELS = {name: numbers(3, seed=i) for i, name in enumerate(("weight", "bias"))}
RUNNING = numbers(3, seed=5), np.abs(numbers(3, seed=6)) + 0.5

CASES = [
    norm("BatchNorm1d", 3, inputs=FLAT),
    norm("BatchNorm1d", 3, inputs=LINE),
    norm("BatchNorm1d", 3, 0.1, 0.3, inputs=LINE),
    norm("BatchNorm1d", 3, momentum=None, inputs=FLAT),
    norm("BatchNorm1d", 3, affine=False, inputs=FLAT),
    norm("BatchNorm1d", 3, bias=False, inputs=FLAT),
    norm("BatchNorm1d", 3, track_running_stats=False, inputs=FLAT),
    norm("BatchNorm1d", 3, affine=False, track_running_stats=False, inputs=LINE),
    norm("BatchNorm2d", 2, inputs=IMAGE),
    norm("BatchNorm2d", 2, 1e-3, None, False, inputs=numbers(1, 2, 2, 1)),
    norm("BatchNorm3d", 2, inputs=VOLUME),
    norm("InstanceNorm1d", 3, inputs=LINE),
    norm("InstanceNorm1d", 3, inputs=LINE[0]),
    norm("InstanceNorm1d", 3, affine=True, bias=False, inputs=LINE),
    norm("InstanceNorm1d", 3, track_running_stats=True, inputs=LINE),
    norm("InstanceNorm1d", 3, 0.1, 0.3, True, True, inputs=LINE[0]),
    norm("InstanceNorm1d", 3, momentum=None, track_running_stats=True, inputs=LINE),
    norm("InstanceNorm2d", 2, affine=True, track_running_stats=True, inputs=IMAGE),
    norm("InstanceNorm2d", 2, affine=True, inputs=IMAGE[0]),
    norm("InstanceNorm3d", 2, affine=True, track_running_stats=True, inputs=VOLUME),
    norm("InstanceNorm3d", 2, inputs=VOLUME[0]),
    norm("GroupNorm", 3, 6, inputs=numbers(2, 6, 4)),
    norm("GroupNorm", 1, 4, inputs=numbers(3, 4)),
    norm("GroupNorm", 2, 2, 0.1, inputs=IMAGE),
    norm("GroupNorm", 2, 4, affine=False, inputs=numbers(1, 4, 1, 2, 2)),
    norm("GroupNorm", 2, 4, bias=False, inputs=numbers(2, 4, 3)),
    norm("LayerNorm", 5, inputs=numbers(4, 5)),
    norm("LayerNorm", 5, inputs=numbers(5)),
    norm("LayerNorm", (3, 5), inputs=LINE),
    norm("LayerNorm", (4, 3, 5), elementwise_affine=False, inputs=LINE),
    norm("LayerNorm", 5, bias=False, inputs=LINE),
    norm("RMSNorm", 5, inputs=numbers(4, 5)),
    norm("RMSNorm", (3, 5), 0.1, inputs=LINE),
    norm("RMSNorm", [5], elementwise_affine=False, inputs=numbers(5)),
    norm("LocalResponseNorm", 2, inputs=LINE),
    norm("LocalResponseNorm", 3, 0.5, 0.6, 2.0, inputs=numbers(2, 5, 2, 3)),
    norm("LocalResponseNorm", 1, alpha=1.0, inputs=VOLUME),
    norm("LocalResponseNorm", 9, alpha=1.0, inputs=LINE),
    Case("batch_norm", RUNNING, CHANNELS | {"eps": 0.1}, inputs=(FLAT,)),
    Case("batch_norm", RUNNING, {"eps": 0.0}, inputs=(FLAT,)),
    Case("batch_norm", (None, None), CHANNELS | {"training": True}, inputs=(LINE,)),
    Case("instance_norm", (), CHANNELS, inputs=(LINE,)),
    Case("instance_norm", RUNNING, CHANNELS | {"use_input_stats": False, "eps": 0.1}, inputs=(LINE,)),
    Case("group_norm", (3,), CHANNELS, inputs=(LINE,)),
    Case("layer_norm", ([3, 5], numbers(3, 5)), {"eps": 0.1}, inputs=(LINE,)),
    Case("local_response_norm", (4, 1.0, 0.5, 0.5), inputs=(LINE,)),
    Case("normalize", inputs=(np.concatenate([FLAT, np.zeros((1, 3), np.float32)]),)),
    *(Case("normalize", (p, 0), inputs=(FLAT,)) for p in (0, 0.5, float("inf"))),
    *(Case("normalize", (p, 0), inputs=(FLAT,)) for p in (-1.0, -2.5, -float("inf"))),
    *(Case("normalize", (p, 0), inputs=(np.ones((), np.float32),)) for p in (1.2, 2.0, -1.0)),
    Case("normalize", (2.0, ()), inputs=(FLAT,)),
    Case("normalize", (2.0, (0, 2), 3.0), inputs=(LINE,)),
    Case("normalize", (), {"dim": -1}, inputs=(LINE,)),
]

INITIAL = [
    ("BatchNorm1d", (4,)),
    ("InstanceNorm2d", (4,), {"affine": True, "track_running_stats": True}),
    ("GroupNorm", (2, 4)),
    ("LayerNorm", ((3, 4),)),
    ("RMSNorm", (4,)),
]

ONE = numbers(1, 3)
REFUSALS = [
    Refusal("BatchNorm1d", (3,), inputs=(IMAGE,), match=r"expected 2D or 3D input \(got 4D"),
    Refusal("BatchNorm2d", (2,), inputs=(LINE,), match=r"expected 4D input \(got 3D"),
    Refusal("BatchNorm3d", (2,), inputs=(IMAGE,), match=r"expected 5D input \(got 4D"),
    Refusal("BatchNorm1d", (4,), inputs=(FLAT,), match=r"num_features=4 channels on axis 1; got \(6, 3\)"),
    Refusal("BatchNorm1d", (-1,), match="num_features >= 0; got -1"),
    Refusal("BatchNorm1d", (3,), inputs=(ONE,), match=r"more than 1 value per channel when training.*\[1, 3\]"),
    Refusal("BatchNorm1d", (3, 0.0), inputs=(FLAT,), match="eps must be positive during training"),
    Refusal("InstanceNorm1d", (3,), inputs=(IMAGE,), match=r"expected 2D or 3D input \(got 4D"),
    Refusal("InstanceNorm2d", (2,), inputs=(FLAT,), match=r"expected 3D or 4D input \(got 2D"),
    Refusal("InstanceNorm1d", (4,), {"affine": True}, inputs=(LINE,), match="num_features=4 channels on axis 1"),
    Refusal("InstanceNorm1d", (4,), {"affine": True}, inputs=(LINE[0],), match="num_features=4 channels on axis 0"),
    Refusal("InstanceNorm1d", (3,), inputs=(numbers(2, 3, 1),), match="more than 1 spatial element"),
    Refusal("GroupNorm", (4, 6), match=r"num_channels \(6\) must be divisible by num_groups \(4\)"),
    Refusal("GroupNorm", (0, 6), match=r"num_groups \(0\)"),
    Refusal(
        "GroupNorm", (2, 4), inputs=(numbers(2, 6, 3),), match=r"weight of shape \(6,\), one per channel; got \(4,\)"
    ),
    Refusal("GroupNorm", (2, 4), inputs=(numbers(4),), match=r"shape \(N, C, ...\); got \(4,\)"),
    Refusal("LayerNorm", (4,), inputs=(FLAT,), match=r"normalized_shape=\[4\] .* got \(6, 3\)"),
    Refusal("LayerNorm", ((),), inputs=(FLAT,), match="one or more sizes"),
    Refusal("LayerNorm", (-1,), match="each >= 0; got -1"),
    Refusal("RMSNorm", ((6, 3),), inputs=(numbers(3),), match=r"normalized_shape=\[6, 3\] .* got \(3,\)"),
    Refusal("LocalResponseNorm", (2,), inputs=(FLAT,), match=r"3 axes or more; got \(6, 3\)"),
    Refusal("LocalResponseNorm", (0,), inputs=(LINE,), match="size > 0; got 0"),
    Refusal("batch_norm", (None, None), inputs=(FLAT,), match="needs running_mean and running_var"),
    Refusal("batch_norm", RUNNING, {"eps": -1.0}, inputs=(FLAT,), match="non-negative, but got -1"),
    Refusal("batch_norm", (RUNNING[0], numbers(4)), inputs=(FLAT,), match=r"running_var of shape \(3,\)"),
    # torch writes to them
    Refusal("batch_norm", RUNNING, {"training": True}, inputs=(FLAT,), match="cannot update", torch_too=False),
    Refusal("instance_norm", RUNNING, inputs=(LINE,), match="cannot update", torch_too=False),
    Refusal("instance_norm", (), {"use_input_stats": False}, inputs=(LINE,), match="needs running_mean"),
    Refusal("instance_norm", (), {"bias": numbers(4)}, inputs=(LINE,), match=r"bias of shape \(3,\).*got \(4,\)"),
    Refusal("group_norm", (2,), inputs=(LINE,), match="must divide the number of channels, 3; got 2"),
    Refusal("group_norm", (3,), inputs=(ONE,), match="more than 1 value per channel"),
    Refusal(
        "layer_norm", ((3,), numbers(2)), inputs=(FLAT,), match=r"weight of the normalized_shape, \(3,\); got \(2,\)"
    ),
    Refusal("rms_norm", ((3,), numbers(2)), inputs=(FLAT,), match=r"weight of the normalized_shape"),
    Refusal("normalize", inputs=(np.ones((2, 3), np.int32),), match="floating input; got int32"),
    *(
        Refusal(name, args, inputs=(np.ones((2, 3, 4), np.int32),), match="floating input; got int32")
        for name, args in [("batch_norm", RUNNING), ("layer_norm", ((4,),)), ("group_norm", (1,))]
    ),
]


class TestLayers(LayerContract):
    pass


def pairs(name, *args, **kwargs):
    return getattr(nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("wrap", [lambda f: f, mt.jit], ids=["eager", "jit"])
def test_running_statistics_follow_torchs_over_several_batches(momentum, wrap):
    ours, theirs = pairs("BatchNorm1d", 3, momentum=momentum)
    call = wrap(lambda x: ours(x))
    for seed in range(4):
        x = 1 + 2 * numbers(5, 3, seed=seed)
        np.testing.assert_allclose(call(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-4, atol=1e-5)
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], tensor.numpy(), rtol=1e-5, err_msg=name)
    assert int(ours.num_batches_tracked) == 4 and ours.num_batches_tracked.dtype == jnp.int32
    ours.eval(), theirs.eval()
    x = numbers(5, 3, seed=9)
    np.testing.assert_allclose(call(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert int(ours.num_batches_tracked) == 4


def test_statistics_are_written_by_backward_and_returned_from_plain_transforms():
    x = numbers(5, 3)
    layers = [nn.BatchNorm1d(3) for _ in range(3)]
    layers[0](x)
    mt.backward(lambda layer, x: layer(x).sum(), layers[1], x)

    def loss(layer):
        return layer(x).sum(), layer

    layers[2] = jax.jit(jax.grad(loss, has_aux=True))(layers[2])[1]
    for layer in layers[1:]:
        for name, value in layers[0].state_dict().items():
            np.testing.assert_allclose(layer.state_dict()[name], value, rtol=1e-6)
    assert abs(np.asarray(layers[0].running_mean)).min() > 0


def test_resetting_running_statistics():
    layer, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    layer(numbers(5, 3))
    layer.reset_running_stats()
    plain.reset_running_stats()
    for name, value in nn.BatchNorm1d(3).state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2)])
def test_an_empty_batch_leaves_statistics_alone(shape):
    layer = nn.BatchNorm2d(3)
    assert layer(jnp.zeros(shape)).shape == shape
    np.testing.assert_array_equal(layer.running_mean, jnp.zeros(3))
    np.testing.assert_array_equal(layer.running_var, jnp.ones(3))
    assert nn.LayerNorm(3)(jnp.zeros((0, 3))).shape == (0, 3)
    assert nn.GroupNorm(1, 3)(jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_a_wrong_number_of_features_that_nothing_depends_on_is_a_warning(name):
    layer = getattr(nn, name)(5, affine=False, track_running_stats=False)
    with pytest.warns(UserWarning, match="num_features=5 channels on axis 1"):
        assert layer(LINE).shape == LINE.shape


def test_in_bfloat16_statistics_are_computed_in_float32():
    x = (100 + numbers(512, 4)).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    layer = nn.BatchNorm1d(4, momentum=1.0)
    out = layer(jnp.asarray(x))
    assert out.dtype == jnp.bfloat16 and layer.running_mean.dtype == jnp.float32
    np.testing.assert_allclose(layer.running_mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, exact.var(0, ddof=1), rtol=1e-5)
    assert layer.astype(jnp.bfloat16)(jnp.asarray(x)).dtype == layer.running_mean.dtype == jnp.bfloat16


@pytest.mark.one_in(9)
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_from_zero_does_not_lose_the_variance(mean):
    """The difference E[x²] - E[x]² would be wrong by more than the variance."""
    x = (mean + numbers(2, 4, 256)).astype(np.float32)
    for ours, theirs in (
        (F.layer_norm(x, (256,)), torch.nn.functional.layer_norm(torch.from_numpy(x), (256,))),
        (nn.BatchNorm1d(4)(x), torch.nn.BatchNorm1d(4)(torch.from_numpy(x))),
        (F.group_norm(x, 2), torch.nn.functional.group_norm(torch.from_numpy(x), 2)),
    ):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_equal_numbers_have_finite_gradients():
    x = jnp.full((4, 3), 2.0)
    batch_norm = functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)
    for f in (batch_norm, nn.LayerNorm(3), nn.RMSNorm(3)):
        out, gradient = jax.jit(jax.value_and_grad(lambda x, f=f: (f(x) ** 2).sum()))(x)
        assert np.isfinite(out) and np.isfinite(gradient).all()
    for p in (0.5, 2, 3.0):
        gradient = jax.jit(jax.grad(lambda x, p=p: F.normalize(x, p).sum()))(jnp.zeros((2, 3)))
        assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_64_bits():
    x = np.random.default_rng(0).standard_normal((4, 6))
    with jax.enable_x64(True):
        for ours, theirs in (
            (F.rms_norm(jnp.asarray(x), (6,)), torch.nn.functional.rms_norm(torch.from_numpy(x), (6,))),
            (F.layer_norm(jnp.asarray(x), (6,)), torch.nn.functional.layer_norm(torch.from_numpy(x), (6,))),
            (nn.BatchNorm1d(6, dtype=jnp.float64)(x), torch.nn.BatchNorm1d(6).double()(torch.from_numpy(x))),
            (
                F.local_response_norm(jnp.asarray(x[None]), 3),
                torch.nn.functional.local_response_norm(torch.from_numpy(x[None]), 3),
            ),
        ):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12, atol=1e-12)
        assert nn.BatchNorm1d(6).num_batches_tracked.dtype == jnp.int64


@pytest.mark.parametrize("name, affine", [("layer_norm", 2), ("layer_norm", 0), ("rms_norm", 1)])
def test_layer_norm_by_rows_has_every_derivative_of_the_plain_form(name, affine):
    """Of each argument alone and of all, forward and backward, twice, and of each sample: in 64 bits, as the plain form."""
    from minitorch_jax.nn.functional.normalization import _plain

    def results(form, args, tangents):
        def loss(*args):
            return jnp.sin(form(*args)).sum()

        everything = tuple(range(len(args)))
        grads = jax.grad(loss, everything)
        yield "value", form(*args)
        yield "tangent", jax.jvp(form, args, tangents)[1]
        for i in everything:
            alone = jax.jvp(lambda v, i=i: form(*args[:i], v, *args[i + 1 :]), args[i : i + 1], tangents[i : i + 1])
            yield f"tangent of {i}", alone[1]
            yield f"gradient of {i}", jax.grad(loss, i)(*args)
        yield "forward over reverse", jax.jvp(grads, args, tangents)[1]
        yield "reverse over reverse", jax.grad(lambda *a: sum((v**2).sum() for v in grads(*a)), everything)(*args)
        yield "each sample's", jax.vmap(jax.grad(loss, everything), (0, *[None] * (len(args) - 1)))(*args)

    forms = [
        lambda x, *affine: getattr(F, name)(x, (5,), *affine, eps=1e-5),
        lambda x, w=None, b=None: _plain(x, w, b, (x.ndim - 1,), 1e-5, name == "layer_norm"),
    ]
    with jax.enable_x64(True):
        x, dx = (jnp.asarray(numbers(4, 3, 5, seed=i), jnp.float64) for i in (1, 2))
        given = [jnp.asarray(numbers(5, seed=i), jnp.float64) for i in (3, 4)][:affine]
        tangents = [dx, *(1 + array for array in given)]
        run = jax.jit(lambda *args: [dict(results(form, args, tuple(tangents))) for form in forms])
        for offset in (0, 1e4):
            ours, plain = run(x + offset, *given)
            for result, expected in plain.items():
                for one, other in zip(*map(jax.tree.leaves, (ours[result], expected)), strict=True):
                    scale = float(np.abs(other).max())
                    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7 * scale, err_msg=result)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 2, 5), (2, 3, 2, 2, 3)])
def test_a_batch_norm_is_the_same_with_channels_last(shape, monkeypatch):
    """That form is for few channels and small images; the plain one must agree in values and both derivatives."""
    random = np.random.default_rng(0)
    x, g = (jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(2))
    weight, bias = (jnp.asarray(random.standard_normal(3), jnp.float32) for _ in range(2))

    def everything():
        norm = functools.partial(batchnorm.batch_norm_by_input, eps=1e-5)
        outs, pullback = jax.vjp(lambda *arrays: norm(*arrays)[0], x, weight, bias)
        return norm(x, weight, bias), outs, pullback(g), norm(x, None, None)

    last = everything()
    monkeypatch.setattr(batchnorm, "_FEW_CHANNELS", 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), last, everything())
