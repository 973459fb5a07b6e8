"""The NumPy mini-torch and its bridge: gradients against JAX and finite differences, weights both ways, optimizers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import numpy as mini

wide_only = pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="longdouble is float64 here")


def small_net(dtype: Any = np.float32, rng: int = 0) -> mini.Sequential:
    """A network with every layer, one container inside another, one Linear without a bias."""
    generator = np.random.default_rng(rng)
    return mini.Sequential(
        mini.Flatten(),
        mini.Linear(6, 5, rng=generator, dtype=dtype),
        mini.Sequential(mini.Tanh(), mini.Linear(5, 5, bias=False, rng=generator, dtype=dtype), mini.Sigmoid()),
        mini.ReLU(),
        mini.Linear(5, 3, rng=generator, dtype=dtype),
    )


# name: (makes the module, shape of its input)
MODULES: dict[str, tuple[Callable[[Any], mini.Module], tuple[int, ...]]] = {
    "linear": (lambda dtype: mini.Linear(4, 3, rng=0, dtype=dtype), (5, 4)),
    "linear without bias": (lambda dtype: mini.Linear(4, 3, bias=False, rng=0, dtype=dtype), (5, 4)),
    "linear on one vector": (lambda dtype: mini.Linear(4, 3, rng=0, dtype=dtype), (4,)),
    "linear on three axes": (lambda dtype: mini.Linear(4, 3, rng=0, dtype=dtype), (2, 5, 4)),
    "relu": (lambda dtype: mini.ReLU(), (5, 4)),
    "tanh": (lambda dtype: mini.Tanh(), (5, 4)),
    "sigmoid": (lambda dtype: mini.Sigmoid(), (5, 4)),
    "flatten": (lambda dtype: mini.Flatten(), (5, 2, 3)),
    "network": (small_net, (7, 2, 3)),
}


def input_of(shape: tuple[int, ...], dtype: Any, seed: int = 1) -> np.ndarray:
    """Random numbers away from 0, where ReLU has no derivative."""
    x = np.random.default_rng(seed).normal(size=shape)
    return (x + 0.1 * np.sign(x)).astype(dtype)


def finite_differences(value: Callable[[], float], array: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """The gradient of `value()` by `array`, changed in place and restored."""
    grad = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        old = array[index]
        array[index] = old + h
        above = value()
        array[index] = old - h
        below = value()
        array[index] = old
        grad[index] = (above - below) / (2 * h)
    return grad


def weights(module: Any) -> list[np.ndarray]:
    return [np.array(array) for array in module.parameters()]


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", MODULES)
def test_layer_gradients_equal_jax(name: str) -> None:
    make, shape = MODULES[name]
    module, x = make(np.float32), input_of(shape, np.float32)
    ours = mini.to_jax(module)
    y = module(x)
    dout = input_of(y.shape, np.float32, seed=2)
    dx = module.backward(dout)

    def loss(model: Any, x: jax.Array) -> jax.Array:
        return (model(x) * dout).sum()

    expected, expected_dx = jax.grad(loss, argnums=(0, 1))(ours, jnp.asarray(x))
    np.testing.assert_allclose(y, ours(jnp.asarray(x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-6)
    assert len(module.grads()) == len(expected.parameters())
    for grad, want in zip(module.grads(), expected.parameters(), strict=True):
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)
    assert {array.dtype for array in (y, dx, *module.grads())} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", MODULES)
def test_layer_gradients_equal_finite_differences(name: str) -> None:
    make, shape = MODULES[name]
    module, x = make(np.float64), input_of(shape, np.float64)
    dout = input_of(module(x).shape, np.float64, seed=2)
    dx = module.backward(dout)
    for array, grad in zip([x, *module.parameters()], [dx, *module.grads()], strict=True):
        want = finite_differences(lambda: float((module(x) * dout).sum()), array)
        np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-8)
        assert grad.dtype == np.float64


LOSSES: dict[str, tuple[Any, Any, np.ndarray]] = {
    "cross entropy": (mini.SoftmaxCrossEntropy, nn.functional.cross_entropy, np.array([0, 2, 1, 2, 2])),
    "mean squared error": (mini.MeanSquaredError, nn.functional.mse_loss, input_of((5, 3), np.float32, seed=3)),
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients(name: str) -> None:
    make, ours, target = LOSSES[name]
    loss_fn, output = make(), input_of((5, 3), np.float32)
    loss = loss_fn(output, target)
    want, grad = jax.value_and_grad(ours)(jnp.asarray(output), jnp.asarray(target))
    assert type(loss) is float
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(loss_fn.backward(), grad, rtol=1e-4, atol=1e-7)
    assert loss_fn.backward().dtype == np.float32

    wide = output.astype(np.float64)
    loss_fn(wide, target)
    want = finite_differences(lambda: make()(wide, target), wide)
    np.testing.assert_allclose(loss_fn.backward(), want, rtol=1e-6, atol=1e-8)


def test_cross_entropy_does_not_overflow() -> None:
    loss_fn = mini.SoftmaxCrossEntropy()
    assert loss_fn(np.array([[1e4, 0.0], [0.0, -1e4]], np.float32), np.array([0, 1])) == pytest.approx(5e3)
    np.testing.assert_array_equal(loss_fn.backward(), np.array([[0, 0], [0.5, -0.5]], np.float32))


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(mini.Sigmoid()(np.array([-1e4, 0, 1e4], np.float32)), np.float32([0, 0.5, 1]))


def test_gradients_accumulate_until_zero_grad() -> None:
    layer, x, dout = mini.Linear(4, 3, rng=0), input_of((5, 4), np.float32), input_of((5, 3), np.float32)
    grads = layer.grads()
    layer(x)
    layer.backward(dout)
    once = [grad.copy() for grad in grads]
    layer.backward(dout)
    for grad, single in zip(grads, once, strict=True):
        np.testing.assert_array_equal(grad, 2 * single)
    layer.zero_grad()
    assert all(now is before and not now.any() for now, before in zip(layer.grads(), grads, strict=True))


def test_parameters_and_grads_are_the_arrays_themselves() -> None:
    layer = mini.Linear(4, 3, rng=0)
    assert [id(array) for array in layer.parameters()] == [id(layer.W), id(layer.b)]
    assert [id(array) for array in layer.grads()] == [id(layer.dW), id(layer.db)]
    bare = mini.Linear(4, 3, bias=False, rng=0)
    assert bare.b is None and bare.db is None and len(bare.parameters()) == len(bare.grads()) == 1
    net = mini.Sequential(layer, mini.ReLU(), bare)
    assert [id(array) for array in net.parameters()] == [id(layer.W), id(layer.b), id(bare.W)]


def test_linear_starts_as_torch_does() -> None:
    layer = mini.Linear(25, 400, rng=0)
    assert layer.W.shape == (400, 25) and layer.W.dtype == layer.b.dtype == np.float32
    assert 0.19 < np.abs(layer.W).max() <= 0.2 and abs(layer.W.mean()) < 0.01
    assert 0.19 < np.abs(layer.b).max() <= 0.2
    np.testing.assert_array_equal(layer.W, mini.Linear(25, 400, rng=np.random.default_rng(0)).W)
    assert mini.Linear(0, 2)(np.zeros((3, 0))).shape == (3, 2)


def test_inputs_take_the_dtype_of_the_layer() -> None:
    layer = mini.Linear(2, 2, rng=0)
    assert layer(np.ones((1, 2), np.float64)).dtype == layer([[1, 2]]).dtype == np.float32
    assert layer.backward(np.ones((1, 2))).dtype == np.float32
    assert mini.ReLU()([1, -1]).dtype == np.float32


def test_networks_copy_and_pickle() -> None:
    net, x = small_net(), input_of((2, 6), np.float32)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        np.testing.assert_array_equal(other(x), net(x))
        assert other[1].W is not net[1].W
    assert len(net) == 5 and [type(module) for module in net][3] is mini.ReLU
    assert repr(net[2]).splitlines()[2] == "  (1): Linear(in_features=5, out_features=5, bias=False)"


# -- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: mini.Linear(2, 2), mini.ReLU, mini.Tanh, mini.Sigmoid, mini.Flatten])
def test_backward_before_forward(make: Callable[[], mini.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"backward\(\) was called before forward\(\)"):
        make().backward(np.ones((1, 2)))
    with pytest.raises(RuntimeError, match=r"backward\(\) was called before forward\(\)"):
        mini.Sequential(make()).backward(np.ones((1, 2)))


@pytest.mark.parametrize("make", [mini.SoftmaxCrossEntropy, mini.MeanSquaredError])
def test_loss_backward_before_forward(make: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"backward\(\) was called before forward\(\): compute the loss first"):
        make().backward()


@pytest.mark.parametrize("name", MODULES)
def test_backward_with_a_wrong_shape(name: str) -> None:
    make, shape = MODULES[name]
    module = make(np.float32)
    wrong = (1, *module(input_of(shape, np.float32)).shape)
    with pytest.raises(ValueError, match=r"takes the gradient of its output, of shape \(.*\) at the last forward"):
        module.backward(np.zeros(wrong))
    assert not any(grad.any() for grad in module.grads())


def test_wrong_arguments_of_layers() -> None:
    with pytest.raises(ValueError, match=r"takes inputs of shape \(\.\.\., 4\); got \(5, 3\)"):
        mini.Linear(4, 2)(np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"takes inputs of shape \(\.\.\., 4\); got \(\)"):
        mini.Linear(4, 2)(1.0)
    with pytest.raises(ValueError, match=r"Linear needs sizes >= 0; got in_features=-1"):
        mini.Linear(-1, 2)
    with pytest.raises(TypeError, match=r"floating dtypes, such as np\.float32; got int32"):
        mini.Linear(1, 2, dtype=np.int32)
    with pytest.raises(ValueError, match=r"at least 2 axes; got \(3,\)"):
        mini.Flatten()(np.zeros(3))
    with pytest.raises(TypeError, match=r"argument 1 is a function"):
        mini.Sequential(mini.ReLU(), lambda x: x)
    with pytest.raises(NotImplementedError, match=r"Module has no `forward`"):
        mini.Module()(1.0)
    with pytest.raises(NotImplementedError, match=r"Module has no `backward`"):
        mini.Module().backward(1.0)


def test_a_module_has_one_place() -> None:
    layer = mini.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Linear\(.*\) occurs twice in this Sequential"):
        mini.Sequential(layer, mini.Sequential(mini.ReLU(), layer))


def test_wrong_arguments_of_losses() -> None:
    entropy, squared = mini.SoftmaxCrossEntropy(), mini.MeanSquaredError()
    scores = np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"scores must have shape \(N, C\), with N >= 1 and C >= 1; got \(4,\)"):
        entropy(scores[:, 0], np.zeros(4, int))
    with pytest.raises(ValueError, match=r"N >= 1 and C >= 1; got \(0, 3\)"):
        entropy(scores[:0], np.zeros(0, int))
    with pytest.raises(ValueError, match=r"classes must have shape \(4,\).*got \(4, 1\)"):
        entropy(scores, np.zeros((4, 1), int))
    with pytest.raises(TypeError, match=r"classes must be integers; got float64"):
        entropy(scores, np.zeros(4))
    with pytest.raises(ValueError, match=r"classes must be from 0 to 2, for 3 scores; got classes from -1 to 3"):
        entropy(scores, np.array([0, 3, -1, 0]))
    with pytest.raises(ValueError, match=r"targets must have the predictions' shape \(4, 3\); got \(4,\)"):
        squared(scores, np.zeros(4))
    with pytest.raises(ValueError, match=r"at least one element; got shape \(0, 3\)"):
        squared(scores[:0], scores[:0])


# -- the bridge -------------------------------------------------------------------------------------------------------


def test_round_trip_from_numpy() -> None:
    net, x = small_net(), input_of((7, 2, 3), np.float32)
    ours = mini.to_jax(net)
    assert [type(layer) for layer in ours[2]] == [nn.Tanh, nn.Linear, nn.Sigmoid]
    assert list(ours.state_dict()) == ["1.weight", "1.bias", "2.1.weight", "4.weight", "4.bias"]
    np.testing.assert_allclose(ours(jnp.asarray(x)), net(x), rtol=1e-5, atol=1e-6)
    back = mini.from_jax(ours)
    assert repr(back) == repr(net)
    for mine, theirs, middle in zip(net.parameters(), back.parameters(), ours.parameters(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine, middle)
        assert not np.shares_memory(mine, theirs) and theirs.flags.writeable
    net[1].W += 1  # no memory is shared: nothing else changes
    np.testing.assert_array_equal(back[1].W, ours[1].weight)
    assert not np.array_equal(net[1].W, back[1].W)


def test_round_trip_from_ours() -> None:
    ours = nn.Sequential({"in": nn.Linear(3, 4), "act": nn.ReLU(inplace=True), "out": nn.Linear(4, 2, bias=False)})
    net, x = mini.from_jax(ours), input_of((5, 3), np.float32)
    np.testing.assert_allclose(net(x), ours(jnp.asarray(x)), rtol=1e-5, atol=1e-6)
    net[0].W *= 2
    mini.copy_weights(net, ours)
    for mine, theirs in zip(net.parameters(), ours.parameters(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_conversion_leaves_the_random_stream_alone() -> None:
    mt.seed(3)
    want = nn.Linear(2, 2).weight
    mt.seed(3)
    mini.from_jax(mini.to_jax(small_net()))
    np.testing.assert_array_equal(nn.Linear(2, 2).weight, want)


def test_float64_needs_x64() -> None:
    net = small_net(np.float64)
    with pytest.raises(ValueError, match=r"at 1 is float64, which JAX would convert to float32: .*jax_enable_x64"):
        mini.to_jax(net)
    with jax.enable_x64(True):
        ours = mini.to_jax(net)
        for mine, theirs in zip(net.parameters(), ours.parameters(), strict=True):
            assert theirs.dtype == np.float64
            np.testing.assert_array_equal(mine, theirs)


def test_copy_weights_in_place_and_nothing_but_weights() -> None:
    net, ours = small_net(rng=0), mini.to_jax(small_net(rng=1))
    arrays = net.parameters()
    net.grads()[0].fill(7)
    ours.accumulate([jnp.ones_like(p) for p in ours.parameters()])
    mini.copy_weights(ours, net)
    for before, after, want in zip(arrays, net.parameters(), ours.parameters(), strict=True):
        assert before is after
        np.testing.assert_array_equal(after, want)
    assert (net.grads()[0] == 7).all() and all((g == 1).all() for g in ours.grads())


def test_copy_weights_lists_every_difference_and_changes_nothing() -> None:
    net = mini.Sequential(
        mini.Linear(2, 3), mini.ReLU(), mini.Linear(3, 4), mini.Sequential(mini.Tanh()), mini.Linear(4, 4, bias=False)
    )
    ours = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 5), nn.Sequential(), nn.Linear(4, 4), nn.ReLU())
    before = weights(net), weights(ours)
    wrong = [
        "the networks differ, so nothing was copied:",
        "at the top: 5 modules in NumPy, 6 in minitorch_jax",
        "at 1: ReLU in NumPy, Tanh in minitorch_jax",
        r"2\.weight: float32\[4, 3\] in NumPy, float32\[5, 3\] in minitorch_jax",
        r"2\.bias: float32\[4\] in NumPy, float32\[5\] in minitorch_jax",
        "at 3: 1 modules in NumPy, 0 in minitorch_jax",
        r"4\.bias: none in NumPy, float32\[4\] in minitorch_jax",
    ]
    for source, target in ((net, ours), (ours, net)):
        with pytest.raises(ValueError, match=r"\n  ".join(wrong) + "$"):
            mini.copy_weights(source, target)
    for kept, now in zip(before, (weights(net), weights(ours)), strict=True):
        for one, other in zip(kept, now, strict=True):
            np.testing.assert_array_equal(one, other)


def test_copy_weights_into_what_cannot_take_them() -> None:
    net = mini.Linear(2, 3)
    ours = mini.to_jax(net)
    old = net.W.copy()
    ours.weight = ours.weight + 1
    net.b.flags.writeable = False
    with pytest.raises(ValueError, match=r"  bias: the NumPy array is read-only"):
        mini.copy_weights(ours, net)
    np.testing.assert_array_equal(net.W, old)
    with pytest.raises(ValueError, match=r"weight: float64\[3, 2\] in NumPy, float32\[3, 2\] in minitorch_jax"):
        mini.copy_weights(ours, mini.Linear(2, 3, dtype=np.float64))
    with pytest.raises(TypeError, match=r"between a NumPy network and one of minitorch_jax\.nn; got a .*Linear and a"):
        mini.copy_weights(net, net)


class Doubling(mini.Linear):
    """A subclass, whose forward is another."""

    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


def test_modules_without_a_counterpart() -> None:
    with pytest.raises(TypeError, match=r"to_jax converts the NumPy modules Linear, .*; at 1\.0 is a .*\.Doubling"):
        mini.to_jax(mini.Sequential(mini.ReLU(), mini.Sequential(Doubling(2, 2))))
    with pytest.raises(TypeError, match=r"from_jax converts the modules Linear, .*; at the top is a .*\.GELU"):
        mini.from_jax(nn.GELU())
    with pytest.raises(ValueError, match=r"keeps only the first axis; at 0 is Flatten\(start_dim=0"):
        mini.from_jax(nn.Sequential(nn.Flatten(0)))
    with pytest.raises(TypeError, match=r"0\.weight is bfloat16, which NumPy lacks"):
        mini.from_jax(nn.Sequential(nn.Linear(2, 2, dtype=jnp.bfloat16)))


def test_tied_or_frozen_parameters_are_not_converted_silently() -> None:
    frozen = nn.Sequential(nn.Linear(2, 2).freeze(), nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"^from_jax cannot convert tied or frozen parameters, .*; got 0\.weight, 0\.bias\."
    ):
        mini.from_jax(frozen)
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].tie("weight", tied[0], "weight")
    with pytest.raises(ValueError, match=r"^from_jax cannot convert tied or frozen parameters, .*; got 1\.weight\."):
        mini.from_jax(tied)


# -- optimizers -------------------------------------------------------------------------------------------------------


def drive(net: mini.Sequential, opt: Any, steps: int = 100) -> None:
    """Train with gradients drawn at random, the same for each net."""
    rng = np.random.default_rng(5)
    for _ in range(steps):
        opt.zero_grad()
        for grad in net.grads():
            assert not grad.any()
            grad += rng.normal(size=grad.shape)
        opt.step()


def test_numpy_optimizer_updates_in_place() -> None:
    net = small_net()
    arrays, before = net.parameters(), weights(net)
    opt = mini.Optimizer([net], lr=0.5)
    for grad in net.grads():
        grad += 1
    opt.step()
    for array, now, old in zip(arrays, net.parameters(), before, strict=True):
        assert array is now
        np.testing.assert_array_equal(now, old - np.float32(0.5))
    opt.lr = 0
    opt.step()
    np.testing.assert_array_equal(net.parameters()[0], before[0] - np.float32(0.5))
    opt.modules = [net, object()]
    opt.zero_grad()
    assert not any(grad.any() for grad in net.grads())


@pytest.mark.parametrize("make", [mt.Optimizer, optim.SGD])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_our_optimizers_drive_numpy_modules(make: Any, dtype: Any, rtol: float) -> None:
    net, other = small_net(dtype), small_net(dtype)
    arrays = net.parameters()
    drive(net, make([net], lr=0.1))
    drive(other, mini.Optimizer([other], lr=0.1))
    for array, now, want in zip(arrays, net.parameters(), other.parameters(), strict=True):
        assert array is now and now.dtype == dtype
        np.testing.assert_allclose(now, want, rtol=rtol, atol=rtol)


class Momentum(mini.Optimizer):
    """Torch's momentum, in NumPy."""

    def __init__(self, modules: Any, lr: float, momentum: float) -> None:
        super().__init__(modules, lr)
        self.momentum = momentum
        self.buffers = [np.zeros_like(p) for module in modules for p in module.parameters()]

    def step(self) -> None:
        params = [p for module in self.modules for p in module.parameters()]
        grads = [g for module in self.modules for g in module.grads()]
        for param, grad, buffer in zip(params, grads, self.buffers, strict=True):
            buffer *= self.momentum
            buffer += grad
            param -= self.lr * buffer


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_our_momentum_drives_numpy_modules(dtype: Any, rtol: float) -> None:
    net, other = small_net(dtype), small_net(dtype)
    arrays = net.parameters()
    drive(net, optim.SGD([net], lr=0.02, momentum=0.9))
    drive(other, Momentum([other], lr=0.02, momentum=0.9))
    for array, now, want in zip(arrays, net.parameters(), other.parameters(), strict=True):
        assert array is now and now.dtype == dtype
        np.testing.assert_allclose(now, want, rtol=rtol, atol=rtol)


