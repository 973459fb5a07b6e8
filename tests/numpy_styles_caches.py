"""More networks in other styles: caches under a condition, returned or collected; dicts of any names; slots; records."""

from dataclasses import dataclass

import numpy as np
from numpy_styles import Style


class Layers(Style):
    """A list of layers, which is trained by the squared distance from 1."""

    def gradients(self, x, target):
        y, caches = x, []
        for layer in self.network:
            y = layer.forward(y)
            if isinstance(y, tuple):
                y, cache = y
                caches.append((cache,))
            else:
                caches.append(())
        loss, dout = np.square(y - 1).sum() / 2 / len(x), (y - 1) / len(x)
        for layer, cache in zip(self.network[::-1], caches[::-1], strict=True):
            dout = layer.backward(dout, *cache)
        return loss

    def pairs(self):
        return [pair for layer in self.network for pair in layer.pairs()]


# -- recurrent: cells made by each forward around the layer's arrays, and a hidden state `h` beside `dh` -----------------


class Cell:
    def __init__(self, params, mistake):
        self.params, self.grads, self.mistake = params, [np.zeros_like(each) for each in params], mistake

    def forward(self, x, h):
        Wx, Wh, b = self.params
        self.x, self.h, self.out = x, h, np.tanh(x @ Wx + h @ Wh + b)
        return self.out

    def backward(self, dout):
        dz = dout * (1 - self.out ** (3 if self.mistake == "tanh" else 2))
        for grad, value in zip(self.grads, (self.x.T @ dz, self.h.T @ dz, dz.sum(0)), strict=True):
            grad[...] = value
        return dz @ self.params[0].T, dz @ self.params[1].T


class Recurrent:
    def __init__(self, n_in, n_out, rng, mistake, stateful=False):
        self.params = [rng.normal(size=(n_in, n_out)), rng.normal(size=(n_out, n_out)), np.zeros(n_out)]
        self.grads = [np.zeros_like(each) for each in self.params]
        self.stateful, self.h, self.dh, self.cells, self.mistake = stateful, None, None, None, mistake

    def forward(self, xs):
        self.cells, out = [], []
        if not self.stateful or self.h is None:
            self.h = np.zeros((len(xs), len(self.params[1])))
        for t in range(xs.shape[1]):
            self.cells.append(Cell(self.params, self.mistake))
            self.h = self.cells[-1].forward(xs[:, t], self.h)
            out.append(self.h)
        return np.stack(out, 1)

    def backward(self, dout):
        total, self.dh, dxs = [0, 0, 0], 0, np.empty((*dout.shape[:2], len(self.params[0])))
        for t, cell in reversed(list(enumerate(self.cells))):
            carried = 0 if self.mistake == "carry" else self.dh
            dxs[:, t], self.dh = cell.backward(dout[:, t] + carried)
            total = [a + b for a, b in zip(total, cell.grads, strict=True)]
        if self.mistake == "last":
            total = self.cells[0].grads
        for grad, value in zip(self.grads, total, strict=True):
            grad[...] = value
        return dxs

    def pairs(self):
        return zip(self.params, self.grads, strict=True)


