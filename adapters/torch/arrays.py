"""Single arrays: torch tensors as JAX arrays and back, sharing memory through DLPack where that is asked for and possible."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

from minitorch_jax.module.parameter import X64, fitting
from minitorch_jax.runtime.memory import owned

_PLAIN = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_FLOATS = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
TORCH_DTYPES = {name: getattr(torch, name) for name in (*_PLAIN, *_FLOATS) if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def from_torch(tensor: torch.Tensor, *, copy: bool | None = None) -> jax.Array:
    """A torch tensor as a JAX array: of its shape and dtype, detached from torch's graph.

    A shared array sees what is changed in the tensor, which JAX does not expect: share batches of data, not what torch
    trains. (`load_from_torch`, for weights, always copies.) So a tensor that requires a gradient is shared only if asked
    for. int64 and uint64, torch's dtype for class numbers, become int32 and uint32 while JAX's 64 bits are off.

    Args:
        tensor: dense, of any shape, contiguous or not.
        copy: None shares memory where that can be done, True copies, False raises where sharing cannot be done.

    Returns:
        An array. A shared one is bound to the tensor's device; a copy lies on JAX's default device, bound to none, as
        what `jnp.array` gives.

    Raises:
        TypeError: for what is no dense tensor, or has a dtype that JAX lacks.
        ValueError: for float64 or complex128, or an integer too large, while JAX's 64 bits are off; with `copy=False`,
            for a tensor that cannot be shared: on another device than JAX's default, not aligned to 64 bytes, with gaps.

    Example:
        >>> batch = torch.arange(6.0).reshape(2, 3)
        >>> x = from_torch(batch)
        >>> x.dtype, x.unsafe_buffer_pointer() == batch.data_ptr()
        (dtype('float32'), True)
        >>> from_torch(torch.tensor([3, 1]))
        Array([3, 1], dtype=int32)
    """
    problem = unreadable(tensor)
    if problem is not None:
        raise TypeError(f"from_torch takes a dense torch tensor with values; got {problem}")
    source, dtype = dtype_of(tensor), kept_dtype(dtype_of(tensor))
    if source != dtype and not np.issubdtype(source, np.integer):
        raise ValueError(
            f"from_torch was given {described(tensor)}, which JAX would cut to {dtype}: convert it with `.to(torch.{dtype})`,"
            f" or call {X64} first"
        )
    reason: Any = "it has to be converted" if source != dtype else None
    if reason is None and tensor.device.type == "cpu" != jax.default_backend():
        reason = f"it is on the cpu, and JAX's default device is a {jax.default_backend()}"
    if copy is False or (copy is None and reason is None and not tensor.requires_grad):
        try:
            if reason is None:
                return jnp.from_dlpack(tensor.detach(), copy=False)
        except (ValueError, BufferError, RuntimeError) as error:  # RuntimeError: XLA's, for strides
            reason = error
        if copy is False:
            raise ValueError(
                f"from_torch cannot share the memory of {described(tensor)}: {reason}. Use copy=None or copy=True"
            ) from (reason if isinstance(reason, Exception) else None)
    return jnp.array(owned(fitting(to_numpy(tensor), dtype)))


def to_torch(array: jax.Array, *, copy: bool | None = True) -> torch.Tensor:
    """A JAX array as a torch tensor of its shape and dtype.

    It is a copy unless sharing is asked for: torch writes into tensors, and what is written into a shared one changes the
    array, and whatever else holds it, modules included. A shared tensor keeps its values when the module or optimizer
    that the array was read from is trained on: what is read is copied before its memory is used again.

    Args:
        array: of any shape; a random key's bits are `jax.random.key_data(key)`.
        copy: True copies, None shares memory where that can be done, False raises where it cannot.

    Returns:
        A tensor: a copy on the cpu, or a shared one on the array's device.

    Raises:
        TypeError: for what is no JAX array (a tracer included), or has a dtype that torch lacks.
        ValueError: with `copy=False`, for an array that cannot be shared: one on several devices, for example.

    Example:
        >>> to_torch(jnp.ones(2, jnp.bfloat16))
        tensor([1., 1.], dtype=torch.bfloat16)
        >>> array = jnp.arange(3.0)
        >>> to_torch(array, copy=False).data_ptr() == array.unsafe_buffer_pointer()
        True
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        what = "a tracer of a JAX transform" if isinstance(array, jax.core.Tracer) else repr(array)
        raise TypeError(f"to_torch takes a JAX array, outside of transforms; got {what}")
    if str(array.dtype) not in TORCH_DTYPES:
        raise TypeError(f"to_torch was given {array.dtype}{list(array.shape)}, a dtype that torch lacks")
    if copy is not True:
        try:
            return torch.utils.dlpack.from_dlpack(array)
        except (ValueError, BufferError, RuntimeError, TypeError) as error:
            if copy is False:
                raise ValueError(
                    f"to_torch cannot share the memory of {array.dtype}{list(array.shape)}: {error}. Use copy=None or"
                    " copy=True"
                ) from error
    return tensor_of(np.asarray(array))


# -- what the rest of the adapter uses ---------------------------------------------------------------------------------


def dtype_of(tensor: torch.Tensor) -> np.dtype[Any]:
    """A tensor's dtype in NumPy's terms."""
    return jnp.dtype(_NAMES[tensor.dtype])


def kept_dtype(dtype: Any) -> np.dtype[Any]:
    """What JAX makes of a dtype, with its 64 bits on or off."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def described(tensor: Any) -> str:
    """`float32[3, 4]`, as JAX's arrays are described."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def unreadable(tensor: Any) -> str | None:
    """What is wrong with something whose values are needed; None for a dense tensor that has them."""
    if not isinstance(tensor, torch.Tensor):
        return f"{tensor!r}, a {type(tensor).__name__}"
    if torch.nn.parameter.is_lazy(tensor):
        return "an uninitialised parameter: call the lazy torch module on a batch first"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"{described(tensor)} of layout {tensor.layout}: convert it with `.to_dense()`"
    if tensor.is_meta:
        return f"{described(tensor)} on the meta device, without values"
    if tensor.dtype not in _NAMES:
        return f"{described(tensor)}, a dtype that JAX lacks"
    return None


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A readable tensor's values, which may share its memory."""
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    name = _NAMES[tensor.dtype]
    if name in _PLAIN:
        values: NDArray[Any] = dense.numpy()
        return values
    bits = torch.int16 if dense.element_size() == 2 else torch.uint8
    return dense.view(bits).numpy().view(jnp.dtype(name))


def tensor_of(values: NDArray[Any]) -> torch.Tensor:
    """A new tensor on the cpu with copies of an array's values."""
    name = str(values.dtype)
    if name in _PLAIN:
        return torch.from_numpy(np.array(values))
    bits = np.int16 if values.dtype.itemsize == 2 else np.uint8
    return torch.from_numpy(np.array(values).view(bits)).view(TORCH_DTYPES[name])
