"""Networks in the styles that people write, each trained through `wrap` and by an update loop of its own."""

import collections
import itertools
import pickle
import sys

import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.adapters.numpy import wrap


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


NETWORKS = {}


def network(cls):
    NETWORKS[cls.__name__] = cls
    return cls


class Network:
    """A network that maps (5, 3) to (5, 2). `pairs()` are its parameters and their gradients, as its author has them."""

    def run(self, x, t):
        y = self.forward(x)
        self.backward((y - t) / len(t))


@network
class DictsMadeByBackward(Network):
    def __init__(self):
        self.params = {"W1": random(3, 4), "b1": np.zeros(4), "W2": random(4, 2), "b2": np.zeros(2)}

    def forward(self, x):
        self.cache = {"x": x, "a": np.tanh(x @ self.params["W1"] + self.params["b1"])}
        return self.cache["a"] @ self.params["W2"] + self.params["b2"]

    def backward(self, d):
        grads = {"W2": self.cache["a"].T @ d, "b2": d.sum(0)}
        d = d @ self.params["W2"].T * (1 - self.cache["a"] ** 2)
        self.grads = grads | {"W1": self.cache["x"].T @ d, "b1": d.sum(0)}

    def pairs(self):
        return [(self.params[key], self.grads[key]) for key in self.params]


@network
class KeysOfGradients(DictsMadeByBackward):
    """Its gradients have the keys `dW1`, as do the velocities that its author's momentum keeps."""

    def __init__(self):
        super().__init__()
        self.velocity = {"d" + key: np.zeros_like(array) for key, array in self.params.items()}

    def backward(self, d):
        super().backward(d)
        self.gradients = {"d" + key: grad for key, grad in vars(self).pop("grads").items()}

    def pairs(self):
        return [(self.params[key], self.gradients["d" + key]) for key in self.params]


class Dense:
    """Stores its output, and the gradient by its input."""

    def __init__(self, n_in, n_out, seed):
        self.weights, self.biases = random(n_in, n_out, seed=seed), np.zeros((1, n_out))
        self.weight_momentums, self.bias_cache = np.zeros((n_in, n_out)), np.zeros((1, n_out))

    def forward(self, inputs):
        self.inputs = inputs
        self.output = inputs @ self.weights + self.biases

    def backward(self, dvalues):
        self.dweights, self.dbiases = self.inputs.T @ dvalues, dvalues.sum(0, keepdims=True)
        self.dinputs = dvalues @ self.weights.T


class Tanh:
    def forward(self, inputs):
        self.output = np.tanh(inputs)

    def backward(self, dvalues):
        self.dinputs = dvalues * (1 - self.output**2)


@network
class StoredOutputs(Network):
    def __init__(self):
        self.layers = [Dense(3, 4, 1), Tanh(), Dense(4, 2, 2)]

    def run(self, x, t):
        for layer in self.layers:
            layer.forward(x)
            x = layer.output
        d = (x - t) / len(t)
        for layer in reversed(self.layers):
            layer.backward(d)
            d = layer.dinputs

    def pairs(self):
        dense = [layer for layer in self.layers if isinstance(layer, Dense)]
        return [pair for each in dense for pair in ((each.weights, each.dweights), (each.biases, each.dbiases))]


class Parameter:
    """With the moments of an Adam."""

    def __init__(self, value):
        self.value, self.grad = value, None
        self.m, self.v = np.zeros_like(value), np.zeros_like(value)


class Slots:
    __slots__ = ("w", "g")

    def __init__(self, value):
        self.w, self.g = value, np.zeros_like(value)


@network
class ParameterObjects(Network):
    def __init__(self):
        self.weight, self.rest = Parameter(random(3, 2)), [collections.OrderedDict(bias=Slots(np.zeros(2)))]

    def forward(self, x):
        self.x = x
        return x @ self.weight.value + self.rest[0]["bias"].w

    def backward(self, d):
        self.weight.grad = self.x.T @ d
        self.rest[0]["bias"].g[...] = d.sum(0)

    def pairs(self):
        return [(self.weight.value, self.weight.grad), (self.rest[0]["bias"].w, self.rest[0]["bias"].g)]


class Tensor:
    def __init__(self, data, requires_grad=True):
        self.data, self.grad, self.parents, self.requires_grad = data, None, (), requires_grad


