"""Initial values: those that torch computes with, and all of them in place."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import signature, torch

import minitorch_jax as mt
from minitorch_jax import nn

KEY = jax.random.key(0)
NAMES = sorted(name for name in torch.nn.init.__all__ if name.endswith("_"))
RANDOM = [name for name in NAMES if name not in ("constant_", "ones_", "zeros_", "eye_", "dirac_")]
NEEDED = {"constant_": {"val": 0.5}, "sparse_": {"sparsity": 0.25}}  # arguments without a default


def shape_of(name):
    return (6, 4, 3) if name == "dirac_" else (6, 4)


class Holder(mt.Module):
    def __init__(self, shape, dtype=jnp.float32):
        self.weight = mt.Parameter(jnp.full(shape, 9, dtype))


# -- new ones ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2)])
def test_eye_is_torchs(shape):
    np.testing.assert_array_equal(nn.init.eye(shape), torch.nn.init.eye_(torch.empty(shape)).numpy())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape, groups", [((4, 2, 3), 1), ((4, 2, 3), 2), ((2, 4, 3, 2), 1), ((6, 2, 1, 3, 4), 3)])
def test_dirac_is_torchs(shape, groups):
    expected = torch.nn.init.dirac_(torch.empty(shape), groups).numpy()
    np.testing.assert_array_equal(nn.init.dirac(shape, groups), expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (3, 2, 5), (1, 1)])
def test_orthogonal_matrices_are(shape):
    q = np.asarray(nn.init.orthogonal(KEY, shape, gain=2.0)).reshape(shape[0], -1)
    assert q.shape == torch.nn.init.orthogonal_(torch.empty(shape)).reshape(shape[0], -1).shape
    product = q @ q.T if q.shape[0] < q.shape[1] else q.T @ q
    np.testing.assert_allclose(product, 4 * np.eye(len(product)), atol=1e-5)


def test_orthogonal_matrices_of_64_bits_are_as_exact():
    with jax.enable_x64(True):
        q = np.asarray(nn.init.orthogonal(KEY, (3, 3), dtype=jnp.float64))
    np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-13)


def test_orthogonal_matrices_are_uniformly_distributed():
    many = jax.vmap(lambda key: nn.init.orthogonal(key, (3, 3)))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(many.mean(0), 0, atol=0.05)
    np.testing.assert_allclose((many**2).mean(0), 1 / 3, atol=0.03)
    assert abs(float(jnp.sign(jnp.linalg.det(many)).mean())) < 0.1


@pytest.mark.parametrize("mean, std, a, b", [(0.0, 1.0, -2.0, 2.0), (0.5, 0.02, 0.46, 0.54), (0.0, 1.0, 0.5, 0.75)])
def test_truncated_normals_are_torchs(mean, std, a, b):
    torch.manual_seed(0)
    expected = torch.nn.init.trunc_normal_(torch.empty(20_000), mean, std, a, b).numpy()
    sample = np.asarray(nn.init.trunc_normal(KEY, (20_000,), mean, std, a, b))
    assert a <= sample.min() and sample.max() <= b
    np.testing.assert_allclose(
        np.quantile(sample, np.linspace(0, 1, 9)), np.quantile(expected, np.linspace(0, 1, 9)), atol=0.05 * (b - a)
    )
    assert sample.std() == pytest.approx(expected.std(), rel=0.03)


def test_a_truncated_normal_far_from_its_mean_warns():
    with pytest.warns(UserWarning, match="more than 2 std from"):
        nn.init.trunc_normal(KEY, (3,), mean=10.0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("sparsity, zeros", [(0.0, 0), (0.25, 2), (0.26, 3), (1.0, 8)])
def test_sparse_columns_have_as_many_zeros_as_torchs(sparsity, zeros):
    expected = (torch.nn.init.sparse_(torch.empty(8, 50), sparsity) == 0).sum(0).tolist()
    sample = nn.init.sparse(KEY, (8, 50), sparsity, std=0.5)
    assert (sample == 0).sum(0).tolist() == expected == [zeros] * 50
    if zeros < 8:
        assert float(sample[sample != 0].std()) == pytest.approx(0.5, rel=0.15)
        assert zeros == 0 or len({tuple(np.flatnonzero(column)) for column in np.asarray(sample).T}) > 5


@pytest.mark.parametrize("name", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_weights_without_numbers(name, shape):
    assert getattr(nn.init, name)(KEY, shape).shape == shape


def test_modes_may_be_written_in_capitals_as_in_torch():
    one, two = (nn.init.kaiming_normal(KEY, (3, 4), mode=mode) for mode in ("fan_out", "FAN_OUT"))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "call, shown",
    [
        (lambda: nn.init.eye((3,)), r"2 dimensions; got shape \(3,\)"),
        (lambda: nn.init.dirac((3, 3)), r"3, 4 or 5 dimensions; got shape \(3, 3\)"),
        (lambda: nn.init.dirac((3, 3, 1), groups=2), "divisible by groups; got 3 and 2"),
        (lambda: nn.init.orthogonal(KEY, (3,)), r"at least 2 dimensions; got shape \(3,\)"),
        (lambda: nn.init.sparse(KEY, (3, 3, 3), 0.5), r"2 dimensions; got shape \(3, 3, 3\)"),
    ],
)
def test_shapes_that_torch_refuses(call, shown):
    with pytest.raises(ValueError, match=shown):
        call()


# -- in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_form_in_place_with_torchs_arguments(name):
    ours = inspect.signature(getattr(nn.init, name)).parameters
    theirs = signature(getattr(torch.nn.init, name)).parameters
    assert list(ours)[:2] == ["module", "path"]
    shared = {n: p.default for n, p in ours.items() if n not in ("module", "path", "key")}
    assert shared == {n: p.default for n, p in theirs.items() if n not in ("tensor", "generator")}
    assert ("key" in ours) == (name in RANDOM)
    document = getattr(nn.init, name).__doc__
    assert "parameter or buffer" in document and f"`{name[:-1]}`" in document


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_place_is_the_same_as_the_pure_form(name, dtype):
    model = nn.Sequential(Holder(shape_of(name), dtype))
    kwargs = NEEDED.get(name, {}) | ({"key": KEY} if name in RANDOM else {})
    given = getattr(nn.init, name)(model, "0.weight", **kwargs)
    expected = getattr(nn.init, name[:-1])(shape=shape_of(name), dtype=dtype, **kwargs)
    np.testing.assert_array_equal(model[0].weight, expected)
    np.testing.assert_array_equal(given, expected)
    assert given.dtype == dtype


def test_without_a_key_the_stream_is_drawn_from():
    layer = nn.Linear(3, 2)
    mt.seed(1)
    one = nn.init.xavier_uniform_(layer, "weight")
    two = nn.init.xavier_uniform_(layer, "weight")
    mt.seed(1)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(nn.init.xavier_uniform_(layer, "weight", 1.0), one)
    np.testing.assert_array_equal(nn.init.xavier_uniform_(layer, "weight", 3.0, key=KEY), layer.weight)
    before = mt.next_key()
    mt.seed(1)
    nn.init.normal_(layer, "bias", key=KEY), nn.init.zeros_(layer, "bias"), mt.next_key()
    assert mt.next_key() == before


def test_torchs_way_to_initialise_a_network():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for name, _ in model.named_parameters():
        (nn.init.ones_ if name.endswith("weight") else nn.init.zeros_)(model, name)
    assert model(jnp.ones((1, 3))).tolist() == [[12.0, 12.0]]

    def fill(module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module, "weight", 0.5)

    model.apply(fill)
    assert float(model[2].weight.sum()) == 4.0

    @mt.jit
    def reset():
        nn.init.zeros_(model, "0.weight")

    reset()
    assert float(abs(model[0].weight).sum()) == 0.0


def test_wrong_calls_say_how_to_write_them():
    layer = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"write `nn.init.zeros_\(layer, 'weight', ...\)` for torch's"):
        nn.init.zeros_(layer.weight)
    with pytest.raises(TypeError, match=r"write `nn.init.uniform_\(layer, 'weight', ...\)`"):
        nn.init.uniform_(layer.weight, 0.0, 1.0)
    with pytest.raises(AttributeError, match="did you mean `weight`"):
        nn.init.zeros_(layer, "wieght")
    with pytest.raises(TypeError, match="unexpected keyword argument 'std'"):
        nn.init.uniform_(layer, "weight", std=1.0)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        nn.init.kaiming_uniform_(layer, "bias")
