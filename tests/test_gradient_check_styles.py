"""The gradient check on networks in many styles: each is right, and a mistake in its first layer is found."""

import abc
import dataclasses
import itertools
import re

import numpy as np
import pytest

from minitorch_jax.adapters.numpy import check_gradients, wrap


def x_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


X, Y, CLASSES = x_of(6, 4), x_of(6, 3, seed=2), np.array([0, 1, 2, 0, 1, 2])


class Affine:
    """Keeps W and b, and assigns dW and db; dW is multiplied by `fault`."""

    def __init__(self, n_in, n_out, fault=1, dtype=np.float64):
        self.W, self.b, self.fault = x_of(n_in, n_out, seed=n_in).astype(dtype), np.zeros(n_out, dtype), fault
        self.dW = self.db = None

    def forward(self, x):
        self.x = x
        return x @ self.W + self.b

    def backward(self, dout):
        self.dW, self.db = self.fault * self.x.T @ dout, dout.sum(0)
        return dout @ self.W.T


class Tanh:
    def forward(self, x):
        self.y = np.tanh(x)
        return self.y

    def backward(self, dout):
        return dout * (1 - self.y**2)


class ReLU:
    def forward(self, x):
        self.mask = x <= 0
        out = x.copy()
        out[self.mask] = 0
        return out

    def backward(self, dout):
        dout[self.mask] = 0  # changes its argument
        return dout


class SoftmaxLoss:
    """With an epsilon that backward leaves out."""

    def forward(self, x, t):
        e = np.exp(x - x.max(1, keepdims=True))
        self.y, self.t = e / e.sum(1, keepdims=True), t
        self.loss = -np.log(self.y[np.arange(len(t)), t] + 1e-7).mean()
        return self.loss

    def backward(self, dout=1):
        d = self.y.copy()
        d[np.arange(len(d)), self.t] -= 1
        return d / len(d)


# -- results in attributes, and a flag for training --


class Stored:
    def __init__(self, n_in, n_out, fault=1):
        self.weights, self.biases, self.fault = 0.5 * x_of(n_in, n_out, seed=n_in), np.zeros((1, n_out)), fault

    def forward(self, inputs, training):
        self.inputs = inputs
        self.output = inputs @ self.weights + self.biases

    def backward(self, dvalues):
        self.dweights, self.dbiases = self.fault * self.inputs.T @ dvalues, dvalues.sum(0, keepdims=True)
        self.dinputs = dvalues @ self.weights.T


class StoredReLU:
    def forward(self, inputs, training):
        self.inputs, self.output = inputs, np.maximum(0, inputs)

    def backward(self, dvalues):
        self.dinputs = dvalues.copy()
        self.dinputs[self.inputs <= 0] = 0


class StoredLoss:
    """`forward` returns a loss for each row, and `backward` takes the scores' softmax, which it keeps."""

    def calculate(self, output, y):
        return self.forward(output, y).mean()

    def forward(self, inputs, y_true):
        e = np.exp(inputs - inputs.max(1, keepdims=True))
        self.output = e / e.sum(1, keepdims=True)
        return -np.log(self.output[range(len(y_true)), y_true])

    def backward(self, dvalues, y_true):
        self.dinputs = dvalues.copy()
        self.dinputs[range(len(y_true)), y_true] -= 1
        self.dinputs /= len(y_true)


def stored(fault):
    return [Stored(4, 5, fault), StoredReLU(), Stored(5, 3)], {"loss": StoredLoss(), "target": CLASSES}


def stored_and_fused(fault):
    class Softmax:
        def forward(self, inputs, training):
            e = np.exp(inputs - inputs.max(1, keepdims=True))
            self.output = e / e.sum(1, keepdims=True)

        def backward(self, dvalues):
            self.dinputs = dvalues.copy()

    class Entropy:
        def forward(self, y_pred, y_true):
            return -np.log(y_pred[range(len(y_true)), y_true])

        def backward(self, dvalues, y_true):
            self.dinputs = (dvalues - np.eye(3)[y_true]) / len(y_true)

    layers = [Stored(4, 5, fault), StoredReLU(), Stored(5, 3), Softmax()]
    return layers, {"loss": Entropy(), "target": CLASSES}


# -- dicts of parameters, and a loss with `loss` and `grad` --


