"""The gradient check: right layers pass, in both precisions; each of a set of seeded mistakes is found, where it is."""

import re

import numpy as np
import numpy_layers as zoo
import pytest

from minitorch_jax.adapters import numpy as mini
from minitorch_jax.adapters.numpy import check_gradients


def x_of(*shape, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


IDS = np.array([[0, 2], [2, 3], [5, 0]])
CLASSES = np.array([0, 2, 1, 2, 2])

# name: (makes the layer, makes its arguments)
RIGHT = {
    "dense": (lambda t: zoo.Dense(4, 3, t), lambda t: [x_of(5, 4, dtype=t)]),
    "conv": (lambda t: zoo.Conv(2, 3, dtype=t), lambda t: [x_of(2, 2, 4, 3, dtype=t)]),
    "conv with stride": (lambda t: zoo.Conv(2, 3, stride=2, dtype=t), lambda t: [x_of(2, 2, 4, 6, dtype=t)]),
    "batch norm": (lambda t: zoo.BatchNorm(3, t), lambda t: [x_of(5, 3, dtype=t)]),
    "layer norm": (lambda t: zoo.LayerNorm(4, t), lambda t: [x_of(5, 4, dtype=t)]),
    "softmax": (lambda t: zoo.Softmax(), lambda t: [x_of(5, 3, dtype=t)]),
    "relu": (lambda t: zoo.ReLU(), lambda t: [x_of(5, 3, dtype=t)]),
    "sigmoid": (lambda t: zoo.Sigmoid(), lambda t: [x_of(5, 3, dtype=t)]),
    "max pool": (lambda t: zoo.MaxPool(), lambda t: [x_of(2, 2, 4, 4, dtype=t)]),
    "embedding": (lambda t: zoo.Embedding(6, 3, t), lambda t: [IDS]),
    "dropout": (lambda t: zoo.Dropout(), lambda t: [x_of(5, 3, dtype=t)]),
    "residual": (lambda t: zoo.Residual(3, t), lambda t: [x_of(5, 3, dtype=t)]),
    "rnn cell": (lambda t: zoo.RNNCell(3, 4, t), lambda t: [x_of(5, 3, dtype=t), x_of(5, 4, dtype=t, seed=2)]),
    "rnn": (lambda t: zoo.RNN(3, 4, t), lambda t: [x_of(5, 3, 3, dtype=t)]),
    "cross entropy": (lambda t: zoo.CrossEntropy(), lambda t: [x_of(5, 3, dtype=t), CLASSES]),
    "squared error": (lambda t: zoo.SquaredError(), lambda t: [x_of(5, 3, dtype=t), x_of(5, 3, dtype=t, seed=2)]),
    "our linear": (lambda t: mini.Linear(4, 3, rng=0, dtype=t), lambda t: [x_of(5, 4, dtype=t)]),
    "our cross entropy": (lambda t: mini.SoftmaxCrossEntropy(), lambda t: [x_of(5, 3, dtype=t), CLASSES]),
    "our squared error": (lambda t: mini.MeanSquaredError(), lambda t: [x_of(5, 3), x_of(5, 3, seed=2)]),
}


SLOW = {"conv", "conv with stride", "rnn"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RIGHT])
def test_right_layers_pass(name, dtype):
    make, arguments = RIGHT[name]
    report = check_gradients(make(dtype), *arguments(dtype))
    assert report and report.wrong == []
    assert all(layer.state == "right" for layer in report.layers), str(report)
    errors = [each.error for layer in report.layers for each in layer.gradients if each.error is not None]
    assert errors and max(errors) < 1e-10


# -- seeded mistakes --------------------------------------------------------------------------------------------------


def mistake(base, backward):
    """The layer with another backward; `right` is the right one, bound."""

    class Mistaken(base):
        pass

    Mistaken.backward = lambda self, *dout: backward(self, *dout)
    return Mistaken


def dense_transposed(self, dout):
    self.dW += dout.T @ self.x
    self.db += dout.sum(axis=0)
    return dout @ self.W.T


