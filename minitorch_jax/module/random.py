"""The streams of random keys that random layers and constructors draw from."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime import contexts
from ..runtime.jax_private import at_top_level
from ..runtime.numpy_memory import owned
from ..state import access, dropped_copies
from ..state import cell as cells
from ..state import frame as frames
from ..state.cell import Cell
from ..state.pytree import Builder, Stateful
from ..state.walk import Node, Walker


class Stream(Stateful):
    """A sequence of random keys: `next()` returns a new key and advances the stream.

    Its one cell stores the data of a key, which are plain integers, because JAX's fast path takes no arrays of keys.
    """

    __slots__ = ("cell", "impl")

    def __init__(self, key: jax.Array) -> None:
        self.impl = str(jax.random.key_impl(key))
        data = jax.random.key_data(key)  # shares the buffer of the key, which belongs to the caller
        self.cell = Cell(data, "stream", lent=True, birth=dropped_copies.birth_here())

    def next(self) -> jax.Array:
        """Return a key that no other call returns."""
        access.check_writable(self.cell, "the random stream", self)
        advance = _advance_now if at_top_level() else _advance
        if frames.is_eager():
            self.move(None)
        data, key = advance(self.cell.value, self.impl)
        access.write(self.cell, data, "the random stream", self)
        return key

    def move(self, devices: Any) -> None:
        """Make the stream usable with arrays on some devices (None: the default device). It is bound to none itself.

        Within a trace nothing is moved, since JAX would make a tracer of the copy, and the stream outlives the trace.
        """
        value = self.cell.value
        if at_top_level() and self.is_committed() and value.sharding.device_set != (devices or {_default_device()}):
            self.cell.value = jnp.asarray(np.asarray(value))

    def is_committed(self) -> bool:
        """True if a computation with arrays that are bound to a device has bound the stream to it, too."""
        value = self.cell.value
        return cells.is_concrete(value) and value.committed

    def _describe(self, walker: Walker, path: str) -> Node:
        return walker.cell(self.cell, path), self.impl

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Stream:
        self = object.__new__(cls)
        builder.begin(self)
        self.cell, self.impl = builder.cells[payload[0]], payload[1]
        return self


def _default_device() -> Any:
    config: Any = jax.config
    default = config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def _advance(data: Any, impl: str) -> tuple[Any, jax.Array]:
    following, key = jax.random.split(jax.random.wrap_key_data(data, impl=impl))
    return jax.random.key_data(following), key


_advance_now = partial(jax.jit, static_argnums=1)(_advance)


_SHARED = [4**n for n in range(6, 11)]  # how many numbers each program draws that several shapes share


def draw(sample: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return `sample(key, shape)` of a function of `jax.random`, computed by a program that compiles quickly.

    XLA needs longer to compile a generator of more axes: seconds for four. A generated number depends only on its position
    in row-major order, so a matrix is drawn and reshaped. Its last axis is that of `shape`, so that an array split over
    devices can stay split. JAX's default generator also returns the same first numbers for any count. So outside of other
    programs, shapes with about the same count share one generator program, and each shape compiles only its cut.
    """
    shape = tuple(shape)
    if not at_top_level():
        if local.in_place:
            few = shape if len(shape) < 3 else (shape[0], math.prod(shape[1:-1]), shape[-1])
            return sample(key, few).reshape(shape)
        return sample(key, (math.prod(shape[:-1]), *shape[-1:])).reshape(shape)
    count = math.prod(shape)
    if count > _SHARED[-1] or not _is_default(key):
        return sample(key, (count,)).reshape(shape)
    return _cut(sample(key, (next(n for n in _SHARED if n >= count),)), shape)


def _is_default(key: jax.Array) -> bool:
    config: Any = jax.config
    return config.jax_threefry_partitionable and str(jax.random.key_impl(key)) == "threefry2x32"


