"""Module, the base class of all networks and layers. The work of its methods is done in the files beside this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from reprlib import recursive_repr
from typing import Any, Self

import jax
import numpy as np

from ..state import access
from ..state import frame as frames
from ..state.cell import Cell
from ..state.hidden_state import PLAIN
from ..state.pytree import Builder, Stateful
from ..state.static_values import is_array
from ..state.walk import Node, Walker, join, walk_of
from . import attributes, class_attributes, conversion, gradients, torch_habits, tree
from .live_lists import LiveList
from .numpy_arguments import copied_arguments
from .parameter import assign
from .state_dict import IncompatibleKeys, load_state_dict, read_state_dict


class Module(Stateful):
    """Base of all networks and layers: assign parameters and submodules in `__init__`, compute in `forward`.

    You need not call `super().__init__()`. An attribute may be a `Parameter(...)` or a `Buffer(...)` (reading it returns
    a plain `jax.Array`, assigning an array replaces its value), a module, a list, tuple or dict of modules, or a static
    value that has a hash. The methods have torch's names and meanings.

    Every Module is a pytree whose leaves are its parameters and buffers. `jax.jit`, `jax.grad`, `jax.vmap`,
    `jax.lax.scan` and `jax.tree.map` therefore work on it. They work on copies, so return the copies that they change.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> class Net(mt.Module):
        ...     def __init__(self):
        ...         self.hidden = nn.Linear(4, 8, key=jax.random.key(0))
        ...         self.out = nn.Linear(8, 2, key=jax.random.key(1))
        ...     def forward(self, x):
        ...         return self.out(nn.functional.relu(self.hidden(x)))
        >>> net = Net()
        >>> net(jnp.ones((3, 4))).shape
        (3, 2)
        >>> [name for name, _ in net.named_parameters()]
        ['hidden.weight', 'hidden.bias', 'out.weight', 'out.bias']
    """

    __slots__ = ("_cells", "__dict__")
    _entry_points = ("forward",)
    _cells: dict[str, Cell]
    training: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "_is_prepared" not in cls.__dict__:
            class_attributes.prepare(cls, Module)
        self = super().__new__(cls)
        object.__setattr__(self, "_cells", {})
        self.__dict__["training"] = True
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = copied_arguments(args, kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output. Subclasses write this."""
        raise NotImplementedError(f"{type(self).__name__} has no `forward`: write one, which a call of the module runs")

    # -- attributes ---------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in Module.__slots__ or name in Stateful.__slots__ or name.startswith("__"):
            raise AttributeError(
                f"{name}: `{type(self).__name__}.__new__` must create the object with `super().__new__(cls)`"
            )
        cell = self._cells.get(name)
        if cell is not None:
            value = access.read(cell, self)
            if frames.local.frame is None:
                torch_habits.note_read(cell, value, type(self), name)
            return value
        if name in vars(self):  # a slot of the class hides the object's attribute
            return vars(self)[name]
        raise attributes.not_found(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        label = f"{type(self).__name__}.{name}"
        cell = self._cells.get(name)
        if cell is not None and (is_array(value) or isinstance(value, int | float | np.generic)):
            assign(cell, value, label, self)
            if frames.local.frame is None:
                torch_habits.warn_of_untied(cell, value, type(self), name)
        elif type(value) in PLAIN and name in vars(self):
            attributes.set_static(self, name, value, label)
        else:
            attributes.set_attribute(self, cell, name, value, label, _RESERVED_NAMES)

    def __delattr__(self, name: str) -> None:
        attributes.delete(self, name)

    def _restructuring(self, label: str) -> AbstractContextManager[None]:
        """A block that adds, removes or replaces cells or modules of this module."""
        return attributes.restructuring(self, label)

    def tie(self, name: str, other: Module, other_name: str) -> None:
        """Replace a parameter of this module by one of another module, so that both modules share it.

        The two then have one array and one gradient, the sum over both uses.

        Args:
            name: the name of this module's parameter; a dotted path for one of a submodule.
            other: the module whose parameter is kept.
            other_name: the name or dotted path of the kept parameter in `other`.

        Raises:
            AttributeError: if one of the names is not a parameter or buffer.
            ValueError: if shapes or dtypes differ, or if one is a parameter and the other a buffer.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> encoder = nn.Linear(3, 5, key=jax.random.key(0))
            >>> decoder = nn.Linear(3, 5, key=jax.random.key(1))
            >>> decoder.tie("weight", encoder, "weight")
            >>> nn.Sequential(encoder, decoder).num_parameters()   # 15 + 5 + 5
            25
        """
        attributes.tie(self, name, other, other_name)

    def _holder(self, path: str) -> tuple[Module, str]:
        """Return the module that holds the parameter or buffer at a dotted path, and its name there."""
        return attributes.holder(self, path)

    # -- what it holds ------------------------------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Iterate over `(name, module)` of each direct submodule. Modules in a list `layers` are `layers.0`, `layers.1`, …"""
        return ((path, value) for path, value in tree.items_below(self) if isinstance(value, Module))

    def children(self) -> Iterator[Module]:
        """Iterate over the direct submodules."""
        return (module for _, module in self.named_children())

    def named_modules(self, prefix: str = "", remove_duplicate: bool = True) -> Iterator[tuple[str, Module]]:
        """Iterate over `(path, module)` of this module and all below it, each once (unless `remove_duplicate=False`)."""
        walk_of(self)
        return tree.named_modules(self, prefix, set() if remove_duplicate else None)

    def modules(self) -> Iterator[Module]:
        """Iterate over this module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def _entries(self) -> Iterator[tuple[str, Module, str, Cell]]:
        """Iterate over `(path, holder, name, cell)` of every parameter and buffer, under each of its names."""
        return tree.entries(self)

    def parameters(self) -> LiveList:
        """Return the arrays of the trainable parameters, each once.

        The list is live: `model.parameters()[0] = array` changes the module.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
            >>> params, grads = layer.parameters(), layer.grads()
            >>> for i in range(len(params)):
            ...     params[i] -= 0.1 * grads[i]
        """
        return LiveList.of(self, gradients=False)

    def grads(self) -> LiveList:
        """Return the accumulated gradients of `parameters()`, in the same order: a live list, zeros where there is none."""
        return LiveList.of(self, gradients=True)

    def named_parameters(self) -> Iterator[tuple[str, jax.Array]]:
        """Iterate over `(path, array)` of the trainable parameters, each once."""
        for path, cell in walk_of(self).named():
            if cell.trainable:
                array = access.read(cell, self)
                torch_habits.note_read(cell, array, type(self), path)
                yield path, array

    def named_buffers(self) -> Iterator[tuple[str, jax.Array]]:
        """Iterate over `(path, array)` of the buffers, each once."""
        for path, cell in walk_of(self).named():
            if cell.kind == "buffer":
                yield path, access.read(cell, self)

    def buffers(self) -> list[jax.Array]:
        """Return the arrays of the buffers, each once."""
        return [array for _, array in self.named_buffers()]

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Return how many numbers the parameters hold. Tied parameters count once."""
        params = walk_of(self).params
        return sum(int(np.prod(c.value.shape)) for c in params if c.trainable or not trainable_only)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Set all gradients of this module and those below it to zeros."""
        gradients.zero(self)

    def accumulate(self, grads: Any) -> None:
        """Add gradients to the accumulated ones, as `backward` does.

        Args:
            grads: a Module of the same structure, as `jax.grad` and `mt.grad` return it, or a list in the order of
                `parameters()`.

        Raises:
            ValueError: if structures, shapes or dtypes differ. Nothing is changed then.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from minitorch_jax import nn
            >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
            >>> grads = jax.grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((5, 2)))
            >>> layer.accumulate(grads)
            >>> layer.grads()[1]
            Array([5.], dtype=float32)
        """
        gradients.accumulate(self, grads)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Make every parameter of this module and those below it trainable, or freeze it. Returns the module."""
        gradients.set_trainable(self, bool(requires_grad))
        return self

    def freeze(self) -> Self:
        """Stop training this module: no gradient of its parameters is computed, and no optimizer changes them."""
        return self.requires_grad_(False)

    def unfreeze(self) -> Self:
        """Make every parameter of this module and those below it trainable again."""
        return self.requires_grad_(True)

    # -- modes, devices, dtypes ---------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Put this module and all below it in training mode. Returns the module."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Put this module and all below it in evaluation mode. Returns the module."""
        return self.train(False)

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` on every submodule, then on this module. Returns the module."""
        tree.apply(self, fn)
        return self

    def to(self, target: Any) -> Self:
        """Move all arrays to a device or a sharding, in place. Returns the module.

        Args:
            target: a `jax.Device`, or a `jax.sharding.Sharding`, which every array gets.

        Raises:
            TypeError: if `target` is neither. For a dtype use `astype`.
        """
        conversion.move(self, target)
        return self

    def astype(self, dtype: Any) -> Self:
        """Convert every floating parameter and buffer, and the gradients, to `dtype`, in place. Returns the module.

        Raises:
            TypeError: if `dtype` is not floating.
        """
        conversion.convert(self, dtype)
        return self

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, jax.Array]:
        """Return every parameter and buffer by torch's dotted path. Tied ones appear under each of their names.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> {name: array.shape for name, array in nn.Linear(3, 2, key=jax.random.key(0)).state_dict().items()}
            {'weight': (2, 3), 'bias': (2,)}
        """
        return read_state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Replace parameters and buffers by the arrays of `state_dict`.

        Args:
            state_dict: arrays by path. An array may be of JAX, of NumPy, or of a type that NumPy can read, such as a
                torch tensor.
            strict: True makes missing and unexpected names an error. A wrong shape or dtype is always an error.

        Returns:
            The missing and the unexpected names.

        Raises:
            ValueError: if something does not fit. One error lists all problems. Nothing is changed then.
        """
        return load_state_dict(self, state_dict, strict)

    def __getstate__(self) -> Any:
        return dict(vars(self)), dict(self._cells)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state[0])
        self._cells.update(state[1])
        for name in self._cells:
            class_attributes.declare(type(self), name)

    # -- text ---------------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Return what the repr shows between the parentheses: for layers, their settings."""
        return tree.own_text(self)

    @recursive_repr("...")
    def __repr__(self) -> str:
        return tree.text(self)

    # -- pytree -------------------------------------------------------------------------------------------------------

    def _follows(self) -> Iterator[tuple[str, Any]]:
        return (item for item in tree.items_below(self) if not isinstance(item[1], int | float | str | None))

    def _describe(self, walker: Walker, path: str) -> Node:
        return tree.to_node(self, walker, path)

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        return ((join(path, name), node) for name, node in payload[1])

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Module:
        return tree.from_node(cls, payload, builder)


_RESERVED_NAMES = frozenset({*vars(Module), *vars(Stateful)})
