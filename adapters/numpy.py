"""A complete mini-torch in NumPy, with hand-written backward passes, and the bridge between it and `minitorch_jax.nn`.

`to_jax` and `from_jax` convert networks, `copy_weights` copies the weights of one into the other, either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

import minitorch_jax as mt
from minitorch_jax import nn


class Module:
    """Base of the NumPy layers: `forward` caches what `backward` needs, `backward` adds to the gradients.

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
        """The gradients' arrays themselves, aligned with `parameters()`."""
        return []

    def zero_grad(self) -> None:
        """Reset the gradients to zeros, in place."""
        for grad in self.grads():
            grad.fill(0)

    def forward(self, x: Any) -> Any:
        """Compute the output. Subclasses write this."""
        raise NotImplementedError(f"{type(self).__name__} has no `forward`: write one, its calls go there")

    def backward(self, dout: Any) -> Any:
        """Add to the gradients, and give the loss's gradient by the input. Subclasses write this.

        Args:
            dout: the loss's gradient by the output of the last `forward`, of its shape.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `backward`: write one that gives dx from dout")

    def __call__(self, x: Any) -> Any:
        return self.forward(x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _cached(self) -> NDArray[Any]:
        """What `forward` kept."""
        if self._cache is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward() was called before forward(): call the layer on a batch first,"
                " backward needs what that call keeps"
            )
        return self._cache


def _floating(x: ArrayLike) -> NDArray[Any]:
    """`x` as a floating array; whole numbers become float32."""
    array = np.asarray(x)
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)


def _incoming(layer: Module, dout: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """The gradient that comes into `backward`, of the shape of the output."""
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
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        bias: whether to add b.
        rng: a `numpy.random.Generator`, or a seed for one, for the initial values; without it they differ at each run.
        dtype: of the parameters, floating; inputs are converted to it.

    Shapes: input `(*, in_features)`, output `(*, out_features)`; `W` and `dW` are `(out_features, in_features)`, `b`
    and `db` are `(out_features,)` (None with `bias=False`). W and b are from U(-k, k), k = 1 / sqrt(in_features).

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
        y: NDArray[Any] = np.maximum(_floating(x), 0)
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
        y: NDArray[Any] = np.tanh(_floating(x))
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
        x = _floating(x)
        small = np.exp(-np.abs(x))  # at most 1
        y: NDArray[Any] = np.where(x >= 0, 1, small) / (1 + small)
        self._cache = y
        return y

    def backward(self, dout: ArrayLike) -> NDArray[Any]:
        y = self._cached()
        dx: NDArray[Any] = _incoming(self, dout, y.shape, y.dtype) * (y * (1 - y))
        return dx


class Flatten(Module):
    """Makes all axes but the first (the batch) one.

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
        x = _floating(x)
        if x.ndim < 2:
            raise ValueError(f"Flatten() takes inputs of shape (N, ...), with at least 2 axes; got {x.shape}")
        self._cache = x
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dout: ArrayLike) -> NDArray[Any]:
        x = self._cached()
        return _incoming(self, dout, (len(x), math.prod(x.shape[1:])), x.dtype).reshape(x.shape)


class Sequential(Module):
    """Calls modules one after another, and their `backward` from the last to the first.

    Args:
        *modules: the modules, each only once: a layer caches the input of one call, so it has one place.

    Raises:
        TypeError: if something is not a module.
        ValueError: if a module is there twice.

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
                    f"{module!r} is twice in this Sequential: a layer caches the input of its last call, so its first"
                    " place would get a wrong gradient. Make another layer, or use minitorch_jax.nn, which ties them."
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
    """A module and all below it."""
    yield module
    if isinstance(module, Sequential):
        for child in module.modules:
            yield from _tree(child)


class _Loss:
    """What the losses share: `forward` caches the gradient's parts, `backward` gives it."""

    _cache: tuple[NDArray[Any], NDArray[Any]] | None = None

    def forward(self, output: ArrayLike, target: ArrayLike) -> float:
        raise NotImplementedError

    def __call__(self, output: ArrayLike, target: ArrayLike) -> float:
        return self.forward(output, target)

    def _cached(self) -> tuple[NDArray[Any], NDArray[Any]]:
        if self._cache is None:
            raise RuntimeError(f"{type(self).__name__}.backward() was called before forward(): compute the loss first")
        return self._cache


