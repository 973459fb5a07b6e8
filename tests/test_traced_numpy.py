"""NumPy code on traced arrays: its values are NumPy's, its derivatives those of finite differences."""

import math

import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from scipy import special

from minitorch_jax.adapters.numpy.reference import Differences, by_jax, reference_for
from minitorch_jax.adapters.numpy.subject import Settings, Subject, outputs_of


class Function:
    def __init__(self, f):
        self.f = f

    def forward(self, x):
        return self.f(x)

    def backward(self, dout):
        raise NotImplementedError


def assigned(x):
    y = np.zeros((3, 4), dtype=x.dtype)
    y[0] = x[1]
    y[1:, 1:3] = 2 * x[1:, :2]
    y[:, 3] += x[:, 0] ** 2
    y[y > 1.5] = 0
    y[[0, 2], [1, 1]] *= 3.0
    return y


def views(x):
    y = x.copy()
    y.T[1] *= 2.0  # all of these write into y
    flat = y.reshape(-1)
    flat[2:5] = x[0, :3]
    y.ravel()[0] = 7
    row = y[2]
    row -= row.mean()
    np.swapaxes(y, 0, 1)[3, :2] = x[0, 0]
    y[::-1][0] += 1
    copied = y.T.reshape(-1)  # a copy, as the transposed is not contiguous
    copied[:] = 0
    picked = y[[0, 1]]
    picked[...] = 0
    return y


def in_place(x):
    y = np.empty_like(x)
    np.multiply(x, 2.0, out=y)
    y += 1.0
    y /= np.full(4, x.max())
    np.add.at(y, (np.array([0, 0, 1]),), x[:1])
    np.copyto(y[1], x[0])
    np.maximum.at(y, (2,), x[1])
    safe = np.divide(x, y, out=np.zeros_like(x), where=y != 0)
    safe.sort(axis=1)
    np.put_along_axis(safe, np.array([[1], [0], [2]]), x[:, :1], axis=1)
    return safe


def lists(x):
    rows = [row * i for i, row in enumerate(x)]
    return np.array([rows[0] + rows[1], rows[2]]) + np.asarray([[x[0, 0], 1.0, x[1, 1], x[2, 2]]])


def numbers(x):
    total = 0.0
    for value in x.flat:
        total += float(value) * 2 if value > 0 else math.exp(value) + math.pow(value, 2)
    return total + x.sum().item() + math.sqrt(abs(x[0, 0]))


def im2col(x):
    s = x.strides
    patches = as_strided(x, (2, 3, 2, 2), (s[0], s[1], s[0], s[1]))
    return patches.sum((0, 1)) + sliding_window_view(x, (2, 2)).max(axis=(0, 1))


def inner_import(x):
    import numpy
    from numpy import tanh as th

    return th(numpy.asarray(x, dtype=numpy.float32)) @ numpy.ones((4, 2))


