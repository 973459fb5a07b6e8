"""Batches of sequences of different lengths, as recurrent layers take them: a padded array beside the lengths.

torch stores the elements of all sequences one after another, in as many rows as there are elements. Compiled code needs fixed
shapes. So here a batch stays padded, and the lengths are an array: other lengths compile nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ...module import torch_names
from ...runtime.jax_private import at_top_level
from ...runtime.numpy_memory import as_numpy
from ...state.static_values import describe, is_array, shown
from .sequences import pad_sequence

_PARTS = ("data", "batch_sizes", "sorted_indices", "unsorted_indices")
_INSTEAD = {
    "data": (
        "embed or project the padded array before it is packed; compute a loss of `pad_packed_sequence(packed)[0]`, with"
        " `ignore_index` or with `packed.mask`"
    ),
    "batch_sizes": "`packed.mask.sum(1)` counts the sequences of each step",
}


@jax.tree_util.register_pytree_with_keys_class
class PackedSequence:
    """A batch of sequences of different lengths: the input and output of `nn.RNN`, `nn.LSTM` and `nn.GRU`.

    `pack_padded_sequence` and `pack_sequence` make one. It is a pytree of two arrays, `padded` and `lengths`, so it goes
    through `mt.jit`, `mt.scan` and JAX's transforms. Its parts in torch's form (`data`, `batch_sizes`, `sorted_indices`,
    `unsorted_indices`) are computed when they are read. They depend on the lengths, which must be known for that: in eager
    code they are, in compiled code only if they were given there as a list or a NumPy array.

    Args:
        data: the elements of all sequences, `(sum of the lengths, *)`: step by step, in each step the longest sequence first.
        batch_sizes: how many sequences have each step: integers that never increase.
        sorted_indices: the numbers of the sequences from the longest to the shortest; None if the batch is in this order.
        unsorted_indices: the inverse of this permutation.

    Attributes:
        padded: the sequences in the order of the batch, `(T, N, *)`, with zeros after each. T is the length of the padded
            input, so `batch_sizes` has T elements; in torch it has as many as the longest sequence.
        lengths: `(N,)`.
        mask: `(T, N)`, True for each element of a sequence, and False after it.

    Raises:
        ValueError: if the arguments do not fit together; when a part is read, if `enforce_sorted=True` was given in compiled
            code for lengths that are not in order.
        TypeError: if the arguments are not arrays; if compiled code reads a part and the lengths are not known.

    Source: torch.nn.utils.rnn.PackedSequence. Among sequences of the same length, the earlier one is first; torch orders them
    as it likes.

    Example:
        >>> from minitorch_jax.nn.utils.rnn import pack_sequence
        >>> packed = pack_sequence([jnp.array([1, 2, 3]), jnp.array([4, 5])])
        >>> packed
        PackedSequence(int32[3, 2], lengths=[3, 2])
        >>> packed.data.tolist(), packed.batch_sizes.tolist()
        ([1, 4, 2, 5, 3], [2, 2, 1])
    """

    __slots__ = ("padded", "lengths", "_is_sorted")
    padded: jax.Array
    lengths: Any
    _is_sorted: bool

    def __init__(
        self, data: Any, batch_sizes: Any = None, sorted_indices: Any = None, unsorted_indices: Any = None
    ) -> None:
        if batch_sizes is None and isinstance(data, tuple | list) and len(data) == 2:
            data, batch_sizes = data
        if unsorted_indices is not None and sorted_indices is None:
            sorted_indices = np.argsort(_integers("PackedSequence", "unsorted_indices", unsorted_indices))
        sizes = _integers("PackedSequence", "batch_sizes", batch_sizes)
        batch = int(sizes[0]) if len(sizes) else 0
        order = np.arange(batch)
        if sorted_indices is not None:
            order = _integers("PackedSequence", "sorted_indices", sorted_indices)
        data = _as_array("PackedSequence", data)
        if batch == 0 or (np.diff(sizes) > 0).any() or sizes[-1] < 0 or data.shape[:1] != (sizes.sum(),):
            raise ValueError(
                "PackedSequence takes data of shape (sum of batch_sizes, *), and batch_sizes that begin above 0 and never"
                f" increase; got {describe(data)} and {sizes.tolist()}. `pack_padded_sequence` makes both."
            )
        if sorted(order.tolist()) != list(range(batch)):
            raise ValueError(f"sorted_indices must be a permutation of 0 to {batch - 1}; got {order.tolist()}")
        rows, inverse = np.cumsum(sizes) - sizes, np.argsort(order)
        lengths = (sizes > np.arange(batch)[:, None]).sum(1)[inverse]
        index = np.minimum(rows[:, None] + inverse, len(data) - 1)
        self.padded = _zeroed(jnp.asarray(_readable(data)[index]), lengths)
        self.lengths = lengths.astype(_int_dtype())
        self._is_sorted = sorted_indices is None

    @classmethod
    def _of(cls, padded: Any, lengths: Any, is_sorted: bool) -> Self:
        self = object.__new__(cls)
        self.padded, self.lengths, self._is_sorted = padded, lengths, is_sorted
        return self

    def _with(self, padded: jax.Array) -> Self:
        """Return the same lengths with other values, which are zeros after each sequence."""
        return self._of(padded, self.lengths, self._is_sorted)

    # -- pytree -------------------------------------------------------------------------------------------------------

    def tree_flatten_with_keys(self) -> tuple[Any, bool]:
        key = jax.tree_util.GetAttrKey
        return ((key("padded"), self.padded), (key("lengths"), self.lengths)), self._is_sorted

    @classmethod
    def tree_unflatten(cls, is_sorted: bool, children: Any) -> Self:
        padded, lengths = children
        return cls._of(padded, lengths, is_sorted)

    # -- parts --------------------------------------------------------------------------------------------------------

    @property
    def mask(self) -> jax.Array:
        """True for each element of a sequence, and False after it: `(T, N)`."""
        return _mask(self.padded.shape[0], self.lengths)

    def _known(self, name: str) -> Any:
        """Return the lengths as a NumPy array."""
        lengths = _known(self.lengths)
        if lengths is None:
            instead = _INSTEAD.get(name, "`packed.padded` and `packed.lengths` are in the order of the batch")
            raise TypeError(
                f"PackedSequence.{name} depends on the lengths, which compiled code does not know: {instead}"
            )
        if self._is_sorted:
            _check_order(lengths)
        return lengths

    @property
    def data(self) -> jax.Array:
        """The elements of all sequences, `(sum of the lengths, *)`."""
        lengths = self._known("data")
        order = _longest_first(lengths)
        step, number = np.nonzero(np.arange(self.padded.shape[0])[:, None] < lengths[order])
        return jnp.asarray(_readable(self.padded)[step, order[number]])

    @property
    def batch_sizes(self) -> Any:
        """How many sequences have each of the T steps: a NumPy array."""
        lengths = self._known("batch_sizes")
        return (lengths > np.arange(self.padded.shape[0])[:, None]).sum(1).astype(_int_dtype())

    @property
    def sorted_indices(self) -> Any:
        """The order from the longest to the shortest, a NumPy array. None if the batch is in this order."""
        return None if self._is_sorted else _longest_first(self._known("sorted_indices"))

    @property
    def unsorted_indices(self) -> Any:
        """The inverse of `sorted_indices`."""
        return None if self._is_sorted else np.argsort(self.sorted_indices).astype(_int_dtype())

    def __iter__(self) -> Iterator[Any]:
        return iter((self.data, self.batch_sizes, self.sorted_indices, self.unsorted_indices))

    def __getitem__(self, index: int) -> Any:
        return getattr(self, _PARTS[index])

    def _replace(self, **parts: Any) -> PackedSequence:
        """Return a copy with other parts, as torch's named tuple does."""
        return PackedSequence(**(dict(zip(_PARTS, self, strict=True)) | parts))

    # -- conversion ---------------------------------------------------------------------------------------------------

    def astype(self, dtype: Any) -> Self:
        """Return a copy whose elements have another dtype."""
        return self._with(self.padded.astype(dtype))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(torch_names.missing("PackedSequence", "PackedSequence", name, dir(type(self))))

    def __repr__(self) -> str:
        lengths = self.lengths
        known = _known(lengths) if is_array(lengths) else None
        return (
            f"PackedSequence({describe(self.padded)}, lengths={describe(lengths) if known is None else known.tolist()})"
        )