class Lists:
    """The lists that it is given."""

    def __init__(self, params: Any, grads: Any = (None,)) -> None:
        self.params, self.given = params, grads

    def parameters(self) -> Any:
        return self.params() if callable(self.params) else self.params

    def grads(self) -> Any:
        return list(self.given)


def test_arrays_that_overlap() -> None:
    array = np.zeros((2, 2), np.float32)
    for modules in ([Lists([array, array.T], [None, None])], [Lists([array]), Lists([array[:1]])]):
        with pytest.raises(
            ValueError, match=r"reached twice through modules, as 0\.0 and as .*, in arrays that share memo"
        ):
            mt.Optimizer(modules, lr=0.1)
    mt.Optimizer([Lists([array[:, :1], array[:, 1:]], [None, None])], lr=0.1)


def test_parameters_that_are_copies() -> None:
    array = np.asfortranarray(np.zeros((2, 3), np.float32))
    for params in (lambda: [array * 1], lambda: [array.ravel()]):
        with pytest.raises(
            ValueError, match=r"0\.parameters\(\)\[0\] is a copy, which an update would change to no effect"
        ):
            mt.Optimizer([Lists(params)], lr=0.1)
    mt.Optimizer([Lists(lambda: [array.T.ravel()])], lr=0.1)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32).newbyteorder(), pytest.param(np.longdouble, marks=wide_only)])
