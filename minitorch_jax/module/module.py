"""Module, the base class of all networks and layers. The work of its methods is done in the files beside this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, Literal, Never, ParamSpec, Protocol, Self, TypeVar

import jax
import numpy as np

from ..runtime.jax_private import at_top_level
from ..runtime.numpy_memory import immutable
from ..state import access, uninitialized
from ..state import frame as frames
from ..state.cell import Cell
from ..state.errors import UninitializedError
from ..state.hidden_state import PLAIN
from ..state.pytree import Builder, Stateful
from ..state.static_values import is_array
from ..state.walk import Node, Walker, join, walk_of
from . import (
    anomaly,
    attributes,
    class_attributes,
    conversion,
    gradients,
    notebook,
    parametrized,
    scopes,
    torch_habits,
    torch_names,
    tree,
)
from .call_errors import explain, refuse_no_array
from .hooks import watchers
from .live_lists import LiveList
from .numpy_arguments import copied_arguments
from .parameter import assign
from .state_dict import IncompatibleKeys, load_state_dict, read_state_dict
from .torch_methods import TorchMethods

if TYPE_CHECKING:
    P = ParamSpec("P")
    R = TypeVar("R")
    R_co = TypeVar("R_co", covariant=True)

    class HasForward(Protocol[P, R_co]):
        """A module, for type checkers: a call takes the arguments of its `forward` and returns the same type."""

        def forward(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Module(TorchMethods):
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
    _entry_points = ("forward", "right_inverse")  # the second is that of a parametrization, which an assignment calls
    _cells: dict[str, Cell]
    training: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "_is_prepared" not in cls.__dict__:
            class_attributes.prepare(cls, Module)
        if "device" in kwargs or "factory_kwargs" in kwargs:
            torch_names.refuse_of_layer(cls, kwargs)
        self = super().__new__(cls)
        object.__setattr__(self, "_cells", {})
        self.__dict__["training"] = True
        return self

    def __call__(self: HasForward[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            if kwargs or not immutable.issuperset(map(type, args)):
                args, kwargs = copied_arguments(args, kwargs)  # type: ignore[assignment]
            if watchers or not at_top_level():
                call: Any = anomaly.checked_call if anomaly.local.on else scopes.scoped_call
                return call(self, args, kwargs)
            return self.forward(*args, **kwargs)
        except Exception as error:
            try:
                refuse_no_array(error, self, args)
            except TypeError as wrong:
                explain(wrong, args, kwargs)
                raise
            explain(error, args, kwargs)
            raise

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
        computed = parametrized.list_of(self, name)
        if computed is not None:
            return computed._value()
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

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._cells, *parametrized.names(self)})

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
        """Iterate over `(name, module)` of the direct submodules, each once. Those in a list `layers` are `layers.0`, …"""
        seen: set[int] = set()
        for path, module in tree.children(self):
            if id(module) not in seen:
                seen.add(id(module))
                yield path, module

    def children(self) -> Iterator[Module]:
        """Iterate over the direct submodules."""
        return (module for _, module in self.named_children())

    def named_modules(
        self, memo: Iterable[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Iterate over `(path, module)` of this module and all below it, each once (unless `remove_duplicate=False`).

        The modules in the list `memo`, and what is below them, are left out. (In torch it is a set, to which it adds.)
        """
        if isinstance(memo, str):
            raise TypeError(f"memo is a list of modules; got {memo!r}: write `named_modules(prefix={memo!r})`")
        try:
            walk_of(self)
        except UninitializedError:
            pass  # a lazy layer is a module, whatever it lacks
        return tree.named_modules(self, prefix, set(map(id, memo or ())), remove_duplicate)

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

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, jax.Array]]:
        """Iterate over `(path, array)` of the trainable parameters.

        Args:
            prefix: a path that is put before each path, with a dot between them.
            recurse: False leaves out the parameters of submodules.
            remove_duplicate: True returns a tied parameter once, False under each of its names.
        """
        for path, cell in tree.named_cells(self, recurse, remove_duplicate):
            if cell.trainable:
                array = access.read(cell, self)
                torch_habits.note_read(cell, array, type(self), path)
                yield join(prefix, path), array

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, jax.Array]]:
        """Iterate over `(path, array)` of the buffers. The arguments are those of `named_parameters`."""
        for path, cell in tree.named_cells(self, recurse, remove_duplicate):
            if cell.kind == "buffer":
                yield join(prefix, path), access.read(cell, self)

    def buffers(self) -> list[jax.Array]:
        """Return the arrays of the buffers, each once."""
        return [array for _, array in self.named_buffers()]

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Return how many numbers the parameters hold. Tied parameters count once."""
        params = walk_of(self).params
        return sum(int(np.prod(c.value.shape)) for c in params if c.trainable or not trainable_only)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: Literal[False] = False) -> None:
        """Set all gradients of this module and those below it to zeros. `set_to_none` is torch's, and can only be False."""
        if set_to_none:
            torch_names.refuse("zero_grad", "zero_grad()", ["set_to_none"])
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
        """Put this module and all below it in evaluation mode. Returns the module.

        In eager code, `model.compile()` then makes each call one program: see `docs/inference.md`.
        """
        return self.train(False)

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` on every submodule, then on this module. Returns the module."""
        tree.apply(self, fn)
        return self

    def to(self, target: Any = None, **others: Never) -> Self:
        """Move all arrays to a device or a sharding, in place. Returns the module.

        Args:
            target: a `jax.Device`, or a `jax.sharding.Sharding`, which every array gets.

        Raises:
            TypeError: if `target` is neither. For a dtype use `astype`.
        """
        torch_names.refuse_all("to", "to()", others)
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

    def state_dict(self, *, prefix: str = "") -> dict[str, Any]:
        """Return every parameter and buffer by torch's dotted path. Tied ones appear under each of their names.

        The paths begin with `prefix`, which ends with a dot of its own. Under `_extra_state` is what a module's
        `get_extra_state` returns, if its class writes one.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> {name: array.shape for name, array in nn.Linear(3, 2, key=jax.random.key(0)).state_dict().items()}
            {'weight': (2, 3), 'bias': (2,)}
        """
        return read_state_dict(self, prefix)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **others: Never) -> IncompatibleKeys:
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
        torch_names.refuse_all("load_state_dict", "load_state_dict()", others)
        return load_state_dict(self, state_dict, strict)

    def __getstate__(self) -> Any:
        if uninitialized.process.has_lazy_layers:
            walk_of(self)  # its error has the path of a lazy layer
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

    def _repr_html_(self) -> str:
        """Return the tree of submodules and arrays that IPython and Jupyter show. It folds."""
        return notebook.as_html(self)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """Return what treescope shows, where it is installed."""
        return notebook.as_treescope(self, path, subtree_renderer)

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
