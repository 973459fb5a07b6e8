"""Eight small NumPy networks, each written in another way that people write them. The first three are in this file.

`Style(mistake)` is a network with a loss. It draws the same weights each time. `mistakes` has three mistakes. It says in
which layer of `network` each is, and by which arrays the gradients are wrong ("input" for the layer's input).
"""

import numpy as np


class Style:
    mistakes = {}
    options = {}  # for `wrap` and `check_gradients`
    loss = None
    ids = False  # True if the input is of integers

    def data(self, rng):
        """A batch: the input and the target."""
        return rng.normal(size=(6, 4)), rng.integers(0, 3, 6)

    def gradients(self, x, target):
        """Forward and backward on a batch, as the network's own loop does it. Returns the loss."""
        raise NotImplementedError

    def pairs(self):
        """Each parameter with its gradient, after `gradients`."""
        raise NotImplementedError

    def zero(self):
        """What the network's own loop does before `gradients`; nothing, if backward assigns."""


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# -- 1: `weights_gradient`, first made in backward, which assigns; batch norm; loss(pred, target) and grad(pred, target) --


class Affine:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.weights, self.bias, self.mistake = rng.normal(size=(n_in, n_out)), np.zeros(n_out), mistake

    def forward(self, x):
        self.inputs = x
        return x @ self.weights + self.bias

    def backward(self, grad):
        self.weights_gradient = self.inputs.T @ grad
        self.bias_gradient = grad.sum(axis=0) * (3 if self.mistake == "a bias before batch norm, times 3" else 1)
        return grad @ self.weights.T


class BatchNormalization:
    def __init__(self, size, mistake=""):
        self.gamma, self.beta, self.mistake = np.ones(size), np.zeros(size), mistake
        self.running_mean, self.running_variance = np.zeros(size), np.ones(size)

    def forward(self, x):
        mean, variance = x.mean(axis=0), x.var(axis=0)
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        self.running_variance = 0.9 * self.running_variance + 0.1 * variance
        self.deviation = np.sqrt(variance + 1e-5)
        self.normal = (x - mean) / self.deviation
        return self.gamma * self.normal + self.beta

    def backward(self, grad):
        self.gamma_gradient = (grad * self.normal).sum(axis=0)
        self.beta_gradient = grad.sum(axis=0)
        grad = grad * self.gamma
        through_mean = 0 if self.mistake == "the mean as a constant" else grad.mean(axis=0)
        return (grad - through_mean - self.normal * (grad * self.normal).mean(axis=0)) / self.deviation


class HyperbolicTangent:
    def __init__(self, mistake=""):
        self.mistake = mistake

    def forward(self, x):
        self.outputs = np.tanh(x)
        return self.outputs

    def backward(self, grad):
        return grad * (1 - (self.outputs if self.mistake == "tanh without the square" else self.outputs**2))


class CategoricalCrossEntropy:
    """Of softmax's scores, which it computes."""

    def loss(self, predicted, target):
        return -np.log(softmax(predicted)[np.arange(len(target)), target]).mean()

    def grad(self, predicted, target):
        return (softmax(predicted) - np.eye(predicted.shape[1])[target]) / len(target)