def pack_padded_sequence(
    input: Any, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
) -> PackedSequence:
    """Put a padded batch and its lengths together, for a recurrent layer.

    Args:
        input: the padded sequences, `(T, N, *)`. What follows a sequence's length is left out.
        lengths: N integers between 1 and T.
        batch_first: True if the input is `(N, T, *)`.
        enforce_sorted: True refuses lengths that increase. The layers here need no order; results are the same without.

    Returns:
        A `PackedSequence`.

    Raises:
        ValueError: if the lengths are out of range, not as many as the sequences, or not in order.
        TypeError: if the input is not an array, or the lengths are not integers.

    Compiled code cannot raise for a value. There, a sequence of length 0 leaves a layer's initial state as it is, one whose
    length is out of range is NaN, and the order is not checked. (No result depends on it.)

    Source: torch.nn.utils.rnn.pack_padded_sequence.

    Example:
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
        >>> x, lengths = jnp.ones((7, 3, 4)), jnp.array([5, 7, 2])
        >>> packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        >>> output, h_n = nn.GRU(4, 8, key=jax.random.key(0))(packed)
        >>> padded, lengths = pad_packed_sequence(output)
        >>> padded.shape, lengths.tolist()
        ((7, 3, 8), [5, 7, 2])
    """
    array = _as_array("pack_padded_sequence", input)
    if array.ndim < 2:
        shapes = "(N, T, *)" if batch_first else "(T, N, *)"
        raise ValueError(f"pack_padded_sequence takes an input of shape {shapes}; got {describe(array)}")
    array = jnp.swapaxes(array, 0, 1) if batch_first else array
    steps, batch = array.shape[:2]
    if isinstance(lengths, list | tuple) and any(isinstance(length, jax.core.Tracer) for length in lengths):
        lengths = jnp.stack(lengths)
    unknown = is_array(lengths) and _known(lengths) is None
    lengths = lengths if unknown else _integers("pack_padded_sequence", "lengths", lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"pack_padded_sequence takes a length for each of {batch} sequences, of shape ({batch},); got {describe(lengths)}"
        )
    if not unknown:
        if batch and not 1 <= lengths.min() <= lengths.max() <= steps:
            raise ValueError(
                f"pack_padded_sequence takes lengths between 1 and {steps}, the length of the padded input; got"
                f" {lengths.tolist()}"
            )
        if enforce_sorted:
            _check_order(lengths)
    lengths = lengths.astype(_int_dtype())
    return PackedSequence._of(_zeroed(array, lengths), lengths, bool(enforce_sorted))


