"""Small NumPy networks, of which two list pairs by a method, and one returns gradients from backward: see numpy_styles.py."""

import numpy as np
from numpy_styles import Style, softmax

# -- 4: params_and_grads() yields pairs from private lists, made early, which backward fills; layer norm; a loss of size 1 --


class Unit:
    def __init__(self, *values, mistake=""):
        self._values, self._slopes = list(values), [np.zeros_like(value) for value in values]
        self.mistake = mistake

    def params_and_grads(self):
        yield from zip(self._values, self._slopes, strict=True)


class Weighted(Unit):
    def __init__(self, n_in, n_out, rng):
        super().__init__(rng.normal(size=(n_out, n_in)), np.zeros(n_out))

    def forward(self, x):
        self._x = x
        return x @ self._values[0].T + self._values[1]

    def backward(self, slope):
        self._slopes[0][...] = slope.T @ self._x
        self._slopes[1][...] = slope.sum(0)
        return slope @ self._values[0]


class Normalized(Unit):
    """Layer norm."""

    def __init__(self, size, mistake):
        super().__init__(np.ones(size), np.zeros(size), mistake=mistake)

    def forward(self, x):
        self._scale = 1 / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        self._n = (x - x.mean(1, keepdims=True)) * self._scale
        return self._n * self._values[0] + self._values[1]

    def backward(self, slope):
        scale, shift = (1, 0) if self.mistake == "scale and shift exchanged" else (0, 1)
        self._slopes[scale][...] = (slope * self._n).sum(0)
        self._slopes[shift][...] = slope.sum(0)
        slope = slope * self._values[0]
        along = (slope * self._n).mean(1, keepdims=True)
        return self._scale * (slope - slope.mean(1, keepdims=True) - self._n * along)


class Logistic(Unit):
    def forward(self, x):
        self._y = 1 / (1 + np.exp(-x))
        return self._y

    def backward(self, slope):
        sign = -1 if self.mistake == "a sign" else 1
        return sign * slope * self._y * (1 - self._y)


class BinaryCrossEntropy:
    """Of scores; the loss has the shape (1,)."""

    def __init__(self, mistake):
        self.mistake = mistake

    def forward(self, scores, target):
        self.p, self.target = 1 / (1 + np.exp(-scores)), target
        return -np.mean(target * np.log(self.p) + (1 - target) * np.log(1 - self.p), axis=0)

    def backward(self):
        return (self.p - self.target) / (1 if self.mistake == "a sum for a mean" else len(self.p))


class Network:
    def __init__(self, *units):
        self.units = units

    def forward(self, x):
        for unit in self.units:
            x = unit.forward(x)
        return x

    def backward(self, slope):
        for unit in self.units[::-1]:
            slope = unit.backward(slope)
        return slope

    def params_and_grads(self):
        for unit in self.units:
            yield from unit.params_and_grads()