class InDicts:
    def __init__(self, n_in, n_out, fault=1):
        self.params, self.grads, self.fault = {"w": x_of(n_in, n_out, seed=n_in), "b": x_of(n_out)}, {}, fault

    def forward(self, inputs):
        self.inputs = inputs
        return inputs @ self.params["w"] + self.params["b"]

    def backward(self, grad):
        self.grads["b"], self.grads["w"] = grad.sum(0), self.fault * self.inputs.T @ grad
        return grad @ self.params["w"].T


class Network:
    def __init__(self, *layers):
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad):
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad


class LossAndGrad:
    def loss(self, predicted, actual):
        return ((predicted - actual) ** 2).sum()

    def grad(self, predicted, actual):
        return 2 * (predicted - actual)


def in_dicts(fault):
    return Network(InDicts(4, 5, fault), Tanh(), InDicts(5, 3)), {"loss": LossAndGrad(), "target": Y}


# -- gradients that backward returns --


def returning(how):
    class Returns(Affine):
        def __init__(self, n_in, n_out, fault=1):
            self.W, self.b, self.fault = x_of(n_in, n_out, seed=n_in), x_of(n_out), fault

        def backward(self, dout):
            return how(dout @ self.W.T, self.fault * self.x.T @ dout, dout.sum(0))

    return lambda fault: ([Returns(4, 4, fault), Tanh(), Returns(4, 3)], {})


RETURNED = {
    "tuple": returning(lambda dx, dw, db: (dx, dw, db)),
    "tuple with a list": returning(lambda dx, dw, db: (dx, [dw, db])),
    "tuple with a dict": returning(lambda dx, dw, db: (dx, {"dW": dw, "db": db})),
    "dict": returning(lambda dx, dw, db: {"dx": dx, "W": dw, "b": db}),
}


# -- backward takes the input again --


def again(fault):
    class Dense:
        def __init__(self, n_in, n_out, fault=1):
            self.W, self.dW, self.fault = x_of(n_in, n_out, seed=n_in), None, fault

        def forward(self, inp):
            return inp @ self.W

        def backward(self, grad_output, inp):
            self.dW = self.fault * inp.T @ grad_output
            return grad_output @ self.W.T

    class Relu:
        def forward(self, input):
            return np.maximum(input, 0)

        def backward(self, input, grad_output):
            return grad_output * (input > 0)

    return [Dense(4, 5, fault), Relu(), Dense(5, 3)], {}


# -- other shapes of networks --


def norm(fault):
    class BatchNorm:
        def __init__(self):
            self.gamma, self.beta, self.running_mean = np.full((1, 5), 1.5), np.zeros((1, 5)), np.zeros((1, 5))
            self.dgamma = self.dbeta = None

        def forward(self, x):
            mean = x.mean(0, keepdims=True)
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
            self.inverse = 1 / np.sqrt(x.var(0, keepdims=True) + 1e-5)
            self.n = (x - mean) * self.inverse
            return self.gamma * self.n + self.beta

        def backward(self, dout):
            self.dgamma, self.dbeta = (dout * self.n).sum(0, keepdims=True), dout.sum(0, keepdims=True)
            d = dout * self.gamma
            return self.inverse * (d - d.mean(0) - self.n * (d * self.n).mean(0))

    layers = [Affine(4, 5, fault), BatchNorm(), ReLU(), Affine(5, 3)]
    return layers, {"loss": SoftmaxLoss(), "target": CLASSES}


def one_class(fault):
    class MLP:
        def __init__(self):
            self.W1, self.b1, self.W2, self.b2 = x_of(4, 5), np.zeros(5), x_of(5, 3), np.zeros(3)

        def forward(self, X):
            self.X, self.Z = X, X @ self.W1 + self.b1
            self.A = np.maximum(self.Z, 0)
            return self.A @ self.W2 + self.b2

        def backward(self, dY):
            self.dW2, self.db2, dZ = self.A.T @ dY, dY.sum(0), dY @ self.W2.T * (self.Z > 0)
            self.dW1, self.db1 = fault * self.X.T @ dZ, dZ.sum(0)

    return MLP(), {}


def tied(fault):
    class Out:
        def __init__(self, W):
            self.W, self.dW = W, None

        def forward(self, x):
            self.x = x
            return x @ self.W.T

        def backward(self, dout):
            self.dW = dout.T @ self.x
            return dout @ self.W

    first = Affine(4, 5, fault)
    return [first, Tanh(), Out(first.W)], {}


