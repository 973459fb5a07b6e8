"""The gradient check on what is not plain: kinks, code that JAX cannot trace, random numbers, state."""

import copy
import functools
import pickle
import random
import re
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import MutableMapping
from types import SimpleNamespace

import numpy as np
import numpy_layers as zoo
import pytest

from minitorch_jax.adapters import numpy as mini
from minitorch_jax.adapters.numpy import check_gradients


def x_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


class Elementwise(zoo.Layer):
    """A function of each element and its derivative."""

    def __init__(self, f, df):
        self.f, self.df = f, df

    def forward(self, x):
        self.x = x
        return self.f(x)

    def backward(self, dout):
        return dout * self.df(self.x)


# -- what the check leaves alone --------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)
SEEN = []
CACHE = {}


class Global(zoo.Layer):
    """Keeps state in its module, in its class and in a closure, and draws from a generator of its module."""

    calls = [0]

    def __init__(self):
        inner = []

        def note(x):
            inner.append(x)
            return len(inner)

        self.note, self.inner = note, inner

    def forward(self, x):
        SEEN.append(x)
        CACHE["mask"] = RNG.random(x.shape) > 0.3
        self.calls[0] += 1
        self.note(x)
        return x * CACHE["mask"] * np.random.random(x.shape) * random.random()

    def backward(self, dout):
        raise NotImplementedError


class Dropouts(Global):
    """The same, with a right backward."""

    def forward(self, x):
        super().forward(x)
        self.scale = CACHE["mask"] * np.random.random(x.shape) * random.random()
        return x * self.scale

    def backward(self, dout):
        return dout * self.scale


def state_of_the_world():
    return pickle.dumps([RNG.bit_generator.state, SEEN, CACHE, Global.calls, np.random.get_state(), random.getstate()])


def test_nothing_of_the_users_changes():
    net = zoo.Net(zoo.Dense(3, 3, np.float32), zoo.BatchNorm(3, np.float32), Dropouts(), zoo.Dropout(), zoo.Residual(3))
    net(x_of(4, 3).astype(np.float32))  # so that there are caches
    arrays = [net.layers[0].W, net.layers[0].dW, net.layers[1].running_mean, net.layers[1].xhat]
    note, inner = net.layers[2].note, net.layers[2].inner
    SEEN.clear()

    def everything():
        layers = [{k: v for k, v in vars(layer).items() if k != "note"} for layer in net.layers]
        return pickle.dumps([layers, [layer.__class__ for layer in net.layers]])

    before, world = everything(), state_of_the_world()
    x = x_of(5, 3).astype(np.float32)
    kept = x.copy()
    assert check_gradients(net, x)
    assert everything() == before and state_of_the_world() == world
    np.testing.assert_array_equal(x, kept)
    now = [net.layers[0].W, net.layers[0].dW, net.layers[1].running_mean, net.layers[1].xhat]
    assert all(a is b for a, b in zip(arrays, now, strict=True)) and now[0].dtype == np.float32
    assert net.layers[2].note is note and note.__closure__[0].cell_contents is inner and len(inner) == 1
    assert type(net.layers[2]) is Dropouts and Dropouts.__subclasses__() == []


class Ordered(OrderedDict):
    pass


class Default(defaultdict):
    pass


class Rows(UserList):
    pass


class Recent(deque):
    pass


