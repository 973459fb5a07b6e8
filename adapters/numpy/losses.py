"""Losses in NumPy. `forward(output, target)` returns a float; `backward()` returns its gradient by the output."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .layers import floating


class _Loss:
    """Base of the losses. `forward` caches what the gradient needs; `backward` returns the gradient."""

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

    `forward(scores, classes)` returns the loss, a float. `backward()` returns its gradient by the scores, `(N, C)`:
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
        scores, classes = floating(scores), np.asarray(classes)
        if scores.ndim != 2 or 0 in scores.shape:
            raise ValueError(f"scores must have shape (N, C), with N >= 1 and C >= 1; got {scores.shape}")
        if classes.shape != scores.shape[:1]:
            raise ValueError(
                f"classes must have shape {scores.shape[:1]}, one class for each row of scores; got {classes.shape}"
            )
        if not np.issubdtype(classes.dtype, np.integer):
            raise TypeError(f"classes must be integers; got {classes.dtype}")
        if classes.min() < 0 or classes.max() >= scores.shape[1]:
            raise ValueError(
                f"classes must be from 0 to {scores.shape[1] - 1}, for {scores.shape[1]} scores; got classes from"
                f" {classes.min()} to {classes.max()}"
            )
        shifted = scores - scores.max(1, keepdims=True)  # its exp is at most 1
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

    `forward(predictions, targets)` returns the loss, a float. `backward()` returns its gradient by the predictions:
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
        predictions = floating(predictions)
        targets = np.asarray(targets, dtype=predictions.dtype)
        if targets.shape != predictions.shape:
            raise ValueError(f"targets must have the predictions' shape {predictions.shape}; got {targets.shape}")
        if not predictions.size:
            raise ValueError(f"predictions must have at least one element; got shape {predictions.shape}")
        self._cache = predictions, targets
        return float(np.square(predictions - targets).mean())

    def backward(self) -> NDArray[Any]:
        """The gradient of the last `forward`'s loss by its predictions, of the same shape."""
        predictions, targets = self._cached()
        dpredictions: NDArray[Any] = (predictions - targets) * (2 / predictions.size)
        return dpredictions