@network
class Tensors(Network):
    """The gradient of a tensor is a tensor; one tensor is no parameter."""

    def __init__(self):
        self.tensors = {"w": Tensor(random(3, 2)), "b": Tensor(np.zeros(2)), "one": Tensor(np.ones(2), False)}

    def forward(self, x):
        self.out = Tensor(x @ self.tensors["w"].data + self.tensors["b"].data)
        self.out.parents = (Tensor(x, False), self.tensors["w"], self.tensors["b"])
        return self.out.data

    def backward(self, d):
        x, w, b = self.out.parents
        self.out.grad, w.grad, b.grad = Tensor(d), Tensor(x.data.T @ d), Tensor(d.sum(0))

    def pairs(self):
        return [(self.tensors[name].data, self.tensors[name].grad.data) for name in "wb"]


class Linear(Network):
    def __init__(self):
        self.w, self.b = random(3, 2), np.zeros(2)

    def forward(self, x):
        self.x = x
        return x @ self.w + self.b


@network
class MethodOfPairs(Linear):
    """Names that say nothing, and a generator of pairs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = np.zeros((3, 2)), np.zeros(2)

    def backward(self, d):
        self.one, self.two = self.x.T @ d, d.sum(0)

    def params_and_grads(self):
        yield self.w, self.one
        yield self.b, self.two

    def pairs(self):
        return list(self.params_and_grads())


@network
class ParamThatReturnsPairs(Linear):
    def __init__(self):
        super().__init__()
        self.dl_dw, self.dl_db = np.zeros((3, 2)), np.zeros(2)

    def backward(self, d):
        self.dl_dw[...], self.dl_db[...] = self.x.T @ d, d.sum(0)

    def param(self):
        return [[self.w, self.dl_dw], [self.b, self.dl_db]]

    pairs = param


@network
class MethodsOfLists(Linear):
    """Its gradients exist after the first backward."""

    def backward(self, d):
        self.one, self.two = self.x.T @ d, d.sum(0)

    def params(self):
        return [self.w, self.b]

    def gradients(self):
        return [self.one, self.two]

    def pairs(self):
        return zip(self.params(), self.gradients(), strict=True)


@network
class ParamsThatAreNoPairs(Linear):
    """Two parameters of one shape in a list of two: not a parameter and its gradient."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = np.ones(2), np.ones(2)

    def forward(self, x):
        return super().forward(x) * self.gamma + self.beta

    def backward(self, d):
        self.d_gamma, self.d_beta = (d * (self.x @ self.w + self.b)).sum(0), d.sum(0)
        self.d_w, self.d_b = self.x.T @ (d * self.gamma), (d * self.gamma).sum(0)

    def params(self):
        return [[self.gamma, self.beta], [self.b, self.gamma]]

    def pairs(self):
        names = ("w", "b", "gamma", "beta")
        return [(getattr(self, name), getattr(self, f"d_{name}")) for name in names]


@network
class Lists(Network):
    """Lists of weights, and lists of gradients that backward builds from the end."""

    def __init__(self):
        self.weights, self.biases = [random(3, 4), random(4, 2)], [np.zeros(4), np.zeros(2)]
        self.momentum_w, self.losses = [np.zeros((3, 4)), np.zeros((4, 2))], []

    def forward(self, x):
        self.activations = [x]
        self.activations.append(np.tanh(x @ self.weights[0] + self.biases[0]))
        return self.activations[1] @ self.weights[1] + self.biases[1]

    def backward(self, d):
        self.losses.append(float((d**2).sum()))
        self.grad_weights, self.grad_biases = [], []
        for a, w in zip(self.activations[::-1], self.weights[::-1], strict=True):
            self.grad_weights.insert(0, a.T @ d)
            self.grad_biases.insert(0, d.sum(0))
            d = d @ w.T * (1 - a**2)

    def pairs(self):
        return zip(self.weights + self.biases, self.grad_weights + self.grad_biases, strict=True)


@network
class Private(Linear):
    def __init__(self):
        super().__init__()
        self.__V = random(2, 2)

    def forward(self, x):
        self.__h = super().forward(x)
        return self.__h @ self.__V

    def backward(self, d):
        self.__nabla_V, d = self.__h.T @ d, d @ self.__V.T
        self.dLdw, self.bGrad = self.x.T @ d, d.sum(0)

    def pairs(self):
        return [(self.w, self.dLdw), (self.b, self.bGrad), (self.__V, self.__nabla_V)]