def pad_packed_sequence(
    sequence: PackedSequence, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[jax.Array, Any]:
    """Return a padded batch and its lengths: the inverse of `pack_padded_sequence`.

    Args:
        sequence: a `PackedSequence`.
        batch_first: True returns `(N, T, *)`, False `(T, N, *)`.
        padding_value: the value after each sequence.
        total_length: T of the result. By default T is that of the packed input, in eager and compiled code alike; in torch
            it is the longest sequence's length.

    Returns:
        The array, and the lengths: `(N,)`, a NumPy array where they are known.

    Raises:
        ValueError: if `total_length` is less than the longest sequence, or, in compiled code, than T.
        TypeError: if `sequence` is not a PackedSequence.

    Source: torch.nn.utils.rnn.pad_packed_sequence.

    Example:
        >>> from minitorch_jax.nn.utils.rnn import pack_sequence, pad_packed_sequence
        >>> packed = pack_sequence([jnp.array([1, 2, 3]), jnp.array([4])])
        >>> pad_packed_sequence(packed, batch_first=True, padding_value=-1)[0]
        Array([[ 1,  2,  3],
               [ 4, -1, -1]], dtype=int32)
    """
    _check_packed("pad_packed_sequence", sequence)
    padded, lengths = sequence.padded, sequence.lengths
    steps = padded.shape[0]
    known = _known(lengths)
    if total_length is not None and total_length != steps:
        needed = steps if known is None else int(known.max())
        if total_length < needed:
            what = "the length of the padded input, since compiled code does not know the lengths: slice the result"
            raise ValueError(
                f"total_length must be at least {needed}, {what if known is None else 'the longest length'}; got"
                f" {total_length}"
            )
        added = max(total_length - steps, 0)
        padded = jnp.pad(padded[:total_length], [(0, added)] + [(0, 0)] * (padded.ndim - 1))
    if padding_value != 0:
        padded = jnp.where(
            _beside(_mask(len(padded), lengths), padded), padded, jnp.asarray(padding_value, padded.dtype)
        )
    return jnp.swapaxes(padded, 0, 1) if batch_first else padded, lengths if known is None else known


def pack_sequence(sequences: Iterable[Any], enforce_sorted: bool = True) -> PackedSequence:
    """Put sequences of different lengths together, for a recurrent layer.

    Args:
        sequences: arrays of the shapes `(length, *)`, whose other axes agree.
        enforce_sorted: True refuses sequences of which one is longer than the one before.

    Returns:
        A `PackedSequence`, whose lengths are known: in compiled code, too, since they are shapes there.

    Raises:
        ValueError, TypeError: as in `pad_sequence` and `pack_padded_sequence`.

    Source: torch.nn.utils.rnn.pack_sequence.

    Example:
        >>> from minitorch_jax.nn.utils.rnn import pack_sequence
        >>> pack_sequence([jnp.ones(1), jnp.ones(3)], enforce_sorted=False).sorted_indices.tolist()
        [1, 0]
    """
    arrays = list(sequences) if isinstance(sequences, Iterable) else sequences
    padded = pad_sequence(arrays)
    return pack_padded_sequence(padded, [len(array) for array in arrays], enforce_sorted=enforce_sorted)


def unpack_sequence(packed_sequences: PackedSequence) -> list[jax.Array]:
    """Return the sequences of a batch, in its order: the inverse of `pack_sequence`.

    Raises:
        TypeError: for something else than a PackedSequence; in compiled code, if the lengths are not known.

    Source: torch.nn.utils.rnn.unpack_sequence.

    Example:
        >>> from minitorch_jax.nn.utils.rnn import pack_sequence, unpack_sequence
        >>> [array.tolist() for array in unpack_sequence(pack_sequence([jnp.array([1, 2, 3]), jnp.array([4])]))]
        [[1, 2, 3], [4]]
    """
    _check_packed("unpack_sequence", packed_sequences)
    return unpad_sequence(packed_sequences.padded, packed_sequences.lengths)


def unpad_sequence(padded_sequences: Any, lengths: Any, batch_first: bool = False) -> list[jax.Array]:
    """Return the sequences of a padded batch: the inverse of `pad_sequence`.

    Args:
        padded_sequences: `(T, N, *)`.
        lengths: N integers between 0 and T.
        batch_first: True if the batch is `(N, T, *)`.

    Raises:
        ValueError: if the lengths do not fit.
        TypeError: if there is something else than arrays; in compiled code, if the lengths are not known, since the shapes
            of the result depend on them.

    Source: torch.nn.utils.rnn.unpad_sequence.

    Example:
        >>> from minitorch_jax.nn.utils.rnn import unpad_sequence
        >>> [array.tolist() for array in unpad_sequence(jnp.array([[1, 2], [3, 0]]), [2, 1])]
        [[1, 3], [2]]
    """
    array = _as_array("unpad_sequence", padded_sequences)
    if array.ndim < 2:
        raise ValueError(f"unpad_sequence takes a padded batch, of two or more axes; got {describe(array)}")
    if is_array(lengths) and _known(lengths) is None:
        raise TypeError(
            "the shapes of the sequences depend on the lengths, which compiled code does not know: keep the batch padded,"
            " with a mask, `jnp.arange(T)[:, None] < lengths`"
        )
    known = _integers("unpad_sequence", "lengths", lengths)
    array = _readable(array) if batch_first else _readable(array).swapaxes(0, 1)
    batch, steps = array.shape[:2]
    if len(known) != batch or (batch and not 0 <= known.min() <= known.max() <= steps):
        raise ValueError(
            f"unpad_sequence takes a length between 0 and {steps} for each of {batch} sequences; got {known.tolist()}"
        )
    return [jnp.asarray(array[i, :length]) for i, length in enumerate(known.tolist())]


# -- lengths ----------------------------------------------------------------------------------------------------------


def _int_dtype() -> Any:
    """int32, or int64 where x64 is on."""
    return jax.dtypes.canonicalize_dtype(np.int64)


def _known(lengths: Any) -> Any:
    """Return an array of lengths as NumPy's, or None where code is traced and they may differ at another call."""
    if isinstance(lengths, jax.Array) and (isinstance(lengths, jax.core.Tracer) or not at_top_level()):
        return None
    return as_numpy(lengths)


def _integers(owner: str, name: str, values: Any) -> Any:
    """Return a one-dimensional NumPy array of integers."""
    given = values
    if is_array(values):
        given = _known(values)
        if given is None:
            raise TypeError(f"{owner}: {name} must be known, and compiled code does not know the values of an array")
    elif isinstance(values, Iterable):
        given = list(values)
    array = np.asarray(given)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{owner} takes {name} as a list or a one-dimensional array of integers; got {shown(values)}")
    return array.astype(np.int64)


def _longest_first(lengths: Any) -> Any:
    return np.argsort(-lengths.astype(np.int64), kind="stable").astype(_int_dtype())


def _check_order(lengths: Any) -> None:
    if (np.diff(lengths) > 0).any():
        raise ValueError(
            f"with enforce_sorted=True, the lengths never increase; got {lengths.tolist()}: pass enforce_sorted=False"
        )


def _check_packed(owner: str, value: Any) -> None:
    if not isinstance(value, PackedSequence):
        fix = ": `pack_padded_sequence(x, lengths)` makes one" if is_array(value) else ""
        raise TypeError(f"{owner} takes a PackedSequence; got {shown(value)} ({type(value).__name__}){fix}")


def _mask(steps: int, lengths: Any) -> jax.Array:
    return jnp.arange(steps, dtype=lengths.dtype)[:, None] < jnp.asarray(lengths)[None]


# -- arrays -----------------------------------------------------------------------------------------------------------


def _as_array(owner: str, value: Any) -> Any:
    if not is_array(value):
        raise TypeError(f"{owner} takes an array; got {shown(value)} ({type(value).__name__})")
    return value if isinstance(value, jax.Array) else jnp.asarray(as_numpy(value))


def _readable(array: Any) -> Any:
    """Return an array for indexing by static values. In eager code it is NumPy's, since JAX would compile each shape."""
    return array if isinstance(array, jax.core.Tracer) or not at_top_level() else np.asarray(array)


def _beside(mask: jax.Array, array: jax.Array) -> jax.Array:
    """Return a mask of the first axes with as many axes as the array."""
    return mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim))


@jax.jit
def _zeroed(array: jax.Array, lengths: Any) -> jax.Array:
    """Return the array with zeros after each sequence, and NaN in place of a sequence whose length is out of range."""
    inside, zero = _mask(array.shape[0], lengths), jnp.zeros((), array.dtype)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return jnp.where(_beside(inside, array), array, zero)
    lengths = jnp.asarray(lengths)
    fits = ((lengths >= 0) & (lengths <= array.shape[0]))[None]
    rest = jnp.where(_beside(fits, array), zero, jnp.asarray(jnp.nan, array.dtype))
    return jnp.where(_beside(inside & fits, array), array, rest)
