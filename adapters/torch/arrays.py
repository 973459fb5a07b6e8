"""Single arrays: torch tensors as JAX arrays and back. DLPack shares their memory if that is allowed and possible."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

from minitorch_jax.module.parameter import X64, fitting
from minitorch_jax.runtime.numpy_memory import owned

_PLAIN = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_FLOATS = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
TORCH_DTYPES = {name: getattr(torch, name) for name in (*_PLAIN, *_FLOATS) if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def from_torch(tensor: torch.Tensor, *, copy: bool | None = None) -> jax.Array:
    """A torch tensor as a JAX array of the same shape and dtype, detached from torch's graph.

    If a tensor changes, an array that shares its memory changes too, which JAX does not expect. Share batches of data, not
    tensors that torch trains. A tensor that requires a gradient is therefore shared only with `copy=False`.
    `load_from_torch`, for weights, always copies. int64 (torch's dtype for class numbers) and uint64 become int32 and
    uint32 while JAX's x64 mode is off.

    Args:
        tensor: dense, of any shape, contiguous or not.
        copy: None shares memory if possible, True copies, False raises if memory cannot be shared.

    Returns:
        An array. A shared array is bound to the tensor's device. A copy is on JAX's default device and bound to none, as
        an array from `jnp.array`.

    Raises:
        TypeError: if `tensor` is not a dense tensor, or has a dtype that JAX lacks.
        ValueError: while JAX's x64 mode is off, for float64, complex128 and an integer that does not fit 32 bits. With
            `copy=False`, for a tensor that cannot be shared: on another device than JAX's default, not aligned to 64
            bytes, or with gaps.

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
            f"from_torch got {described(tensor)}, which JAX would convert to {dtype}: convert it with"
            f" `.to(torch.{dtype})`, or call {X64} first"
        )
    reason: Any = "its dtype must be converted" if source != dtype else None
    if reason is None and tensor.device.type == "cpu" != jax.default_backend():
        reason = f"it is on the cpu, and JAX's default device is a {jax.default_backend()}"
    if copy is False or (copy is None and reason is None and not tensor.requires_grad):
        try:
            if reason is None:
                return jnp.from_dlpack(tensor.detach(), copy=False)
        except (ValueError, BufferError, RuntimeError) as error:  # XLA raises RuntimeError for strides
            reason = error
        if copy is False:
            raise ValueError(
                f"from_torch cannot share the memory of {described(tensor)}: {reason}. Use copy=None or copy=True"
            ) from (reason if isinstance(reason, Exception) else None)
    return jnp.array(owned(fitting(to_numpy(tensor), dtype)))


def to_torch(array: jax.Array, *, copy: bool | None = True) -> torch.Tensor:
    """A JAX array as a torch tensor of the same shape and dtype.

    The tensor is a copy by default. Torch writes into tensors: a write into a shared tensor changes the array, and every
    object that holds it, modules included. A shared tensor keeps its values when you continue to train the module or
    optimizer that the array was read from: an array that was read is copied before its memory is reused.

    Args:
        array: any shape. For a random key, pass its bits, `jax.random.key_data(key)`.
        copy: True copies, None shares memory if possible, False raises if memory cannot be shared.

    Returns:
        A tensor: a copy on the cpu, or a shared tensor on the array's device.

    Raises:
        TypeError: if `array` is not a JAX array (or is a tracer), or has a dtype that torch lacks.
        ValueError: with `copy=False`, if memory cannot be shared, for example for an array on several devices.

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
        raise TypeError(f"to_torch takes a dtype that torch has; got {array.dtype}{list(array.shape)}")
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


# -- used by the rest of the adapter -----------------------------------------------------------------------------------


def dtype_of(tensor: torch.Tensor) -> np.dtype[Any]:
    """A tensor's dtype in NumPy's terms."""
    return jnp.dtype(_NAMES[tensor.dtype])


def kept_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype that JAX converts a dtype to. It depends on the x64 mode."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def described(tensor: Any) -> str:
    """`float32[3, 4]`, in the form used for JAX's arrays."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def unreadable(tensor: Any) -> str | None:
    """The problem if the values of `tensor` cannot be read; None for a dense tensor with values."""
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