class SoftmaxCrossEntropy(_Loss):
    """The cross-entropy between unnormalised scores and classes, averaged over the batch, without overflow.

    `forward(scores, classes)` gives the loss, a float; `backward()` its gradient by the scores, `(N, C)`:
    (softmax(scores) - one-hot(classes)) / N.

    Args:
        scores: floating, `(N, C)`.
        classes: class numbers from 0 to C - 1, integers, `(N,)`.

    Raises:
        ValueError: if shapes do not fit, the batch is empty, or a class number is out of range.
        TypeError: if the class numbers are not integers.
        RuntimeError: if `backward` is called before `forward`.

    Example:
        >>> loss_fn = SoftmaxCrossEntropy()
        >>> loss_fn(np.zeros((1, 2)), np.array([1]))
        0.6931471805599453
        >>> loss_fn.backward()
        array([[ 0.5, -0.5]])
    """

    def forward(self, scores: ArrayLike, classes: ArrayLike) -> float:
        scores, classes = _floating(scores), np.asarray(classes)
        if scores.ndim != 2 or 0 in scores.shape:
            raise ValueError(f"scores must have shape (N, C), with N >= 1 and C >= 1; got {scores.shape}")
        if classes.shape != scores.shape[:1]:
            raise ValueError(
                f"classes must have shape {scores.shape[:1]}, one number for each row of scores; got {classes.shape}"
            )
        if not np.issubdtype(classes.dtype, np.integer):
            raise TypeError(f"classes must be class numbers, integers; got {classes.dtype}")
        if classes.min() < 0 or classes.max() >= scores.shape[1]:
            raise ValueError(
                f"classes must be from 0 to {scores.shape[1] - 1}, for {scores.shape[1]} scores; got numbers from"
                f" {classes.min()} to {classes.max()}"
            )
        shifted = scores - scores.max(1, keepdims=True)  # exp of it is at most 1
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        self._cache = log_p, classes
        return float(-log_p[np.arange(len(classes)), classes].mean())

    def backward(self) -> NDArray[Any]:
        """The gradient of the last `forward`'s loss by its scores, `(N, C)`."""
        log_p, classes = self._cached()
        dscores: NDArray[Any] = np.exp(log_p)
        dscores[np.arange(len(classes)), classes] -= 1
        dscores /= len(classes)
        return dscores


class MeanSquaredError(_Loss):
    """The squared difference, averaged over all elements.

    `forward(predictions, targets)` gives the loss, a float; `backward()` its gradient by the predictions:
    2 (predictions - targets) / number of elements.

    Args:
        predictions: floating, any shape, not empty.
        targets: the same shape; converted to the predictions' dtype.

    Raises:
        ValueError: if shapes differ, or there are no elements.
        RuntimeError: if `backward` is called before `forward`.

    Example:
        >>> loss_fn = MeanSquaredError()
        >>> loss_fn(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
        2.0
        >>> loss_fn.backward()
        array([ 0., -2.])
    """

    def forward(self, predictions: ArrayLike, targets: ArrayLike) -> float:
        predictions = _floating(predictions)
        targets = np.asarray(targets, dtype=predictions.dtype)
        if targets.shape != predictions.shape:
            raise ValueError(f"targets must have the predictions' shape {predictions.shape}; got {targets.shape}")
        if not predictions.size:
            raise ValueError(f"predictions must have at least one element; got shape {predictions.shape}")
        self._cache = predictions, targets
        return float(np.square(predictions - targets).mean())

    def backward(self) -> NDArray[Any]:
        """The gradient of the last `forward`'s loss by its predictions, of their shape."""
        predictions, targets = self._cached()
        dpredictions: NDArray[Any] = (predictions - targets) * (2 / predictions.size)
        return dpredictions


