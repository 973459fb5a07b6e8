"""Layers in NumPy, with hand-written backward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray


class Module:
    """Base of the NumPy layers. `forward` caches what `backward` needs; `backward` adds to the gradients.

    A layer of your own writes `forward` and `backward`, and, if it has parameters, `parameters` and `grads`.

    Example:
        >>> class Scale(Module):
        ...     def __init__(self, size):
        ...         self.w, self.dw = np.ones(size), np.zeros(size)
        ...     def parameters(self):
        ...         return [self.w]
        ...     def grads(self):
        ...         return [self.dw]
        ...     def forward(self, x):
        ...         self.x = x
        ...         return self.w * x
        ...     def backward(self, dout):
        ...         self.dw += (dout * self.x).sum(0)
        ...         return dout * self.w
        >>> scale = Scale(2)
        >>> _ = scale(np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> scale.backward(np.ones((2, 2)))
        array([[1., 1.],
               [1., 1.]])
        >>> scale.grads()
        [array([4., 6.])]
    """

    _cache: NDArray[Any] | None = None

    def parameters(self) -> list[NDArray[Any]]:
        """The trainable arrays themselves, not copies."""
        return []

    def grads(self) -> list[NDArray[Any]]:
        """The gradient arrays themselves, aligned with `parameters()`."""
        return []

    def zero_grad(self) -> None:
        """Reset the gradients to zeros, in place."""
        for grad in self.grads():
            grad.fill(0)

    def forward(self, x: Any) -> Any:
        """Compute the output. Subclasses write this."""
        raise NotImplementedError(f"{type(self).__name__} has no `forward`: write one; a call of the layer runs it")

    def backward(self, dout: Any) -> Any:
        """Add to the gradients, and return the loss's gradient by the input. Subclasses write this.

        Args:
            dout: the loss's gradient by the output of the last `forward`, of the output's shape.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `backward`: write one that takes dout and returns dx")

    def __call__(self, x: Any) -> Any:
        return self.forward(x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _cached(self) -> NDArray[Any]:
        """The cache of the last `forward`."""
        if self._cache is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward() was called before forward(): call the layer on a batch first, since"
                " backward needs the cache of that call"
            )
        return self._cache


def floating(x: ArrayLike) -> NDArray[Any]:
    """`x` as a floating array. Integers become float32."""
    array = np.asarray(x)
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)


