"""The right gradients of a layer: `jax.grad` of its own forward on traced values, or finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .dispatch import unwrapped
from .imitation import traced_world
from .memory import widened
from .subject import Key, Subject, outputs_of
from .traced import Traced

_MOST = 400  # finite differences are taken for at most so many elements of an array


@dataclass
class Reference:
    """The right gradients, with NaN for elements that were not computed."""

    grads: dict[Key, Any]
    how: str
    rough: bool = False  # True if NumPy's forward rounds to fewer bits than JAX's

    @property
    def by_jax(self) -> bool:
        return self.how == "jax.grad"


@contextmanager
def exactly() -> Iterator[None]:
    """JAX in float64 on the CPU, with the checks off that forbid what NumPy allows."""
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.debug_nans(False))
        stack.enter_context(jax.debug_infs(False))
        stack.enter_context(jax.transfer_guard("allow"))
        with suppress(RuntimeError):  # JAX may have no CPU
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def constant(array: Any) -> Traced:
    """The user's array as a constant for traced code."""
    return Traced(np.array(array, widened(array.dtype)))


def array_maker(tracers: Sequence[tuple[Any, Any]]) -> Callable[[Any], Traced]:
    """A function that makes traced arrays. An array with a tracer, or one that shares its memory, gets traced values."""
    by_id = {id(array): (array, tracer) for array, tracer in tracers}

    def make(array: Any) -> Traced:
        if id(array) in by_id:
            return Traced(by_id[id(array)][1])
        new = constant(array)
        for other, tracer in tracers:
            if np.may_share_memory(array, other) and np.shares_memory(array, other):
                _, mine, theirs = np.intersect1d(_addresses(array), _addresses(other), return_indices=True)
                flat = jnp.asarray(new.value).reshape(-1).at[mine].set(tracer.reshape(-1)[theirs])
                new = Traced(flat.reshape(array.shape))
        return new

    return make


