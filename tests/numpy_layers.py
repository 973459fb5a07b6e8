"""A mini-torch of the kind people write, with right backwards, that shares no code with ours: for the gradient check."""

import numpy as np


def im2col(x, size, stride):
    """Patches (N, out_h, out_w, C * size * size) of images (N, C, H, W)."""
    n, c, h, w = x.shape
    oh, ow = (h - size) // stride + 1, (w - size) // stride + 1
    cols = np.zeros((n, oh, ow, c, size, size), dtype=x.dtype)
    for i in range(size):
        for j in range(size):
            cols[..., i, j] = x[:, :, i : i + stride * oh : stride, j : j + stride * ow : stride].transpose(0, 2, 3, 1)
    return cols.reshape(n, oh, ow, -1)


def col2im(cols, shape, size, stride):
    n, oh, ow, _ = cols.shape
    cols = cols.reshape(n, oh, ow, shape[1], size, size)
    x = np.zeros(shape, dtype=cols.dtype)
    for i in range(size):
        for j in range(size):
            x[:, :, i : i + stride * oh : stride, j : j + stride * ow : stride] += cols[..., i, j].transpose(0, 3, 1, 2)
    return x


class Layer:
    """Gradients are attributes: `dW` of `W`."""

    def zero_grad(self):
        for name in [name for name in vars(self) if f"d{name}" in vars(self)]:
            getattr(self, f"d{name}").fill(0)

    def __call__(self, *args):
        return self.forward(*args)


class Dense(Layer):
    def __init__(self, n_in, n_out, dtype=np.float64, seed=0):
        rng = np.random.default_rng(seed)
        self.W = rng.normal(size=(n_in, n_out)).astype(dtype)
        self.b = rng.normal(size=n_out).astype(dtype)
        self.dW, self.db = np.zeros_like(self.W), np.zeros_like(self.b)

    def forward(self, x):
        self.x = x
        return x @ self.W + self.b

    def backward(self, dout):
        self.dW += self.x.T @ dout
        self.db += dout.sum(axis=0)
        return dout @ self.W.T