def _incoming(layer: Module, dout: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """The incoming gradient of `backward`. Raises unless it has the shape of the output."""
    array = np.asarray(dout, dtype=dtype)
    if array.shape != shape:
        raise ValueError(
            f"{layer!r}.backward() takes the gradient of its output, of shape {shape} at the last forward(); got"
            f" {array.shape}"
        )
    return array


class Linear(Module):
    """y = x W^T + b, and dW += dout^T x, db += sum of dout over the batch, dx = dout W.

    Args:
        in_features: the size of the input's last axis.
        out_features: the size of the output's last axis.
        bias: True adds b.
        rng: a `numpy.random.Generator`, or a seed for one, for the initial values. By default they differ at each run.
        dtype: the dtype of the parameters, floating. Inputs are converted to it.

    Shapes: input `(*, in_features)`, output `(*, out_features)`. `W` and `dW` are `(out_features, in_features)`, `b` and
    `db` are `(out_features,)` (None with `bias=False`). W and b are drawn from U(-k, k) with k = 1 / sqrt(in_features).

    Raises:
        ValueError: if a size is negative; if an input's last axis is not `in_features`, or `dout` has another shape
            than the output.
        TypeError: if `dtype` is not one of NumPy's floating types.
        RuntimeError: if `backward` is called before `forward`.

    Source: torch.nn.Linear.

    Example:
        >>> layer = Linear(3, 2, rng=0)
        >>> layer(np.ones((5, 3), np.float32)).shape
        (5, 2)
        >>> layer.backward(np.ones((5, 2), np.float32)).shape
        (5, 3)
        >>> layer.db
        array([5., 5.], dtype=float32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rng: np.random.Generator | int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if in_features < 0 or out_features < 0:
            raise ValueError(f"Linear needs sizes >= 0; got in_features={in_features}, out_features={out_features}")
        if not np.issubdtype(dtype, np.floating):
            raise TypeError(f"Linear needs one of NumPy's floating dtypes, such as np.float32; got {np.dtype(dtype)}")
        self.in_features, self.out_features = in_features, out_features
        rng = np.random.default_rng(rng)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        self.W: NDArray[Any] = rng.uniform(-bound, bound, (out_features, in_features)).astype(dtype)
        self.dW: NDArray[Any] = np.zeros_like(self.W)
        self.b: NDArray[Any] | None = rng.uniform(-bound, bound, out_features).astype(dtype) if bias else None
        self.db: NDArray[Any] | None = None if self.b is None else np.zeros_like(self.b)

    def parameters(self) -> list[NDArray[Any]]:
        return [self.W] if self.b is None else [self.W, self.b]

    def grads(self) -> list[NDArray[Any]]:
        return [self.dW] if self.db is None else [self.dW, self.db]

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        x = np.asarray(x, dtype=self.W.dtype)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{self!r} takes inputs of shape (..., {self.in_features}); got {x.shape}")
        self._cache = x
        out: NDArray[Any] = x @ self.W.T
        return out if self.b is None else out + self.b

    def backward(self, dout: ArrayLike) -> NDArray[Any]:
        x = self._cached()
        dout = _incoming(self, dout, (*x.shape[:-1], self.out_features), self.W.dtype)
        rows = dout.reshape(math.prod(dout.shape[:-1]), self.out_features)
        self.dW += rows.T @ x.reshape(len(rows), self.in_features)
        if self.db is not None:
            self.db += rows.sum(0)
        dx: NDArray[Any] = dout @ self.W
        return dx

    def __repr__(self) -> str:
        return f"Linear(in_features={self.in_features}, out_features={self.out_features}, bias={self.b is not None})"


class ReLU(Module):
    """max(x, 0), elementwise, of any shape; its derivative at 0 is 0.

    Raises:
        ValueError: if `dout` has another shape than the output.
        RuntimeError: if `backward` is called before `forward`.

    Example:
        >>> relu = ReLU()
        >>> relu(np.array([-1.0, 2.0])), relu.backward(np.array([5.0, 5.0]))
        (array([0., 2.]), array([0., 5.]))
    """

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        y: NDArray[Any] = np.maximum(floating(x), 0)
        self._cache = y
        return y

    def backward(self, dout: ArrayLike) -> NDArray[Any]:
        y = self._cached()
        dx: NDArray[Any] = _incoming(self, dout, y.shape, y.dtype) * (y > 0)
        return dx


class Tanh(Module):
    """The hyperbolic tangent y, elementwise, of any shape; dx = (1 - y^2) dout.

    Raises:
        ValueError: if `dout` has another shape than the output.
        RuntimeError: if `backward` is called before `forward`.

    Example:
        >>> tanh = Tanh()
        >>> tanh(np.zeros(1)), tanh.backward(np.ones(1))
        (array([0.]), array([1.]))
    """

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        y: NDArray[Any] = np.tanh(floating(x))
        self._cache = y
        return y

    def backward(self, dout: ArrayLike) -> NDArray[Any]:
        y = self._cached()
        dx: NDArray[Any] = _incoming(self, dout, y.shape, y.dtype) * (1 - y * y)
        return dx


class Sigmoid(Module):
    """y = 1 / (1 + exp(-x)), elementwise, of any shape, without overflow; dx = y (1 - y) dout.

    Raises:
        ValueError: if `dout` has another shape than the output.
        RuntimeError: if `backward` is called before `forward`.

    Example:
        >>> sigmoid = Sigmoid()
        >>> sigmoid(np.zeros(1)), sigmoid.backward(np.ones(1))
        (array([0.5]), array([0.25]))
    """

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        x = floating(x)
        small = np.exp(-np.abs(x))  # at most 1
        y: NDArray[Any] = np.where(x >= 0, 1, small) / (1 + small)
        self._cache = y
        return y

    def backward(self, dout: ArrayLike) -> NDArray[Any]:
        y = self._cached()
        dx: NDArray[Any] = _incoming(self, dout, y.shape, y.dtype) * (y * (1 - y))
        return dx


class Flatten(Module):
    """Merges all axes after the first (the batch) into one.

    Shapes: input `(N, d1, ...)`, output `(N, d1 * ...)`.

    Raises:
        ValueError: if an input has fewer than 2 axes, or `dout` has another shape than the output.
        RuntimeError: if `backward` is called before `forward`.

    Example:
        >>> flatten = Flatten()
        >>> flatten(np.zeros((2, 3, 4))).shape, flatten.backward(np.zeros((2, 12))).shape
        ((2, 12), (2, 3, 4))
    """

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        x = floating(x)
        if x.ndim < 2:
            raise ValueError(f"Flatten() takes inputs of shape (N, ...), with at least 2 axes; got {x.shape}")
        self._cache = x
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dout: ArrayLike) -> NDArray[Any]:
        x = self._cached()
        return _incoming(self, dout, (len(x), math.prod(x.shape[1:])), x.dtype).reshape(x.shape)


class Sequential(Module):
    """Calls modules one after another, and their `backward` in reverse order.

    Args:
        *modules: the modules, each only once, since a layer caches the input of one call.

    Raises:
        TypeError: if something is not a module.
        ValueError: if a module occurs twice.

    Example:
        >>> net = Sequential(Linear(4, 8, rng=0), ReLU(), Linear(8, 3, rng=1))
        >>> net(np.ones((5, 4))).shape, net.backward(np.ones((5, 3))).shape
        ((5, 3), (5, 4))
        >>> [p.shape for p in net.parameters()]
        [(8, 4), (8,), (3, 8), (3,)]
    """

    def __init__(self, *modules: Module) -> None:
        for i, module in enumerate(modules):
            if not isinstance(module, Module):
                raise TypeError(f"Sequential takes NumPy modules; argument {i} is a {type(module).__name__}")
        inside = [module for top in modules for module in _tree(top)]
        for i, module in enumerate(inside):
            if any(module is other for other in inside[:i]):
                raise ValueError(
                    f"{module!r} occurs twice in this Sequential. A layer caches the input of its last call only, so its"
                    " gradient would be wrong. Make another layer, or use minitorch_jax.nn, which can tie layers."
                )
        self.modules = modules

    def parameters(self) -> list[NDArray[Any]]:
        return [param for module in self.modules for param in module.parameters()]

    def grads(self) -> list[NDArray[Any]]:
        return [grad for module in self.modules for grad in module.grads()]

    def zero_grad(self) -> None:
        for module in self.modules:
            module.zero_grad()

    def forward(self, x: ArrayLike) -> Any:
        for module in self.modules:
            x = module(x)
        return x

    def backward(self, dout: ArrayLike) -> Any:
        for module in reversed(self.modules):
            dout = module.backward(dout)
        return dout

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    def __getitem__(self, index: int) -> Module:
        return self.modules[index]

    def __repr__(self) -> str:
        lines = [f"  ({i}): " + repr(module).replace("\n", "\n  ") for i, module in enumerate(self.modules)]
        return "\n".join(["Sequential(", *lines, ")"]) if lines else "Sequential()"


def _tree(module: Module) -> Iterator[Module]:
    """A module and all modules inside it."""
    yield module
    if isinstance(module, Sequential):
        for child in module.modules:
            yield from _tree(child)