class Optimizer:
    """Plain SGD, `p -= lr * grad`, in place in the modules' own arrays.

    `minitorch_jax.Optimizer` and all of `minitorch_jax.optim` take NumPy modules too.

    Args:
        modules: a list of objects with `parameters()` and `grads()`, aligned lists of arrays.
        lr: learning rate.

    Example:
        >>> layer = Linear(2, 1, rng=0)
        >>> opt = Optimizer([layer], lr=0.5)
        >>> opt.zero_grad()
        >>> _ = layer(np.ones((1, 2))), layer.backward(np.ones((1, 1)))
        >>> before = layer.b.copy()
        >>> opt.step()
        >>> layer.b - before
        array([-0.5], dtype=float32)
    """

    def __init__(self, modules: Iterable[Any], lr: float = 0.01) -> None:
        self.modules = modules
        self.lr = lr

    def step(self) -> None:
        """Update every parameter from its gradient."""
        for module in self.modules:
            params, grads = module.parameters(), module.grads()
            for i in range(len(params)):
                params[i] -= self.lr * grads[i]

    def zero_grad(self) -> None:
        """Reset the gradients of every module to zeros; an object without a `zero_grad` is skipped."""
        for module in self.modules:
            if hasattr(module, "zero_grad"):
                module.zero_grad()


# -- the bridge -------------------------------------------------------------------------------------------------------

