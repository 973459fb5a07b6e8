"""`wrap`: networks that keep `W`, `b` and `dW`, `db`, trained in place by our optimizers as any other network is."""

import collections
import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpy_layers as zoo
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import numpy as mini
from minitorch_jax.adapters.numpy import wrap


def x_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Layer:
    """y = x W + b; `dW` and `db` are assigned by backward."""

    def __init__(self, n_in, n_out, seed=0):
        rng = np.random.default_rng(seed)
        self.W = rng.normal(size=(n_in, n_out)).astype(np.float32) / 2
        self.b = np.zeros(n_out, np.float32)
        self.dW = self.db = None

    def forward(self, x):
        self.x = x
        return x @ self.W + self.b

    def backward(self, dout):
        self.dW, self.db = self.x.T @ dout, dout.sum(0)
        return dout @ self.W.T


class Adding(Layer):
    """The same, which adds to its gradients in place."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dW, self.db = np.zeros_like(self.W), np.zeros_like(self.b)

    def backward(self, dout):
        self.dW += self.x.T @ dout
        self.db += dout.sum(0)
        return dout @ self.W.T


class Listed(Adding):
    """The same, with lists of its own."""

    def parameters(self):
        return [self.W, self.b]

    def grads(self):
        return [self.dW, self.db]

    def zero_grad(self):
        self.dW.fill(0)
        self.db.fill(0)


class Net:
    """Two layers and a tanh."""

    def __init__(self, layer):
        self.first, self.rest = layer(3, 4, seed=1), {"second": [layer(4, 2, seed=2)]}

    def forward(self, x):
        self.h = np.tanh(self.first.forward(x))
        return self.rest["second"][0].forward(self.h)

    def backward(self, dout):
        return self.first.backward(self.rest["second"][0].backward(dout) * (1 - self.h**2))


RULES = {
    "sgd": lambda modules: optim.SGD(modules, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda modules: optim.Adam(modules, lr=0.01),
}


def train(opt, net, steps=20):
    for i in range(steps):
        opt.zero_grad()
        x = x_of(8, 3, seed=i)
        net.backward((net.forward(x) - x[:, :2]) / 8)
        opt.step()


@pytest.mark.one_in(9)
@pytest.mark.parametrize("rule", RULES)
def test_attributes_lists_and_our_modules_train_alike(rule):
    nets = [Net(Layer), Net(Adding), Net(Listed)]
    layers = [(net.first, net.rest["second"][0]) for net in nets]
    arrays = [[array for layer in pair for array in (layer.W, layer.b)] for pair in layers]
    ours = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for mine, layer in zip((ours[0], ours[2]), layers[0], strict=True):
        mine.weight, mine.bias = jnp.asarray(layer.W.T), jnp.asarray(layer.b)
    for net, listed in zip(nets, (wrap(nets[0]), wrap(nets[1]), None), strict=True):
        modules = [listed] if listed is not None else list(layers[2])
        train(RULES[rule](modules), net)
    opt = RULES[rule]([ours])

    def loss_fn(model, x):
        return ((model(x) - x[:, :2]) ** 2).sum() / 16

    for i in range(20):
        opt.zero_grad()
        mt.backward(loss_fn, ours, jnp.asarray(x_of(8, 3, seed=i)))
        opt.step()
    for before, pair in zip(arrays, layers, strict=True):
        now = [array for layer in pair for array in (layer.W, layer.b)]
        assert all(a is b for a, b in zip(before, now, strict=True))
    for i, want in enumerate([ours[0].weight.T, ours[0].bias, ours[2].weight.T, ours[2].bias]):
        for theirs in arrays:  # a rounding a step
            np.testing.assert_allclose(theirs[i], want, rtol=20 * 2.0**-24, atol=20 * 2.0**-24)
        np.testing.assert_array_equal(arrays[1][i], arrays[2][i])
        assert np.abs(arrays[0][i] - Net(Layer).first.W.mean()).max() > 0.01


def test_paths_of_a_nested_network():
    net = Net(Layer)
    network = wrap(net)
    assert [path for path, _ in network.named_parameters()] == [
        "first.W",
        "first.b",
        "rest.second.0.W",
        "rest.second.0.b",
    ]
    assert [id(a) for a in network.parameters()] == [
        id(a) for layer in (net.first, net.rest["second"][0]) for a in (layer.W, layer.b)
    ]
    assert network.network is net
    assert repr(network).splitlines()[1] == "  first.W: float32[3, 4] <- dW"
    assert [g.shape for g in network.grads()] == [(3, 4), (4,), (4, 2), (2,)] and not any(
        g.any() for g in network.grads()
    )


def test_cycles_and_shared_layers():
    a, b = Layer(3, 3), Layer(3, 3)
    a.next, b.next, a.itself = b, a, [a]
    shared = {"one": a, "again": (b, a)}
    network = wrap([shared, a, b])
    assert [path for path, _ in network.named_parameters()] == ["0.one.W", "0.one.b", "0.one.next.W", "0.one.next.b"]
    opt = mt.Optimizer([network], lr=1.0)
    a.dW, before = np.ones_like(a.W), a.W.copy()
    opt.step()
    np.testing.assert_array_equal(a.W, before - 1)


def test_one_array_in_two_places():
    a, b = Layer(3, 3), Adding(3, 3)
    b.W = a.W
    network = wrap([a, b])
    assert [path for path, _ in network.named_parameters()] == ["0.W", "0.b", "1.b"]
    a.dW, b.dW[...] = np.full_like(a.W, 2), 3
    np.testing.assert_array_equal(network.grads()[0], np.full((3, 3), 5))
    before = a.W.copy()
    mt.Optimizer([network], lr=1.0).step()
    np.testing.assert_array_equal(a.W, before - 5)
    a.dW = b.dW
    np.testing.assert_array_equal(network.grads()[0], np.full((3, 3), 3))
    network.zero_grad()
    assert not b.dW.any()


class Names:
    def __init__(self):
        self.u, self.d_u = np.ones(2), None
        self.v, self.grad_v = np.ones(2), np.full(2, 2.0)
        self.w, self.w_grad = np.ones(2), np.full(2, 3.0)
        self.K, self.gK = np.ones(2), np.full(2, 4.0)
        self.count = np.arange(3)  # integers are no parameters
        self.bias, self.dbias = None, None  # nor is what is not there


class Params:
    """As in well-known courses: dicts, or lists, of both."""

    def __init__(self):
        self.params = {"W1": np.ones(2), "b1": np.ones(1)}
        self.grads = {}
        self.weights, self.dweights = [np.ones(3), (np.ones(4),)], [np.ones(3), (np.full(4, 2.0),)]


def test_names_of_gradients():
    net = Names()
    network = wrap(net, gradients={"K": "gK"})
    assert [path for path, _ in network.named_parameters()] == ["u", "v", "w", "K"]
    assert [float(grad[0]) for grad in network.grads()] == [0, 2, 3, 4]
    assert wrap({"layer": net}, gradients={"layer.K": "gK"}).parameters()[3] is net.K
    assert wrap(net, frozen="K", ignored="gK").parameters()[-1] is net.w
    both = {"W": np.ones(2), "dW": np.full(2, 7.0)}
    assert wrap([both]).grads()[0] is both["dW"]


def test_containers_of_parameters_beside_containers_of_gradients():
    net = Params()
    network = wrap(net)
    assert [path for path, _ in network.named_parameters()] == ["params.W1", "params.b1", "weights.0", "weights.1.0"]
    assert [float(grad[0]) for grad in network.grads()] == [0, 0, 1, 2]
    net.grads["dW1"] = np.full(2, 5.0)
    net.grads["b1"] = np.full(1, 6.0)
    assert [float(grad[0]) for grad in network.grads()] == [5, 6, 1, 2]
    before = net.params["W1"]
    mt.Optimizer([network], lr=1.0).step()
    assert net.params["W1"] is before and before.tolist() == [-4, -4] and net.weights[1][0].tolist() == [-1] * 4
    network.zero_grad()
    assert not any(grad.any() for grad in network.grads())
    net.grads["s1"] = net.grads.pop("dW1")
    with pytest.raises(ValueError, match=r"params\.W1 has no gradient: the gradients beside it are 'b1', 's1'"):
        network.grads()
    net.dweights.pop()
    with pytest.raises(ValueError, match=r"weights\.1\.0 has no gradient: the gradients beside it are 0"):
        network.grads()


def test_replaced_arrays_are_noticed_and_used():
    layer = Layer(2, 2)
    opt = optim.SGD([wrap([layer])], lr=1.0, momentum=0.5)
    layer.dW, layer.db = np.ones_like(layer.W), np.ones_like(layer.b)
    opt.step()
    layer.W = new = np.full((2, 2), 10, np.float32)
    opt.step()
    assert layer.W is new and new[0, 0] == 8.5  # momentum goes on
    layer.W = np.zeros((3, 2), np.float32)
    before = layer.b.copy()
    with pytest.raises(
        ValueError, match=r"cannot be trained as they are:\n  0\.W was float32\[2, 2\], and is float32\[3, 2\] now"
    ):
        opt.step()
    layer.W = None
    with pytest.raises(ValueError, match=r"0\.W was float32\[2, 2\], and is NoneType now|0\.W has gone"):
        opt.step()
    np.testing.assert_array_equal(layer.b, before)


def test_objects_with_lists_are_used_as_they_are():
    inner = mini.Sequential(mini.Linear(2, 3, rng=0), mini.Tanh(), mini.Linear(3, 1, bias=False, rng=1))

    class Own:
        def __init__(self):
            self.arrays, self.gradients = [np.ones(2)], [np.ones(2)]

        def parameters(self):
            return self.arrays

        def grads(self):
            return self.gradients

    own, plain = Own(), Layer(1, 1)
    network = wrap([inner, own, plain])
    assert [path for path, _ in network.named_parameters()] == [
        "0.modules.0.W", "0.modules.0.b", "0.modules.2.W", "1.arrays.0", "2.W", "2.b",
    ]  # fmt: skip
    assert network.grads()[0] is inner[0].dW and network.grads()[3] is own.gradients[0]
    inner[0].dW += 1
    network.zero_grad()
    assert not inner[0].dW.any() and not own.gradients[0].any()
    own.gradients.append(np.ones(1))
    with pytest.raises(
        ValueError, match=r"1: parameters\(\) returns 1 arrays and grads\(\) returns 2: they must be aligned"
    ):
        network.grads()


def test_zero_grad_leaves_none_and_read_only_gradients():
    layer = Layer(2, 2)
    network = wrap(layer)
    layer.db = np.broadcast_to(np.float32(1), (2,))  # cannot be written
    network.zero_grad()
    assert layer.dW is None and not layer.db.any()
    opt = mt.Optimizer([network], lr=1.0)
    opt.zero_grad()
    opt.step()
    np.testing.assert_array_equal(layer.W, Layer(2, 2).W)


def test_save_and_load(tmp_path):
    net = [Layer(3, 3), zoo.BatchNorm(3, np.float64)]
    network = wrap(net, frozen="*.running_mean")
    opt = optim.Adam([network], lr=0.1)
    net[0].dW, net[1].dgamma[...] = np.ones_like(net[0].W), 1
    opt.step()
    assert list(network.state_dict()) == ["0.W", "0.b", "1.gamma", "1.beta", "1.running_mean"]
    assert "1.running_mean: float64[3], frozen" in repr(network)
    net[1].running_mean += 0.1
    saved = network.state_dict()
    mt.save(tmp_path / "run.npz", network=network, opt=opt, step=1)
    arrays = network.parameters()
    twin = [Layer(3, 3, seed=5), zoo.BatchNorm(3, np.float64)]
    other = wrap(twin, frozen="*.running_mean")
    other_opt = optim.Adam([other], lr=0.5)
    assert mt.load(tmp_path / "run.npz", network=other, opt=other_opt) == {"step": 1}
    for path, array in other.state_dict().items():
        np.testing.assert_array_equal(array, saved[path])
        assert array.dtype == saved[path].dtype
    for trained, layers in ((opt, net), (other_opt, twin)):
        layers[1].dgamma[...] = 2
        layers[0].dW = np.full_like(layers[0].W, 0.5)
        trained.step()
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert all(a is b for a, b in zip(arrays, network.parameters(), strict=True))


def test_load_state_dict_is_all_or_nothing():
    network = wrap([Layer(2, 2), Layer(2, 2)])
    saved, before = network.state_dict(), network.state_dict()
    saved["0.W"] += 1
    saved["0.b"] = np.zeros(3, np.float32)
    saved["1.W"] = saved["1.W"].astype(np.float64)
    saved["extra"] = saved.pop("1.b")
    wrong = [
        "state_dict does not fit this network; nothing was loaded:",
        r"missing: 1\.b",
        "unexpected: extra",
        r"0\.b: got float32\[3\] for float32\[2\]",
        r"1\.W: got float64\[2, 2\] for float32\[2, 2\]",
    ]
    with pytest.raises(ValueError, match=r"\n  ".join(wrong) + "$"):
        network.load_state_dict(saved)
    for path, array in network.state_dict().items():
        np.testing.assert_array_equal(array, before[path])
    network.parameters()[0].flags.writeable = False
    with pytest.raises(ValueError, match=r"0\.W: the array is read-only"):
        network.load_state_dict(before)
    with pytest.raises(
        ValueError, match=r"parameters are updated in place, so they must be writable arrays:\n  0\.W is read-only"
    ):
        network.parameters()


# -- where parameters are looked for ----------------------------------------------------------------------------------


class Shared:
    """Parameters of the class, which all instances have."""

    W, dW = np.ones(2), np.full(2, 3.0)
    layers = (Layer(1, 1),)


class AttrDict(dict):
    """Items as attributes, with a KeyError for one that is not there."""

    __getattr__ = dict.__getitem__


def pair():
    return {"W": np.ones(2), "dW": np.full(2, 3.0)}


@pytest.mark.parametrize(
    "holder",
    [
        types.SimpleNamespace(**pair()),
        collections.UserList([AttrDict(pair())]),
        collections.deque([pair()]),
        np.array([[None, types.SimpleNamespace(**pair())]], object),
        AttrDict(pair()),
        Shared(),
        {"_W": np.ones(2), "_dW": np.full(2, 3.0)},
        {"_Layer__W": np.ones(2), "_Layer__dW": np.full(2, 3.0)},
        {"_params": [np.ones(2)], "_grads": [np.full(2, 3.0)]},
        {"W": collections.deque([np.ones(2)]), "dW": collections.deque([np.full(2, 3.0)])},
    ],
    ids=lambda holder: next(iter(holder), "") if type(holder) is dict else type(holder).__name__,
)
def test_where_parameters_are_found(holder):
    network = wrap([holder])
    opt = mt.Optimizer([network], lr=1.0)
    before = network.parameters()[0].copy()
    opt.step()
    np.testing.assert_array_equal(network.parameters()[0], before - 3)
    assert len(network.parameters()) == (3 if isinstance(holder, Shared) else 1)
    network.zero_grad()
    assert not network.grads()[0].any()
    network.grads()[0][:] = 3


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"b": np.zeros(2, int), "db": None}, r"0\.held\.b is int64\[2\] beside db, and only floating NumPy arrays"),
        ({"b": jnp.zeros(2), "db": None}, r"0\.held\.b is ArrayImpl beside db, and only floating NumPy arrays"),
        ({"b": [[0.0, 1]], "db": [[0, 0]]}, r"0\.held\.b is list beside db, and only floating NumPy arrays"),
        ({"params": {"b": jnp.zeros(2)}, "grads": {}}, r"0\.held\.params is dict beside grads, and only floating"),
        ({Layer(1, 1)}, r"0\.held is a set, which has no order: use a list, or name it in `ignored`"),
    ],
)
def test_what_cannot_be_trained_is_said(held, message):
    layer = Layer(2, 2)
    layer.held = held
    with pytest.raises(ValueError, match=message):
        wrap([layer])
    assert len(wrap([layer], ignored="0.held").parameters()) == 2


def test_hyperparameters_beside_gradients_are_no_parameters():
    layer = Layer(2, 2)
    layer.params, layer.grads, layer.t, layer.dt = {"in": 3, "out": [4]}, {}, 0, 0.1
    assert len(wrap(layer).parameters()) == 2


def test_objects_of_plotting_libraries_are_not_looked_into():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    layer = Layer(2, 2)
    layer.figure, layer.axes = figure, [figure.subplots()]
    assert len(wrap([layer]).parameters()) == 2


class Book:
    """A network that lists the arrays of its layers, which have them as attributes."""

    def __init__(self):
        self.params = {"W": np.ones((2, 2)), "b": np.zeros(2)}
        self.layer = Layer(2, 2)
        self.layer.W, self.layer.b = self.params["W"], self.params["b"]
        self.layer.dW, self.layer.db = np.full((2, 2), 3.0), np.full(2, 3.0)

    def forward(self, x):
        return self.layer.forward(x)

    def backward(self, dout):
        return self.layer.backward(dout)


def test_an_array_that_is_trained_elsewhere_needs_no_gradient():
    network = wrap(Book())
    assert [path for path, _ in network.named_parameters()] == ["layer.W", "layer.b"]
    mt.Optimizer([network], lr=1.0).step()
    np.testing.assert_array_equal(network.network.params["W"], np.full((2, 2), -2.0))
    assert "constants" not in str(mini.check_gradients(Book(), x_of(3, 2), accumulates=False))


def test_gradients_of_a_collection_and_of_what_is_in_it_are_not_added():
    net = Book()
    net.grads = {"W": net.layer.dW, "b": net.layer.db}
    assert wrap(net).grads()[0] is net.layer.dW  # one gradient, in two places
    net.grads = {"W": net.layer.dW + 0.1 * net.layer.W, "b": net.layer.db}  # weight decay
    with pytest.raises(
        ValueError,
        match=r"\n  params\.W and layer\.W, in the same object, are one array with two gradients, which would be added:"
        r" name one of the two in `ignored`$",
    ):
        wrap(net)
    assert wrap(net, ignored="layer.*").grads()[0] is net.grads["W"]
    assert wrap(net, ignored="params.*").grads()[0] is net.layer.dW
    tied = wrap(
        [{"params": [net.layer.W], "grads": [np.ones((2, 2))]}, {"params": [net.layer.W], "grads": [net.layer.dW]}]
    )
    np.testing.assert_array_equal(
        tied.grads()[0], np.full((2, 2), 4.0)
    )  # of two layers, of which neither has the other


class Recurrent:
    """Makes its cells at each forward, and adds up their gradients."""

    def __init__(self, listed):
        self.cell, self.cells = Listed if listed else Layer, []
        self.params, self.grads = [np.ones((2, 2), np.float32), np.zeros(2, np.float32)], [None, None]

    def forward(self, x):
        self.cells[:] = [self.cell(2, 2) for _ in range(3)]
        for cell in self.cells:
            cell.W, cell.b = self.params
            x = cell.forward(x)
        return x

    def backward(self, dout):
        for cell in reversed(self.cells):
            dout = cell.backward(dout)
        self.grads = [sum(cell.dW for cell in self.cells), sum(cell.db for cell in self.cells)]


@pytest.mark.parametrize("listed", [True, False])
def test_cells_that_forward_makes_anew(listed):
    layer = Recurrent(listed)
    opt = mt.Optimizer([wrap([layer])], lr=1.0)
    for _ in range(2):
        opt.zero_grad()
        layer.forward(np.ones((1, 2), np.float32))
        layer.backward(np.ones((1, 2), np.float32))
        before = layer.params[1].copy()
        opt.step()
        np.testing.assert_array_equal(layer.params[1], before - layer.grads[1])
    with pytest.raises(ValueError, match=r"0\.params\.0 and 0\.cells\.0(\.W)?, in the same object, are one array"):
        wrap([layer], ignored="*.x")
    layer.cells = [Layer(2, 2)]
    with pytest.raises(ValueError, match=r"0\.cells\.0\.W is new"):
        opt.step()


class Assigning(Recurrent):
    """The same, which assigns the list of cells."""

    def forward(self, x):
        self.cells = []
        return super().forward(x)


def test_cells_in_an_attribute_that_forward_assigns():
    layer = Assigning(False)
    layer.forward(np.ones((1, 2), np.float32))
    opt = mt.Optimizer([wrap([layer])], lr=1.0)
    layer.forward(np.ones((1, 2), np.float32))
    layer.backward(np.ones((1, 2), np.float32))
    before = layer.params[1].copy()
    opt.step()
    np.testing.assert_array_equal(layer.params[1], before - layer.grads[1])


class Running:
    """Makes its statistics at the first forward."""

    def __init__(self):
        self.gamma, self.dgamma, self.mean = np.ones(2), None, None

    def forward(self, x):
        self.mean = x.mean(0) if self.mean is None else (self.mean + x.mean(0)) / 2
        return self.gamma * (x - self.mean)


def test_frozen_arrays_that_forward_makes(tmp_path):
    network = wrap([Running()], frozen="*.mean")
    opt = mt.Optimizer([network], lr=0.1)
    assert list(network.state_dict()) == ["0.gamma"] == [path for path, _ in network.named_parameters()]
    empty = network.state_dict()
    network.network[0].forward(np.full((1, 2), 3.0))
    opt.step()
    assert repr(network).splitlines()[2] == "  0.mean: float64[2], frozen"
    mt.save(tmp_path / "run.npz", network=network)
    other = wrap([Running()], frozen="*.mean")
    mt.load(tmp_path / "run.npz", network=other)
    mean = other.network[0].mean
    assert mean.tolist() == [3, 3] and mean is not network.network[0].mean
    other.load_state_dict(empty)
    assert other.network[0].mean is None
    with pytest.raises(ValueError, match="unexpected: 0.mean"):
        wrap([Running()]).load_state_dict(network.state_dict())


def test_a_frozen_layer_may_keep_what_is_no_array():
    layers = [Layer(2, 2), Layer(2, 2)]
    layers[0].mask = layers[0].x = None
    network = wrap(layers, frozen="0.*")
    layers[0].mask, layers[0].x, layers[0].y = np.ones(2, bool), (2, 2), x_of(2, 2)
    assert [path for path, _ in network.named_parameters()] == ["1.W", "1.b"]
    del layers[0].y
    network.zero_grad()


class Odd(Listed):
    """With lists as `give` makes them."""

    give = staticmethod(lambda arrays: arrays)
    give_grads = staticmethod(lambda arrays: arrays)
    zero_grad = None

    def parameters(self):
        return self.give(super().parameters())

    def grads(self):
        return self.give_grads(super().grads())


def odd(**kinds):
    return type("Odd", (Odd,), {name: staticmethod(kind) for name, kind in kinds.items()})(2, 3)


def test_parameters_that_are_copies():
    copies = odd(give=lambda arrays: [array * 1.0 for array in arrays])
    with pytest.raises(ValueError, match=r"parameters\(\) returns copies.*\n  0\.parameters\.0\n  0\.parameters\.1$"):
        wrap([copies])
    views = odd(
        give=lambda arrays: [array.ravel() for array in arrays], give_grads=lambda arrays: map(np.ravel, arrays)
    )
    assert len(wrap([views]).parameters()) == 2


# -- what is not clear is an error ------------------------------------------------------------------------------------


class NoGradient:
    def __init__(self):
        self.layers, self.W = [Layer(2, 2)], np.ones(2)
        self.tables = [np.ones(3)]


def test_an_array_without_a_gradient():
    net = {"net": NoGradient()}
    net["net"].numbered = {1: np.ones(2)}
    network = wrap(net)  # backward may make the gradients
    assert [line.partition(": ")[2] for line in repr(network).splitlines()[1:-1]] == [
        "float64[2] <- not known before the first backward",
        "float32[2, 2] <- dW",
        "float32[2] <- db",
        "float64[3] <- not known before the first backward",
        "float64[2] <- not known before the first backward",
    ]
    opt = mt.Optimizer([network], lr=1.0)
    opt.step()
    net["net"].layers[0].dW = np.ones((2, 2))
    before = network.state_dict()
    with pytest.raises(
        ValueError,
        match=r"backward\(\) has set no gradient of these parameters, so a step would not train them:"
        r"\n  net\.W is float64\[2\]; there is no dW, grad_W, W_grad, dL_dW\. Name its gradient,"
        r" gradients=\{'W': \.\.\.\}; or frozen='net\.W' if it is not trained, ignored='net\.W' if forward\(\) keeps it"
        r"\n  net\.tables\.0 is float64\[3\]; there is no list of gradients beside its list\. .*"
        r"\n  net\.numbered\.1 is float64\[2\]; there is no list of gradients",
    ):
        opt.step()
    for path, array in network.state_dict().items():
        np.testing.assert_array_equal(array, before[path])
    net = NoGradient()
    assert len(wrap(net, frozen=["W", "tables.?"]).parameters()) == 2
    assert list(wrap(net, frozen="W", ignored="tables.*").state_dict()) == ["W", "layers.0.W", "layers.0.b"]


def test_what_forward_keeps_is_no_parameter():
    net = Net(Layer)
    net.forward(x_of(2, 3))
    net.first.dx = x_of(2, 3)
    assert [path for path, _ in wrap(net).named_parameters()] == [
        "first.W", "first.b", "rest.second.0.W", "rest.second.0.b",
    ]  # fmt: skip


class ReturnsOnly:
    def __init__(self):
        self.W, self.b = np.ones((2, 2)), np.zeros(2)

    def forward(self, x):
        self.x = x
        return x @ self.W + self.b

    def backward(self, dout):
        return dout @ self.W.T, self.x.T @ dout, dout.sum(0)


class Unnamed(ReturnsOnly):
    """It keeps the gradients in a list, which has no names."""

    def backward(self, dout):
        self.gradients = [self.x.T @ dout, dout.sum(0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            ReturnsOnly,
            r"ReturnsOnly: its backward\(\) stores no gradient, it can only return them\. Keep each beside its",
        ),
        (Unnamed, r"Unnamed keeps arrays in 'gradients', and no name says whose gradients they are: keep them beside"),
    ],
)
def test_a_network_of_which_no_gradient_is_found_is_not_left_untrained(make, message):
    net = make()
    opt = mt.Optimizer([wrap(net)], lr=1.0)
    opt.zero_grad()
    opt.step()  # no backward has run: all gradients are zeros
    net.forward(np.ones((1, 2)))
    net.backward(np.ones((1, 2)))
    with pytest.raises(ValueError, match=message):
        opt.step()


def test_methods_that_return_dicts():
    class Dicts(Layer):
        def get_params(self):
            return {"W": self.W, "b": self.b}

        def get_grads(self):
            return {"db": self.db, "dW": self.dW}

    layer = Dicts(2, 3)
    layer.dW, layer.db = np.ones_like(layer.W), np.ones_like(layer.b)
    network = wrap([layer])
    assert [path for path, _ in network.named_parameters()] == ["0.W", "0.b"]
    assert all(a is b for a, b in zip(network.grads(), (layer.dW, layer.db), strict=True))


@pytest.mark.parametrize("mark", ["d", ""])
def test_gradients_in_a_dict_of_the_object(mark):
    class Model:
        def __init__(self):
            self.W1, self.b1, self.grads = np.ones((2, 2)), np.ones(2), {}
            self.grad_cache = {"W1": np.ones((2, 2))}  # of an optimizer

    model = Model()
    network = wrap(model)
    model.grads[f"{mark}W1"], model.grads[f"{mark}b1"] = np.full((2, 2), 2.0), np.full(2, 3.0)
    mt.Optimizer([network], lr=1.0).step()
    np.testing.assert_array_equal(model.W1, np.full((2, 2), -1.0))
    np.testing.assert_array_equal(model.b1, np.full(2, -2.0))
    assert f"W1: float64[2, 2] <- grads.{mark}W1" in repr(network)


def test_a_layer_of_a_library_is_not_left_out_silently():
    scope = {"__name__": "torch.nn"}
    exec("class Library:\n    def backward(self, dout):\n        return dout", scope)
    Library = scope["Library"]
    with pytest.raises(ValueError, match=r"1 was not looked into: its class is torch\.nn\.Library, of a library\."):
        wrap([Layer(2, 2), Library()])
    assert len(wrap([Layer(2, 2), Library()], ignored="1").parameters()) == 2


def test_other_things_that_are_not_clear():
    layer = Layer(2, 2)
    layer.grad_W = layer.dW
    layer.scale, layer.dscale = 1.0, 0.0
    with pytest.raises(
        ValueError,
        match=r"\n  W has several possible gradients, dW and grad_W: select one, gradients=\{'W': \.\.\.\}"
        r"\n  scale is float beside dscale, and only floating NumPy arrays can be updated in place: make it such an array\."
        r" If it is not a parameter, name it in `frozen`"
        r"\n  'V' matches nothing\n  '\*\.table' matches nothing$",
    ):
        wrap(layer, gradients={"V": "gV"}, frozen="*.table")
    assert len(wrap(layer, gradients={"W": "dW"}, frozen="scale").parameters()) == 2
    with pytest.raises(ValueError, match=r"found no parameters: no object has an array `x` beside `dx`"):
        wrap([mini.Tanh(), "text", 3])
    with pytest.raises(ValueError, match=r"1 is a minitorch_jax Module: list it in the optimizer's modules by itself"):
        wrap([layer, nn.Linear(2, 2)], gradients={"W": "dW"}, frozen="scale")


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda arrays: {"W": arrays[0], "b": arrays[1]},
            r"0: parameters\(\) returns a dict and grads\(\) a list: return two lists in one order, or two dicts of",
        ),
        (
            lambda arrays: [tuple(arrays)] * 2,
            r"\n  0\.parameters\.0 is tuple: parameters\(\) must return a list of floating NumPy arrays",
        ),
    ],
)
def test_lists_of_something_else(give, message):
    with pytest.raises(ValueError, match=message):
        wrap([odd(give=give)])


def test_arrays_that_overlap():
    first, second = Layer(2, 3), Layer(3, 2)
    second.W = first.W.T
    with pytest.raises(ValueError, match=r"0\.W shares memory with 1\.W, but is another array: use one array in both"):
        wrap([first, second])
    assert len(wrap([first, second], frozen="1.W").parameters()) == 3


def test_a_network_that_changes():
    net = [Layer(2, 2)]
    opt = mt.Optimizer([wrap(net)], lr=0.1)
    net.append(Layer(2, 2))
    with pytest.raises(
        ValueError, match=r"holds other parameters than at wrap\(\): wrap it again.*\n  1\.W is new\n  1\.b is new"
    ):
        opt.step()
    del net[:]
    with pytest.raises(ValueError, match=r"\n  0\.W has gone\n  0\.b has gone"):
        opt.step()
    net[:] = [Layer(2, 2)]
    mt.Optimizer([wrap(net)], lr=0.1).step()
    cached = wrap(net)
    net[0].y, net[0].dy = x_of(2, 2), x_of(2, 2)
    with pytest.raises(ValueError, match=r"name arrays that forward\(\) keeps in `ignored`\n  0\.y is new"):
        cached.parameters()
    assert len(wrap(net, ignored="*.y").parameters()) == 2


def test_zero_grad_of_lists():
    class Plain(Odd):
        zero_grad = property()  # none

    layer = Plain(2, 3)
    layer.dW, layer.db = None, np.ones(3)
    network = wrap([layer])
    network.zero_grad()
    assert layer.dW is None and not layer.db.any()
    Plain.give_grads = staticmethod(lambda grads: [grad / 4 for grad in grads])
    layer.dW = np.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"0: grads\(\) returns new arrays at each call, .*: write a zero_grad\(\) for the object"
    ):
        network.zero_grad()


def test_gradients_that_begin_as_the_number_0():
    layer = Layer(2, 3)
    layer.dW, layer.db = 0, 0.0
    opt = mt.Optimizer([wrap([layer])], lr=1.0)
    opt.zero_grad()
    opt.step()
    np.testing.assert_array_equal(layer.W, Layer(2, 3).W)
    layer.dW += np.ones((2, 3))
    opt.step()
    np.testing.assert_array_equal(layer.W, Layer(2, 3).W - 1)


def test_a_gradient_of_a_wrong_shape():
    layer = Layer(2, 3)
    network = wrap([layer])
    layer.db = np.zeros(2)
    with pytest.raises(ValueError, match=r"0\.b has shape \(3,\) and its gradient has \(2,\): they must be the same"):
        mt.Optimizer([network], lr=0.1).step()


def test_wrapped_networks_copy():
    network = wrap(Net(Adding))
    twin = copy.deepcopy(network)
    twin.parameters()[0][...] = 7
    assert network.parameters()[0].max() < 7 and twin.network.first.W.max() == 7


def test_wrapped_networks_cannot_be_traced():
    network = wrap([Layer(2, 2)])
    opt = mt.Optimizer([network], lr=0.1)
    with pytest.raises(TypeError, match="NumPy modules are updated in place, which cannot be traced"):
        jax.jit(lambda x: opt.step())(1.0)
