"""Dropout of channels, and that which keeps mean and variance. (Streams, keys and nn.Dropout: test_random.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, numbers
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn

F = nn.functional
LIMIT = 1.7580993408473766

INPUTS = {
    "Dropout": numbers(4, 3),
    "Dropout1d": numbers(2, 3, 4),
    "Dropout2d": numbers(2, 3, 4, 2),
    "Dropout3d": numbers(2, 3, 2, 2, 2),
    "AlphaDropout": numbers(4, 3),
    "FeatureAlphaDropout": numbers(2, 3, 4),
}
FORMS = {
    "Dropout": F.dropout,
    "Dropout1d": F.dropout1d,
    "Dropout2d": F.dropout2d,
    "Dropout3d": F.dropout3d,
    "AlphaDropout": F.alpha_dropout,
    "FeatureAlphaDropout": F.feature_alpha_dropout,
}

CASES = [
    *(Case(name, inputs=(x,), random=True) for name, x in INPUTS.items()),
    *(Case(name, (0.3, True), inputs=(x,), random=True) for name, x in INPUTS.items()),
    *(Case(name, (float(i % 2),), inputs=(x,)) for i, (name, x) in enumerate(INPUTS.items())),
    Case("Dropout1d", (1.0,), inputs=(INPUTS["Dropout1d"][0],)),
    Case("Dropout3d", (1.0,), inputs=(INPUTS["Dropout3d"][0],)),
    *(Case(form.__name__, (1.0, True), inputs=(INPUTS[name],)) for name, form in FORMS.items()),
]

REFUSALS = [
    *(Refusal(name, (p,), match=f"between 0 and 1, but got {p}") for name in INPUTS for p in (-0.1, 1.5)),
    *(
        Refusal(form.__name__, (2.0,), inputs=(INPUTS[name],), match="between 0 and 1, but got 2")
        for name, form in FORMS.items()
    ),
    *(
        Refusal(name, inputs=(np.ones((2, 3, 4, 2, 2)[: x.ndim], np.int32),), match="needs a floating input; got int32")
        for name, x in INPUTS.items()
    ),
    Refusal("Dropout1d", inputs=(numbers(2, 3, 4, 5),), match="expected 2D or 3D input, but received a 4D"),
    Refusal("FeatureAlphaDropout", inputs=(numbers(3),), match=r"shape \(N, C, \*\); got \(3,\)"),
    # torch says that these will be errors
    Refusal("Dropout2d", inputs=(numbers(2, 3),), match="expected 3D or 4D input, but received a 2D", torch_too=False),
    Refusal("Dropout3d", inputs=(numbers(2, 3),), match="expected 4D or 5D input, but received a 2D", torch_too=False),
]


class TestLayers(LayerContract):
    pass


CHANNELS = [("Dropout1d", (40, 50, 3)), ("Dropout2d", (40, 50, 2, 2)), ("Dropout3d", (40, 50, 2, 1, 2))]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("p", [0.2, 0.7])
@pytest.mark.parametrize(("name", "shape"), CHANNELS)
def test_whole_channels_are_dropped_or_scaled(name, shape, p):
    x = 1 + jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    ratio = np.asarray(getattr(nn, name)(p)(x) / x).reshape(2000, -1)
    kept = ratio[:, 0] != 0
    np.testing.assert_allclose(ratio, np.where(kept, 1 / (1 - p), 0)[:, None] * np.ones_like(ratio), rtol=1e-5)
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / 2000) ** 0.5
    by_sample = kept.reshape(40, 50)
    assert 0 < by_sample.mean(0).std() and 0 < by_sample.mean(1).std()  # neither a sample's nor a channel's one fate


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("Dropout1d", (2000, 3)), ("Dropout3d", (2000, 2, 1, 2))])
def test_channels_without_a_batch(name, shape):
    out = np.asarray(getattr(nn, name)(0.3)(jnp.ones(shape))).reshape(2000, -1)
    kept = out[:, 0] != 0
    np.testing.assert_array_equal(out != 0, kept[:, None] & np.ones_like(out, bool))
    assert abs(kept.mean() - 0.7) < 0.06


@pytest.mark.slow
def test_dropout2d_takes_three_axes_as_torch_does():
    with pytest.warns(UserWarning, match=r"as \(N, C, L\), as torch does"):
        out = np.asarray(nn.Dropout2d()(jnp.ones((20, 30, 4))))
    assert ((out == out[:, :, :1]).all()) and 0.3 < (out != 0).mean() < 0.7
    assert 0 < out.mean((1, 2)).std()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("name", ["AlphaDropout", "FeatureAlphaDropout"])
def test_alpha_dropout_keeps_mean_and_variance(name, p):
    x = jax.random.normal(jax.random.key(0), (100, 200, 2))
    out = getattr(nn, name)(p)(x)
    assert abs(float(out.mean())) < 0.05
    assert abs(float(out.var()) - 1) < 0.06
    scale = ((LIMIT**2 * p + 1) * (1 - p)) ** -0.5
    low = LIMIT * scale * (p - 1)
    dropped = np.isclose(out, low, rtol=1e-5)
    expected = scale * np.asarray(x) + low + LIMIT * scale
    np.testing.assert_allclose(np.asarray(out)[~dropped], expected[~dropped], rtol=1e-5, atol=1e-6)
    assert abs(dropped.mean() - p) < 0.02
    assert (dropped[..., 0] == dropped[..., 1]).all() == (name == "FeatureAlphaDropout")


@pytest.mark.parametrize("name", ["AlphaDropout", "FeatureAlphaDropout"])
def test_alpha_dropout_puts_torchs_numbers(name):
    x = np.zeros((50, 40), np.float32)
    theirs = getattr(torch.nn, name)(0.3)(torch.from_numpy(x)).numpy()
    ours = np.asarray(getattr(nn, name)(0.3)(jnp.asarray(x)))
    np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("wrap", [lambda f: f, mt.jit], ids=["eager", "jit"])
def test_every_call_has_another_mask_that_the_seed_decides(name, wrap):
    layer, x = getattr(nn, name)(), jnp.ones((40, 5, 1, 1, 1)[: INPUTS[name].ndim])
    call = wrap(lambda x: layer(x))

    def masks():
        mt.seed(3)
        return [np.asarray(call(x)) for _ in range(3)]

    first, again = masks(), masks()
    for i in range(3):
        np.testing.assert_array_equal(first[i], again[i])
        assert not np.array_equal(first[i], first[i - 1])
    np.testing.assert_array_equal(wrap(layer.eval())(x), x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", INPUTS)
def test_forms_with_a_key_draw_what_layers_draw(name):
    x = INPUTS[name]
    mt.seed(4)
    layer = getattr(nn, name)(0.4)(x)
    mt.seed(4)
    key = mt.next_key()
    for wrap in (lambda f: f, jax.jit):
        np.testing.assert_allclose(
            wrap(lambda x: FORMS[name](x, 0.4, True, True, key=key))(x), layer, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", INPUTS)
def test_without_training_the_input_is_given_back(name):
    x = jnp.asarray(INPUTS[name])
    assert FORMS[name](x, 0.5, False) is FORMS[name](x, 0.0, True) is getattr(nn, name)().eval()(x) is x


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_reach_what_is_kept(name, dtype):
    x = jnp.asarray(INPUTS[name], dtype)
    key = jax.random.key(1)
    gradient = jax.grad(lambda x: FORMS[name](x, 0.5, True, key=key).sum())(x)
    out = FORMS[name](x, 0.5, True, key=key)
    assert out.dtype == gradient.dtype == dtype
    scale = ((LIMIT**2 * 0.5 + 1) * 0.5) ** -0.5 if "Alpha" in name else 2.0
    low = -0.5 * LIMIT * scale if "Alpha" in name else 0.0
    np.testing.assert_allclose(np.float32(gradient), np.where(np.isclose(np.float32(out), low, 3e-3), 0, scale), 1e-2)
    assert 0 < np.count_nonzero(gradient) < gradient.size
