"""Conversion between NumPy networks and networks of `minitorch_jax.nn`, and copies of their weights."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.module.tree import children
from minitorch_jax.state.walk import join

from .layers import Flatten, Linear, Module, ReLU, Sequential, Sigmoid, Tanh

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
    """Convert a NumPy network to `minitorch_jax.nn`, with copies of the weights.

    Args:
        network: a NumPy Sequential, Linear, ReLU, Tanh, Sigmoid or Flatten; float64 needs JAX's `jax_enable_x64`.

    Returns:
        A `minitorch_jax.nn` module. `W` and `b` are its `weight` and `bias`; gradients are not copied.

    Raises:
        TypeError: if a module has no counterpart in `minitorch_jax.nn`. Subclasses have none.
        ValueError: if JAX would convert the dtype.

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
    """Convert a network of `minitorch_jax.nn` to NumPy, with copies of the weights.

    Args:
        module: a `minitorch_jax.nn` Sequential, Linear, ReLU, Tanh, Sigmoid or Flatten.

    Returns:
        A NumPy module. `weight` and `bias` are its `W` and `b`; gradients are zeros.

    Raises:
        TypeError: if a module has no counterpart here (subclasses have none), or NumPy lacks its dtype.
        ValueError: for tied or frozen parameters, which a NumPy network cannot have, and for a Flatten of other axes.

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
            f"from_jax cannot convert tied or frozen parameters, which a NumPy network would train separately; got"
            f" {', '.join(special)}. Convert a network without ties, after `unfreeze()`."
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
        TypeError: unless one is a NumPy network and the other is a network of minitorch_jax.nn.
        ValueError: if the networks differ. One error lists all differences, and nothing has changed.

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


def _make_ours(network: Module, path: str) -> Any:
    """A module of `minitorch_jax.nn` with the structure of `network`. Its weights are replaced later."""
    if type(network) not in _OURS:
        raise TypeError(
            f"to_jax converts the NumPy modules {_KNOWN}; {_at(path)} is a {_full_name(network)}. Write its forward as"
            " a minitorch_jax.Module."
        )
    if isinstance(network, Sequential):
        return nn.Sequential(*[_make_ours(child, join(path, str(i))) for i, child in enumerate(network)])
    if not isinstance(network, Linear):
        return _OURS[type(network)]()
    dtype, kept = network.W.dtype, jax.dtypes.canonicalize_dtype(network.W.dtype)
    if kept != dtype:
        raise ValueError(
            f"{network!r} {_at(path)} is {dtype}, which JAX would convert to {kept}: make it with dtype=np.float32, or call"
            ' jax.config.update("jax_enable_x64", True) first'
        )
    key = jax.random.key(0)  # a fixed key leaves the global stream unchanged; these weights are replaced
    return nn.Linear(network.in_features, network.out_features, network.b is not None, dtype=dtype, key=key)


def _make_theirs(module: mt.Module, path: str) -> Module:
    """A NumPy module with the structure of `module`. Its weights are replaced later."""
    if type(module) not in _THEIRS:
        raise TypeError(
            f"from_jax converts the modules {_KNOWN} of minitorch_jax.nn; {_at(path)} is a {_full_name(module)}"
        )
    if isinstance(module, nn.Sequential):
        return Sequential(*[_make_theirs(child, join(path, name)) for name, child in children(module)])
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"the NumPy Flatten keeps only the first axis; {_at(path)} is {module!r}")
    if not isinstance(module, nn.Linear):
        return _THEIRS[type(module)]()
    weight: Any = module.weight
    dtype = weight.dtype
    if not np.issubdtype(dtype, np.floating):
        raise TypeError(f"{join(path, 'weight')} is {dtype}, which NumPy lacks: convert with astype(np.float32) first")
    return Linear(module.in_features, module.out_features, module.bias is not None, rng=0, dtype=dtype)


def _match(
    network: Module,
    ours: mt.Module,
    path: str,
    pairs: list[tuple[str, NDArray[Any], jax.Array]],
    problems: list[str],
) -> None:
    """Collect the pairs of corresponding arrays, by our paths, and the differences."""
    if _OURS.get(type(network)) is not type(ours):
        problems.append(f"{_at(path)}: {type(network).__name__} in NumPy, {type(ours).__name__} in minitorch_jax")
    elif isinstance(network, Sequential):
        below = list(children(ours))
        if len(network) != len(below):
            problems.append(f"{_at(path)}: {len(network)} modules in NumPy, {len(below)} in minitorch_jax")
        for theirs, (name, child) in zip(network, below, strict=False):
            _match(theirs, child, join(path, name), pairs, problems)
    elif isinstance(network, Linear):
        for name, array in (("weight", network.W), ("bias", network.b)):
            value, label = getattr(ours, name), join(path, name)
            if _describe(array) != _describe(value):
                problems.append(f"{label}: {_describe(array)} in NumPy, {_describe(value)} in minitorch_jax")
            elif array is not None:
                pairs.append((label, array, value))


def _describe(array: Any) -> str:
    """`float32[3, 4]`, or "none"."""
    return "none" if array is None else f"{array.dtype}{list(array.shape)}"
