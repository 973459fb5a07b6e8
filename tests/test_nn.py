"""Layers, losses and initial values against torch's: names, arguments, defaults, outputs, gradients, distributions."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import arguments, compare_arguments, numbers
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn

F, TF = nn.functional, torch.nn.functional

LAYERS = sorted(
    name
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and issubclass(kind, mt.Module) and kind is not mt.Module
)
FUNCTIONS = sorted(
    name for name, function in vars(F).items() if inspect.isfunction(function) and not name.startswith("_")
)
DISTRIBUTIONS = [
    name
    for name, function in vars(nn.init).items()
    if inspect.isfunction(function) and hasattr(torch.nn.init, f"{name}_")
]


def compare(ours, theirs, *inputs, rtol=1e-5, atol=1e-6, compiled=True):
    """Outputs, and gradients of a weighted sum of them with respect to the inputs, of two functions of arrays."""
    tensors = [torch.from_numpy(array.copy()).requires_grad_() for array in inputs]
    expected = theirs(*tensors)
    cotangent = numbers(*expected.shape, seed=99)
    expected.backward(torch.from_numpy(cotangent))

    def run(cotangent, *inputs):
        out, pull = jax.vjp(ours, *inputs)
        return out, pull(cotangent)

    out, gradients = (jax.jit(run) if compiled else run)(jnp.asarray(cotangent), *map(jnp.asarray, inputs))
    assert out.shape == tuple(expected.shape) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=rtol, atol=atol)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=10 * rtol, atol=atol)


# -- arguments and defaults --------------------------------------------------------------------------------------------


def test_every_layer_is_one_of_torchs():
    assert {"Linear", "ReLU", "Tanh", "Sigmoid", "GELU", "Softmax", "Flatten", "Identity", "Sequential"} <= set(LAYERS)
    assert [name for name in LAYERS if not hasattr(torch.nn, name)] == []


@pytest.mark.parametrize("name", [name for name in LAYERS if hasattr(torch.nn, name) and name != "Sequential"])
def test_constructors_take_torchs_arguments_with_torchs_defaults(name):
    compare_arguments(getattr(nn, name).__init__, getattr(torch.nn, name))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if hasattr(TF, name)])
def test_functions_take_torchs_arguments_with_torchs_defaults(name):
    try:
        theirs = arguments(getattr(TF, name))
    except ValueError:  # written in C, without a signature
        return
    if theirs:  # else it is (*args, **kwargs)
        compare_arguments(getattr(F, name), getattr(TF, name))


def test_every_function_is_one_of_torchs():
    assert {"relu", "tanh", "sigmoid", "gelu", "softmax", "log_softmax", "cross_entropy", "mse_loss"} <= set(FUNCTIONS)
    assert [name for name in FUNCTIONS if not hasattr(TF, name) and not hasattr(torch, name)] == []


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_take_torchs_arguments_with_torchs_defaults(name):
    ours, theirs = arguments(getattr(nn.init, name)), arguments(getattr(torch.nn.init, f"{name}_"))
    shared = [argument for argument in ours if argument not in ("key", "shape", "dtype")]
    assert shared == [argument for argument in theirs if argument not in ("tensor", "generator")]
    assert {argument: ours[argument] for argument in shared} == {argument: theirs[argument] for argument in shared}


# -- Linear ------------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 3), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_computes_what_torchs_does(shape, bias):
    theirs = torch.nn.Linear(3, 2, bias=bias)
    ours = nn.Linear(3, 2, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x = numbers(*shape)
    compare(ours, theirs, x)
    cotangent = numbers(*shape[:-1], 2, seed=5)
    theirs.zero_grad()
    theirs(torch.from_numpy(x)).backward(torch.from_numpy(cotangent))
    mt.backward(lambda model, x, c: (model(x) * c).sum(), ours, x, cotangent)
    for (name, wanted), grad in zip(theirs.named_parameters(), ours.grads(), strict=True):
        np.testing.assert_allclose(grad, wanted.grad.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_network_of_layers_computes_what_torchs_does():
    def make(library):
        first = [library.Flatten(), library.Linear(6, 5), library.GELU(), library.Linear(5, 4), library.Tanh()]
        return library.Sequential(*first, library.Identity(), library.Linear(4, 3), library.Softmax(dim=-1))

    ours, theirs = make(nn), make(torch.nn)
    ours.load_state_dict(theirs.state_dict())
    x = numbers(4, 2, 3)
    compare(ours, theirs, x)
    theirs.zero_grad()
    theirs(torch.from_numpy(x))[:, 0].sum().backward()
    mt.backward(lambda model, x: model(x)[:, 0].sum(), ours, x)
    for (name, wanted), grad in zip(theirs.named_parameters(), ours.grads(), strict=True):
        np.testing.assert_allclose(grad, wanted.grad.numpy(), rtol=1e-4, atol=1e-7, err_msg=name)


def test_linear_without_bias_and_of_another_dtype():
    layer = nn.Linear(3, 2, bias=False, dtype=jnp.bfloat16)
    assert layer.bias is None and list(layer.state_dict()) == ["weight"]
    assert layer.weight.dtype == jnp.bfloat16 and layer.weight.shape == (2, 3)
    assert layer(jnp.ones((1, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert nn.Linear(3, 2, dtype=jnp.float16).bias.dtype == jnp.float16


def test_linear_of_size_zero():
    assert nn.Linear(3, 0)(jnp.ones((2, 3))).shape == (2, 0)
    empty = nn.Linear(0, 3)
    assert empty.weight.shape == (3, 0) and empty(jnp.ones((2, 0))).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("sizes", [(-1, 2), (3, -2)])
def test_linear_refuses_negative_sizes(sizes):
    with pytest.raises(ValueError, match=rf"Linear needs sizes >= 0.*in_features={sizes[0]}, out_features={sizes[1]}"):
        nn.Linear(*sizes)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 1), ()])
def test_linear_refuses_inputs_of_another_size(shape):
    with pytest.raises(ValueError, match=r"Linear\(3, 2\) takes inputs of shape \(\.\.\., 3\); got \("):
        nn.Linear(3, 2)(jnp.ones(shape))


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_linear_refuses_parameters_that_are_not_floating(dtype):
    with pytest.raises((TypeError, ValueError), match="float"):
        nn.Linear(3, 2, dtype=dtype)


# -- activations, Softmax, Flatten, Identity ---------------------------------------------------------------------------

EVERYWHERE = np.concatenate([np.linspace(-6, 6, 41), [-100, -20, 20, 100, 0.0, -0.0]]).astype(np.float32)

ACTIVATIONS = {
    "relu": (F.relu, TF.relu),
    "tanh": (F.tanh, torch.tanh),
    "sigmoid": (F.sigmoid, torch.sigmoid),
    "gelu": (F.gelu, TF.gelu),
    "gelu tanh": (lambda x: F.gelu(x, "tanh"), lambda x: TF.gelu(x, approximate="tanh")),
    "ReLU": (nn.ReLU(), torch.nn.ReLU()),
    "ReLU inplace": (nn.ReLU(True), torch.nn.ReLU()),
    "Tanh": (nn.Tanh(), torch.nn.Tanh()),
    "Sigmoid": (nn.Sigmoid(), torch.nn.Sigmoid()),
    "GELU": (nn.GELU(), torch.nn.GELU()),
    "GELU tanh": (nn.GELU(approximate="tanh"), torch.nn.GELU(approximate="tanh")),
    "Identity": (nn.Identity(5, unused=True), torch.nn.Identity(5, unused=True)),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("ours, theirs", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_compute_what_torchs_do(ours, theirs):
    compare(ours, theirs, EVERYWHERE, atol=1e-5)  # 1 + tanh(x) loses digits for negative x, in torch too
    compare(ours, theirs, numbers(2, 3, 4))


def test_the_two_gelus_differ():
    x = jnp.linspace(-3.0, 3.0, 7)
    assert np.abs(F.gelu(x) - F.gelu(x, approximate="tanh")).max() > 1e-4


@pytest.mark.parametrize("make", [lambda: nn.GELU("erf"), lambda: F.gelu(jnp.ones(2), "erf")])
def test_gelu_refuses_unknown_approximations(make):
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh'; got 'erf'"):
        make()


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "shape, dim", [((4,), 0), ((3, 4), 0), ((3, 4), 1), ((3, 4), -1), ((2, 3, 4), 1), ((2, 3, 4), -3)]
)
def test_softmax_computes_what_torchs_does(shape, dim):
    x = numbers(*shape, scale=3)
    x.flat[0] = 90.0
    compare(lambda x: F.softmax(x, dim), lambda x: TF.softmax(x, dim), x)
    compare(lambda x: F.log_softmax(x, dim), lambda x: TF.log_softmax(x, dim), x, atol=1e-5)
    compare(nn.Softmax(dim), torch.nn.Softmax(dim), x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("ours, theirs", [(F.softmax, TF.softmax), (F.log_softmax, TF.log_softmax)])
def test_softmax_without_dim_follows_torchs_old_rule_with_a_warning(ours, theirs, shape):
    x = numbers(*shape)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        expected = theirs(torch.from_numpy(x))
    with pytest.warns(UserWarning, match="got no dim and uses dim=[01], as torch does.*pass dim="):
        out = ours(jnp.asarray(x))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_the_softmax_layer_without_dim_warns_too():
    with pytest.warns(UserWarning, match="pass dim=1"):
        out = nn.Softmax()(jnp.ones((2, 4)))
    assert out.tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize("arguments", [(), (0,), (2,), (1, 2), (-2, -1), (0, 1), (-3,), (1, 1), (3, 3)])
def test_flatten_reshapes_as_torchs_does(arguments):
    compare(nn.Flatten(*arguments), torch.nn.Flatten(*arguments), numbers(2, 3, 4, 5))


def test_flatten_of_few_dimensions():
    compare(nn.Flatten(0), torch.nn.Flatten(0), np.asarray(3, np.float32))
    compare(nn.Flatten(0), torch.nn.Flatten(0), numbers(3))


@pytest.mark.parametrize("arguments, shape", [((), (3,)), ((1, 3), (2, 3, 4)), ((2, 1), (2, 3, 4)), ((-4,), (2, 3, 4))])
def test_flatten_refuses_axes_that_do_not_fit(arguments, shape):
    with pytest.raises(ValueError, match=r"flatten\(start_dim=.*cannot flatten an input of shape \("):
        nn.Flatten(*arguments)(jnp.ones(shape))


# -- losses ------------------------------------------------------------------------------------------------------------

REDUCTIONS = ["mean", "sum", "none"]
SCORES = {"unbatched": (4,), "batch": (5, 4), "image": (3, 4, 2)}
scores = pytest.mark.parametrize("shape", SCORES.values(), ids=SCORES)


def class_numbers(shape, classes=4):
    outside = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    return np.asarray(np.random.default_rng(1).integers(0, classes, outside))


def compare_losses(x, target, weight=None, **kwargs):
    ours_target = jnp.asarray(target)
    theirs_target = torch.from_numpy(np.asarray(target))
    ours_weight = None if weight is None else jnp.asarray(weight)
    theirs_weight = None if weight is None else torch.from_numpy(weight)
    compare(
        lambda x: F.cross_entropy(x, ours_target, ours_weight, **kwargs),
        lambda x: TF.cross_entropy(x, theirs_target, theirs_weight, **kwargs),
        x,
        compiled=False,
    )


weights = pytest.mark.parametrize("weight", [None, np.float32([0.5, 2.0, 0.0, 1.5])], ids=["plain", "weighted"])


@pytest.mark.one_in(9)
@scores
@weights
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_of_class_numbers_is_torchs(shape, smoothing, weight):
    x, target = numbers(*shape, scale=3), class_numbers(shape)
    if target.ndim:
        target.flat[:2] = 1, 3
    for reduction in REDUCTIONS:
        compare_losses(x, target, weight, ignore_index=1, reduction=reduction, label_smoothing=smoothing)
    compare_losses(x, np.where(target == 0, -100, target), weight, label_smoothing=smoothing)


@pytest.mark.one_in(4)
@scores
@weights
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_of_probabilities_is_torchs(shape, smoothing, weight):
    axis = 0 if len(shape) == 1 else 1
    raw = np.exp(numbers(*shape, seed=2))
    x, target = numbers(*shape, scale=3), raw / raw.sum(axis, keepdims=True)
    for reduction in REDUCTIONS:
        compare_losses(x, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.slow
def test_cross_entropy_is_differentiable_in_probabilities_and_weights():
    x, raw, weight = numbers(5, 4), np.exp(numbers(5, 4, seed=2)), np.float32([0.5, 2.0, 1.0, 1.5])
    target = raw / raw.sum(1, keepdims=True)
    compare(F.cross_entropy, TF.cross_entropy, x, target)
    numbered = class_numbers((5, 4))
    with_weight = jax.grad(lambda w: F.cross_entropy(jnp.asarray(x), jnp.asarray(numbered), w))(jnp.asarray(weight))
    assert np.isfinite(with_weight).all() and np.abs(with_weight).max() > 1e-3


@pytest.mark.slow
def test_cross_entropy_of_images():
    shape = (2, 4, 3, 2)
    compare_losses(numbers(*shape), class_numbers(shape), np.float32([0.5, 2.0, 1.0, 1.5]), label_smoothing=0.1)


@pytest.mark.slow
def test_cross_entropy_of_extreme_scores():
    x = np.float32([[1e4, -1e4, 0, 3e38], [-1e4, 1e4, 5, 5], [0, 0, 0, 0]])
    for target in ([3, 1, 2], [0, 0, 0]):
        compare_losses(x, np.array(target))


def test_cross_entropy_of_masked_scores():
    x = numbers(3, 4)
    x[:, 2] = -np.inf
    compare_losses(x, np.array([0, 1, 3]))
    compare_losses(x, np.array([0, 1, 3]), reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_where_everything_is_ignored(reduction):
    x, target = numbers(3, 4), np.full(3, -100)
    expected = TF.cross_entropy(torch.from_numpy(x), torch.from_numpy(target), reduction=reduction)
    out = F.cross_entropy(jnp.asarray(x), jnp.asarray(target), reduction=reduction)
    np.testing.assert_equal(np.asarray(out), expected.numpy())
    assert np.isnan(out) == (reduction == "mean")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_class_numbers_may_be_of_any_integer_type(dtype, array):
    x, target = jnp.asarray(numbers(3, 4)), np.array([3, 0, 2])
    expected = -(jax.nn.log_softmax(x)[np.arange(3), target]).mean()
    np.testing.assert_allclose(F.cross_entropy(x, array(target.astype(dtype))), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_keep_the_dtype_of_the_input(dtype):
    x = jnp.asarray(numbers(3, 4)).astype(dtype)
    wide = x.astype(jnp.float32)
    for target in (jnp.array([3, 0, 2]), jnp.full((3, 4), 0.25, dtype)):  # a target of other floats is promoted
        loss = F.cross_entropy(x, target)
        assert loss.dtype == dtype
        np.testing.assert_allclose(loss.astype(jnp.float32), F.cross_entropy(wide, target), rtol=0.03)
    loss = F.mse_loss(x, jnp.zeros((3, 4), dtype))
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss.astype(jnp.float32), (wide**2).mean(), rtol=0.03)


def test_a_class_number_out_of_range_makes_the_loss_nan():
    for bad in (4, -1, 200):
        losses = F.cross_entropy(jnp.zeros((3, 4)), jnp.array([0, bad, 1]), reduction="none")
        assert np.isnan(losses).tolist() == [False, True, False]
        assert np.isnan(F.cross_entropy(jnp.zeros((3, 4)), jnp.array([0, bad, 1])))


@pytest.mark.parametrize(
    "arguments, kwargs, shown",
    [
        (((3, 4), (2,)), {}, r"for scores \(3, 4\), class numbers must have shape \(3,\); got \(2,\)"),
        (((3, 4, 2), (3,)), {}, r"for scores \(3, 4, 2\), class numbers must have shape \(3, 2\); got \(3,\)"),
        (((3, 4), (3, 4)), {}, r"class numbers must have shape \(3,\); got \(3, 4\)"),
        (((), ()), {}, "got a scalar"),
        (((3, 4), (3,)), {"weight": (3,)}, r"weight must have shape \(4,\), one per class; got \(3,\)"),
        (((3, 4), (3,)), {"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        (((3, 4), (3,)), {"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\]; got -0.1"),
        (((3, 4), (3,)), {"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none'; got 'avg'"),
    ],
)
def test_cross_entropy_refuses_what_does_not_fit(arguments, kwargs, shown):
    if "weight" in kwargs:
        kwargs = {"weight": jnp.ones(kwargs["weight"])}
    with pytest.raises(ValueError, match=shown):
        F.cross_entropy(jnp.ones(arguments[0]), jnp.zeros(arguments[1], jnp.int32), **kwargs)


def test_cross_entropy_refuses_probabilities_that_do_not_fit():
    with pytest.raises(ValueError, match=r"probabilities must have the input's shape \(3, 4\); got \(3,\)"):
        F.cross_entropy(jnp.ones((3, 4)), jnp.ones(3))
    with pytest.raises(ValueError, match="ignore_index"):  # torch: not supported for floating point targets
        F.cross_entropy(jnp.ones((3, 4)), jnp.full((3, 4), 0.25), ignore_index=1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (4,), (3, 4)])
def test_mse_loss_is_torchs(shape, reduction):
    compare(
        lambda x, y: F.mse_loss(x, y, reduction=reduction),
        lambda x, y: TF.mse_loss(x, y, reduction=reduction),
        numbers(*shape),
        numbers(*shape, seed=1),
    )


def test_mse_loss_of_other_shapes_is_broadcast_with_a_warning():
    x, y = numbers(3, 1), numbers(3, seed=1)
    with pytest.warns(UserWarning, match="target size"):
        expected = TF.mse_loss(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.warns(UserWarning, match=r"the target's shape \(3,\) differs from the input's shape \(3, 1\)"):
        out = F.mse_loss(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_mse_loss_takes_numpy_and_integer_targets():
    x = jnp.array([1.0, 2.0])
    assert float(F.mse_loss(x, np.array([1, 4]))) == 2.0
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none'; got 'max'"):
        F.mse_loss(x, x, reduction="max")


# -- initial values ----------------------------------------------------------------------------------------------------


def check_uniform(sample, bound):
    """That many numbers look drawn from U(-bound, bound)."""
    sample = np.asarray(sample, np.float64).ravel()
    std = bound / math.sqrt(3)
    assert np.abs(sample).max() <= bound
    assert sample.max() > 0.99 * bound and sample.min() < -0.99 * bound
    assert abs(sample.mean()) < 5 * std / math.sqrt(sample.size)
    assert abs(sample.std() / std - 1) < 0.03
    inner = np.histogram(sample, 4, (-bound, bound))[0] / sample.size
    assert np.abs(inner - 0.25).max() < 0.02


def check_normal(sample, mean, std):
    """That many numbers look drawn from N(mean, std²)."""
    sample = np.asarray(sample, np.float64).ravel()
    assert abs(sample.mean() - mean) < 5 * std / math.sqrt(sample.size)
    assert abs(sample.std() / std - 1) < 0.03
    assert abs((np.abs(sample - mean) < std).mean() - 0.6827) < 0.02
    assert np.abs(sample - mean).max() > 3 * std


@pytest.mark.slow
@pytest.mark.parametrize("in_features, out_features", [(25, 400), (400, 25)])
def test_linear_starts_from_torchs_distributions(in_features, out_features):
    bound = 1 / math.sqrt(in_features)
    layer = nn.Linear(in_features, out_features, key=jax.random.key(0))
    check_uniform(layer.weight, bound)
    check_uniform(torch.nn.Linear(in_features, out_features).weight.detach(), bound)
    biases = [nn.Linear(25, 1000, key=jax.random.key(i)).bias for i in range(4)]
    check_uniform(jnp.concatenate(biases), 1 / math.sqrt(25))
    assert layer.weight.dtype == layer.bias.dtype == jnp.float32


def test_weight_and_bias_are_drawn_independently():
    layer = nn.Linear(1, 1000, key=jax.random.key(0))
    correlation = np.corrcoef(np.asarray(layer.weight).ravel(), layer.bias)[0, 1]
    assert abs(correlation) < 0.15


def test_a_key_gives_the_same_layer_each_time():
    one, two, other = (nn.Linear(3, 2, key=jax.random.key(k)) for k in (5, 5, 6))
    for name, array in one.state_dict().items():
        np.testing.assert_array_equal(array, two.state_dict()[name])
        assert not np.array_equal(array, other.state_dict()[name])
    old_style = nn.Linear(3, 2, key=jax.random.PRNGKey(5))
    np.testing.assert_array_equal(old_style.weight, one.weight)


def test_seed_restarts_the_global_stream():
    def layers():
        return [np.asarray(nn.Linear(3, 2).weight) for _ in range(3)]

    mt.seed(7)
    first = layers()
    again = layers()
    mt.seed(7)
    second = layers()
    mt.seed(8)
    third = layers()
    np.testing.assert_array_equal(first, second)
    distinct = {array.tobytes() for array in [*first, *again, *third]}
    assert len(distinct) == 9


def test_a_layer_with_a_key_does_not_move_the_global_stream():
    mt.seed(7)
    first = nn.Linear(3, 2).weight
    mt.seed(7)
    nn.Linear(3, 2, key=jax.random.key(0))
    nn.ReLU()
    np.testing.assert_array_equal(nn.Linear(3, 2).weight, first)


@pytest.mark.parametrize("bad", [1.5, "7", None, True])
def test_seed_takes_integers(bad):
    with pytest.raises(TypeError, match=r"seed\(\) takes an integer"):
        mt.seed(bad)


@pytest.mark.parametrize("number", [0, -1, np.int64(3), 2**32 - 1])
def test_seeds_of_any_integer_type(number):
    mt.seed(number)
    first = nn.Linear(3, 2).weight
    mt.seed(int(number))
    np.testing.assert_array_equal(nn.Linear(3, 2).weight, first)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jit(f)(1.0),
        lambda f: jax.grad(f)(1.0),
        lambda f: jax.vmap(f)(jnp.ones(2)),
        lambda f: jax.lax.scan(lambda carry, a: (carry, f(a)), 0.0, jnp.ones(2)),
        lambda f: jax.eval_shape(f, 1.0),
    ],
    ids=["jit", "grad", "vmap", "scan", "eval_shape"],
)
def test_constructing_without_a_key_inside_a_transform_is_an_error(transform):
    mt.seed(7)
    expected = nn.Linear(3, 2).weight
    mt.seed(7)
    with pytest.raises(mt.TraceError, match=r"without `key=`.*Pass a key"):
        transform(lambda a: nn.Linear(1, 1)(jnp.ones(1)).sum() * a)
    np.testing.assert_array_equal(nn.Linear(3, 2).weight, expected)


# -- nn.init -----------------------------------------------------------------------------------------------------------

KEY = jax.random.key(0)
WEIGHTS = [(50, 200), (40, 10, 5, 5)]


def torchs(name, shape, **kwargs):
    torch.manual_seed(0)
    return getattr(torch.nn.init, f"{name}_")(torch.empty(shape), **kwargs).numpy()


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (6, 2, 3, 3)])
def test_fans_are_torchs(shape):
    assert nn.init.fans(shape) == torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


def test_fans_need_two_dimensions():
    for shape in ((), (3,)):
        with pytest.raises(ValueError, match=r"at least 2 dimensions; got shape \("):
            nn.init.fans(shape)
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            nn.init.xavier_uniform(KEY, shape)


GAINS = ["linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "sigmoid", "tanh", "relu", "leaky_relu", "selu"]


@pytest.mark.parametrize("nonlinearity", GAINS)
def test_gains_are_torchs(nonlinearity):
    assert nn.init.calculate_gain(nonlinearity) == pytest.approx(torch.nn.init.calculate_gain(nonlinearity), rel=1e-12)


@pytest.mark.parametrize("slope", [0, 0.2, -0.5])
def test_the_gain_of_a_leaky_relu_depends_on_its_slope(slope):
    expected = torch.nn.init.calculate_gain("leaky_relu", slope)
    assert nn.init.calculate_gain("leaky_relu", slope) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unknown", ["gelu", "convolution", "conv4d", ""])
def test_an_unknown_nonlinearity_is_refused(unknown):
    with pytest.raises(ValueError):
        torch.nn.init.calculate_gain(unknown)
    with pytest.raises(ValueError, match=f"unknown nonlinearity '{unknown}'; pass one of .*relu"):
        nn.init.calculate_gain(unknown)


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("xavier_uniform", {}),
        ("xavier_uniform", {"gain": 2.0}),
        ("kaiming_uniform", {}),
        ("kaiming_uniform", {"a": math.sqrt(5)}),
        ("kaiming_uniform", {"mode": "fan_out", "nonlinearity": "relu"}),
        ("kaiming_uniform", {"nonlinearity": "tanh"}),
    ],
)
def test_uniform_distributions_are_torchs(name, kwargs, shape):
    bound = np.abs(torchs(name, shape, **kwargs)).max()  # 10,000 numbers: within 0.1 % of the bound
    sample = getattr(nn.init, name)(KEY, shape, **kwargs)
    assert sample.shape == shape and sample.dtype == jnp.float32
    assert np.abs(sample).max() == pytest.approx(bound, rel=2e-3)
    check_uniform(sample, bound * 1.002)


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("xavier_normal", {}),
        ("xavier_normal", {"gain": 2.0}),
        ("kaiming_normal", {}),
        ("kaiming_normal", {"a": 1.0, "mode": "fan_out"}),
        ("kaiming_normal", {"nonlinearity": "relu"}),
    ],
)
def test_normal_distributions_are_torchs(name, kwargs, shape):
    std = torchs(name, shape, **kwargs).std()
    sample = getattr(nn.init, name)(KEY, shape, **kwargs)
    assert sample.shape == shape and sample.dtype == jnp.float32
    assert np.asarray(sample).std() == pytest.approx(std, rel=0.04)
    check_normal(sample, 0.0, np.asarray(sample).std())


@pytest.mark.slow
def test_the_exact_bounds():
    fan_in, fan_out = 50, 200
    cases = {
        math.sqrt(6 / (fan_in + fan_out)): nn.init.xavier_uniform(KEY, (200, 50)),
        math.sqrt(6 / fan_in): nn.init.kaiming_uniform(KEY, (200, 50)),
        1 / math.sqrt(fan_in): nn.init.kaiming_uniform(KEY, (200, 50), a=math.sqrt(5)),
        math.sqrt(2) * math.sqrt(3 / fan_out): nn.init.kaiming_uniform(
            KEY, (200, 50), mode="fan_out", nonlinearity="relu"
        ),
    }
    for bound, sample in cases.items():
        check_uniform(sample, bound)
    for std, sample in {
        math.sqrt(2 / (fan_in + fan_out)): nn.init.xavier_normal(KEY, (200, 50)),
        math.sqrt(2 / fan_in): nn.init.kaiming_normal(KEY, (200, 50)),
    }.items():
        check_normal(sample, 0.0, std)


@pytest.mark.slow
def test_plain_distributions():
    check_uniform(nn.init.uniform(KEY, (100, 100), -0.3, 0.3), 0.3)
    check_uniform(nn.init.uniform(KEY, (100, 100)) - 0.5, 0.5)
    check_normal(nn.init.normal(KEY, (100, 100)), 0.0, 1.0)
    check_normal(nn.init.normal(KEY, (100, 100), mean=5.0, std=0.2), 5.0, 0.2)
    assert nn.init.constant((2, 3), 0.7).tolist() == [[np.float32(0.7)] * 3] * 2
    assert nn.init.zeros((2,)).tolist() == [0.0, 0.0] and nn.init.ones((2,)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "name", ["uniform", "normal", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]
)
def test_initial_values_come_in_the_dtype_asked_for(name):
    make = getattr(nn.init, name)
    assert make(KEY, (4, 4), dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert make(KEY, (4, 4)).dtype == jnp.float32
    assert not np.array_equal(make(KEY, (4, 4)), make(jax.random.key(1), (4, 4)))


@pytest.mark.parametrize("make", [nn.init.kaiming_uniform, nn.init.kaiming_normal])
def test_kaiming_refuses_unknown_modes(make):
    with pytest.raises(ValueError, match="mode must be 'fan_in' or 'fan_out'; got 'fan_avg'"):
        make(KEY, (3, 4), mode="fan_avg")
    with pytest.raises(ValueError, match="unknown nonlinearity 'gelu'"):
        make(KEY, (3, 4), nonlinearity="gelu")