class Conv(Layer):
    def __init__(self, c_in, c_out, size=2, stride=1, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.size, self.stride = size, stride
        self.K = rng.normal(size=(c_out, c_in, size, size)).astype(dtype)
        self.b = rng.normal(size=c_out).astype(dtype)
        self.dK, self.db = np.zeros_like(self.K), np.zeros_like(self.b)

    def forward(self, x):
        self.shape, self.cols = x.shape, im2col(x, self.size, self.stride)
        return (self.cols @ self.K.reshape(len(self.K), -1).T + self.b).transpose(0, 3, 1, 2)

    def backward(self, dout):
        dout = dout.transpose(0, 2, 3, 1)
        rows = dout.reshape(-1, dout.shape[-1])
        self.dK += (rows.T @ self.cols.reshape(len(rows), -1)).reshape(self.K.shape)
        self.db += rows.sum(axis=0)
        return col2im(dout @ self.K.reshape(len(self.K), -1), self.shape, self.size, self.stride)


class BatchNorm(Layer):
    def __init__(self, size, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.gamma, self.beta = rng.normal(size=size).astype(dtype), rng.normal(size=size).astype(dtype)
        self.dgamma, self.dbeta = np.zeros_like(self.gamma), np.zeros_like(self.beta)
        self.running_mean, self.training = np.zeros(size, dtype), True

    def forward(self, x):
        mean, var = x.mean(axis=0), x.var(axis=0)
        self.running_mean *= 0.9
        self.running_mean += 0.1 * mean
        self.std = np.sqrt(var + 1e-5)
        self.xhat = (x - mean) / self.std
        return self.gamma * self.xhat + self.beta

    def backward(self, dout):
        self.dgamma += (dout * self.xhat).sum(axis=0)
        self.dbeta += dout.sum(axis=0)
        dxhat = dout * self.gamma
        return (dxhat - dxhat.mean(axis=0) - self.xhat * (dxhat * self.xhat).mean(axis=0)) / self.std


class LayerNorm(Layer):
    def __init__(self, size, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.gamma, self.beta = rng.normal(size=size).astype(dtype), rng.normal(size=size).astype(dtype)
        self.dgamma, self.dbeta = np.zeros_like(self.gamma), np.zeros_like(self.beta)

    def forward(self, x):
        self.std = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        self.xhat = (x - x.mean(axis=-1, keepdims=True)) / self.std
        return self.gamma * self.xhat + self.beta

    def backward(self, dout):
        self.dgamma += (dout * self.xhat).sum(axis=0)
        self.dbeta += dout.sum(axis=0)
        d = dout * self.gamma
        xhat = self.xhat
        return (d - d.mean(-1, keepdims=True) - xhat * (d * xhat).mean(-1, keepdims=True)) / self.std


class Softmax(Layer):
    def forward(self, x):
        e = np.exp(x - np.max(x, axis=1, keepdims=True))
        self.y = e / e.sum(axis=1, keepdims=True)
        return self.y

    def backward(self, dout):
        return self.y * (dout - (dout * self.y).sum(axis=1, keepdims=True))


class ReLU(Layer):
    def forward(self, x):
        self.mask = x <= 0
        out = x.copy()
        out[self.mask] = 0
        return out

    def backward(self, dout):
        return np.where(self.mask, 0, dout)


class Sigmoid(Layer):
    def forward(self, x):
        self.y = 1 / (1 + np.exp(-x))
        return self.y

    def backward(self, dout):
        return dout * self.y * (1 - self.y)


class MaxPool(Layer):
    """Windows of 2 x 2 without overlap."""

    def forward(self, x):
        n, c, h, w = x.shape
        windows = x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
        self.shape, self.best = x.shape, windows.argmax(axis=-1)
        return windows.max(axis=-1)

    def backward(self, dout):
        n, c, h, w = self.shape
        windows = np.zeros((*dout.shape, 4), dout.dtype)
        np.put_along_axis(windows, self.best[..., None], dout[..., None], axis=-1)
        return windows.reshape(n, c, h // 2, w // 2, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(self.shape)


class Flatten(Layer):
    def forward(self, x):
        self.shape = x.shape
        return x.reshape(x.shape[0], -1)

    def backward(self, dout):
        return dout.reshape(self.shape)


class Embedding(Layer):
    def __init__(self, count, size, dtype=np.float64):
        self.W = np.random.default_rng(0).normal(size=(count, size)).astype(dtype)
        self.dW = np.zeros_like(self.W)

    def forward(self, ids):
        self.ids = ids
        return self.W[ids]

    def backward(self, dout):
        np.add.at(self.dW, self.ids, dout)


class Dropout(Layer):
    def __init__(self, p=0.4, seed=0):
        self.p, self.rng = p, np.random.default_rng(seed)

    def forward(self, x):
        self.mask = (self.rng.random(x.shape) >= self.p) / (1 - self.p)
        return x * self.mask

    def backward(self, dout):
        return dout * self.mask


class Residual(Layer):
    """x + second(relu(first(x)))."""

    def __init__(self, size, dtype=np.float64):
        self.first, self.relu, self.second = Dense(size, size, dtype), ReLU(), Dense(size, size, dtype, seed=1)

    def zero_grad(self):
        self.first.zero_grad()
        self.second.zero_grad()

    def forward(self, x):
        return x + self.second(self.relu(self.first(x)))

    def backward(self, dout):
        return dout + self.first.backward(self.relu.backward(self.second.backward(dout)))


class RNNCell(Layer):
    """Two inputs, two gradients."""

    def __init__(self, n_in, n_hidden, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.Wx = rng.normal(size=(n_in, n_hidden)).astype(dtype)
        self.Wh = rng.normal(size=(n_hidden, n_hidden)).astype(dtype)
        self.b = rng.normal(size=n_hidden).astype(dtype)
        self.dWx, self.dWh, self.db = (np.zeros_like(array) for array in (self.Wx, self.Wh, self.b))

    def forward(self, x, h):
        self.x, self.h, self.out = x, h, np.tanh(x @ self.Wx + h @ self.Wh + self.b)
        return self.out

    def backward(self, dout):
        dz = dout * (1 - self.out**2)
        self.dWx += self.x.T @ dz
        self.dWh += self.h.T @ dz
        self.db += dz.sum(axis=0)
        return dz @ self.Wx.T, dz @ self.Wh.T


class RNN(Layer):
    """The cell over the second axis, each step with a cell that shares the weights; gives the last state."""

    def __init__(self, n_in, n_hidden, dtype=np.float64):
        self.cell, self.size = RNNCell(n_in, n_hidden, dtype), n_hidden

    def zero_grad(self):
        self.cell.zero_grad()

    def forward(self, x):
        self.steps, h = [], np.zeros((x.shape[0], self.size), x.dtype)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            self.steps.append((self.cell.x, self.cell.h, self.cell.out))
        self.shape = x.shape
        return h

    def backward(self, dh):
        dx = np.zeros(self.shape, dh.dtype)
        for t in reversed(range(self.shape[1])):
            self.cell.x, self.cell.h, self.cell.out = self.steps[t]
            dx[:, t], dh = self.cell.backward(dh)
        return dx


class CrossEntropy:
    """Of scores, averaged over the batch."""

    def forward(self, scores, classes):
        scores = scores - scores.max(axis=1, keepdims=True)
        self.p, self.classes = np.exp(scores), classes
        self.p /= self.p.sum(axis=1, keepdims=True)
        return float(-np.mean(np.log(self.p[np.arange(len(classes)), classes])))

    def backward(self):
        d = self.p.copy()
        d[np.arange(len(d)), self.classes] -= 1
        return d / len(d)


class SquaredError:
    def forward(self, y, target):
        self.difference = y - target
        return (self.difference**2).mean()

    def backward(self):
        return 2 * self.difference / self.difference.size


class Net(Layer):
    """Layers in an order of its own, with a branch."""

    def __init__(self, *layers, side=None):
        self.layers, self.side = list(layers), side

    def zero_grad(self):
        for layer in [*self.layers, *([self.side] if self.side else [])]:
            layer.zero_grad()

    def forward(self, x):
        y = x
        for layer in self.layers:
            y = layer(y)
        return y if self.side is None else y + self.side(x)

    def backward(self, dout):
        d = dout
        for layer in reversed(self.layers):
            d = layer.backward(d)
        return d if self.side is None else d + self.side.backward(dout)