@partial(jax.jit, static_argnums=1)
def _cut(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return numbers[: math.prod(shape)].reshape(shape)


class _Local(threading.local):
    stream: Stream | None = None
    in_place = False  # see `drawing_in_place`


local = _Local()


@contextmanager
def drawing_in_place() -> Iterator[None]:
    """Let traced draws in a `with` block be split over devices along the first, second and last axis without more memory.

    XLA takes about twice as long to compile such a generator.
    """
    before, local.in_place = local.in_place, True
    try:
        yield
    finally:
        local.in_place = before


class _Block:
    """A `with rng(key)` block that was entered: its stream, and the block around it.

    If a generator that entered a block is closed late, the block is left while it is not the innermost one. It is then
    skipped when the inner blocks are left. If another thread or task finalizes the generator, the block is left where it was
    never entered. It is then `lost`, and skipped in the thread or task where it still seems to be active.
    """

    __slots__ = ("stream", "around", "left", "lost")

    def __init__(self, stream: Stream, around: _Block | None) -> None:
        self.stream, self.around = stream, around
        self.left = self.lost = False

    def leave(self) -> None:
        self.left = True
        innermost = block = innermost_block.get()
        while block is not None and block is not self:
            block = block.around
        self.lost = block is None
        if innermost is self:
            while block is not None and block.left:
                block = block.around
            innermost_block.set(block)


# One per thread or asyncio task, so that tasks that take turns do not draw from each other's streams.
innermost_block: ContextVar[_Block | None] = ContextVar("minitorch_jax.rng", default=None)
_seed = 0  # the seed of the main thread's stream
_threads = itertools.count(1)


def current() -> Stream:
    """Return the stream to draw from: that of the innermost `rng` block, or the thread's own."""
    block = innermost_block.get()
    while block is not None and block.lost:
        block = block.around
    if block is not None:
        return block.stream
    stream = local.stream
    if stream is None:
        with jax.ensure_compile_time_eval():
            key = jax.random.key(_seed)
            if threading.current_thread() is not threading.main_thread():
                key = jax.random.fold_in(key, next(_threads))
            stream = local.stream = _outside(key)
    return stream


def _outside(key: jax.Array) -> Stream:
    """Return a stream that belongs to no trace, even if a trace makes it."""
    stream = Stream(key)
    stream.cell.birth = None
    frame = frames.local.frame
    if frame is not None:
        frame.own.pop(id(stream.cell), None)
    return stream


def seed(n: int) -> None:
    """Restart the stream of random keys that random layers, and constructors without `key=`, draw from.

    Each thread has a stream of its own, so that threads can train at the same time. `seed` restarts the stream of the
    calling thread. A thread that never calls it gets a stream derived from the main thread's seed and a running number.

    Args:
        n: an integer of 32 bits, signed or unsigned. The main thread starts with `seed(0)`.

    Raises:
        TypeError: if `n` is not an integer.
        ValueError: if `n` does not fit 32 bits, or if JAX's default type of keys has changed since the stream was made.

    Example:
        >>> import minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> mt.seed(7); a = nn.Linear(2, 2).weight
        >>> mt.seed(7); b = nn.Linear(2, 2).weight
        >>> bool((a == b).all())
        True
    """
    global _seed
    new = _key_of(n, "seed")
    if local.stream is None and innermost_block.get() is None and at_top_level():
        local.stream = Stream(new)
    else:
        stream = current()
        if str(jax.random.key_impl(new)) != stream.impl:
            raise ValueError(
                f"seed() cannot restart a stream of {stream.impl} keys, as JAX now makes {jax.random.key_impl(new)} keys"
            )
        access.write(stream.cell, jax.random.key_data(new), "the random stream", stream)
    if threading.current_thread() is threading.main_thread():
        _seed = n.__index__()


def _key_of(n: Any, name: str) -> jax.Array:
    """Return the random key of an integer seed."""
    if isinstance(n, bool | np.ndarray | jax.Array) or not hasattr(n, "__index__"):
        raise TypeError(f"{name}() takes an integer, not {n!r}")
    number = n.__index__()
    if not -(2**31) <= number < 2**32:
        raise ValueError(f"{name}() takes an integer of 32 bits; got {number}")
    with contexts.constants():
        return jax.random.key(number)


@contextmanager
def rng(key: Any) -> Iterator[None]:
    """Draw random keys from a new stream, which starts at `key`, within a `with` block (in this thread or asyncio task).

    A random layer needs this inside a plain JAX transform, where the stream of `seed` cannot advance. It also makes a piece
    of code reproducible on its own. Tasks started within the block draw from its stream, too. (If a generator is suspended
    within a block, the block stays active for the code that runs next, as with `decimal.localcontext`.)

    Args:
        key: a key of `jax.random.key` (shape `()`, traced or not) or of `jax.random.PRNGKey`, or an integer seed.

    Raises:
        TypeError: if `key` is none of these.
        ValueError: if an integer seed does not fit 32 bits.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> drop = nn.Dropout(0.5)
        >>> @jax.jit
        ... def f(key, x):
        ...     with mt.rng(key):
        ...         return drop(x)
        >>> f(jax.random.key(0), jnp.ones(4)).shape
        (4,)
    """
    if hasattr(key, "__index__") and not isinstance(key, bool | np.ndarray | jax.Array):
        key = _key_of(key, "rng")
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.shape == _raw_shape():
        key = jax.random.wrap_key_data(jnp.asarray(owned(key)))  # a key of `jax.random.PRNGKey`
    if not isinstance(key, jax.Array) or key.shape != () or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"rng() takes a `jax.random.key` or an integer, not {key!r}")
    block = _Block(Stream(key), innermost_block.get())
    try:
        innermost_block.set(block)
        yield
    finally:
        block.leave()


def _raw_shape() -> tuple[int, ...]:
    """Return the shape of the data of a key."""
    shape: tuple[int, ...] = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    return shape


def next_key(key: Any = None) -> jax.Array:
    """Return a new random key from the current stream, for your own layers and constructors.

    Args:
        key: if it is not None, it is returned unchanged. Pass the `key=` argument of a constructor here.

    Raises:
        TraceError: inside a plain JAX transform, outside of an `rng` block within it.

    Example:
        >>> import jax, minitorch_jax as mt
        >>> class Noise(mt.Module):
        ...     def forward(self, x):
        ...         return x + jax.random.normal(mt.next_key(), x.shape)
        >>> Noise()(jax.numpy.zeros(3)).shape
        (3,)
    """
    if key is None:
        return current().next()
    drawn: jax.Array = key
    return drawn