def test_dtypes_that_jax_lacks(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"0\.parameters\(\)\[0\] is .*, which JAX lacks: convert it"):
        mt.Optimizer([Lists([np.zeros(2, dtype)])], lr=0.1)


def test_the_number_0_as_a_gradient() -> None:
    array = np.ones(2, np.float32)
    mt.Optimizer([Lists([array], [0])], lr=0.1).step()
    assert array.tolist() == [1, 1]


def test_training_both_sides_alike() -> None:
    """The whole loop, on both sides, from the same weights."""
    rng = np.random.default_rng(0)
    net = mini.Sequential(mini.Linear(6, 8, rng=rng), mini.Tanh(), mini.Linear(8, 3, rng=rng))
    ours = mini.to_jax(net)
    x, y = rng.normal(size=(32, 6)).astype(np.float32), rng.integers(0, 3, 32).astype(np.int32)
    loss_fn, theirs, mine = mini.SoftmaxCrossEntropy(), mini.Optimizer([net], lr=0.5), mt.Optimizer([ours], lr=0.5)

    def our_loss(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return nn.functional.cross_entropy(model(x), y)

    losses = []
    for _ in range(50):
        theirs.zero_grad()
        losses.append(loss_fn(net(x), y))
        net.backward(loss_fn.backward())
        theirs.step()
        mine.zero_grad()
        loss = mt.backward(our_loss, ours, x, y)
        mine.step()
        assert float(loss) == pytest.approx(losses[-1], rel=1e-4)
    assert losses[-1] < losses[0] / 2
    for array, want in zip(net.parameters(), ours.parameters(), strict=True):
        np.testing.assert_allclose(array, want, rtol=1e-4, atol=1e-5)
