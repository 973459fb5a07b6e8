"""What XLA computes wrongly on CPUs: NaN lost by maxima, products of few rows, reductions of seven axes and more.

The arrays are as large as it takes, and programs are compiled as users have them (in processes of their own where the fault
is a crash).
"""

import math
import os
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.runtime import xla_faults

F = nn.functional


def image(*shape, dtype=jnp.float32):
    """Noise with one NaN, negative as x86 makes it."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[tuple(n * 2 // 5 for n in shape)] = -np.nan
    return jnp.asarray(values, dtype)


def avoided(function, *args):
    """What the library is not to compute in a program."""
    return xla_faults.avoided_in(jax.make_jaxpr(function)(*args).jaxpr)


def convolved(x):
    return F.conv2d(x, jnp.ones((1, 1, 3, 3)))


MAXIMA = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (1, 4, 65536)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (1, 1, 256, 256)),
    "max_pool2d, overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1), (1, 1, 256, 256)),
    "max_pool2d, with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (1, 1, 256, 256)),
    "max_pool2d, dilated": (lambda x: F.max_pool2d(x, 2, dilation=2), (1, 1, 256, 256)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (1, 1, 64, 64, 64)),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 64), (1, 1, 65536)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 8), (1, 1, 256, 256)),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 4), (1, 1, 64, 64, 64)),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, 0 * x, p=math.inf), (256, 256)),
    "normalize": (lambda x: F.normalize(x, p=math.inf), (256, 256)),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 2, 2), (1, 1, 256, 256)),
    "softmax": (lambda x: F.softmax(x, 1), (256, 256)),
    "log_softmax": (lambda x: F.log_softmax(x, 0), (256, 256)),
    "cross_entropy": (lambda x: F.cross_entropy(x, jnp.zeros(256, jnp.int32), reduction="none"), (256, 256)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (1, 1, 256, 256)),
    "embedding_bag": (
        lambda x: F.embedding_bag(jnp.arange(256).reshape(4, 64), x, mode="max"),
        (256, 256),
    ),
    "layer_norm": (lambda x: F.layer_norm(x, (256,)), (256, 256)),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", MAXIMA)
def test_nan_comes_through(name):
    function, shape = MAXIMA[name]
    x = image(*shape)
    eager, compiled = function(x), jax.jit(function)(x)
    assert 0 < np.isnan(eager).sum() and np.isnan(compiled).sum() == np.isnan(eager).sum(), name
    clean = jnp.where(jnp.isnan(x), 9.0, x)
    assert not np.isnan(function(clean)).any() and not np.isnan(jax.jit(function)(clean)).any()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy", "attention", "layer_norm"])
def test_nan_comes_through_gradients(name):
    function, shape = MAXIMA[name]
    x = image(*shape)

    def grads(x):
        return jax.value_and_grad(lambda x: (function(x) ** 2).sum())(x)

    assert not avoided(grads, x)
    options = xla_faults.options_without(frozenset({"reduction"})) if xla_faults._is_known() else None
    expected, found = (jax.jit(grads, compiler_options=given)(x) for given in (options, None))
    for ours, safe in zip(found, expected, strict=True):
        assert 0 < np.isnan(safe).sum()
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(safe))


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(8)], ids=repr)
def test_images_of_nan_are_pooled_to_nan(layer):
    x = jnp.full((1, 1, 256, 256), jnp.nan)
    assert np.isnan(layer(x)).all() and np.isnan(mt.jit(lambda layer, x: layer(x))(layer, x)).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_largest_is_the_maximum(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(0, 100, (80, 90)), dtype)
    for axis in (None, 0, 1):
        np.testing.assert_array_equal(xla_faults.largest(x, axis), np.asarray(x).max(axis))
        np.testing.assert_array_equal(xla_faults.largest(x, axis, True), np.asarray(x).max(axis, keepdims=True))
    if dtype == "float32":
        np.testing.assert_array_equal(jax.grad(xla_faults.largest)(x), jax.grad(jnp.max)(x))
    assert float(xla_faults.largest(jnp.zeros((0,)), initial=0.0)) == 0.0


def test_the_gradient_of_max_pooling_is_what_it_was():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 2, 6, 6)), jnp.float32)  # with ties
    want = jax.grad(lambda x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID").sum())
    np.testing.assert_array_equal(jax.grad(lambda x: F.max_pool2d(x, 2).sum())(x), want(x))


def test_clipping_by_the_infinite_norm_sees_nan():
    def gradients():
        model = nn.Linear(256, 256, bias=False)
        model.accumulate([image(256, 256)])
        return model

    with pytest.raises(RuntimeError, match="non-finite|not finite|nan"):
        mt.clip_grad_norm(gradients(), 1.0, norm_type=math.inf, error_if_nonfinite=True)
    assert math.isnan(mt.clip_grad_norm(gradients(), 1.0, norm_type=math.inf))
    assert math.isnan(mt.jit(lambda m: mt.clip_grad_norm(m, 1.0, norm_type=math.inf))(gradients()))


def test_lbfgs_does_not_take_a_gradient_of_nan_for_a_small_one():
    from minitorch_jax.optim.quasi_newton import largest_of

    assert math.isnan(largest_of(image(65536)))


# -- users' own code ---------------------------------------------------------------------------------------------------


class Largest(mt.Module):
    def __init__(self):
        self.weight = mt.Parameter(jnp.ones(()))

    def forward(self, x):
        return jnp.max(x * self.weight), jnp.min(x * self.weight, axis=1)[x.shape[0] * 2 // 5]


def both(out):
    return all(math.isnan(number) for number in out)


def test_maxima_in_compiled_user_code_keep_nan():
    model, x = Largest(), image(256, 256)
    assert both(mt.jit(lambda m, x: m(x))(model, x))
    assert both(mt.backward(lambda m, x: (m(x)[0], m(x)), model, x, has_aux=True)[1])
    assert both(mt.value_and_grad(lambda m, x: (m(x)[0], m(x)), has_aux=True)(model, x)[0][1])
    assert both([out[0] for out in mt.scan(lambda x: model(x), x[None])])


def test_the_option_is_given_to_programs_that_need_it_alone():
    x = jnp.ones((8, 8))
    for function in (F.softmax, F.log_softmax, jax.nn.logsumexp, jnp.argmax, F.relu, xla_faults.largest, jnp.tanh):
        assert not avoided(lambda x, f=function: f(x, 1) if f in (F.softmax, F.log_softmax) else f(x), x)
    assert not avoided(lambda x: F.cross_entropy(x, jnp.zeros(8, jnp.int32)), x)
    assert not avoided(lambda x: F.max_pool2d(x, 2), jnp.ones((1, 1, 8, 8)))
    assert not avoided(lambda x: x.astype(int).max(), x)
    assert not avoided(lambda x, w: F.linear(x, w), jnp.ones((9, 3)), jnp.ones((3, 3)))
    for function in (jnp.max, jnp.min, jax.jit(jnp.max), lambda x: jax.lax.map(jnp.max, x)):
        assert avoided(function, x) == {"reduction"}


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.softmax(x, 1)[0, 0],
        lambda x: F.log_softmax(x, 1)[0, 0],
        lambda x: F.cross_entropy(x, jnp.zeros(8, jnp.int32)),
        lambda x: F.cross_entropy(x, jnp.zeros(8, jnp.int32), label_smoothing=0.1),
        lambda x: F.linear_cross_entropy(x, x, jnp.zeros(8, jnp.int32)),
        lambda x: F.scaled_dot_product_attention(x, x, x)[0, 0],
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)[0, 0],
        lambda x: jax.nn.softmax(x)[0, 0],
        lambda x: jax.nn.logsumexp(x),
    ],
)
def test_a_gradient_needs_the_option_no_more_than_its_loss(loss):
    """JAX's derivative of a maximum leaves equations behind that nobody reads."""
    x = jnp.ones((8, 8))
    for function in (loss, jax.grad(loss), jax.value_and_grad(loss), lambda x: jax.vjp(loss, x)[1](1.0)):
        assert not avoided(function, x)
    kept = jax.value_and_grad(lambda x: loss(x) + x.max())
    assert avoided(kept, x) == {"reduction"}


