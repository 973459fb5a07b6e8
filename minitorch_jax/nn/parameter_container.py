"""Containers of parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import jax

from ..module.module import Module
from ..module.parameter import Parameter
from ..state.static_values import is_array
from .container import check_name


class _Parameters(Module):
    """Base of the parameter containers. An array that is stored becomes a Parameter; reading returns arrays."""

    def _put(self, name: str, value: Any) -> None:
        """Set the parameter `name`. An array replaces the value of an existing parameter, or becomes a new Parameter."""
        if is_array(value) and name not in self._cells:
            value = Parameter(value)
        if not (isinstance(value, Parameter) or is_array(value)):
            raise TypeError(f"{type(self).__name__} holds Parameters and arrays; got a {type(value).__name__}")
        setattr(self, name, value)

    def _share(self, name: str, other: _Parameters, other_name: str) -> None:
        """Tie the parameter `name` to a parameter of another container."""
        with self._restructuring(f"{type(self).__name__}.{name}"):
            self._cells[name] = other._cells[other_name]


class ParameterList(_Parameters):
    """A list of parameters. It is a module itself; `state_dict()` names its parameters "0", "1", … as in torch.

    Args:
        values: Parameters, or floating arrays, which become Parameters. The parameters of another ParameterList are tied
            to it; so are those of a slice.

    Raises:
        TypeError: if an entry is neither a Parameter nor an array.

    Source: torch.nn.ParameterList. Differs from PyTorch: it holds only parameters. An array assigned to an index replaces
    the value of that parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> biases = nn.ParameterList([jnp.zeros(2), jnp.ones(3)])
        >>> biases[0] = biases[0] + 5
        >>> biases
        ParameterList(0=float32[2], 1=float32[3])
        >>> [bias.tolist() for bias in biases]
        [[5.0, 5.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, values: Iterable[Any] | None = None) -> None:
        self.extend(() if values is None else values)

    def _name(self, index: int) -> str:
        return str(range(len(self))[index])

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[jax.Array]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """The array at an index. For a slice, a ParameterList of the same parameters."""
        if not isinstance(index, slice):
            return getattr(self, self._name(index))
        new = type(self)()
        for i, place in enumerate(range(len(self))[index]):
            new._share(str(i), self, str(place))
        return new

    def __setitem__(self, index: int, value: Any) -> None:
        self._put(self._name(index), value)

    def __iadd__(self, values: Iterable[Any]) -> Self:
        return self.extend(values)

    def append(self, value: Any) -> Self:
        """Add a parameter at the end. Returns the list."""
        self._put(str(len(self)), value)
        return self

    def extend(self, values: Iterable[Any]) -> Self:
        """Add parameters at the end. Returns the list."""
        if isinstance(values, ParameterList):
            for i in range(len(values)):
                self._share(str(len(self)), values, str(i))
            return self
        if is_array(values) or not isinstance(values, Iterable):
            raise TypeError(f"ParameterList takes an iterable of parameters; got a {type(values).__name__}")
        for value in values:
            self.append(value)
        return self


class ParameterDict(_Parameters):
    """A dict of names and parameters. It is a module itself.

    Args:
        parameters: a mapping, or pairs, of names and Parameters. Floating arrays become Parameters. The parameters of
            another ParameterDict are tied to it.

    Raises:
        TypeError: if a value is neither a Parameter nor an array.
        KeyError: if a key cannot name a parameter.

    Source: torch.nn.ParameterDict. Differs from PyTorch: it holds only parameters. An array assigned to a key replaces
    the value of that parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> scales = nn.ParameterDict({"left": jnp.ones(2), "right": jnp.ones(3)})
        >>> scales["left"].shape, list(scales)
        ((2,), ['left', 'right'])
    """

    def __init__(self, parameters: Any = None) -> None:
        self.update({} if parameters is None else parameters)

    def __getitem__(self, key: str) -> jax.Array:
        if key not in self._cells:
            raise KeyError(key)
        found: jax.Array = getattr(self, key)
        return found

    def __setitem__(self, key: str, value: Any) -> None:
        self._put(check_name(key, self, "parameter"), value)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._cells)

    def __contains__(self, key: object) -> bool:
        return key in self._cells

    def __or__(self, other: ParameterDict) -> ParameterDict:
        new = self.copy()
        new.update(other)
        return new

    def __ior__(self, other: ParameterDict) -> Self:
        self.update(other)
        return self

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._cells.keys()

    def values(self) -> Iterable[jax.Array]:
        """The arrays."""
        return (self[key] for key in self)

    def items(self) -> Iterable[tuple[str, jax.Array]]:
        """Names and arrays."""
        return ((key, self[key]) for key in self)

    def get(self, key: str, default: Any = None) -> Any:
        """The array under a name, or `default`."""
        return self[key] if key in self else default

    def setdefault(self, key: str, default: Any = None) -> jax.Array:
        """The array under a name. A new name gets the parameter `default`."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, parameters: Any) -> None:
        """Add parameters or replace values. Those of a plain dict are added in the order of their names, as in torch."""
        if isinstance(parameters, ParameterDict):
            for key in parameters:
                self._share(key, parameters, key)
            return
        if is_array(parameters) or not isinstance(parameters, Iterable):
            raise TypeError(f"ParameterDict takes a mapping, or pairs; got a {type(parameters).__name__}")
        if isinstance(parameters, Mapping) and not isinstance(parameters, OrderedDict):
            parameters = sorted(parameters.items())
        for key, value in dict(parameters).items():
            self[key] = value

    def copy(self) -> ParameterDict:
        """A new ParameterDict of the same (tied) parameters."""
        return ParameterDict(self)

    def fromkeys(self, keys: Iterable[str], default: Any = None) -> ParameterDict:
        """A new ParameterDict. A Parameter `default` is tied under all names; an array makes one Parameter for each name."""
        return ParameterDict((key, default) for key in keys)

    def clear(self) -> None:
        """Remove all parameters."""
        for key in list(self):
            delattr(self, key)

    def pop(self, key: str) -> jax.Array:
        """Remove a parameter and return its array."""
        array = self[key]
        delattr(self, key)
        return array

    def popitem(self) -> tuple[str, jax.Array]:
        """Remove the last parameter and return its name and array."""
        key = next(reversed(self))
        return key, self.pop(key)
