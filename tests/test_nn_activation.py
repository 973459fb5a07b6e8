"""Activations against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, compare_arguments, numbers
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn

F = nn.functional

X = numbers(3, 4, scale=3.0)
EDGES = np.array([-30, -6, -3, -1, -0.5, -0.0, 0, 0.5, 1, 3, 6, 30], np.float32)  # where pieces meet, and far away
EDGES = np.append(EDGES, 1.00001 * EDGES[EDGES != 0])

PLAIN = ["ReLU6", "SELU", "SiLU", "Mish", "Hardsigmoid", "Hardswish", "ReLU"]  # whose only argument is `inplace`
OTHERS = ["Sigmoid", "Tanh", "LogSigmoid", "Softsign", "Tanhshrink"]
IN_PLACE = {
    "differentiable": False
}  # torch cannot change in place what it differentiates, and we test no more than that

CASES = [
    *[Case(name, inputs=(EDGES,)) for name in PLAIN + OTHERS],
    *[Case(name, (True,), inputs=(X,), **IN_PLACE) for name in PLAIN],
    Case("Threshold", (1.5, 2.0), inputs=(X,)),
    Case("Threshold", (0.5, -7.0), inputs=(EDGES,)),
    Case("Threshold", (1.0, 2.0, True), inputs=(X,), **IN_PLACE),
    Case("RReLU", inputs=(EDGES,), random=True),
    Case("RReLU", (0.1, 0.3, True), inputs=(X,), random=True, **IN_PLACE),
    Case("RReLU", (0.2, 0.2), inputs=(X,)),  # of one slope, so not random
    Case("Hardtanh", inputs=(EDGES,)),
    Case("Hardtanh", (-0.5, 3.0, True), inputs=(EDGES,), **IN_PLACE),
    Case("LeakyReLU", inputs=(EDGES,)),
    Case("LeakyReLU", (0.3, True), inputs=(X,), **IN_PLACE),
    Case("PReLU", inputs=(EDGES,)),
    Case("PReLU", (4, -0.5), inputs=(X,)),
    Case("PReLU", (3,), inputs=(numbers(2, 3, 2, 2),)),
    Case("PReLU", inputs=(np.array(-2, np.float32),), id="PReLU-of-a-scalar"),
    Case("ELU", inputs=(EDGES,)),
    Case("ELU", (0.7, True), inputs=(X,), **IN_PLACE),
    Case("CELU", inputs=(EDGES,)),
    Case("CELU", (1.7, True), inputs=(X,), **IN_PLACE),
    Case("GELU", inputs=(EDGES,)),
    Case("GELU", (), {"approximate": "tanh"}, inputs=(EDGES,)),
    Case("GLU", inputs=(X,)),
    Case("GLU", (0,), inputs=(numbers(2, 3, 5),)),
    Case("GLU", (-2,), inputs=(numbers(4, 1),)),
    Case("Softplus", inputs=(EDGES,)),
    Case("Softplus", (2.0, 1.5), inputs=(EDGES,)),
    Case("Hardshrink", inputs=(EDGES,)),
    Case("Hardshrink", (1.0,), inputs=(EDGES,)),
    Case("Softshrink", inputs=(EDGES,)),
    Case("Softshrink", (3.0,), inputs=(EDGES,)),
    *[Case(name, (1,), inputs=(X,)) for name in ("Softmax", "Softmin", "LogSoftmax")],
    *[Case(name, (), {"dim": -3}, inputs=(numbers(2, 3, 4),)) for name in ("Softmax", "Softmin", "LogSoftmax")],
    Case("Softmax2d", inputs=(numbers(2, 3, 4, 1),)),
    Case("Softmax2d", inputs=(numbers(3, 2, 2),)),
    *[Case(name, (dim,), inputs=(numbers(),)) for name in ("softmax", "softmin", "log_softmax") for dim in (0, -1)],
    *[Case(name, (1,), {"dtype": jnp.float32}, inputs=(X,)) for name in ("softmax", "softmin", "log_softmax")],
    Case("prelu", inputs=(X, numbers(seed=1))),
    Case("prelu", inputs=(numbers(2, 3), numbers(3, seed=1))),
    Case("rrelu", (0.1, 0.2), inputs=(X,)),
    Case("rrelu", (0.2, 0.2, True), inputs=(X,)),
]

INITIAL = [("PReLU", (), {"init": 0.1}), ("PReLU", (5,))]

REFUSALS = [
    Refusal("Hardtanh", (1.0, 1.0), match="min_val < max_val; got 1.0 and 1.0"),
    Refusal("hardtanh", (2.0, 1.0), inputs=(X,), match="min_val <= max_val; got 2.0 and 1.0"),
    Refusal("RReLU", (0.5, 0.1), inputs=(X,), match="lower <= upper; got 0.5 and 0.1"),
    Refusal("CELU", (0.0,), inputs=(X,), match="alpha, which must not be 0"),
    Refusal("Softshrink", (-1.0,), inputs=(X,), match="lambd >= 0; got -1.0"),
    Refusal("GLU", (0,), inputs=(X,), match=r"must be even; got an input of shape \(3, 4\)"),
    Refusal("PReLU", (3,), inputs=(X,), match=r"\(4,\) for an input of shape \(3, 4\); got \(3,\)"),
    Refusal("PReLU", (3,), inputs=(numbers(3),), match=r"\(1,\) for an input of shape \(3,\); got \(3,\)"),
    Refusal("Softmax2d", inputs=(X,), match=r"3 or 4 dimensions; got shape \(3, 4\)"),
    Refusal("GELU", ("erf",), inputs=(X,), match="'none' or 'tanh'; got 'erf'"),
]


class TestLayers(LayerContract):
    pass


def test_every_activation_of_torch_is_there():
    theirs = set(torch.nn.modules.activation.__all__) - {"MultiheadAttention"}
    assert theirs == {case.name for case in CASES if not case.is_function}
    compare_arguments(F.gumbel_softmax, torch.nn.functional.gumbel_softmax)


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu", "hardshrink", "softshrink", "elu", "gelu"])
def test_a_nan_stays_one(name):
    assert np.isnan(getattr(F, name)(jnp.array([np.nan]))).all()


@pytest.mark.parametrize("name", ["elu", "selu", "celu", "softplus", "logsigmoid", "mish", "silu", "gelu", "hardswish"])
def test_gradients_of_huge_numbers_are_finite(name):
    x = jnp.array([-1e30, -1e4, 1e4, 1e30])
    theirs = torch.tensor(x.tolist(), requires_grad=True)
    getattr(torch.nn.functional, name)(theirs).sum().backward()
    gradient = jax.jit(jax.grad(lambda x: getattr(F, name)(x).sum()))(x)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)


def test_a_random_relu_draws_its_slopes_anew_at_each_call():
    layer, x = nn.RReLU(0.1, 0.4), -jnp.ones((100, 100))
    one, two = layer(x), layer(x)
    assert not np.array_equal(one, two)
    assert -0.4 <= one.min() < -0.399 and -0.101 < one.max() <= -0.1
    assert float(one.mean()) == pytest.approx(-0.25, abs=0.005)
    np.testing.assert_array_equal(layer(-x), -x)
    np.testing.assert_array_equal(layer.eval()(x), 0.25 * x)


def test_a_random_relu_has_the_gradient_of_its_slopes_and_takes_keys():
    key, x = jax.random.key(0), -jnp.ones(5)
    slopes = -F.rrelu(x, training=True, key=key)
    gradient = jax.grad(lambda x: F.rrelu(x, training=True, key=key).sum())(x)
    np.testing.assert_array_equal(gradient, slopes)
    assert F.rrelu(x.astype(jnp.bfloat16), training=True, key=key).dtype == jnp.bfloat16
    mt.seed(3)
    one = F.rrelu(x, training=True)
    mt.seed(3)
    np.testing.assert_array_equal(nn.RReLU()(x), one)


@pytest.mark.slow
def test_softmax_converts_first():
    x = jnp.array([[1e5, 0.0]])
    for function in (F.softmax, F.softmin, F.log_softmax):
        assert function(x, 1, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    half = jnp.full(3, 1.0, jnp.float16)
    np.testing.assert_array_equal(F.softmax(half, 0, dtype=jnp.float32), F.softmax(half.astype(jnp.float32), 0))


@pytest.mark.parametrize("name", ["Softmax", "Softmin", "LogSoftmax"])
def test_without_dim_there_is_a_warning(name):
    with pytest.warns(UserWarning, match="got no dim and uses dim=0"):
        nothing = getattr(nn, name)()(jnp.ones((3, 1, 1)))
    with pytest.warns(UserWarning, match="got no dim and uses dim=1"):
        getattr(nn, name)()(jnp.ones((3, 2)))
    assert nothing.shape == (3, 1, 1)


@pytest.mark.slow
def test_gumbel_softmax_samples_from_the_softmax():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    many = jnp.broadcast_to(logits[None], (20_000, 3))
    soft, hard = (F.gumbel_softmax(many, hard=hard, key=jax.random.key(1)) for hard in (False, True))
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(hard.mean(0), [0.1, 0.2, 0.7], atol=0.015)
    assert set(np.unique(hard)) == {0.0, 1.0}
    np.testing.assert_array_equal(soft.argmax(1), hard.argmax(1))
    cold = F.gumbel_softmax(many[:9], tau=1e-3, key=jax.random.key(1))
    assert float(cold.max(1).min()) > 0.95


@pytest.mark.slow
def test_hard_gumbel_softmax_has_the_soft_gradient_along_any_axis():
    x, key = jnp.asarray(numbers(4, 3)), jax.random.key(0)
    weight = jnp.asarray(numbers(4, 3, seed=1))

    def loss(x, hard):
        return (F.gumbel_softmax(x, 0.7, hard, dim=0, key=key) * weight).sum()

    soft, hard = (jax.grad(loss)(x, hard) for hard in (False, True))
    np.testing.assert_allclose(soft, hard, rtol=1e-5)
    np.testing.assert_array_equal(F.gumbel_softmax(x, hard=True, dim=0, key=key).sum(0), 1)
    assert F.gumbel_softmax(x.astype(jnp.bfloat16), key=key).dtype == jnp.bfloat16
    with pytest.warns(UserWarning, match="eps"):
        F.gumbel_softmax(x, eps=1e-5)