def test_a_program_gets_the_option_when_another_shape_needs_it():
    model = Largest()
    compiled = mt.jit(lambda m, x: m(x) if x.ndim == 2 else (m.weight * x).sum())
    assert float(compiled(model, jnp.ones(5))) == 5.0
    assert both(compiled(model, image(256, 256)))
    assert float(compiled(model, jnp.ones(5))) == 5.0


# -- convolutions ------------------------------------------------------------------------------------------------------


def test_the_library_computes_no_convolution(monkeypatch):
    x = jnp.ones((1, 1, 8, 8))
    plain = partial(jax.lax.conv, rhs=jnp.ones((1, 1, 3, 3)), window_strides=(1, 1), padding="SAME")
    for function in (convolved, plain, jax.grad(lambda x: plain(x).sum()), lambda x: jax.lax.map(plain, x[None])):
        assert avoided(function, x) == {"convolution"}
    assert avoided(lambda x: convolved(x).max(), x) == {"convolution", "reduction"}
    monkeypatch.setenv("XLA_FLAGS", f"--{xla_faults.OPTION}=reduce")  # the user's choice, but where results are wrong
    assert not avoided(convolved, x)
    assert avoided(lambda x: convolved(x).max(), x) == {"reduction"}


def test_what_is_avoided_becomes_xla_s_option():
    found = {kinds: xla_faults.options_without(frozenset(kinds)) for kinds in [(), ("convolution",), ("reduction",)]}
    dot, rest = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    assert found == {
        (): None,
        ("convolution",): {xla_faults.OPTION: f"{dot},LIBRARY_FUSION_TYPE_REDUCE"},
        ("reduction",): {xla_faults.OPTION: f"{dot},{rest}"},
    }
    x, w = jnp.ones((8, 32, 32, 8)), jnp.ones((3, 3, 8, 8))
    names = "NHWC", "HWIO", "NHWC"
    options = found["convolution",] if xla_faults._is_known() else None
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=names)
    text = jax.jit(convolve, compiler_options=options).lower(x, w).compile().as_text()
    assert " convolution(" in text[text.index("ENTRY") :]  # not a part of what the library computes


