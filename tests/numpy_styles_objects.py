"""Small NumPy networks whose parameters are objects that hold an array and its gradient: see numpy_styles.py."""

import numpy as np
from numpy_styles import Style, softmax

# -- 7: objects with .data and .grad, which is None at first; backward adds; embedding and a recurrent cell; float32 --


class Tensor:
    def __init__(self, data):
        self.data, self.grad = np.asarray(data, np.float32), None

    def add(self, grad):
        self.grad = grad if self.grad is None else self.grad + grad


class Words:
    def __init__(self, count, size, rng, mistake):
        self.weight, self.mistake = Tensor(rng.normal(size=(count, size))), mistake

    def forward(self, ids):
        self.ids = ids
        return self.weight.data[ids]

    def backward(self, g):
        grad = np.zeros_like(self.weight.data)
        if self.mistake == "a word that occurs twice":
            grad[self.ids] += g
        else:
            np.add.at(grad, self.ids, g)
        self.weight.add(grad)


class Recurrent:
    """From (N, T, n_in) to the last state, (N, n_hidden)."""

    def __init__(self, n_in, n_hidden, rng, mistake):
        self.w_in, self.w_state = (Tensor(rng.normal(size=(n, n_hidden)) / 2) for n in (n_in, n_hidden))
        self.bias, self.mistake = Tensor(np.zeros(n_hidden)), mistake

    def forward(self, x):
        self.x, self.states = x, [np.zeros((len(x), len(self.bias.data)), np.float32)]
        for t in range(x.shape[1]):
            mixed = x[:, t] @ self.w_in.data + self.states[-1] @ self.w_state.data + self.bias.data
            self.states.append(np.tanh(mixed))
        return self.states[-1]

    def backward(self, g):
        dx = np.zeros_like(self.x)
        for t in reversed(range(self.x.shape[1])):
            g = g * (1 - self.states[t + 1] ** 2)
            self.w_in.add(self.x[:, t].T @ g)
            self.w_state.add(self.states[t + (self.mistake == "the next state for this one")].T @ g)
            self.bias.add(g.sum(0))
            dx[:, t] = g @ self.w_in.data.T
            g = g @ self.w_state.data.T
        return dx


class Head:
    def __init__(self, n_in, n_out, rng, mistake):
        self.weight, self.bias, self.mistake = Tensor(rng.normal(size=(n_in, n_out))), Tensor(np.zeros(n_out)), mistake

    def forward(self, x):
        self.x = x
        return x @ self.weight.data + self.bias.data

    def backward(self, g):
        self.weight.add(self.x.T @ g)
        self.bias.add(g.mean(0) if self.mistake == "a mean for a sum over the batch" else g.sum(0))
        return g @ self.weight.data.T


class Reader:
    def __init__(self, rng, mistake):
        self.words, self.cell, self.head = (
            Words(7, 3, rng, mistake),
            Recurrent(3, 4, rng, mistake),
            Head(4, 2, rng, mistake),
        )

    def forward(self, ids):
        return self.head.forward(self.cell.forward(self.words.forward(ids)))

    def backward(self, g):
        self.words.backward(self.cell.backward(self.head.backward(g)))

    def parameters(self):
        cell = self.cell
        return [self.words.weight, cell.w_in, cell.w_state, cell.bias, self.head.weight, self.head.bias]


class SquaredDifference:
    def forward(self, out, target):
        self.difference = out - target
        return (self.difference**2).sum() / len(out)

    def backward(self):
        return 2 * self.difference / np.float32(len(self.difference))


class Tensors(Style):
    mistakes = {
        "a word that occurs twice": ("words", {"weight"}),
        "the next state for this one": ("cell", {"w_state"}),
        "a mean for a sum over the batch": ("head", {"bias"}),
    }

    def __init__(self, mistake=""):
        self.network, self.loss = Reader(np.random.default_rng(4), mistake), SquaredDifference()

    def data(self, rng):
        return rng.integers(0, 7, (5, 4)), rng.normal(size=(5, 2)).astype(np.float32)

    def gradients(self, x, target):
        loss = self.loss.forward(self.network.forward(x), target)
        self.network.backward(self.loss.backward())
        return loss

    def pairs(self):
        return [(each.data, each.grad) for each in self.network.parameters()]

    def zero(self):
        for each in self.network.parameters():
            each.grad = None