class RecurrentLayers(Layers):
    mistakes = {
        "carry": (0, {"input", "params.0", "params.1", "params.2"}),
        "last": (0, {"params.0", "params.1", "params.2"}),
        "tanh": (0, {"input", "params.0", "params.1", "params.2"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(1)
        self.network = [Recurrent(3, 4, rng, mistake), Recurrent(4, 2, rng, "")]

    def data(self, rng):
        return rng.normal(size=(2, 4, 3)), None


# -- a cache kept only in training, under an `if`, beside its gradient ---------------------------------------------------


class Conditional:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.weights, self.biases, self.mistake = rng.normal(size=(n_in, n_out)), np.zeros((1, n_out)), mistake

    def forward(self, inputs, training=True):
        if training:
            self.inputs = inputs
        self.output = inputs @ self.weights + self.biases
        return self.output

    def backward(self, dvalues):
        self.dweights = self.inputs.T @ dvalues
        self.dbiases = np.sum(dvalues, axis=0, keepdims=self.mistake != "keepdims")
        if self.mistake == "decay":
            self.dweights += 0.1 * self.weights
        self.dinputs = dvalues @ (self.weights.T * (2 if self.mistake == "twice" else 1))
        return self.dinputs

    def pairs(self):
        return [(self.weights, self.dweights), (self.biases, self.dbiases)]


class ConditionalCaches(Layers):
    mistakes = {"keepdims": (0, {"biases"}), "decay": (0, {"weights"}), "twice": (0, {"input"})}

    def __init__(self, mistake=""):
        rng = np.random.default_rng(1)
        self.network = [Conditional(4, 3, rng, mistake), Conditional(3, 2, rng)]


# -- functions in classes: forward returns `(output, cache)`, and backward takes the cache -------------------------------


class Affine:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.W, self.b, self.mistake = rng.normal(size=(n_in, n_out)), np.zeros(n_out), mistake

    def forward(self, x):
        return x @ self.W + self.b, (x, self.W)

    def backward(self, dout, cache):
        x, W = cache
        self.dW, self.db = x.T @ dout, dout.sum(0) * (2 if self.mistake == "bias" else 1)
        return dout @ W.T if self.mistake != "sign" else -dout @ W.T

    def pairs(self):
        return [(self.W, self.dW), (self.b, self.db)]


class Relu:
    def __init__(self, mistake=""):
        self.mistake = mistake

    def forward(self, x):
        return np.maximum(x, 0), x > 0

    def backward(self, dout, mask):
        return dout if self.mistake == "mask" else dout * mask

    def pairs(self):
        return []


class ReturnedCaches(Layers):
    mistakes = {"bias": (0, {"b"}), "sign": (0, {"input"}), "mask": (1, {"input"})}

    def __init__(self, mistake=""):
        rng = np.random.default_rng(1)
        self.network = [Affine(4, 3, rng, mistake), Relu(mistake), Affine(3, 2, rng)]


# -- dicts of any names, whose keys say which gradient belongs to which parameter; backward adds -------------------------


class Gate:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.p = {"Wg": rng.normal(size=(n_in, n_out)), "bg": np.zeros(n_out), "Wh": rng.normal(size=(n_in, n_out))}
        self.g, self.mistake = {"d" + key: np.zeros_like(array) for key, array in self.p.items()}, mistake

    def forward(self, x):
        gate, hidden = 1 / (1 + np.exp(-x @ self.p["Wg"] - self.p["bg"])), np.tanh(x @ self.p["Wh"])
        self.tape = x, gate, hidden
        return gate * hidden

    def backward(self, dout):
        x, gate, hidden = self.tape
        dgate = dout * hidden * gate * (1 if self.mistake == "sigmoid" else 1 - gate)
        dhidden = dout * gate * (1 - hidden**2)
        self.g["dWg"] += x.T @ dgate
        self.g["dbg"] += dgate.mean(0) if self.mistake == "mean" else dgate.sum(0)
        self.g["dWh"] += x.T @ dhidden
        dx = dgate @ self.p["Wg"].T
        return dx if self.mistake == "path" else dx + dhidden @ self.p["Wh"].T

    def zero_grad(self):
        for grad in self.g.values():
            grad.fill(0)

    def pairs(self):
        return [(self.p[key], self.g["d" + key]) for key in self.p]


class DictsOfAnyNames(Layers):
    mistakes = {"sigmoid": (0, {"input", "p.Wg", "p.bg"}), "mean": (0, {"p.bg"}), "path": (0, {"input"})}

    def __init__(self, mistake=""):
        rng = np.random.default_rng(1)
        self.network = [Gate(4, 3, rng, mistake), Gate(3, 2, rng)]

    def zero(self):
        for layer in self.network:
            layer.zero_grad()


# -- slots without values until backward, and two records of one class: `params` and `grads` -----------------------------


class Slotted:
    __slots__ = ("W", "b", "dW", "db", "mistake", "x")

    def __init__(self, n_in, n_out, rng, mistake=""):
        self.W, self.b, self.mistake = rng.normal(size=(n_in, n_out)), np.zeros(n_out), mistake

    def forward(self, x):
        self.x = x
        return np.maximum(x @ self.W + self.b, 0)

    def backward(self, dout):
        dout = dout * (self.x @ self.W + self.b > 0) if self.mistake != "mask" else dout
        self.dW, self.db = self.x.T @ dout, dout.sum(0)
        return dout @ self.W.T

    def pairs(self):
        return [(self.W, self.dW), (self.b, self.db)]


@dataclass
class Arrays:
    W: np.ndarray
    b: np.ndarray


class Recorded:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.params = Arrays(rng.normal(size=(n_in, n_out)), np.zeros(n_out))
        self.grads, self.mistake = Arrays(np.zeros((n_in, n_out)), np.zeros(n_out)), mistake

    def forward(self, x):
        self.x = x
        return x @ self.params.W + self.params.b

    def backward(self, dout):
        self.grads = Arrays(self.x.T @ dout, dout.sum(0) * (3 if self.mistake == "bias" else 1))
        return dout @ self.params.W.T * (-1 if self.mistake == "sign" else 1)

    def pairs(self):
        return [(self.params.W, self.grads.W), (self.params.b, self.grads.b)]


class SlotsAndRecords(Layers):
    mistakes = {"mask": (0, {"input", "W", "b"}), "bias": (1, {"params.b"}), "sign": (1, {"input"})}

    def __init__(self, mistake=""):
        rng = np.random.default_rng(1)
        self.network = [Slotted(4, 3, rng, mistake), Recorded(3, 2, rng, mistake)]


# -- forward collects all its calls, until a method of the author empties the list ---------------------------------------


class Collecting:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.parameters = {"W": rng.normal(size=(n_in, n_out)), "b": np.zeros((1, n_out))}
        self.gradients = {key: np.zeros_like(array) for key, array in self.parameters.items()}
        self.X, self.Y, self.mistake = [], [], mistake

    def forward(self, x):
        self.X.append(x)
        self.Y.append(np.tanh(x @ self.parameters["W"] + self.parameters["b"]))
        return self.Y[-1]

    def backward(self, dout):
        dx = 0
        for x, y in zip(self.X, self.Y, strict=True):
            dz = dout if self.mistake == "tanh" else dout * (1 - y**2)
            self.gradients["W"] += x.T @ dz * (2 if self.mistake == "twice" else 1)
            self.gradients["b"] += dz.sum(0, keepdims=True)
            dx = dx + dz @ self.parameters["W"].T
        return dx if self.mistake != "half" else dx / 2

    def flush_gradients(self):
        self.X, self.Y = [], []
        for grad in self.gradients.values():
            grad.fill(0)

    def pairs(self):
        return [(self.parameters[key], self.gradients[key]) for key in "Wb"]


class CollectedCalls(Layers):
    mistakes = {
        "tanh": (0, {"input", "parameters.W", "parameters.b"}),
        "twice": (0, {"parameters.W"}),
        "half": (0, {"input"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(1)
        self.network = [Collecting(4, 3, rng, mistake), Collecting(3, 2, rng)]

    def gradients(self, x, target):
        for layer in self.network:
            layer.flush_gradients()
        return super().gradients(x, target)