class YieldedPairs(Style):
    mistakes = {
        "scale and shift exchanged": ("units.1", {"0", "1"}),
        "a sign": ("units.2", {"input"}),
        "a sum for a mean": ("loss", {"input 0"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(5)
        units = Weighted(4, 5, rng), Normalized(5, mistake), Logistic(mistake=mistake), Weighted(5, 1, rng)
        self.network, self.loss = Network(*units), BinaryCrossEntropy(mistake)

    def data(self, rng):
        return rng.normal(size=(6, 4)), rng.integers(0, 2, (6, 1)).astype(float)

    def gradients(self, x, target):
        (loss,) = self.loss.forward(self.network.forward(x), target)
        self.network.backward(self.loss.backward())
        return loss

    def pairs(self):
        return list(self.network.params_and_grads())


# -- 5: param() returns lists of pairs; `dL_dW`, made early, to which backward adds; layers are called; a list in a list --


class Part:
    def param(self):
        return []


class Line(Part):
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.W, self.b, self.mistake = rng.normal(size=(n_in, n_out)), np.zeros(n_out), mistake
        self.dL_dW, self.dL_db = np.zeros((n_in, n_out)), np.zeros(n_out)

    def __call__(self, x):
        self.x = x
        return x @ self.W + self.b

    def backward(self, dL_dy):
        self.dL_dW += (2 if self.mistake == "a factor of 2" else 1) * self.x.T @ dL_dy
        self.dL_db += dL_dy[-1] if self.mistake == "the last sample alone" else dL_dy.sum(0)
        return dL_dy @ self.W.T

    def param(self):
        return [(self.W, self.dL_dW), (self.b, self.dL_db)]


class Leak(Part):
    def __call__(self, x):
        self.slope = np.where(x > 0, 1.0, 0.1)
        return x * self.slope

    def backward(self, dL_dy):
        return dL_dy * self.slope


class Parts(Part):
    def __init__(self, *parts):
        self.parts = list(parts)

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x

    def backward(self, dL_dy):
        for part in reversed(self.parts):
            dL_dy = part.backward(dL_dy)
        return dL_dy

    def param(self):
        return [pair for part in self.parts for pair in part.param()]


class MeanSquare:
    def __init__(self, mistake):
        self.mistake = mistake

    def __call__(self, out, target):
        self.error = out - target
        return np.mean(self.error**2)

    def backward(self):
        return (1 if self.mistake == "the square's factor" else 2) * self.error / self.error.size


class ParamPairs(Style):
    mistakes = {
        "a factor of 2": ("parts.0.parts.0", {"W"}),
        "the last sample alone": ("parts.1", {"b"}),
        "the square's factor": ("loss", {"input 0"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(6)
        first, last = [mistake if kind in mistake else "" for kind in ("factor of 2", "sample")]
        self.network = Parts(Parts(Line(4, 5, rng, first), Leak()), Line(5, 2, rng, last))
        self.loss = MeanSquare(mistake)

    def data(self, rng):
        return rng.normal(size=(6, 4)), rng.normal(size=(6, 2))

    def gradients(self, x, target):
        loss = self.loss(self.network(x), target)
        self.network.backward(self.loss.backward())
        return loss

    def pairs(self):
        return self.network.param()

    def zero(self):
        for _, grad in self.pairs():
            grad.fill(0)


# -- 6: backward returns the gradients; the network puts them into a list beside that of its parameters; a residual block --


class Map:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.W, self.b, self.mistake = rng.normal(size=(n_in, n_out)) / 2, np.zeros(n_out), mistake

    def forward(self, x):
        self.cache = x
        return x @ self.W + self.b

    def backward(self, g):
        gradient = self.cache.T @ g
        return g @ self.W.T, gradient.T if self.mistake == "a square matrix transposed" else gradient, g.sum(0)


class SoftPlus:
    def forward(self, x):
        self.cache = x
        return np.log1p(np.exp(x))

    def backward(self, g):
        return g / (1 + np.exp(-self.cache))


class Residual:
    def __init__(self, rng, mistake):
        self.first, self.middle, self.last = Map(4, 4, rng), Map(4, 4, rng, mistake), Map(4, 3, rng)
        self.bend, self.bend_again, self.mistake = SoftPlus(), SoftPlus(), mistake
        self.params = [array for layer in (self.first, self.middle, self.last) for array in (layer.W, layer.b)]
        self.grads = None

    def forward(self, x):
        h = self.bend.forward(self.first.forward(x))
        h = h + self.bend_again.forward(self.middle.forward(h))
        return self.last.forward(h)

    def backward(self, g):
        g, *of_last = self.last.backward(g)
        inner, *of_middle = self.middle.backward(self.bend_again.backward(g))
        g = inner if self.mistake == "without the skip" else inner + g
        g, *of_first = self.first.backward(self.bend.backward(g))
        if self.mistake == "another layer's gradient":
            of_first[0], of_middle[0] = of_middle[0], of_first[0]
        self.grads = [*of_first, *of_middle, *of_last]
        return g


class SoftmaxLoss:
    def __call__(self, scores, target):
        self.p, self.target = softmax(scores), target
        return -np.log(self.p[np.arange(len(target)), target]).mean()

    def backward(self):
        return (self.p - np.eye(self.p.shape[1])[self.target]) / len(self.p)


class Returned(Style):
    mistakes = {
        "a square matrix transposed": ("middle", {"W"}),
        "without the skip": ("", {"params.0", "params.1", "input"}),
        "another layer's gradient": ("", {"params.0", "params.2"}),
    }

    def __init__(self, mistake=""):
        self.network, self.loss = Residual(np.random.default_rng(7), mistake), SoftmaxLoss()

    def gradients(self, x, target):
        loss = self.loss(self.network.forward(x), target)
        self.network.backward(self.loss.backward())
        return loss

    def pairs(self):
        return list(zip(self.network.params, self.network.grads, strict=True))