class NamedGradients(Style):
    options = {"frozen": ("*.running_mean", "*.running_variance")}
    mistakes = {
        "a bias before batch norm, times 3": (0, {"bias"}),
        "the mean as a constant": (1, {"input"}),
        "tanh without the square": (2, {"input"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(1)
        layers = (
            Affine(4, 4, rng, mistake),
            BatchNormalization(4, mistake),
            HyperbolicTangent(mistake),
            Affine(4, 3, rng),
        )
        self.network, self.loss = list(layers), CategoricalCrossEntropy()

    def gradients(self, x, target):
        for layer in self.network:
            x = layer.forward(x)
        grad = self.loss.grad(x, target)
        for layer in reversed(self.network):
            grad = layer.backward(grad)
        return self.loss.loss(x, target)

    def pairs(self):
        names = "weights", "bias", "gamma", "beta"
        found = [(layer, name) for layer in self.network for name in names if hasattr(layer, name)]
        return [(getattr(layer, name), getattr(layer, f"{name}_gradient")) for layer, name in found]


# -- 2: dicts of parameters and of gradients, made early; backward(input, grad_output) adds; convolution; float32 --


class Node:
    def __init__(self, mistake="", **params):
        self.params = {name: value.astype(np.float32) for name, value in params.items()}
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.mistake = mistake


class Convolve(Node):
    def __init__(self, n_in, n_out, rng, mistake):
        super().__init__(mistake, weight=rng.normal(size=(n_out, n_in, 2, 2)) / 2, bias=np.zeros(n_out))

    def forward(self, input):
        _, _, height, width = input.shape
        weight, out = self.params["weight"], self.params["bias"][:, None, None]
        for i, j in np.ndindex(2, 2):
            part = input[:, :, i : i + height - 1, j : j + width - 1]
            out = out + np.einsum("nchw,oc->nohw", part, weight[:, :, i, j])
        return out

    def backward(self, input, grad_output):
        _, _, height, width = grad_output.shape
        weight, grad_input = self.params["weight"], np.zeros_like(input)
        self.grads["bias"] += grad_output.sum((0, 2, 3))
        for i, j in np.ndindex(2, 2):
            rows, columns = slice(i, i + height), slice(j, j + width)
            self.grads["weight"][:, :, i, j] += np.einsum("nchw,nohw->oc", input[:, :, rows, columns], grad_output)
            used = weight[:, :, j, i] if self.mistake == "the kernel turned" else weight[:, :, i, j]
            grad_input[:, :, rows, columns] += np.einsum("nohw,oc->nchw", grad_output, used)
        return grad_input


class Rectify(Node):
    def forward(self, input):
        return np.maximum(input, 0)

    def backward(self, input, grad_output):
        return grad_output * ((grad_output if self.mistake == "the mask of the gradient" else input) > 0)


class Flatten(Node):
    def forward(self, input):
        return input.reshape(len(input), -1)

    def backward(self, input, grad_output):
        return grad_output.reshape(input.shape)


class FullyConnected(Node):
    def __init__(self, n_in, n_out, rng, mistake):
        super().__init__(mistake, weight=rng.normal(size=(n_out, n_in)) / 2, bias=np.zeros(n_out))

    def forward(self, input):
        return input @ self.params["weight"].T + self.params["bias"]

    def backward(self, input, grad_output):
        if self.mistake == "the bias assigns, the weight adds":
            self.grads["bias"] = grad_output.sum(0)
        else:
            self.grads["bias"] += grad_output.sum(0)
        self.grads["weight"] += grad_output.T @ input
        return grad_output @ self.params["weight"]


class LogSoftmaxLoss:
    def forward(self, out, target):
        return -np.log(softmax(out)[np.arange(len(out)), target]).mean()

    def backward(self, out, target):
        return (softmax(out) - np.eye(out.shape[1], dtype=out.dtype)[target]) / np.float32(len(out))


class Dicts(Style):
    mistakes = {
        "the kernel turned": (0, {"input"}),
        "the mask of the gradient": (1, {"input"}),
        "the bias assigns, the weight adds": (3, {"bias"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(2)
        convolve, connect = Convolve(2, 3, rng, mistake), FullyConnected(12, 3, rng, mistake)
        self.network, self.loss = [convolve, Rectify(mistake), Flatten(), connect], LogSoftmaxLoss()

    def data(self, rng):
        return rng.normal(size=(5, 2, 3, 3)).astype(np.float32), rng.integers(0, 3, 5)

    def gradients(self, x, target):
        kept = [x]
        for layer in self.network:
            kept.append(layer.forward(kept[-1]))
        out = kept.pop()
        grad = self.loss.backward(out, target)
        for layer, x in zip(reversed(self.network), reversed(kept), strict=True):
            grad = layer.backward(x, grad)
        return self.loss.forward(out, target)

    def pairs(self):
        return [(layer.params[name], layer.grads[name]) for layer in self.network for name in layer.params]

    def zero(self):
        for _, grad in self.pairs():
            grad[...] = 0


# -- 3: forward stores `output`, backward stores `dinputs`, both return nothing; dropout; softmax apart from the loss --


class LayerDense:
    def __init__(self, n_in, n_out, rng, mistake=""):
        self.weights, self.biases, self.mistake = rng.normal(size=(n_in, n_out)), np.zeros((1, n_out)), mistake

    def forward(self, inputs):
        self.inputs = inputs
        self.output = np.dot(inputs, self.weights) + self.biases

    def backward(self, dvalues):
        self.dweights = np.dot(self.inputs.T, dvalues)
        self.dbiases = np.sum(dvalues, axis=0, keepdims=True)
        self.dinputs = np.dot(dvalues, self.weights if self.mistake == "weights not transposed" else self.weights.T)


class FirstInputs(LayerDense):
    """Keeps the input of the first call."""

    def forward(self, inputs):
        if not hasattr(self, "inputs"):
            self.inputs = inputs
        self.output = np.dot(inputs, self.weights) + self.biases


class LayerDropout:
    def __init__(self, rate, mistake=""):
        self.keep, self.mistake, self.generator = 1 - rate, mistake, np.random.default_rng(0)

    def forward(self, inputs):
        self.mask = self.generator.binomial(1, self.keep, inputs.shape) / self.keep
        self.output = inputs * self.mask

    def backward(self, dvalues):
        self.dinputs = dvalues * ((self.mask > 0) if self.mistake == "dropout without its factor" else self.mask)


class ActivationSoftmax:
    def forward(self, inputs):
        self.output = softmax(inputs)

    def backward(self, dvalues):
        self.dinputs = np.empty_like(dvalues)
        for i, (output, values) in enumerate(zip(self.output, dvalues, strict=True)):
            column = output.reshape(-1, 1)
            self.dinputs[i] = np.dot(np.diagflat(column) - np.dot(column, column.T), values)


class LossCrossEntropy:
    def forward(self, predicted, target):
        return -np.log(predicted[np.arange(len(predicted)), target]).mean()

    def backward(self, dvalues, target):
        self.dinputs = -np.eye(dvalues.shape[1])[target] / dvalues / len(dvalues)


class StoredOutputs(Style):
    mistakes = {
        "the first batch's input": (0, {"weights"}),
        "dropout without its factor": (1, {"input"}),
        "weights not transposed": (2, {"input"}),
    }

    def __init__(self, mistake=""):
        rng = np.random.default_rng(3)
        first = FirstInputs if mistake == "the first batch's input" else LayerDense
        dense = first(4, 5, rng), LayerDense(5, 5, rng, mistake), LayerDense(5, 3, rng)
        self.network = [dense[0], LayerDropout(0.3, mistake), dense[1], dense[2], ActivationSoftmax()]
        self.loss = LossCrossEntropy()

    def gradients(self, x, target):
        for layer in self.network:
            layer.forward(x)
            x = layer.output
        self.loss.backward(x, target)
        dvalues = self.loss.dinputs
        for layer in reversed(self.network):
            layer.backward(dvalues)
            dvalues = layer.dinputs
        return self.loss.forward(x, target)

    def pairs(self):
        dense = [layer for layer in self.network if hasattr(layer, "weights")]
        return [pair for each in dense for pair in ((each.weights, each.dweights), (each.biases, each.dbiases))]