def dense_no_transpose(self, dout):
    self.dW += self.x.T @ dout
    self.db += dout.sum(axis=0)
    return dout @ self.W


def dense_mean(self, dout):
    self.dW += self.x.T @ dout / len(dout)
    self.db += dout.sum(axis=0)
    return dout @ self.W.T


def dense_bias_axis(self, dout):
    self.dW += self.x.T @ dout
    self.db += dout.sum(axis=1)
    return dout @ self.W.T


def dense_bias_mean(self, dout):
    self.dW += self.x.T @ dout
    self.db += dout.mean(axis=0)
    return dout @ self.W.T


def dense_bias_not_summed(self, dout):
    self.dW += self.x.T @ dout
    self.db = dout
    return dout @ self.W.T


def dense_overwrites(self, dout):
    self.dW, self.db = self.x.T @ dout, dout.sum(axis=0)
    return dout @ self.W.T


def dense_twice(self, dout):
    for _ in range(2):
        self.dW += self.x.T @ dout
    self.db += dout.sum(axis=0)
    return dout @ self.W.T


def dense_no_weights(self, dout):
    self.db += dout.sum(axis=0)
    return dout @ self.W.T


def dense_updates(self, dout):
    dx = zoo.Dense.backward(self, dout)
    self.W -= 0.1 * self.dW
    return dx


def dense_zero_dx(self, dout):
    zoo.Dense.backward(self, dout)
    return np.zeros_like(self.x)


def batch_norm_without_mean(self, dout):
    zoo.BatchNorm.backward(self, dout)
    d = dout * self.gamma
    return (d - self.xhat * (d * self.xhat).mean(axis=0)) / self.std * np.ones_like(self.std)


def batch_norm_as_eval(self, dout):
    zoo.BatchNorm.backward(self, dout)
    return dout * self.gamma / self.std


def layer_norm_axis(self, dout):
    self.dgamma += (dout * self.xhat).sum(axis=-1)
    self.dbeta += dout.sum(axis=0)
    d = dout * self.gamma
    return (d - d.mean(-1, keepdims=True) - self.xhat * (d * self.xhat).mean(-1, keepdims=True)) / self.std


def softmax_without_sum(self, dout):
    return self.y * dout


def sigmoid_from_output(self, dout):
    return dout


def pool_everywhere(self, dout):
    return np.repeat(np.repeat(dout, 2, axis=2), 2, axis=3)


def conv_turned(self, dout):
    kept = self.dK.copy()
    dx = zoo.Conv.backward(self, dout)
    self.dK[...] = kept + (self.dK - kept)[:, :, ::-1, ::-1]
    return dx


def conv_assigns(self, dout):
    zoo.Conv.backward(self, dout)
    cols = dout.transpose(0, 2, 3, 1) @ self.K.reshape(len(self.K), -1)
    n, oh, ow, _ = cols.shape
    cols, x = cols.reshape(n, oh, ow, self.shape[1], self.size, self.size), np.zeros(self.shape)
    for i in range(self.size):
        for j in range(self.size):
            x[:, :, i : i + oh, j : j + ow] = cols[..., i, j].transpose(0, 3, 1, 2)
    return x


def embedding_loses(self, dout):
    self.dW[self.ids] += dout


def dropout_unscaled(self, dout):
    return dout * (self.mask > 0)


def dropout_draws_again(self, dout):
    return dout * (self.rng.random(dout.shape) >= self.p) / (1 - self.p)


def residual_forgets(self, dout):
    return self.first.backward(self.relu.backward(self.second.backward(dout)))


def cell_swaps(self, dout):
    dx, dh = zoo.RNNCell.backward(self, dout)
    return dh, dx


def cell_uses_output(self, dout):
    dz = dout * (1 - self.out**2)
    self.dWx += self.x.T @ dz
    self.dWh += self.out.T @ dz
    self.db += dz.sum(axis=0)
    return dz @ self.Wx.T, dz @ self.Wh.T