def _addresses(array: Any) -> Any:
    """The address of each element."""
    found = np.full(array.shape, array.__array_interface__["data"][0])
    for axis, (size, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        found += (np.arange(size) * stride).reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    return found.reshape(-1)


def traced_call(subject: Subject, xs: dict[int, Any], tracers: Sequence[tuple[Any, Any]]) -> list[Any]:
    """The outputs of a layer's forward on traced arguments and parameters."""
    subject.settings.draws.reset()
    world = traced_world(array_maker(tracers))
    layer = world.of(subject.layer)
    args = [constant(arg) if isinstance(arg, np.ndarray) else world.of(arg) for arg in subject.args]
    output = subject.call(world, layer, [Traced(xs[i]) if i in xs else arg for i, arg in enumerate(args)])
    found = output if type(output) in (list, tuple) else [output]
    return [jnp.asarray(unwrapped(each), jnp.float64) for each in found]


def by_jax(subject: Subject, dout: Sequence[Any]) -> dict[Key, Any]:
    """The gradients of the sum of `dout * output`, by all floating arguments and parameters."""
    return _by_jax(subject, dout)[0]


def _by_jax(subject: Subject, dout: Sequence[Any]) -> tuple[dict[Key, Any], list[Any]]:
    """The gradients, and the outputs."""
    arrays = {name: array for name, array, _ in subject.entries(subject.layer) if name in subject.names}
    with exactly():
        xs = {i: jnp.asarray(subject.args[i]) for i in subject.floating}
        ps = {name: jnp.asarray(array, jnp.float64) for name, array in arrays.items()}

        def f(xs: Any, ps: Any) -> list[Any]:
            return traced_call(subject, xs, [(arrays[name], ps[name]) for name in arrays])

        outputs, vjp = jax.vjp(f, xs, ps)
        dx, dp = vjp([jnp.asarray(each, jnp.float64) for each in dout])
        found: dict[Key, Any] = {i: np.asarray(dx[i]) for i in subject.floating}
        return found | {name: np.asarray(dp[name]) for name in arrays}, list(map(np.asarray, outputs))


class Differences:
    """Finite differences of the sum of `dout * output`, from runs of the layer's own code in float64."""

    def __init__(self, subject: Subject, dout: Sequence[Any]) -> None:
        self._subject, self._dout = subject, dout
        self._start = self._outputs(None, (), 0.0)
        self.narrow = any(each.dtype != np.float64 for each in self._start)  # the layer's code rounds to fewer bits
        self.coarse = 1e-1 if self.narrow else 1e-3  # the relative accuracy of one-sided slopes

    def _outputs(self, key: Key | None, index: tuple[int, ...], step: float) -> list[Any]:
        run = self._subject.run()
        args = [np.array(arg) if isinstance(arg, np.ndarray) else arg for arg in self._subject.args]
        if isinstance(key, str):
            run.params()[key][index] += step
        elif key is not None:
            args[key][index] += step
        return outputs_of(run.forward(args))

    def _difference(self, key: Key, index: tuple[int, ...], high: float, low: float) -> float:
        above = self._outputs(key, index, high) if high else self._start
        below = self._outputs(key, index, low) if low else self._start
        total = 0.0
        for d, a, b in zip(self._dout, above, below, strict=True):
            total += float(np.sum(d * (np.asarray(a, np.float64) - np.asarray(b, np.float64))))
        return total / (high - low)

    def _steps(self, key: Key, index: tuple[int, ...], first: float, count: int) -> list[float]:
        """Steps from an element's value, each a hundredth of the one before."""
        value = float(self._subject.args[key][index]) if isinstance(key, int) else 1.0
        return [first * max(1.0, abs(value)) * 1e-2**i for i in range(count)]

    def smooth(self, key: Key, index: tuple[int, ...], scale: float) -> float | None:
        """The derivative by one element. NaN at an edge; None at a kink, where the left and right slopes differ.

        With smaller steps, the difference of the two slopes stays at a kink, and shrinks on a curve.
        """
        slope: float | None = np.nan
        last = np.inf
        for h in self._steps(key, index, *((1e-3, 2) if self.narrow else (1e-6, 4))):
            left, right = self._difference(key, index, 0.0, -h), self._difference(key, index, h, 0.0)
            gap = abs(left - right)
            if np.isfinite(gap):  # forward is defined on both sides
                slope, last = (left + right) / 2 if gap <= last / 2 else None, gap
                if gap <= self.coarse * max(abs(left), abs(right), scale):
                    return (left + right) / 2
        return slope

    def slope(self, key: Key, index: tuple[int, ...]) -> float:
        """The derivative by one element, of fourth order, with the first step that is small enough."""
        best, least = np.nan, np.inf
        for h in self._steps(key, index, *((1e-2, 2) if self.narrow else (1e-4, 5))):
            near, far = self._difference(key, index, h, -h), self._difference(key, index, 2 * h, -2 * h)
            slope, gap = (4 * near - far) / 3, abs(near - far)
            if gap <= 1e-3 * abs(near):
                return slope
            if gap < least:
                best, least = slope, gap
        return best

    def all(self) -> dict[Key, Any]:
        """The gradients by all floating arguments and parameters, at up to 400 elements of each."""
        params = self._subject.run().params()
        shapes: dict[Key, tuple[int, ...]] = {i: self._subject.args[i].shape for i in self._subject.floating}
        shapes |= {name: param.shape for name, param in params.items()}
        rng = np.random.default_rng(self._subject.settings.seed)
        found = {}
        for key, shape in shapes.items():
            found[key] = np.full(shape, np.nan)
            size = found[key].size
            chosen = range(size) if size <= _MOST else rng.choice(size, _MOST, replace=False)
            for place in chosen:
                index = tuple(map(int, np.unravel_index(int(place), shape)))
                found[key][index] = self.slope(key, index)
        return found


def reference_for(subject: Subject, dout: Sequence[Any], outputs: Sequence[Any]) -> Reference:
    """The right gradients. If JAX cannot trace the layer's forward, they are finite differences, with the reason."""
    try:
        grads, mine = _by_jax(subject, dout)
        pairs = list(zip(mine, outputs, strict=True))
        for rtol in (1e-8, 1e-3):
            if all(a.shape == b.shape and np.allclose(a, b, rtol, rtol, equal_nan=True) for a, b in pairs):
                return Reference(grads, "jax.grad", rtol > 1e-8)
        raise ArithmeticError("forward returns other values with jax.numpy than with NumPy")
    except Exception as error:  # the user's code may raise anything for values that are not NumPy arrays
        reason = str(error).partition("\n")[0] or type(error).__name__
        return by_differences(subject, dout, f"{type(error).__name__}: {reason}" if len(reason) < 20 else reason)


def by_differences(subject: Subject, dout: Sequence[Any], why: str) -> Reference:
    grads = Differences(subject, dout).all()
    sampled = f", at {_MOST} elements of each" if any(g.size > _MOST for g in grads.values()) else ""
    return Reference(grads, f"finite differences{sampled} ({why})")