def test_a_program_avoids_more_when_another_shape_needs_it():
    class Net(mt.Module):
        def __init__(self):
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return jnp.max(x) if x.ndim == 2 else self.conv(x).sum()

    model = Net()
    compiled = mt.jit(lambda m, x: m(x))
    first = float(compiled(model, jnp.ones((1, 1, 8, 8))))
    assert math.isnan(compiled(model, image(256, 256)))
    assert float(compiled(model, jnp.ones((1, 1, 8, 8)))) == first


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(xla_faults, "OPTION", "xla_of_another_version")
    xla_faults._is_known.cache_clear()
    try:
        model = Largest()
        assert float(mt.jit(lambda m, x: m(x))(model, jnp.ones((5, 5)))[0]) == 1.0
    finally:
        xla_faults._is_known.cache_clear()


def test_the_option_is_not_given_on_other_backends(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not avoided(jnp.max, jnp.ones(3)) and not avoided(convolved, jnp.ones((1, 1, 8, 8)))


@pytest.mark.slow
def test_known_faults_in_a_user_s_programs():
    """In a process of its own: the third crashes, and XLA optimizes as it does for users."""
    code = """
        import jax, jax.numpy as jnp, numpy as np, minitorch_jax as mt
        from minitorch_jax import nn
        rng = np.random.default_rng(0)
        rows, w = rng.normal(size=(40_000, 3)).astype(np.float32), rng.normal(size=(3, 3)).astype(np.float32)
        class Net(mt.Module):
            def __init__(self):
                self.w = mt.Parameter(w)
            def forward(self, x):
                return jax.vmap(lambda row: jnp.sum((self.w @ row) ** 2))(x)
        net = Net()
        want = ((rows.astype(float) @ w.astype(float).T) ** 2).sum(1)
        np.testing.assert_allclose(mt.jit(net)(rows), want, rtol=1e-4, atol=1e-5)
        loss = mt.backward(lambda net, x: net(x).sum(), net, rows)
        grad = 2 * (rows.astype(float) @ w.astype(float).T).T @ rows.astype(float)
        np.testing.assert_allclose(net.grads()[0], grad, rtol=1e-3)
        a = rng.normal(size=(3, 1, 2, 2, 8, 8, 8)).astype(np.float32)
        cosine = nn.CosineSimilarity(3)
        np.testing.assert_allclose(mt.jit(cosine)(a, a), 1.0, rtol=1e-4)
        np.testing.assert_allclose(cosine(a, a), 1.0, rtol=1e-4)
        class Scale(mt.Module):
            def __init__(self):
                self.w = mt.Parameter(jnp.ones((2, 1, 1, 1)))
            def forward(self, x):
                return x * self.w
        mt.backward(lambda m, x: m(x).sum(), Scale(), a)
        x = np.full((1, 1, 256, 256), np.nan, np.float32)
        assert np.isnan(mt.jit(nn.MaxPool2d(2))(x)).all() and np.isnan(nn.MaxPool2d(2)(x)).all()
        print("right")
    """
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "right", (done.returncode, done.stderr[-2000:])