class Dotted(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class Mapped(MutableMapping):
    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


CONTAINERS = {
    "namespace": SimpleNamespace,
    "ordered": Ordered,
    "default": lambda **items: Default(list, items),
    "counter": Counter,
    "user dict": UserDict,
    "user list": lambda **items: Rows(items.values()),
    "deque": lambda **items: Recent(items.values(), maxlen=2),
    "attributes": Dotted,
    "mapping": Mapped,
}


class Contained:
    """Keeps all that it has in a container."""

    def __init__(self, make, factor):
        self.state, self.factor = make(W=x_of(3, 2), dW=np.zeros((3, 2))), factor

    def both(self):
        state = vars(self.state) if isinstance(self.state, SimpleNamespace) else self.state
        return (state["W"], state["dW"]) if hasattr(state, "keys") else state

    def forward(self, x):
        self.x = x
        return x @ self.both()[0]

    def backward(self, dout):
        W, dW = self.both()
        dW += self.factor * self.x.T @ dout
        return dout @ W.T


@pytest.mark.parametrize("name", CONTAINERS)
def test_state_in_containers_is_copied(name):
    for factor in (1, 5):
        layer = Contained(CONTAINERS[name], factor)
        W, dW = layer.both()
        report = check_gradients(layer, x_of(5, 3))
        assert layer.both()[0] is W and not dW.any()
        np.testing.assert_array_equal(W, x_of(3, 2))
        names = [each.name for each in report[""].gradients]
        assert len(names) == 2
        if name in ("user list", "deque"):  # a list of both has no names
            assert not report and report.wrong == [] and "1 of 1 layers is not checked: Contained" in str(report)
        else:
            assert bool(report) == (factor == 1), str(report)


def test_a_check_that_raises_changes_nothing():
    net, world = zoo.Net(Global(), zoo.Dense(3, 2)), state_of_the_world()
    report = check_gradients(net, x_of(5, 3))
    assert report.wrong == ["layers.0"]
    assert "backward() raised NotImplementedError: without a message" in str(report)
    assert state_of_the_world() == world


def test_a_generator_without_a_seed_is_refused():
    class Unseeded(zoo.Dropout):
        def forward(self, x):
            self.rng = np.random.default_rng()
            return super().forward(x)

    with pytest.raises(
        ValueError, match=r"layers\.1: two runs of forward on the same input differ.*keep a np\.random\.Gen"
    ):
        check_gradients(zoo.Net(zoo.Dense(3, 3), Unseeded()), x_of(5, 3))


# -- kinks ------------------------------------------------------------------------------------------------------------


def test_relu_at_zero_is_noted_and_not_judged():
    x = np.array([[0.0, 1.0, -1.0], [0.0, 0.0, 2.0]])
    for relu in (zoo.ReLU(), mini.ReLU()):  # of these one copies and assigns, one is np.maximum
        assert check_gradients(relu, x)
    report = check_gradients(mini.ReLU(), x)
    assert "judged beside a kink" in str(report)
    assert "forward has a kink at this input, where the left and right slopes differ" in str(report)


def test_a_mistake_beside_a_kink_is_found():
    class Leaks(mini.ReLU):
        def backward(self, dout):
            dx = super().backward(dout)
            dx[1, 1] = 7
            return dx

    report = check_gradients(Leaks(), np.array([[0.0, 1.0, -1.0], [0.0, 2.0, 2.0]]))
    (found,) = report[""].gradients
    assert report.wrong == [""] and found.index == (1, 1) and found.got == 7
    assert found.remark == "beside a kink" and "only at 1 of axis 0" in found.hint


def test_many_kinks():
    x = x_of(12, 10)
    x[:, :8] = 0
    assert "judged beside a kink" in str(check_gradients(mini.ReLU(), x))

    class Slightly(mini.ReLU):
        def backward(self, dout):
            return super().backward(dout) + 1e-4 * (np.arange(10) == 9)

    report = check_gradients(Slightly(), x)
    assert report.wrong == [""] and not report[""].gradients[0].ok


@pytest.mark.slow
def test_ties_in_max_pooling_and_dead_rows():
    assert check_gradients(zoo.MaxPool(), np.zeros((2, 1, 4, 4)))
    net = mini.Sequential(mini.Linear(3, 4, rng=0), mini.ReLU(), mini.Linear(4, 2, rng=1))
    net[0].b[...] = 0
    x = x_of(5, 3)
    x[2] = 0
    report = check_gradients(net, x)
    assert report, str(report)
    assert "kink" in str(report)


CURVED = {
    "log": (np.log, lambda x: 1 / x),
    "reciprocal": (lambda x: 1 / x, lambda x: -(x**-2)),
    "sqrt": (np.sqrt, lambda x: 0.5 / np.sqrt(x)),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("size", [5e-3, 5e-4, 1e-5, 1e-9])
@pytest.mark.parametrize("name", CURVED)
def test_what_curves_strongly_has_no_kink(name, size):
    f, df = CURVED[name]
    x = size * np.array([[1.0, 1.1]])

    def outside(x):
        return np.array(memoryview(f(np.array(memoryview(np.ascontiguousarray(x))))))

    def narrow(x):
        out = np.empty(x.shape, "f")
        out[:] = f(x)
        return out

    for g in [f, outside] + [narrow] * (size > 1e-3):
        assert check_gradients(Elementwise(g, df), x)
        report = check_gradients(Elementwise(g, lambda x: -df(x)), x)
        assert report.wrong == [""] and "kink" not in str(report)


def test_a_loss_of_small_probabilities_is_judged():
    class CrossEntropy(zoo.Layer):
        def forward(self, p, t):
            self.p, self.picked = p, (np.arange(len(t)), t)
            return -np.log(p[self.picked]).mean()

        def backward(self):
            dp = np.zeros_like(self.p)
            dp[self.picked] = -1 / self.p[self.picked]
            return dp

    report = check_gradients([zoo.Softmax()], 0.01 * x_of(2, 1500), loss=CrossEntropy(), target=np.array([7, 900]))
    assert report.wrong == ["loss"] and "2 times the right one" in str(report)


def test_the_edge_of_a_domain():
    x = np.array([[0.0, 1.0, 4.0]])
    assert check_gradients(Elementwise(np.sqrt, lambda x: 0.5 / np.sqrt(x)), x)
    assert check_gradients(Elementwise(np.sqrt, lambda x: 1 / np.sqrt(x)), x).wrong == [""]
    report = check_gradients(Elementwise(np.sqrt, lambda x: 0.5 / np.sqrt(x + 1e-12)), x)
    assert report and "judged beside a kink" in str(report)
    report = check_gradients(Elementwise(lambda x: np.sqrt(np.array(memoryview(x))), lambda x: 0.5 / np.sqrt(x)), x)
    assert report, str(report)


def test_a_branch_that_is_not_taken_does_not_count():
    layer = Elementwise(
        lambda x: np.where(x > 0, np.sqrt(x), 0), lambda x: np.where(x > 0, 0.5 / np.sqrt(np.abs(x)), 0)
    )
    x = np.array([[1.0, -2.0, 4.0]])
    report = check_gradients(layer, x)
    assert report and report[""].gradients[0].error < 1e-6


# -- any code ---------------------------------------------------------------------------------------------------------


def by_objects(x):
    return np.frompyfunc(lambda v: v**3, 1, 1)(np.asarray(memoryview(np.ascontiguousarray(x)))).astype(float)


def test_code_of_any_library_is_checked():
    right = check_gradients(Elementwise(by_objects, lambda x: 3 * x**2), x_of(5, 3))
    assert right, str(right)
    wrong = check_gradients(Elementwise(by_objects, lambda x: -3 * x**2), x_of(5, 3))
    assert wrong.wrong == [""] and wrong[""].gradients[0].hint == "its sign is wrong"


def test_a_network_with_such_code_is_checked_layer_by_layer():
    class Half(zoo.Dense):
        def backward(self, dout):
            return super().backward(dout) / 2

    net = zoo.Net(zoo.Dense(4, 3), Elementwise(by_objects, lambda x: 3 * x**2), Half(3, 3), zoo.Sigmoid())
    report = check_gradients(net, 0.3 * x_of(5, 4))
    assert report.wrong == ["layers.2"] and report["layers.2"].gradients[0].hint == "it is 1/2 of the right one"
    assert report["layers.0"].state == report["layers.1"].state == "right"


def test_one_wrong_element_of_a_large_array_is_found():
    """Random directions miss no element; halves of a direction lead to it."""

    class Spoilt(Elementwise):
        def backward(self, dout):
            dx = super().backward(dout)
            dx[31, 17] += 1e-2
            return dx

    assert check_gradients(Elementwise(np.sin, np.cos), x_of(50, 40))
    report = check_gradients(Spoilt(np.sin, np.cos), x_of(50, 40))
    (found,) = report[""].gradients
    assert report.wrong == [""] and found.index == (31, 17)
    assert found.got - found.expected == pytest.approx(1e-2, rel=1e-5)


def test_code_that_rounds_to_float32():
    def tanh(dtype, back=None):
        return lambda x: np.tanh(x.astype(dtype)).astype(back or dtype)

    for f in (tanh("float32"), tanh("float32", "float64")):
        report = check_gradients(Elementwise(f, lambda x, f=f: 1 - f(x) ** 2), x_of(5, 3))
        assert report and "rounds to fewer bits than float64" in str(report), str(report)
        assert not check_gradients(Elementwise(f, lambda x, f=f: 1.001 - f(x) ** 2), x_of(5, 3))
    report = check_gradients(
        Elementwise(tanh(np.float32), lambda x: 1 - np.tanh(x.astype(np.float32)) ** 2), x_of(5, 3)
    )
    assert report[""].gradients[0].error < 1e-9 and not report[""].notes  # said by its name, it is taken as float64


def test_python_control_flow_and_numbers():
    def f(x):
        total = 0.0
        for row in x:
            if row.sum() > 0:  # a branch that depends on values
                total = total + float(row[0]) * float(np.max(row))
            else:
                total += row[int(np.argmin(row))]
        return total

    def df(x):
        grad = np.zeros_like(x)
        for row, out in zip(x, grad, strict=True):
            if row.sum() > 0:
                out[0] += row.max()
                out[row.argmax()] += row[0]
            else:
                out[row.argmin()] += 1
        return grad

    class Total(Elementwise):
        def backward(self):
            return self.df(self.x)

    report = check_gradients(Total(f, df), x_of(5, 3))
    assert report and report[""].gradients[0].error < 1e-9


# -- other shapes of layers and networks ------------------------------------------------------------------------------


class Recurrent(zoo.RNNCell):
    """Keeps its state from one call to the next."""

    def __init__(self, *args):
        super().__init__(*args)
        self.state = None

    def forward(self, x):
        self.state = super().forward(x, np.zeros((len(x), len(self.b))) if self.state is None else self.state)
        return self.state

    def backward(self, dout):
        return super().backward(dout)[0]


class Slotted:
    __slots__ = ("W", "dW", "x")

    def __init__(self):
        self.W, self.dW = x_of(3, 2), None

    def __call__(self, x):
        self.x = x
        return x @ self.W

    def backward(self, dout):
        self.dW = (0 if self.dW is None else self.dW) + self.x.T @ dout  # and no gradient by the input


class Lazy(zoo.Dense):
    """Makes its parameters at the first call."""

    def __init__(self):
        self.W = self.b = self.dW = self.db = None

    def forward(self, x):
        if self.W is None:
            super().__init__(x.shape[1], 2)
        return super().forward(x)


class Stack(zoo.Dense):
    """Caches on a list, which backward takes from."""

    def __init__(self, *args):
        super().__init__(*args)
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return super().forward(x)

    def backward(self, dout):
        self.x = self.inputs.pop()
        return super().backward(dout)


class Flat:
    """Parameters and gradients are views of two flat arrays, made anew at each call."""

    def __init__(self):
        self.flat, self.dflat = x_of(8), np.zeros(8)

    def parameters(self):
        return [self.flat[:6].reshape(3, 2), self.flat[6:]]

    def grads(self):
        return [self.dflat[:6].reshape(3, 2), self.dflat[6:]]

    def forward(self, x):
        self.x, (W, b) = x, self.parameters()
        return x @ W + b

    def backward(self, dout):
        dW, db = self.grads()
        dW += self.x.T @ dout
        db += dout.sum(0)
        return dout @ self.parameters()[0].T


class Layers(list):
    """A network that is a list."""

    def forward(self, x):
        return functools.reduce(lambda x, layer: layer.forward(x), self, x)

    def backward(self, dout):
        return functools.reduce(lambda d, layer: layer.backward(d), reversed(self), dout)


@pytest.mark.parametrize(
    "network",
    [
        Recurrent(3, 4),
        Slotted(),
        Lazy(),
        Stack(3, 2),
        pytest.param(Flat(), marks=pytest.mark.slow),
        Layers([zoo.Dense(3, 2), zoo.Sigmoid()]),
    ],
)
def test_layers_of_many_kinds(network):
    report = check_gradients(network, x_of(5, 3))
    assert report, str(report)
    named = {each.name for each in report.layers[0].gradients}
    assert len(named - {"input"}) == {"Recurrent": 3, "Slotted": 1}.get(type(network).__name__, 2), named


def test_a_parameter_that_forward_does_not_use_is_told():
    class Copies(Flat):
        def forward(self, x):
            self.x = x
            return x @ x_of(3, 2, seed=9) + 1

    report = check_gradients(Copies(), x_of(5, 3))
    assert report.wrong == [""] and "should be 0" in str(report)


def test_overwriting_on_purpose():
    class Overwrites(zoo.Dense):
        def backward(self, dout):
            self.dW, self.db = self.x.T @ dout, dout.sum(0)
            return dout @ self.W.T

    assert check_gradients(Overwrites(3, 2), x_of(5, 3), accumulates=False)
    report = check_gradients(zoo.Dense(3, 2), x_of(5, 3), accumulates=False)
    assert "with accumulates=False, backward() must overwrite gradients; it does not for W, b" in str(report)


def test_a_gradient_of_another_dtype():
    class Wide(zoo.Dense):
        def __init__(self, *args):
            super().__init__(*args, dtype=np.float32)
            self.db = np.zeros(2)

    report = check_gradients(Wide(3, 2), x_of(5, 3).astype(np.float32))
    assert report.wrong == [""] and report[""].problems == ("b is float32, and its gradient is float64",)


def test_a_gradient_that_is_never_made():
    class Never(zoo.Dense):
        def __init__(self, *args):
            super().__init__(*args)
            self.db = None

        def backward(self, dout):
            self.dW += self.x.T @ dout
            return dout @ self.W.T

    report = check_gradients(Never(3, 2), x_of(5, 3))
    assert "the gradient by b is wrong: backward() computes none" in str(report)


def test_what_is_raised_or_added_at_a_second_call():
    class Once(zoo.Sigmoid):
        y = None

        def forward(self, x):
            if self.y is not None:
                raise RuntimeError("once only")
            return super().forward(x)

    report = check_gradients([zoo.Dense(3, 3), Once()], x_of(5, 3))
    assert report.wrong == ["layers.1"]
    assert "RuntimeError: once only" in str(report)

    class Twice(zoo.Dense):
        calls = 0

        def backward(self, dout):
            self.calls += 1
            dx = super().backward(dout)
            self.db += self.calls - 1
            return dx

    said = "at its second call, backward() returns a wrong gradient by b"
    assert said in str(check_gradients(Twice(3, 2), x_of(5, 3)))

    class Fades(zoo.Dense):
        def backward(self, dout):
            self.dW *= 0.5
            return super().backward(dout)

    assert "do not add up in the gradient by W: they should add up" in str(check_gradients(Fades(3, 2), x_of(5, 3)))

    class Fragile(zoo.Sigmoid):
        count = 0

        def backward(self, dout):
            self.count += 1
            if self.count > 1:
                raise RuntimeError("twice")
            return super().backward(dout)

    report = check_gradients(Fragile(), x_of(5, 3))
    assert "when it was called a second time, the layer raised RuntimeError: twice (line" in str(report)

    class Strict(zoo.Dense):
        def backward(self, dout):
            np.add(self.db, np.zeros(2), out=self.db, casting="no")
            return super().backward(dout)

    report = check_gradients(Strict(3, 2, np.float32), x_of(5, 3))
    assert "in a run with its own dtypes, the layer raised" in str(report)

    class Picky(zoo.Sigmoid):
        def forward(self, x):
            if abs(x[0, 0] - x_of(5, 3)[0, 0]) > 0.1:
                raise ValueError("not my batch")
            return super().forward(x)

    report = check_gradients(Picky(), x_of(5, 3))
    assert "note: the check for values kept from an earlier batch was skipped: forward raised ValueError: not" in str(
        report
    )


def test_two_wrong_layers_are_both_named():
    wrong = type("Wrong", (zoo.Dense,), {"backward": lambda self, dout: -zoo.Dense.backward(self, dout)})
    report = check_gradients([wrong(3, 3), zoo.Sigmoid(), zoo.Net(wrong(3, 3))], x_of(5, 3))
    assert report.wrong == ["layers.0", "layers.2.layers.0"]
    assert report["layers.2"].state == "unknown"
    assert str(report).startswith(
        "gradient check: 2 of 4 layers are wrong: layers.0 (Wrong), layers.2.layers.0 (Wrong)\n"
    )


def test_a_wrong_loss_does_not_blame_the_layers():
    loss = type("Loss", (zoo.CrossEntropy,), {"backward": lambda self: 2 * zoo.CrossEntropy.backward(self)})()
    report = check_gradients([zoo.Dense(3, 3), zoo.ReLU()], x_of(5, 3), loss=loss, target=np.array([0, 1, 2, 0, 1]))
    assert report.wrong == ["loss"]


def test_layers_that_do_not_run_and_gradients_that_are_zero():
    net = zoo.Net(zoo.Dense(3, 2))
    net.spare = zoo.Dense(2, 2)
    report = check_gradients(net, x_of(5, 3), dout=np.zeros((5, 2)))
    assert report and report["spare"].state == "not run" and "spare (Dense)" in str(report)
    assert "zero for this input, so hardly tested" in str(check_gradients(zoo.ReLU(), np.full((5, 3), -5.0)))
    wrong = type(
        "Wrong", (zoo.Dense,), {"backward": lambda self, dout: zoo.Dense.backward(self, dout) + 0 * self.add()}
    )
    wrong.add = lambda self: self.dW.__iadd__(self.dW).sum()
    assert check_gradients(zoo.Dense(3, 2), np.zeros((5, 3)))  # where W has a gradient of zeros
    assert check_gradients(wrong(3, 2), np.zeros((5, 3))).wrong == [""]


class Split(zoo.Layer):
    """Two outputs."""

    def forward(self, x):
        self.x = x
        return x[:, :2] * 2, np.tanh(x)

    def backward(self, *douts):
        first, second = douts if len(douts) == 2 else douts[0]
        dx = second * (1 - np.tanh(self.x) ** 2)
        dx[:, :2] += 2 * first
        return dx


def test_more_than_one_output():
    class Together(Split):
        def backward(self, douts):
            return super().backward(douts)

    class Halves(Split):
        def forward(self, x):
            return [half.copy() for half in super().forward(x)]

        def backward(self, first, second):
            return super().backward(second[:, :2], second)

    assert check_gradients(Split(), x_of(5, 3)) and check_gradients(Together(), x_of(5, 3))
    report = check_gradients(Halves(), x_of(5, 3), dout=(x_of(5, 2), x_of(5, 3)))
    assert report.wrong == [""]
    with pytest.raises(ValueError, match=r"the network's output, \[\(5, 2\), \(5, 3\)\]; got \(5, 3\)"):
        check_gradients(Split(), x_of(5, 3), dout=x_of(5, 3))


def test_arguments_that_hold_arrays_are_noted():
    class Pair(zoo.Layer):
        def forward(self, x, state, *, scale):
            self.h, self.scale = state[0], scale
            state.append(x)  # a list of the user's
            return x * self.h * scale

        def backward(self, dout):
            return dout * self.h * self.scale, [dout]

    class Holder(zoo.Layer):
        def __init__(self):
            self.pair = Pair()

        def forward(self, x):
            return self.pair.forward(x, [x + 1], scale=np.float32(2))

        def backward(self, dout):
            return None

    report = check_gradients(Holder(), x_of(5, 3))
    assert report and report["pair"].state == "right"
    assert "the gradients by arrays inside argument 1 are not checked" in str(report)
    assert report[""].gradients[0].remark == "not computed"


def test_a_layer_that_is_used_twice():
    class Twice(zoo.Layer):
        def __init__(self):
            self.dense = Stack(3, 3)

        def zero_grad(self):
            self.dense.zero_grad()

        def forward(self, x):
            return self.dense(np.tanh(self.dense(x)))

        def backward(self, dout):
            h = np.tanh(self.dense.inputs[-2] @ self.dense.W + self.dense.b)
            return self.dense.backward(self.dense.backward(dout) * (1 - h**2))

    assert check_gradients(Twice(), x_of(5, 3))


# -- a list as a whole ------------------------------------------------------------------------------------------------


class Doubles(zoo.Layer):
    """Changes its input."""

    def forward(self, x):
        x *= 2
        return x

    def backward(self, dout):
        return 2 * dout


class KeepsOutput(zoo.Layer):
    def forward(self, x):
        self.y = np.tanh(x)
        return self.y

    def backward(self, dout):
        return dout * (1 - self.y**2)


def test_right_layers_that_are_wrong_one_after_another():
    dense = zoo.Dense(3, 3)
    for layers, wrong in (([KeepsOutput(), Doubles()], "input"), ([dense, zoo.Sigmoid(), dense], "layers.0.W")):
        report = check_gradients(layers, x_of(5, 3))
        assert report.wrong == [""] and {layer.state for layer in report.layers[:-1]} == {"right"}
        assert wrong in [each.name for each in report[""].gradients if not each.ok]
        assert "layers is wrong: the list as a whole\n" in str(report)
        assert "each layer is right by itself. Does a layer change an array that another layer keeps?" in str(report)
    stack = Stack(3, 3)
    assert check_gradients([zoo.Dense(3, 3), Doubles(), stack, KeepsOutput(), stack], x_of(5, 3))


def test_a_gradient_that_is_not_returned():
    class Forgets(zoo.Dense):
        def backward(self, dout):
            super().backward(dout)

    report = check_gradients([zoo.Dense(3, 3), zoo.Sigmoid(), Forgets(3, 2)], x_of(5, 3))
    assert report.wrong == ["layers.2"]
    assert "backward() returns no gradient by the input, which layers.0 needs: is a `return` missing?" in str(report)
    assert check_gradients([KeepsOutput(), Forgets(3, 3), zoo.Dense(3, 2)], x_of(5, 3))


class Applied:
    """Its call keeps what backward needs."""

    def __call__(self, *args):
        self.args, self.out = args, self.forward(*args)
        return self.out

    def backward(self, *dout):
        return self.derivative(*dout, self.out, *self.args)


class AppliedTanh(Applied):
    def forward(self, x):
        return np.tanh(x)

    def derivative(self, dout, out, x):
        return dout * (1 - out**2)


class AppliedError(Applied):
    def forward(self, y, t):
        return ((y - t) ** 2).mean()

    def derivative(self, out, y, t):
        return 2 * (y - t) / y.size


def test_a_call_that_runs_forward_is_used():
    report = check_gradients([AppliedTanh(), zoo.Dense(3, 2)], x_of(5, 3), loss=AppliedError(), target=x_of(5, 2))
    assert report and len(report.layers) == 3, str(report)


def test_forward_and_backward_of_the_object_itself():
    class Own(zoo.Layer):
        def __init__(self, factor):
            self.factor, self.forward, self.backward = factor, self.run, self.turn

        def run(self, x):
            self.x = x
            return x**2

        def turn(self, dout):
            return self.factor * self.x * dout

    own = Own(2)
    assert check_gradients([zoo.Dense(3, 3), own], x_of(5, 3)) and not hasattr(own, "x")
    report = check_gradients([zoo.Dense(3, 3), Own(3)], x_of(5, 3))
    assert report.wrong == ["layers.1"] and report["layers.0"].state == "right"


# -- the report, and bad input ----------------------------------------------------------------------------------------


def test_the_text_of_a_report():
    class Wrong(zoo.Dense):
        def backward(self, dout):
            dx = super().backward(dout)
            self.db -= 2 * dout.sum(0)
            return dx

    net = [zoo.Dense(2, 2), Wrong(2, 1)]
    net[0].W[:], net[1].W[:] = [[1, 2], [-1, 3]], [[2], [-1]]  # so that nothing is rounded
    net[0].b[:], net[1].b[:] = [0, 1], 2
    report = check_gradients(net, np.array([[1.0, 2.0], [3.0, 4.0]]), dout=np.array([[1.0], [2.0]]))
    lines = re.sub(r"\d\.\de-1\d", "0.0e+00", str(report)).splitlines()  # rounding of the slopes
    assert re.fullmatch(r"  the gradient by b is (\S+) at \(0,\) and should be (\S+): its sign is wrong", lines.pop(-3))
    assert lines == [
        "gradient check: 1 of 2 layers is wrong: layers.1 (Wrong)",
        "",
        "layer             gradient by  shape   error",
        "layers.0 (Dense)  input        (2, 2)  0.0e+00",
        "                  W            (2, 2)  0.0e+00",
        "                  b            (2,)    0.0e+00",
        "layers.1 (Wrong)  input        (2, 2)  0.0e+00",
        "                  W            (2, 1)  0.0e+00",
        "                  b            (1,)    2.0e+00  WRONG",
        "",
        "layers.1 (Wrong):",
        "",
        "backward() adds to gradients",
    ]
    assert str(check_gradients(zoo.Sigmoid(), np.ones((1, 1)))).startswith("gradient check: 1 layer is right\n")
    with pytest.raises(KeyError, match=r"no layer at '2'; the layers are 'layers\.0', 'layers\.1'"):
        report["2"]
    check_gradients(zoo.Sigmoid(), np.ones((1, 1))).raise_if_wrong()
    assert issubclass(mini.GradientError, ValueError)
    pickle.loads(pickle.dumps(report)), copy.deepcopy(report)


def test_bad_input():
    dense, x = zoo.Dense(3, 2), x_of(5, 3)
    with pytest.raises(TypeError, match=r"found no layer: a dict holds no object with `backward` and `forward`"):
        check_gradients({"a": 1}, x)
    with pytest.raises(ValueError, match=r"dout must have the shape of the network's output, \(5, 2\); got \(5, 3\)"):
        check_gradients(dense, x, dout=x)
    with pytest.raises(ValueError, match=r"got a target without a loss: pass loss="):
        check_gradients(dense, x, target=x)
    with pytest.raises(ValueError, match=r"got both dout and loss"):
        check_gradients(dense, x, dout=x, loss=zoo.CrossEntropy())

    with pytest.raises(ValueError, match=r"the network's output is not finite for this input, so there is no gradient"):
        check_gradients(dense, np.full((5, 3), np.inf))
    with pytest.raises(ValueError, match=r"the loss is not finite for this input"):
        check_gradients(zoo.ReLU(), 1e4 * np.eye(3), loss=zoo.CrossEntropy(), target=np.array([1, 2, 0]))

    class Updating(zoo.Dense):
        def backward(self, dout, lr):
            self.W -= lr * self.x.T @ dout

    updating = Updating(3, 2)
    report = check_gradients(updating, x)
    assert "backward() takes a learning rate, and changes parameters, not only their gradients" in str(report)
    many = type("Many", (zoo.Sigmoid,), {"backward": lambda self, dout: (dout, dout)})()
    assert "backward() returned 2 gradients for 1 floating arguments of forward()" in str(check_gradients(many, x))


def test_what_is_expected_is_told():
    dense, x = zoo.Dense(3, 2), x_of(5, 3)

    class Predicts:
        def __init__(self):
            self.dense, self.forward_of = dense, zoo.Dense.forward

        def predict(self, x):
            return self.dense.forward(x)

    with pytest.raises(
        TypeError, match=r"a Predicts has layers, but no `forward` \(or `__call__`\) that runs them: write"
    ):
        check_gradients(Predicts(), x)
    idle = type("Idle", (Predicts,), {"forward": lambda self, x: x})
    with pytest.raises(
        TypeError, match=r"has nothing to check: the network's forward calls none of its layers \(dense\)"
    ):
        check_gradients(idle(), x)
    cached = type("Cached", (zoo.Dense,), {"forward": lambda self, x: (zoo.Dense.forward(self, x), (x, 1))})
    with pytest.raises(
        TypeError, match=r"layers\.0: forward\(\) must return an array, or a tuple of arrays; got ndarray, tuple"
    ):
        check_gradients([cached(3, 2)], x)
    both = type("Both", (AppliedError,), {"forward": lambda self, y, t: (((y - t) ** 2).mean(), y - t)})
    with pytest.raises(
        TypeError, match=r"loss\.forward\(output, target\) must return one number, .*; got shape \[\(\), \(5, 2\)\]"
    ):
        check_gradients([dense], x, loss=both(), target=x_of(5, 2))
    named = type("Named", (zoo.Dense,), {"backward": lambda self, dout: {"x": dout @ self.W.T}})
    report = check_gradients(named(3, 2), x)
    assert report.wrong == [""] and "should be" in str(report)
    assert [each.name for each in report[""].gradients if each.ok] == ["input"]


def test_a_backward_that_raises_is_not_said_to_be_put_together_wrongly():
    class Raises(zoo.Net):
        def backward(self, dout):
            raise RuntimeError("no")

    said = "the mistake is in its own backward"
    assert said not in str(check_gradients(Raises(zoo.Dense(3, 2)), x_of(5, 3)))
    twice = type("Twice", (zoo.Net,), {"backward": lambda self, dout: 2 * zoo.Net.backward(self, dout)})
    assert said in str(check_gradients(twice(zoo.Dense(3, 2)), x_of(5, 3)))


def test_an_epsilon_in_a_logarithm_is_told():
    class Loss(zoo.CrossEntropy):
        def forward(self, x, t):
            super().forward(x, t)
            return -np.log(self.p[np.arange(len(t)), t] + 1e-6).mean()

    report = check_gradients(Loss(), x_of(6, 3), np.array([0, 1, 2, 0, 1, 0]))
    assert report and "right but for an epsilon" in str(report)
    assert re.search(r"differs by \de-0[67] from that of forward, because of a small constant", str(report))


def test_gradients_by_a_list_of_arrays_are_no_surplus():
    class Concatenate:
        def forward(self, parts):
            self.cut = parts[0].shape[1]
            return np.concatenate(parts, 1)

        def backward(self, dout):
            return [dout[:, : self.cut], dout[:, self.cut :]]

    class Net:
        def __init__(self):
            self.a, self.b, self.join = zoo.Dense(3, 2), zoo.Dense(3, 4), Concatenate()

        def forward(self, x):
            return self.join.forward([self.a.forward(x), self.b.forward(x)])

        def backward(self, dout):
            a, b = self.join.backward(dout)
            return self.a.backward(a) + self.b.backward(b)

    report = check_gradients(Net(), x_of(5, 3))
    assert report and "are not checked" in str(report)