# -- 8: params() returns a dict of objects with .value and .grad; channels come last; pooling; no object for the loss --


class Param:
    def __init__(self, value):
        self.value = value.astype(np.float32)
        self.grad = np.zeros_like(self.value)


class ConvolutionalLayer:
    def __init__(self, n_in, n_out, rng, mistake):
        self.W, self.B = Param(rng.normal(size=(2, 2, n_in, n_out)) / 2), Param(np.zeros(n_out))
        self.mistake = mistake

    def forward(self, X):
        self.X = X
        patches = np.lib.stride_tricks.sliding_window_view(X, (2, 2), axis=(1, 2))  # (N, H - 1, W - 1, C, 2, 2)
        return np.einsum("nhwcij,ijco->nhwo", patches, self.W.value) + self.B.value

    def backward(self, d_out):
        patches = np.lib.stride_tricks.sliding_window_view(self.X, (2, 2), axis=(1, 2))
        self.W.grad += np.einsum("nhwcij,nhwo->ijco", patches, d_out)
        self.B.grad += d_out.sum((0, 1, 3) if self.mistake == "a sum over the wrong axes" else (0, 1, 2))
        d_X = np.zeros_like(self.X)
        _, height, width, _ = d_out.shape
        for i in range(2):
            for j in range(2):
                d_X[:, i : i + height, j : j + width] += d_out @ self.W.value[i, j].T
        return d_X

    def params(self):
        return {"W": self.W, "B": self.B}


class AveragePooling:
    def __init__(self, mistake):
        self.mistake = mistake

    def forward(self, X):
        n, height, width, channels = X.shape
        return X.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))

    def backward(self, d_out):
        spread = d_out.repeat(2, axis=1).repeat(2, axis=2)
        return spread if self.mistake == "an average without its factor" else spread / 4

    def params(self):
        return {}


class Flattener:
    def __init__(self, mistake):
        self.mistake = mistake

    def forward(self, X):
        self.shape = X.shape
        return X.reshape(len(X), -1)

    def backward(self, d_out):
        if self.mistake == "the axes in another order":
            n, height, width, channels = self.shape
            return d_out.reshape(n, channels, height, width).transpose(0, 2, 3, 1)
        return d_out.reshape(self.shape)

    def params(self):
        return {}


class FullyConnectedLayer:
    def __init__(self, n_in, n_out, rng):
        self.W, self.B = Param(rng.normal(size=(n_in, n_out)) / 4), Param(np.zeros((1, n_out)))

    def forward(self, X):
        self.X = X
        return X @ self.W.value + self.B.value

    def backward(self, d_out):
        self.W.grad += self.X.T @ d_out
        self.B.grad += d_out.sum(0, keepdims=True)
        return d_out @ self.W.value.T

    def params(self):
        return {"W": self.W, "B": self.B}


def softmax_with_cross_entropy(predictions, target):
    """The loss, and its gradient."""
    p, rows = softmax(predictions), np.arange(len(target))
    loss = -np.log(p[rows, target]).mean()
    p[rows, target] -= 1
    return loss, p / np.float32(len(target))


class ValueObjects(Style):
    mistakes = {
        "a sum over the wrong axes": (0, {"B"}),
        "an average without its factor": (1, {"input"}),
        "the axes in another order": (2, {"input"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(8)
        convolve, connect = ConvolutionalLayer(2, 4, rng, mistake), FullyConnectedLayer(16, 3, rng)
        self.network = [convolve, AveragePooling(mistake), Flattener(mistake), connect]

    def data(self, rng):
        return rng.normal(size=(4, 5, 5, 2)).astype(np.float32), rng.integers(0, 3, 4)

    def gradients(self, x, target):
        for layer in self.network:
            x = layer.forward(x)
        loss, grad = softmax_with_cross_entropy(x, target)
        for layer in reversed(self.network):
            grad = layer.backward(grad)
        return loss

    def pairs(self):
        return [(each.value, each.grad) for layer in self.network for each in layer.params().values()]

    def zero(self):
        for _, grad in self.pairs():
            grad.fill(0)