def data_class(fault):
    @dataclasses.dataclass
    class Dense:
        W: np.ndarray
        fault: float = 1
        dW: np.ndarray = None

        def forward(self, x):
            self.x = x
            return x @ self.W

        def backward(self, dout):
            self.dW = self.fault * self.x.T @ dout
            return dout @ self.W.T

    return [Dense(x_of(4, 5), fault), Tanh(), Dense(x_of(5, 2))], {}


def with_its_loss(fault):
    class Whole(Network):
        def __init__(self):
            super().__init__(Affine(4, 5, fault), Tanh(), Affine(5, 3))
            self.criterion = SoftmaxLoss()

        def forward(self, x):
            return self.criterion.forward(super().forward(x), CLASSES)

        def backward(self):
            return super().backward(self.criterion.backward())

    return Whole(), {}


def linked(fault):
    class Node(Affine):
        before = after = None

        def forward(self, x):
            self.out = np.tanh(super().forward(x))
            return self.after.forward(self.out) if self.after else self.out

        def backward(self, dout):
            dx = super().backward(dout * (1 - self.out**2))
            return self.before.backward(dx) if self.before else dx

    class Linked:
        def __init__(self):
            self.head, self.tail = Node(4, 5, fault), Node(5, 3)
            self.head.after, self.tail.before = self.tail, self.head

        def forward(self, x):
            return self.head.forward(x)

        def backward(self, dout):
            return self.tail.backward(dout)

    return Linked(), {}


def sparse(fault):
    """Many inputs are zero, and biases too: kinks everywhere."""
    layers = [Affine(4, 5, fault), ReLU(), Affine(5, 3)]
    layers[2].W[...] = 0
    return layers, {"loss": SoftmaxLoss(), "target": CLASSES}


# -- right only together: factors that cancel, and a fused softmax --


def columns(fault):
    """Examples are columns; layers divide by their number, and the loss does not."""

    class Dense:
        def __init__(self, n_in, n_out, fault=1):
            self.W, self.b, self.fault = x_of(n_out, n_in, seed=n_in), np.zeros((n_out, 1)), fault

        def forward(self, A):
            self.A = A
            return self.W @ A + self.b

        def backward(self, dZ):
            m = self.A.shape[1]
            self.dW, self.db = self.fault * dZ @ self.A.T / m, dZ.sum(1, keepdims=True) / m
            return self.W.T @ dZ

    class Sigmoid:
        def forward(self, Z):
            self.A = 1 / (1 + np.exp(-Z))
            return self.A

        def backward(self, dA):
            return dA * self.A * (1 - self.A)

    class Cost:
        def forward(self, A, Y):
            self.A, self.Y = A, Y
            return -(Y * np.log(A) + (1 - Y) * np.log(1 - A)).sum() / Y.shape[1]

        def backward(self):
            return -(self.Y / self.A - (1 - self.Y) / (1 - self.A))

    layers = [Dense(6, 5, fault), Sigmoid(), Dense(5, 1), Sigmoid()]
    return layers, {"loss": Cost(), "target": np.array([[1.0, 0.0, 1.0, 1.0]])}


class Softmax:
    def forward(self, x):
        e = np.exp(x - x.max(1, keepdims=True))
        self.y = e / e.sum(1, keepdims=True)
        return self.y

    def backward(self, dout):
        return dout


class CrossEntropy:
    def forward(self, y, t):
        self.y, self.t = y, t
        return -(t * np.log(y)).sum() / len(y)

    def backward(self):
        return (self.y - self.t) / len(self.y)


def fused(fault):
    layers = [Affine(4, 5, fault), Tanh(), Affine(5, 3), Softmax()]
    return layers, {"loss": CrossEntropy(), "target": np.eye(3)[CLASSES]}


def fused_in_a_network(fault):
    return Network(Affine(4, 5, fault), Tanh(), Affine(5, 3), Softmax()), fused(1)[1]