QUICK = {"lists": lists, "numbers": numbers, "imports": inner_import}
SWEEP = {
    "assigned": assigned,
    "views": views,
    "in place": in_place,
    "im2col": im2col,
    "reductions": lambda x: x.sum(0) + x.mean(0) + x.max(0) + x.min(0) + x.prod(0) + x.var(0) + x.std(0, ddof=1),
    "with keepdims": lambda x: (x - x.mean(1, keepdims=True)) / (1 + np.var(x, axis=-1, keepdims=True)),
    "norms": lambda x: np.linalg.norm(x, axis=1) + np.sqrt((x**2).sum(1)),
    "linear algebra": lambda x: np.linalg.inv(x @ x.T + 5 * np.eye(3)) + np.linalg.det(x @ x.T) + np.trace(x @ x.T),
    "products": lambda x: np.dot(x, x.T) + np.einsum("ij,kj->ik", x, x) + np.tensordot(x, x, (1, 1)) + np.inner(x, x),
    "outer": lambda x: np.outer(x[0], x[1]) + np.multiply.outer(x[0], x[2]) + np.kron(x[0, :2], x[1, :2]).reshape(1, 4),
    "ufuncs": lambda x: (
        np.exp(x) + np.log1p(x**2) + np.sin(x) * np.cos(x) + np.arctan(x) + np.square(x) + np.cbrt(x + 5)
    ),
    "more ufuncs": lambda x: (
        np.logaddexp(x, 0) + np.hypot(x, 1) + np.arctan2(x, 2) + np.expm1(x) + np.reciprocal(x + 9)
    ),
    "ufunc methods": lambda x: (
        np.add.reduce(x, axis=0) + np.maximum.reduce(x, axis=0) + np.add.accumulate(x, axis=1)[0]
    ),
    "special functions": lambda x: special.erf(x) + special.expit(x) + special.gammaln(x + 5),
    "choices": lambda x: (
        np.where(x > 0, x, 0.1 * x) + np.clip(x, -1, 1) + np.maximum(x, 0.3) + np.minimum(x, x.T[0, 0])
    ),
    "clip by name": lambda x: np.clip(x, a_min=-0.5, a_max=None) + x.clip(min=0.2),
    "select": lambda x: (
        np.select([x > 1, x > 0], [x**2, x], default=0.0) + np.abs(x) + np.sign(x) * x + np.heaviside(x, 0)
    ),
    "joined": lambda x: (
        np.concatenate([x, x * 2], axis=1)[:, 2:6] + np.stack([x[0], x[1], x[2]]) + np.vstack([x[:1], x[1:]])
    ),
    "blocks": lambda x: (
        np.block([[x, x], [x, x]])[:3, 2:6] + np.column_stack([x[:, 0], x[:, 1:]]) + np.hstack([x, x])[:, :4]
    ),
    "split": lambda x: np.split(x, 2, axis=1)[1] + np.array_split(x, 2, axis=1)[0] + np.hsplit(x, 2)[0],
    "moved": lambda x: (
        np.moveaxis(x[None], 0, 2)[..., 0] + np.expand_dims(x, 1).squeeze(1) + np.transpose(x.T) + x[:, ::-1]
    ),
    "repeated": lambda x: np.repeat(x, 2, axis=0)[::2] + np.tile(x, (2, 1))[3:] + np.roll(x, 1, axis=1) + np.flip(x, 0),
    "padded": lambda x: np.pad(x, ((1, 1), (0, 2)))[1:-1, :-2] + np.pad(x, 1, mode="edge")[1:4, 2:6],
    "taken": lambda x: (
        np.take(x, [2, 0, 1], axis=0) + np.take_along_axis(x, np.argsort(x, axis=1), axis=1) + x[[1, 1, 0]]
    ),
    "by a mask": lambda x: x[x > 0].sum() + x[np.argmax(x, axis=0), np.arange(4)] + x[np.arange(3), [0, 3, 1]].sum(),
    "diagonals": lambda x: (
        np.diag(x[:, :3]) + np.diagonal(x[:, 1:]) + np.tril(x[:, :3]).sum(0) + np.triu(x[:, :3]).sum(0)
    ),
    "sums along": lambda x: np.cumsum(x, axis=1) + np.cumprod(x, axis=0) + np.diff(x, axis=1, prepend=0),
    "sorted": lambda x: np.sort(x, axis=1) + np.median(x, axis=1, keepdims=True),
    "averages": lambda x: np.average(x, axis=0, weights=[1, 2, 3]) + np.nanmean(x, axis=0) + np.ptp(x, axis=0),
    "constants": lambda x: (
        x * np.linspace(0, 1, 4) + np.arange(4.0) + np.eye(3, 4) + np.ones_like(x) + np.full((3, 4), x[0, 0])
    ),
    "dtypes": lambda x: (
        x.astype(np.float32).astype(float) * (x > 0).astype(x.dtype) + np.array(x, dtype="float64", copy=True)
    ),
    "operators": lambda x: (
        -x + abs(x) + x // 1 + x % 2 + 2 / (x + 7) + (x + 7) ** 0.5 + 2.0**x - (1 - x) + (x > 0) * ~(x > 1)
    ),
    "attributes": lambda x: x * x.size + x.ndim + len(x) + x.shape[1] + x.T.T.real + (x.nbytes // x.itemsize),
    "convolved": lambda x: np.convolve(x[0], x[1]) + np.correlate(x[0], x[2], "full"),
    "interpolated": lambda x: (
        np.interp(x, [-3, 0, 3], [0, 1, 5]) + np.polyval([1, 2, 3], x) + np.trapezoid(x, axis=1)[:, None]
    ),
    "broadcast": lambda x: np.broadcast_to(x[0], (3, 4)) + x[:, None, :].sum(1) + x[..., None].reshape(3, 4) + x[:, :1],
    "stacked axes": lambda x: np.array([[x, x]]).sum((0, 1)) + np.array(x, ndmin=3)[0] + np.atleast_3d(x)[..., 0],
    "vectors": lambda x: np.cross(x[:, :3], x[::-1, :3]) + x[:, :3] @ x[0, :3] + np.vdot(x[0], x[1]),
    "loops": lambda x: (
        np.array([max(row) - min(row) + sum(row) for row in x]) + np.array([[v for v in r] for r in x]).sum(1)
    ),
    "tuples": lambda x: (x * 2, [np.sum(x)][0]),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SWEEP)])
def test_values_and_derivatives(name):
    f = (QUICK | SWEEP)[name]
    x = np.random.default_rng(5).normal(size=(3, 4))
    subject = Subject("", Function(f), "forward", (x,), {}, Settings())
    outputs = outputs_of(f(x.copy()))
    dout = [np.random.default_rng(6).normal(size=each.shape) for each in outputs]
    with np.errstate(all="ignore"):
        reference = reference_for(subject, dout, outputs_of(subject.run().forward()))
        want = Differences(subject, dout).all()
    assert reference.how == "jax.grad" and not reference.rough
    np.testing.assert_allclose(reference.grads[0], want[0], rtol=1e-7, atol=1e-8)
    assert np.abs(want[0]).max() > 1e-3 and not jax.config.jax_enable_x64


def lost_in_asarray(x):
    return np.linalg.norm(np.float64(x[0, 0])) * x


def lost_in_memory(x):
    y = np.random.default_rng(0).normal(size=x.shape)  # an ordinary array, made by no function that is replaced
    y[0] = x[0]
    return y


def lost_in_a_library(x):
    return special.softmax(memoryview(x), axis=1)


@pytest.mark.parametrize("f", [lost_in_asarray, lost_in_memory, lost_in_a_library])
def test_a_derivative_is_never_lost_in_silence(f):
    subject = Subject("", Function(f), "forward", (np.ones((3, 4)),), {}, Settings())
    with pytest.raises(TypeError):
        by_jax(subject, [np.ones((3, 4))])