_OURS: dict[type[Module], type[mt.Module]] = {
    Linear: nn.Linear,
    ReLU: nn.ReLU,
    Tanh: nn.Tanh,
    Sigmoid: nn.Sigmoid,
    Flatten: nn.Flatten,
    Sequential: nn.Sequential,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_KNOWN = ", ".join(cls.__name__ for cls in _OURS)


def to_jax(network: Module) -> Any:
    """The same network in `minitorch_jax.nn`, with copies of the weights.

    Args:
        network: a NumPy Sequential, Linear, ReLU, Tanh, Sigmoid or Flatten; float64 needs JAX's `jax_enable_x64`.

    Returns:
        A `minitorch_jax.nn` module. `W` and `b` are its `weight` and `bias`; gradients are not copied.

    Raises:
        TypeError: for a module that has no counterpart in `minitorch_jax.nn`, subclasses included.
        ValueError: for a dtype that JAX would not keep.

    Example:
        >>> net = Sequential(Linear(4, 8, rng=0), ReLU())
        >>> ours = to_jax(net)
        >>> ours
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
        >>> bool(np.allclose(ours(np.ones((1, 4), np.float32)), net(np.ones((1, 4))), atol=1e-6))
        True
    """
    ours = _make_ours(network, "")
    copy_weights(network, ours)
    return ours


def from_jax(module: mt.Module) -> Any:
    """The same network in NumPy, with copies of the weights.

    Args:
        module: a `minitorch_jax.nn` Sequential, Linear, ReLU, Tanh, Sigmoid or Flatten.

    Returns:
        A NumPy module. `weight` and `bias` are its `W` and `b`; gradients are zeros.

    Raises:
        TypeError: for a module that has no counterpart here, subclasses included; for a dtype that NumPy lacks.
        ValueError: for tied or frozen parameters, which the NumPy network cannot keep so; for a Flatten of other axes.

    Example:
        >>> from_jax(nn.Sequential(nn.Linear(4, 8, key=jax.random.key(0)), nn.ReLU()))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    network = _make_theirs(module, "")
    plain = {name for name, _ in module.named_parameters()}
    special = [name for name in module.state_dict() if name not in plain]
    if special:
        raise ValueError(
            f"{', '.join(special)}: tied or frozen, and a NumPy network would train it on its own. Convert a network"
            " without ties, after `unfreeze()`."
        )
    copy_weights(module, network)
    return network


def copy_weights(source: Module | mt.Module, target: Module | mt.Module) -> None:
    """Copy the weights of a NumPy network into one of `minitorch_jax.nn`, or the other way, in place.

    Args:
        source: the network to read.
        target: the network to change, of the same structure, shapes and dtypes. NumPy arrays stay the same objects;
            gradients stay as they are.

    Raises:
        TypeError: unless one is a NumPy network and the other is ours.
        ValueError: one error that lists every difference; nothing has changed then.

    Example:
        >>> net = Sequential(Linear(4, 8, rng=0), ReLU())
        >>> ours = to_jax(net)
        >>> ours[0].weight = ours[0].weight * 2
        >>> copy_weights(ours, net)
        >>> bool(np.array_equal(net[0].W, ours[0].weight))
        True
    """
    pairs: list[tuple[str, NDArray[Any], jax.Array]] = []
    problems: list[str] = []
    if isinstance(source, Module) and isinstance(target, mt.Module):
        _match(source, target, "", pairs, problems)
    elif isinstance(source, mt.Module) and isinstance(target, Module):
        _match(target, source, "", pairs, problems)
        problems += [f"{path}: the NumPy array is read-only" for path, array, _ in pairs if not array.flags.writeable]
    else:
        raise TypeError(
            "copy_weights copies between a NumPy network and one of minitorch_jax.nn; got a"
            f" {_full_name(source)} and a {_full_name(target)}"
        )
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"the networks differ, so nothing was copied:\n{listed}")
    if isinstance(target, mt.Module):
        target.load_state_dict({path: array for path, array, _ in pairs})
        return
    values = [np.asarray(value) for _, _, value in pairs]
    for (_, array, _), value in zip(pairs, values, strict=True):
        np.copyto(array, value)


def _full_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _at(path: str) -> str:
    return f"at {path}" if path else "at the top"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _make_ours(network: Module, path: str) -> Any:
    """A module of `minitorch_jax.nn` like `network`, with any weights."""
    if type(network) not in _OURS:
        raise TypeError(
            f"to_jax converts the NumPy modules {_KNOWN}; {_at(path)} is a {_full_name(network)}. Write its forward as"
            " a minitorch_jax.Module."
        )
    if isinstance(network, Sequential):
        return nn.Sequential(*[_make_ours(child, _join(path, str(i))) for i, child in enumerate(network)])
    if not isinstance(network, Linear):
        return _OURS[type(network)]()
    dtype, kept = network.W.dtype, jax.dtypes.canonicalize_dtype(network.W.dtype)
    if kept != dtype:
        raise ValueError(
            f"{network!r} {_at(path)} is {dtype}, which JAX would cut to {kept}: make it with dtype=np.float32, or call"
            ' jax.config.update("jax_enable_x64", True) first'
        )
    key = jax.random.key(0)  # to leave the global stream alone: these weights are replaced
    return nn.Linear(network.in_features, network.out_features, network.b is not None, dtype=dtype, key=key)


def _make_theirs(module: mt.Module, path: str) -> Module:
    """A NumPy module like `module`, with any weights."""
    if type(module) not in _THEIRS:
        raise TypeError(
            f"from_jax converts the modules {_KNOWN} of minitorch_jax.nn; {_at(path)} is a {_full_name(module)}"
        )
    if isinstance(module, nn.Sequential):
        return Sequential(*[_make_theirs(child, _join(path, name)) for name, child in module.named_children()])
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"the NumPy Flatten keeps the first axis and no other; {_at(path)} is {module!r}")
    if not isinstance(module, nn.Linear):
        return _THEIRS[type(module)]()
    weight: Any = module.weight
    dtype = weight.dtype
    if not np.issubdtype(dtype, np.floating):
        raise TypeError(f"{_join(path, 'weight')} is {dtype}, which NumPy lacks: convert with astype(np.float32) first")
    return Linear(module.in_features, module.out_features, module.bias is not None, rng=0, dtype=dtype)


def _match(
    network: Module,
    ours: mt.Module,
    path: str,
    pairs: list[tuple[str, NDArray[Any], jax.Array]],
    problems: list[str],
) -> None:
    """Collect the arrays that correspond, by our paths, and whatever differs."""
    if _OURS.get(type(network)) is not type(ours):
        problems.append(f"{_at(path)}: {type(network).__name__} in NumPy, {type(ours).__name__} in minitorch_jax")
    elif isinstance(network, Sequential):
        children = list(ours.named_children())
        if len(network) != len(children):
            problems.append(f"{_at(path)}: {len(network)} modules in NumPy, {len(children)} in minitorch_jax")
        for theirs, (name, child) in zip(network, children, strict=False):
            _match(theirs, child, _join(path, name), pairs, problems)
    elif isinstance(network, Linear):
        for name, array in (("weight", network.W), ("bias", network.b)):
            value, label = getattr(ours, name), _join(path, name)
            if _describe(array) != _describe(value):
                problems.append(f"{label}: {_describe(array)} in NumPy, {_describe(value)} in minitorch_jax")
            elif array is not None:
                pairs.append((label, array, value))


def _describe(array: Any) -> str:
    """`float32[3,4]`, or "none"."""
    return "none" if array is None else f"{array.dtype}[{','.join(map(str, array.shape))}]"