@network
class NestedDicts(Network):
    def __init__(self):
        self.p = {"one": {"W": random(3, 4), "b": np.zeros(4)}, "two": {"W": random(4, 2), "b": np.zeros(2)}}
        self.d_p = None

    def forward(self, x):
        self.x, self.a = x, np.tanh(x @ self.p["one"]["W"] + self.p["one"]["b"])
        return self.a @ self.p["two"]["W"] + self.p["two"]["b"]

    def backward(self, d):
        e = d @ self.p["two"]["W"].T * (1 - self.a**2)
        self.d_p = {"two": {"W": self.a.T @ d, "b": d.sum(0)}, "one": {"W": self.x.T @ e, "b": e.sum(0)}}

    def pairs(self):
        return [(self.p[name][key], self.d_p[name][key]) for name in self.p for key in "Wb"]


@pytest.mark.parametrize("ran_before", [False, True], ids=["new", "ran"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_as_by_its_own_loop(name, ran_before):
    ours, own = NETWORKS[name](), NETWORKS[name]()
    for net in (ours, own) if ran_before else ():
        net.run(random(5, 3), random(5, 2))
    wrapped = wrap(ours)
    opt = optim.SGD([wrapped], lr=0.1, momentum=0.5)
    velocity = itertools.repeat(0)
    for i in range(20):
        x, t = random(5, 3, seed=i), random(5, 2, seed=-1 + 2**i)
        opt.zero_grad()
        ours.run(x, t)
        opt.step()
        own.run(x, t)
        velocity = [0.5 * v + grad for v, (_, grad) in zip(velocity, own.pairs(), strict=False)]
        for v, (param, _) in zip(velocity, own.pairs(), strict=True):
            param -= 0.1 * v
    mine = [param for param, _ in ours.pairs()]
    assert {id(param) for param in mine} == {id(param) for param in wrapped.parameters()}
    for param, (other, _) in zip(mine, own.pairs(), strict=True):
        np.testing.assert_allclose(param, other, rtol=1e-13, atol=1e-13)
    assert "not known" not in repr(wrapped) and repr(wrapped).count("<-") == len(mine)
    twin = pickle.loads(pickle.dumps(wrapped)) if name in ("Lists", "NestedDicts") else wrapped
    assert list(twin.state_dict()) == list(wrapped.state_dict())


# -- what a step costs -------------------------------------------------------------------------------------------------


class Layer(Network):
    def __init__(self):
        self.W, self.b, self.dW, self.db = random(3, 3), np.zeros(3), None, None

    def forward(self, x):
        self.x = x
        return np.tanh(x @ self.W + self.b)

    def backward(self, d):
        d = d * (1 - np.tanh(self.x @ self.W + self.b) ** 2)
        self.dW, self.db = self.x.T @ d, d.sum(0)
        return d @ self.W.T


class Deep(Network):
    def __init__(self):
        self.layers, self.history, self.vocabulary = [Layer() for _ in range(20)], [], {str(i): i for i in range(1000)}

    def forward(self, x):
        self.kept = (x, [layer.W for layer in self.layers])
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, d):
        self.history.append(float(d.sum()))
        for layer in reversed(self.layers):
            d = layer.backward(d)


class AsLists:
    """What a native object has: lists of its arrays."""

    def __init__(self, net):
        self.net = net

    def parameters(self):
        return [array for layer in self.net.layers for array in (layer.W, layer.b)]

    def grads(self):
        return [array for layer in self.net.layers for array in (layer.dW, layer.db)]


def calls(function):
    """How many calls of Python functions, and of C functions from Python code, a call makes."""
    counts = {"call": 0, "c_call": 0}
    old = sys.getprofile()

    def profile(frame, event, arg):
        if event in counts:
            counts[event] += 1

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(old)
    return counts["call"], counts["c_call"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_step_looks_at_each_array_and_does_not_search(replaced):
    counted = []
    for make in (wrap, AsLists):
        net = Deep()
        module = make(net)
        opt = mt.Optimizer([module], lr=0.1)
        for _ in range(3):
            net.run(random(5, 3), random(5, 3))
            opt.step()
        net.run(random(5, 3), random(5, 3))
        if replaced:
            net.layers[3].W = net.layers[3].W.copy()
        counted.append(calls(opt.step))
        if make is wrap and not replaced:
            python, c = map(sum, zip(*map(calls, (module.parameters, module.grads, module.zero_grad)), strict=True))
            assert python <= 2 * 40 and c <= 4 * 40
    (wrapped, wrapped_c), (native, native_c) = counted
    assert wrapped <= 2 * native and wrapped_c <= 2 * native_c