def rnn_last_step(self, dh):
    dx = np.zeros(self.shape)
    dx[:, -1], _ = self.cell.backward(dh)
    return dx


def entropy_sum(self):
    return zoo.CrossEntropy.backward(self) * len(self.p)


def entropy_sign(self):
    return -zoo.CrossEntropy.backward(self)


def squared_without_two(self):
    return self.difference / self.difference.size


def squared_by_rows(self):
    return 2 * self.difference / len(self.difference)


class Stale(zoo.Dense):
    """Keeps the first input for ever."""

    x = None

    def forward(self, x):
        if self.x is None:
            self.x = x
        return x @ self.W + self.b


def used(*sizes):
    """Such a layer that has seen a batch already."""
    layer = Stale(*sizes)
    layer(x_of(5, 4, seed=7))
    return layer


class StaleSigmoid(zoo.Sigmoid):
    """Its backward uses the output before the last."""

    before = y = None

    def forward(self, x):
        self.before = self.y
        return super().forward(x)

    def backward(self, dout):
        y = self.y if self.before is None else self.before
        return dout * y * (1 - y)


class ForgetsBias(zoo.Dense):
    def zero_grad(self):
        self.dW.fill(0)


class Detached(zoo.Dense):
    """zero_grad makes new arrays, and backward adds to the old ones."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kept = [self.dW, self.db]

    def zero_grad(self):
        self.dW, self.db = np.zeros_like(self.W), np.zeros_like(self.b)

    def backward(self, dout):
        self.kept[0] += self.x.T @ dout
        self.kept[1] += dout.sum(axis=0)
        return dout @ self.W.T


class Switches(zoo.BatchNorm):
    """backward changes what forward uses."""

    def backward(self, dout):
        dx = super().backward(dout)
        self.gamma = self.gamma * 1.0
        self.scale = 2.0
        return dx

    def forward(self, x):
        return super().forward(x) * getattr(self, "scale", 1.0)


class Swapped(mini.Linear):
    def grads(self):
        return [self.db, self.dW]


class Unaligned(mini.Linear):
    def grads(self):
        return [self.dW]


# name: (makes the layer, its arguments, the gradient that is wrong (or None), what is said of it)
MISTAKES = {
    "dW transposed": (mistake(zoo.Dense, dense_transposed), (3, 3), [x_of(5, 3)], "W", "it is transposed"),
    "dx without transpose": (
        mistake(zoo.Dense, dense_no_transpose),
        (3, 3),
        [x_of(5, 3)],
        "input",
        r"it is dout @ W, and should be dout @ W\.T: a transpose is missing",
    ),
    "dW divided by N": (
        mistake(zoo.Dense, dense_mean),
        (4, 3),
        [x_of(5, 4)],
        "W",
        "1/5 of the right one, by the batch size 5: is it divided once too often",
    ),
    "db over the wrong axis": (
        mistake(zoo.Dense, dense_bias_axis),
        (4, 5),
        [x_of(5, 4)],
        "b",
        "summed over axis 1 of the incoming gradient, not over axis 0",
    ),
    "db over the wrong axis, of another size": (
        mistake(zoo.Dense, dense_bias_axis),
        (4, 3),
        [x_of(5, 4)],
        None,
        r"backward\(\) raised ValueError: .*broadcast.*test_gradient_check\.py, in dense_bias_axis",
    ),
    "db as a mean": (mistake(zoo.Dense, dense_bias_mean), (4, 3), [x_of(5, 4)], "b", "1/5 of the right one"),
    "db not summed": (
        mistake(zoo.Dense, dense_bias_not_summed),
        (4, 3),
        [x_of(5, 4)],
        "b",
        r"its shape is \(5, 3\) and should be \(3,\): it is not summed over axis 0",
    ),
    "gradients overwritten": (
        mistake(zoo.Dense, dense_overwrites),
        (4, 3),
        [x_of(5, 4)],
        None,
        "do not add up in the gradient by W, b: the second overwrites the first",
    ),
    "dW added twice": (
        mistake(zoo.Dense, dense_twice),
        (4, 3),
        [x_of(5, 4)],
        "W",
        "2 times the right one: added twice",
    ),
    "dW never computed": (mistake(zoo.Dense, dense_no_weights), (4, 3), [x_of(5, 4)], "W", "it is zero: it is never"),
    "dx zero": (mistake(zoo.Dense, dense_zero_dx), (4, 3), [x_of(5, 4)], "input", "it is zero"),
    "weights updated in backward": (
        mistake(zoo.Dense, dense_updates),
        (4, 3),
        [x_of(5, 4)],
        None,
        "changes parameters, .*: W",
    ),
    "stale cache": (
        Stale,
        (4, 3),
        [x_of(5, 4)],
        None,
        r"gradient by W, which is that of the other batch.*\(a stale cache\)",
    ),
    "stale cache from before the check": (
        used,
        (4, 3),
        [x_of(5, 4)],
        "W",
        r"does not change with the batch: .*\(a stale",
    ),
    "output of the batch before": (StaleSigmoid, (), [x_of(5, 3)], None, "wrong gradient by input.*stale cache"),
    "zero_grad forgets": (ForgetsBias, (4, 3), [x_of(5, 4)], None, r"zero_grad\(\) does not reset the gradient by b"),
    "zero_grad detaches": (
        Detached,
        (4, 3),
        [x_of(5, 4)],
        None,
        r"after zero_grad\(\), backward\(\) returns a wrong gradient by W, b",
    ),
    "forward changed by backward": (
        Switches,
        (3,),
        [x_of(5, 3)],
        None,
        r"when it was called a second time|forward\(\) returns another output after backward|add",
    ),
    "batch norm without the mean": (
        mistake(zoo.BatchNorm, batch_norm_without_mean),
        (3,),
        [x_of(5, 3)],
        "input",
        "the difference is constant along axis 0",
    ),
    "batch norm as in eval": (mistake(zoo.BatchNorm, batch_norm_as_eval), (3,), [x_of(5, 3)], "input", ""),
    "layer norm over the wrong axis": (mistake(zoo.LayerNorm, layer_norm_axis), (5,), [x_of(5, 5)], "gamma", ""),
    "softmax without the sum": (mistake(zoo.Softmax, softmax_without_sum), (), [x_of(5, 3)], "input", ""),
    "sigmoid without derivative": (
        mistake(zoo.Sigmoid, sigmoid_from_output),
        (),
        [x_of(5, 3)],
        "input",
        "incoming gradient, unchanged",
    ),
    "relu without mask": (
        mistake(zoo.ReLU, sigmoid_from_output),
        (),
        [x_of(5, 3)],
        "input",
        "incoming gradient, unchanged",
    ),
    "pooling sent everywhere": (
        mistake(zoo.MaxPool, pool_everywhere),
        (),
        [x_of(2, 2, 4, 4)],
        "input",
        "elements are wrong",
    ),
    "kernel turned round": (
        mistake(zoo.Conv, conv_turned),
        (2, 3),
        [x_of(2, 2, 4, 3)],
        "K",
        "reversed along axes 2, 3",
    ),
    "patches assigned": (mistake(zoo.Conv, conv_assigns), (2, 3), [x_of(2, 2, 4, 3)], "input", "elements are wrong"),
    "repeated indices": (mistake(zoo.Embedding, embedding_loses), (6, 3), [IDS], "W", r"np\.add\.at\(dW, i, \.\.\.\)"),
    "dropout without scale": (
        mistake(zoo.Dropout, dropout_unscaled),
        (),
        [x_of(5, 3)],
        "input",
        r"it is 0\.6 times the right one",
    ),
    "dropout with another mask": (
        mistake(zoo.Dropout, dropout_draws_again),
        (),
        [x_of(5, 3)],
        "input",
        "elements are wrong",
    ),
    "residual without the branch": (mistake(zoo.Residual, residual_forgets), (3,), [x_of(5, 3)], "input", ""),
    "gradients swapped": (
        mistake(zoo.RNNCell, cell_swaps),
        (3, 3),
        [x_of(5, 3), x_of(5, 3, seed=2)],
        "input 0",
        "it is the gradient by input 1",
    ),
    "the wrong state": (
        mistake(zoo.RNNCell, cell_uses_output),
        (3, 4),
        [x_of(5, 3), x_of(5, 4, seed=2)],
        "Wh",
        "",
    ),
    "not through time": (mistake(zoo.RNN, rnn_last_step), (3, 4), [x_of(5, 3, 3)], "input", "zero in 30 of 45"),
    "forgotten batch mean": (
        mistake(zoo.CrossEntropy, entropy_sum),
        (),
        [x_of(5, 3), CLASSES],
        "input",
        "5 times the right one, by the batch size 5: is a mean over the batch forgotten",
    ),
    "sign of a loss": (
        mistake(zoo.CrossEntropy, entropy_sign),
        (),
        [x_of(5, 3), CLASSES],
        "input",
        "its sign is wrong",
    ),
    "a loss without its 2": (
        mistake(zoo.SquaredError, squared_without_two),
        (),
        [x_of(5, 3), x_of(5, 3, seed=2)],
        "input 0",
        "1/2 of the right",
    ),
    "a loss divided by rows": (
        mistake(zoo.SquaredError, squared_by_rows),
        (),
        [x_of(5, 3), x_of(5, 3, seed=2)],
        "input 0",
        "3 times the right one",
    ),
    "grads in another order": (
        Swapped,
        (4, 3),
        [x_of(5, 4)],
        "W",
        r"it is the gradient by b: are the gradients in the right order",
    ),
    "grads of another length": (
        Unaligned,
        (4, 3),
        [x_of(5, 4)],
        None,
        r"parameters\(\) returns 2 arrays and grads\(\) returns 1",
    ),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_found(name):
    make, sizes, arguments, wrong, said = MISTAKES[name]
    report = check_gradients(make(*sizes), *arguments, accumulates=True)
    assert not report and report.wrong == [""]
    layer = report[""]
    names = [each.name for each in layer.gradients if not each.ok]
    if wrong is None:
        assert not names
        found = "\n".join(layer.problems)
    else:
        assert wrong in names
        found = next(each.hint for each in layer.gradients if each.name == wrong)
    assert re.search(said, found), found
    assert re.search(said, str(report))
    with pytest.raises(mini.GradientError, match=re.escape(f"is wrong: {type(make(*sizes)).__name__}")):
        report.raise_if_wrong()


SIDE_BY_SIDE = {
    name: (Stale if make is used else make, (3, 3)[: len(sizes)])
    for name, (make, sizes, arguments, *_) in MISTAKES.items()
    if len(arguments) == 1 and arguments[0].ndim == 2 and arguments[0].dtype == float and sizes != (5,)
}
QUICK = {"dx without transpose", "db as a mean", "stale cache", "zero_grad forgets", "residual without the branch"}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SIDE_BY_SIDE])
def test_the_layer_that_is_wrong_is_named_and_no_other(name):
    """Right layers before, after and beside a wrong one, all in one that sends gradients through them."""
    make, sizes = SIDE_BY_SIDE[name]
    mistaken = make(*sizes)
    net = zoo.Net(
        zoo.Dense(3, 3, seed=5), zoo.Net(mistaken, zoo.Sigmoid()), zoo.Dense(3, 3, seed=6), side=zoo.Sigmoid()
    )
    report = check_gradients(net, x_of(5, 3), loss=zoo.CrossEntropy(), target=CLASSES, accumulates=True)
    assert report.wrong == ["layers.1.layers.0"], str(report)
    states = {layer.path: layer.state for layer in report.layers}
    assert states.pop("layers.1.layers.0") == "wrong"
    assert states.pop("") in ("unknown", "right") and states.pop("layers.1") in ("unknown", "right")
    inner = {path for path in states if path.startswith("layers.1.layers.0.")}
    assert set(states) - inner == {"layers.0", "layers.1.layers.1", "layers.2", "side", "loss"}
    assert set(states.values()) == {"right"}