STYLES = {
    "stored": stored,
    "stored and fused": stored_and_fused,
    "dicts": in_dicts,
    **RETURNED,
    "again": again,
    "norm": norm,
    "one class": one_class,
    "tied": tied,
    "data class": data_class,
    "with its loss": with_its_loss,
    "linked": linked,
    "sparse": sparse,
    "columns": columns,
    "fused": fused,
    "fused in a network": fused_in_a_network,
}
FIRST = {"dicts": "layers.0", "one class": "", "with its loss": "layers.0", "linked": ""}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", STYLES)
def test_each_style_is_right_and_its_mistakes_are_found(name):
    network, options = STYLES[name](1)
    report = check_gradients(network, X, **options)
    assert report, str(report)
    for fault in (-1, 1.01, 2):
        network, options = STYLES[name](fault)
        report = check_gradients(network, X, **options)
        assert report.wrong == [FIRST.get(name, "layers.0")], str(report)
        wrong = [
            each.name for layer in report.layers if layer.state == "wrong" for each in layer.gradients if not each.ok
        ]
        assert wrong[0].rpartition(".")[2] in ("W", "w", "weights", "W1"), wrong


def loss_of(forward, backward):
    return type("Loss", (), {"forward": forward, "backward": backward})()


def half(y, t):
    return 0.5 * (y - t) ** 2


class TargetFirst:
    def loss(self, y, y_pred):
        return half(y_pred, y)  # one for each element

    def gradient(self, y, y_pred):
        return y_pred - y


LOSSES = {
    "of shape (1,)": lambda k: loss_of(
        lambda self, y, t: setattr(self, "d", k * (y - t)) or np.array([half(y, t).sum()]), lambda self: self.d
    ),
    "of shape (1, 1)": lambda k: loss_of(
        lambda self, y, t: setattr(self, "d", k * (y - t)) or np.array([[half(y, t).sum()]]), lambda self: self.d
    ),
    "backward takes output and target": lambda k: loss_of(
        lambda self, out, target: half(out, target).sum(), lambda self, out, target: k * (out - target)
    ),
    "backward takes the target": lambda k: loss_of(
        lambda self, y, t: setattr(self, "y", y) or half(y, t).sum(), lambda self, target: k * (self.y - target)
    ),
    "backward takes a gradient": lambda k: loss_of(
        lambda self, y, t: setattr(self, "d", k * (y - t)) or half(y, t).sum(), lambda self, grad: grad * self.d
    ),
    "target first": lambda k: (
        TargetFirst() if k == 1 else type("W", (TargetFirst,), {"gradient": lambda s, y, p: k * (p - y)})()
    ),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", LOSSES)
def test_conventions_of_losses(name):
    layers = [Affine(4, 5), Tanh(), Affine(5, 3)]
    report = check_gradients(layers, X, loss=LOSSES[name](1), target=Y)
    assert report, str(report)
    assert check_gradients(layers, X, loss=LOSSES[name](3), target=Y).wrong == ["loss"]
    with pytest.raises(TypeError, match="loss must be an object with forward.*got a function without a `backward`"):
        check_gradients(layers, X, loss=half, target=Y)


# -- what is not judged -----------------------------------------------------------------------------------------------


class Updates:
    """Trains itself: it keeps no gradient."""

    def __init__(self, n_in, n_out):
        self.weights = x_of(n_in, n_out)

    def forward(self, input):
        self.input = input
        return input @ self.weights

    def backward(self, output_error, learning_rate):
        dx = output_error @ self.weights.T
        self.weights -= learning_rate * self.input.T @ output_error
        return dx


class UpdatesBySelf(Updates):
    def backward(self, grad):
        return super().backward(grad, 0.1)


@pytest.mark.parametrize("kind", [Updates, UpdatesBySelf])
def test_layers_that_update_themselves_are_not_judged(kind):
    class Rated(Tanh):
        def backward(self, output_error, learning_rate):
            return super().backward(output_error)

    report = check_gradients([kind(4, 5), Rated(), kind(5, 3)], X)
    assert not report and report.wrong == []
    assert [layer.state for layer in report.layers] == ["not judged", "right", "not judged"]
    lines = [
        line for line in str(report).splitlines() if "changes parameters, not only their gradients: weights." in line
    ]
    assert len(lines) == 2 and all("Take the update out" in line for line in lines)


def test_a_convention_that_is_not_understood_is_not_judged():
    class Trains(Affine):
        def backward(self, X, y, batch):
            raise AssertionError

    report = check_gradients([Trains(4, 3)], X)
    assert not report and report.wrong == [] and report["layers.0"].state == "not judged"
    assert "backward() takes X, y, batch, and the check passes only the gradient of the output" in str(report)
    with pytest.raises(TypeError, match=r"layers\.1 of the list is a function, which has no `backward`"):
        check_gradients([Affine(4, 3), half], X)


def test_layers_that_were_not_looked_into_are_listed():
    layer = type("Meta", (type,), {})("Odd", (Affine,), {})(5, 3, 7)
    report = check_gradients([Affine(4, 5), layer], X)
    assert not report and report.wrong == [] and report["layers.1"].state == "not judged"
    assert "it was not looked into: its class is" in str(report)
    assert not hasattr(layer, "x")  # it ran as a copy


@pytest.mark.parametrize("bases", [(Affine,), (Affine, abc.ABC)], ids=["plain", "abstract"])
def test_classes_that_name_the_module_of_their_metaclass_are_looked_into(bases):
    made = abc.ABCMeta("Made", bases, {})
    assert made.__module__ == "abc"
    assert check_gradients([Affine(4, 5), made(5, 3)], X)
    assert check_gradients([Affine(4, 5), made(5, 3, 7)], X).wrong == ["layers.1"]
    assert [name for name, _ in wrap([made(5, 3)]).named_parameters()] == ["0.W", "0.b"]


def test_arrays_without_a_gradient_are_not_right():
    class Kernel:
        def __init__(self):
            self.kernel, self.table, self.velocity = x_of(4, 4), x_of(6, 4), np.zeros((4, 4))

        def forward(self, x):
            self.x = x
            return x @ self.kernel + self.table

        def backward(self, dout):
            self.found = self.x.T @ dout
            return dout @ self.kernel.T

    report = check_gradients([Kernel()], X)
    assert not report and report.wrong == [] and report["layers.0"].state == "not checked"
    assert "the output depends on layers.0.kernel" in str(report) and "gradients={'kernel': 'found'}" in str(report)
    assert "velocity" not in str(report)
    for options in ({"frozen": "*.table"}, {"ignored": ["table"]}, {"frozen": "layers.0.table"}):
        assert check_gradients([Kernel()], X, gradients={"kernel": "found"}, **options)
        assert not check_gradients([Kernel()], X, **options)

    class Lazy(Kernel):
        kernel = None

        def __init__(self):
            self.table = 0

        def forward(self, x):
            self.kernel = x_of(4, 4) if self.kernel is None else self.kernel
            return super().forward(x)

    assert "the output depends on layers.0.kernel" in str(check_gradients([Lazy()], X))

    class Own:
        def __init__(self):
            self.layer, self.scale, self.dscale = Affine(4, 3), x_of(3), None

        def forward(self, x):
            return self.layer.forward(x) * self.scale

    report = check_gradients(Own(), X)  # no backward: who computes dscale?
    assert not report and report[""].state == "not checked" and report["layer"].state == "right"
    assert "the output depends on scale, and the network has no backward" in str(report)


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_float64_mask_in_float32_layers_is_a_note():
    class Dropout:
        def __init__(self):
            self.rng = np.random.default_rng(0)

        def forward(self, x):
            self.mask = (self.rng.random(x.shape) > 0.5) * 2.0
            return x * self.mask

        def backward(self, dout):
            return dout * self.mask

    x = X.astype(np.float32)
    layers = Affine(4, 5, dtype=np.float32), Dropout(), Affine(5, 3, dtype=np.float32)
    for network in (list(layers), Network(*layers)):
        report = check_gradients(network, x)
        assert report, str(report)
        assert re.search(
            r"layers\.1 \(Dropout\):\n  note: forward\(\) returns float64 for float32 arguments", str(report)
        )
    assert "note" not in str(check_gradients([Affine(4, 5), Dropout()], X))


def test_weight_decay_is_named_with_its_factor():
    class Decayed(Affine):
        def backward(self, dout):
            dx = super().backward(dout)
            self.dW = self.dW + 0.003 * self.W
            return dx

    report = check_gradients([Decayed(4, 5)], X)
    assert report.wrong == ["layers.0"]
    assert "it is the right one plus 0.003 times W: weight decay, which forward() does not have" in str(report)


@pytest.mark.parametrize("fault", [1, 3])
def test_keepdims_is_named_and_the_values_are_compared(fault):
    class Flat(Affine):
        def __init__(self):
            super().__init__(4, 5)
            self.b = np.zeros((1, 5))

        def backward(self, dout):
            dx = super().backward(dout)
            self.db = fault * self.db
            return dx

    report = check_gradients([Flat()], X)
    assert report.wrong == ["layers.0"]
    assert "its shape is (5,) and should be (1, 5): sum over axis 0 with keepdims=True" in str(report)
    assert ("Its values are wrong, too: it is 3 times the right one" in str(report)) == (fault == 3)


def test_a_forgotten_derivative_is_no_stale_cache():
    class Forgets(Affine):
        def forward(self, x):
            return np.tanh(super().forward(x))

    texts = []
    for ran in (False, True):
        layer = Forgets(4, 5)
        if ran:
            layer.forward(x_of(6, 4, seed=9))
            layer.backward(x_of(6, 5, seed=8))
        report = check_gradients([layer], X)
        assert report.wrong == ["layers.0"] and "stale" not in str(report)
        texts.append(str(report))
    assert texts[0] == texts[1]


def test_an_output_of_the_authors_own_class_is_named():
    class Tensor:
        def __init__(self, data):
            self.data = data

    class Wraps(Affine):
        def forward(self, x):
            return Tensor(super().forward(x))

    with pytest.raises(
        TypeError, match=r"layers\.0: forward\(\) must return an array.*got an object of its own class, Tensor"
    ):
        check_gradients([Wraps(4, 5)], X)


def test_adding_and_assigning():
    class Adds(Affine):
        def __init__(self, *args):
            super().__init__(*args)
            self.dW, self.db = np.zeros_like(self.W), np.zeros_like(self.b)

        def backward(self, dout):
            self.dW += self.x.T @ dout
            self.db += dout.sum(0)
            return dout @ self.W.T

    class Mixes(Adds):
        def backward(self, dout):
            dx = super().backward(dout)
            self.db = dout.sum(0)
            return dx

    report = check_gradients([Adds(4, 5), Affine(5, 3)], X)
    assert [layer.accumulates for layer in report.layers] == [True, False]
    assert "backward() adds to gradients in layers.0 (Adds), and overwrites them in layers.1 (Affine)" in str(report)
    assert check_gradients([Adds(4, 5), Affine(5, 3)], X, accumulates=True).wrong == ["layers.1"]
    assert check_gradients([Adds(4, 5), Affine(5, 3)], X, accumulates=False).wrong == ["layers.0"]
    report = check_gradients([Mixes(4, 5)], X)
    assert report.wrong == ["layers.0"]
    assert "backward() adds to the gradient by W, and assigns that by b: do the same for both" in str(report)


def test_several_possible_gradients_are_not_judged():
    class Two(Affine):
        def __init__(self, *args):
            super().__init__(*args)
            self.grad_W = None

        def backward(self, dout):
            dx = super().backward(dout)
            self.dW, self.grad_W = 2 * self.dW, self.dW
            return dx

    report = check_gradients([Two(4, 5)], X)
    assert not report and report.wrong == [] and report["layers.0"].state == "not judged"
    assert re.search(r"W has several possible gradients, (dW and grad_W|grad_W and dW)", str(report))
    assert check_gradients([Two(4, 5)], X, gradients={"W": "grad_W"})
    assert check_gradients([Two(4, 5)], X, gradients={"W": "dW"}).wrong == ["layers.0"]


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_sizes_of_inputs_do_not_matter(size):
    for fault in (1, 1.001):
        report = check_gradients([Affine(4, 5, fault), Tanh()], size * X)
        assert bool(report) == (fault == 1), str(report)


def test_an_epsilon_in_a_saturated_loss_is_a_note():
    """Where y is far smaller than the epsilon, the gradients differ by all of themselves."""
    report = check_gradients([Affine(4, 5)], 20 * X, loss=SoftmaxLoss(), target=np.arange(6) % 5)
    assert report and "because of a small constant" in str(report), str(report)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_probability_that_is_exactly_zero_is_judged_elsewhere(clipped, factor):
    """There the logarithm is constant, so a fused gradient cannot fit it."""

    class Loss:
        def forward(self, scores, target):
            e = np.exp(scores - scores.max(1, keepdims=True))
            self.y, self.t = e / e.sum(1, keepdims=True), target
            y = np.clip(self.y, 1e-12, 1) if clipped else self.y + 1e-9
            return -np.sum(target * np.log(y)) / len(y)

        def backward(self):
            return (self.y - factor * self.t) / len(self.y)

    scores = x_of(3, 3)
    scores[0], scores[1] = [0, 0, -900], [2000, 0, 0]
    report = check_gradients(Loss(), scores, np.eye(3)[[2, 1, 0]])
    assert bool(report) == (factor == 1), str(report)
    assert ("a small constant decides the output of forward" in str(report)) == (factor == 1)


def test_a_target_is_not_varied():
    """The fused gradient is right only for targets that sum to 1."""

    class Loss(SoftmaxLoss):
        def forward(self, scores, target):
            e = np.exp(scores - scores.max(1, keepdims=True))
            self.y, self.t = e / e.sum(1, keepdims=True), target
            return -np.sum(target * np.log(self.y + 1e-9)) / len(scores)

        def backward(self):
            return (self.y - self.t) / len(self.y)

    assert check_gradients(Loss(), 1000 * np.eye(3), np.eye(3))  # all gradients are zero, and tested nearby


def test_a_cache_that_is_kept_only_once_is_no_parameter():
    class Stale(Affine):
        inputs = None

        def forward(self, x):
            if self.inputs is None:
                self.inputs = x
            return x @ self.W + self.b

        def backward(self, dout):
            self.dW, self.db, self.dinputs = self.inputs.T @ dout, dout.sum(0), dout @ self.W.T
            return self.dinputs

    for ran in (False, True):
        layer = Stale(4, 5)
        if ran:
            layer.forward(x_of(6, 4, seed=9))
        report = check_gradients([layer], X)
        assert report.wrong == ["layers.0"] and "stale cache" in str(report)
        assert [each.name for each in report["layers.0"].gradients] == ["input", "W", "b"]


@pytest.mark.parametrize(("bound", "state"), [(100.0, "wrong"), (0.1, "not checked")])
def test_a_parameter_that_forward_replaces_is_not_left_out(bound, state):
    class Bounded(Affine):
        def forward(self, x):
            bounded = np.clip(self.W, -bound, bound)
            self.W = bounded
            return super().forward(x)

    report = check_gradients([Bounded(4, 3, 2)], X)
    assert report["layers.0"].state == state, str(report)
    assert check_gradients([Bounded(4, 3)], X) if state == "wrong" else "forward() replaces layers.0.W" in str(report)
    assert [name for name, _ in wrap([Bounded(4, 3)]).named_parameters()] == ["0.W", "0.b"]


def test_running_statistics_of_an_evaluation_are_named_ready_to_paste():
    class Evaluated(Affine):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.running_mean, self.running_var = np.ones(4), np.full(4, 2.0)

        def forward(self, x):
            return super().forward((x - self.running_mean) / np.sqrt(self.running_var))

        def backward(self, dout):
            return super().backward(dout) / np.sqrt(self.running_var)

    report = check_gradients([Evaluated(4, 3)], X)
    assert not report and report.wrong == []
    assert "If it is not trained: frozen=['*running_mean', '*running_var']" in str(report)
    assert check_gradients([Evaluated(4, 3)], X, frozen=["*running_mean", "*running_var"])


def test_a_proposal_for_a_gradient_can_be_pasted():
    class Model:
        def __init__(self):
            self.stages, self.made = [(x_of(4, 3), np.zeros(3))], None

        def forward(self, x):
            self.x = x
            return x @ self.stages[0][0] + self.stages[0][1]

        def backward(self, dout):
            self.made = [(self.x.T @ dout, dout.sum(0))]
            return dout @ self.stages[0][0].T

    assert "gradients={'stages': 'made'}" in str(check_gradients(Model(), X))
    assert check_gradients(Model(), X, gradients={"stages": "made"})


def test_a_weight_decay_that_backward_lacks():
    class Regularized(Affine):
        def forward(self, x):
            return 0.5 * np.square(super().forward(x)).sum() + 0.2 * np.square(self.W).sum()

        def backward(self):
            return super().backward(self.x @ self.W + self.b)

    text = str(check_gradients(Regularized(4, 3), X))
    assert "the right one less 0.4 times W: forward() has a weight decay that is missing in backward()" in text


RUNS = itertools.count()


def test_a_right_layer_needs_some_tens_of_runs():
    class Counts(Affine):
        def forward(self, x):
            next(RUNS)
            return super().forward(x)

    start = next(RUNS)
    assert check_gradients([Counts(4, 5), Tanh()], X)
    assert next(RUNS) - start < 80  # of the layer by itself, and in the list as a whole
