"""Module: what a user writes a network with."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from reprlib import recursive_repr
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..state import access
from ..state import frame as frames
from ..state.cell import Cell
from ..state.containers import TrackedDict, TrackedList, convert, describe, is_array, stateful_in
from ..state.gradient import gradient, starting_value
from ..state.lending import lend, lendings, steadily
from ..state.packed import release
from ..state.pytree import Builder, Stateful
from ..state.reach import PLAIN
from ..state.structure import cell_changed, changed
from ..state.walk import Node, Walker, join, walk_of
from . import class_attributes as names
from . import habits
from .callers_memory import given
from .differences import difference
from .live_lists import LiveList
from .parameter import Buffer, Parameter, assign, checked, declared, encode_checked, same_values


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` left alone."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module(Stateful):
    """Base of all networks and layers: assign parameters and submodules in `__init__`, compute in `forward`.

    No `super().__init__()` is needed. Attributes may be `Parameter(...)` and `Buffer(...)` (reading them gives a plain
    `jax.Array`, assigning an array replaces the value), modules, lists, tuples and dicts of modules, and static values
    that can be hashed. Names and meanings of the methods are torch's.

    Every Module is a pytree whose leaves are its parameters and buffers, so `jax.jit`, `jax.grad`, `jax.vmap`,
    `jax.lax.scan` and `jax.tree.map` work on it: they see copies, and what they change must be returned.

    Example:
        >>> import jax, minitorch_jax as mt
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
            names.prepare(cls, Module)
        self = super().__new__(cls)
        object.__setattr__(self, "_cells", {})
        self.__dict__["training"] = True
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = given(args, kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output. Subclasses write this."""
        raise NotImplementedError(f"{type(self).__name__} has no `forward`: write one, its calls go there")

    # -- attributes ---------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in Module.__slots__ or name in Stateful.__slots__ or name.startswith("__"):
            raise AttributeError(
                f"{name}: a `__new__` of {type(self).__name__} must make the object by `super().__new__(cls)`"
            )
        cell = self._cells.get(name)
        if cell is not None:
            value = access.read(cell, self)
            if frames.local.frame is None:
                habits.note_read(cell, value, type(self), name)
            return value
        if name in vars(self):  # the class has a slot of that name
            return vars(self)[name]
        if _is_property(type(self), name):
            raise AttributeError(
                f"{type(self).__name__}.{name} is a property, whose code raised an AttributeError that Python does not pass"
                f" on: `type(module).{name}.fget(module)` shows it"
            )
        known = [*self._cells, *vars(self), *(n for n in dir(type(self)) if not n.startswith("_") and n != name)]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise AttributeError(f"{type(self).__name__} has no attribute `{name}`{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        label = f"{type(self).__name__}.{name}"
        cell = self._cells.get(name)
        if cell is not None and (is_array(value) or isinstance(value, int | float | np.generic)):
            assign(cell, value, label, self)
            if frames.local.frame is None:
                habits.warn_of_untied(cell, value, type(self), name)
        elif type(value) in PLAIN and name in vars(self):
            self._set_static(name, value, label)
        elif names.settle(type(self), name, value, label, _OUR_NAMES):
            object.__setattr__(self, name, value)
            if name in ("__class__", "__dict__"):
                changed(self)
        elif isinstance(value, Parameter | Buffer):
            with self._restructuring(label):
                vars(self).pop(name, None)
                self._cells[name] = value._cell
        elif cell is not None and value is not None:
            raise TypeError(
                f"{label} is a {cell.kind}: it takes an array, a Parameter or a Buffer, not a"
                f" {type(value).__name__}. `del` it first to use the name for something else."
            )
        else:
            self._set_static(name, value, label)

    def _set_static(self, name: str, value: Any, label: str) -> None:
        """Anything but an array: a module, a container, or a static value."""
        missing = object()
        old = vars(self).get(name, missing)
        if old is value and not isinstance(value, list | dict):
            return
        new = convert(value, label)
        for other in stateful_in(new):
            if not isinstance(other, Module) and id(self) in walk_of(other).objects:
                kind = type(other).__name__
                raise TypeError(
                    f"{label}: this {kind} trains the {type(self).__name__} itself, so each would be a part of the other."
                    f" Keep the optimizer outside of the module, or have it train the parts: `{kind}([self.net])`."
                )
        if not isinstance(new, Stateful | TrackedList | TrackedDict) and _typed(old) == _typed(new):
            return
        if name in self._cells or _has_structure(new) or _has_structure(old):
            self._check_restructurable(label)
        else:  # a plain value: taken back if the run fails
            undo = self._put_static, (name, old, missing)
            if frames.local.frame is None:
                access.check_restructurable(self._birth, label, "was assigned")
                frames.on_failure(undo[0], *undo[1])
            else:
                frames.local.frame.undo.append(undo)
                frames.local.frame.statics.append((self, name, old))
        self._cells.pop(name, None)
        self._put_static(name, new, missing)

    def _put_static(self, name: str, value: Any, missing: Any) -> None:
        """Have a value, or `missing` for none, and record it; `training` goes back and forth, so each mode has its stamp."""
        before = vars(self).get(name, missing)
        if value is missing:
            vars(self).pop(name, None)
        else:
            vars(self)[name] = value
        if name == "training" and type(value) is bool and type(before) is bool and self._structure is not None:
            self._structure.switch(before, value)
        else:
            changed(self)

    def __delattr__(self, name: str) -> None:
        with self._restructuring(f"{type(self).__name__}.{name}"):
            if self._cells.pop(name, None) is None:
                if name in vars(self):
                    del vars(self)[name]
                else:
                    object.__delattr__(self, name)

    @contextmanager
    def _restructuring(self, label: str) -> Iterator[None]:
        """Around a change of which cells or modules there are, recorded at its end."""
        self._check_restructurable(label)
        try:
            yield
        finally:
            changed(self)

    def _check_restructurable(self, label: str) -> None:
        """Raise while compiled code runs, unless that made this module."""
        frame = frames.local.frame
        own = frame is not None and id(self) in frame.own
        access.check_restructurable(self._birth, label, "was given a new Parameter, Buffer or module", own)

    def tie(self, name: str, other: Module, other_name: str) -> None:
        """Make parameter `name` one with `other_name` of another module: one array, one gradient, the sum of all uses.

        Args:
            name: of this module's parameter; dotted for one of a submodule.
            other: the module whose parameter stays.
            other_name: its name there.

        Raises:
            AttributeError: if either is not a parameter or buffer.
            ValueError: if shapes or dtypes differ.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> encoder = nn.Linear(3, 5, key=jax.random.key(0))
            >>> decoder = nn.Linear(3, 5, key=jax.random.key(1))
            >>> decoder.tie("weight", encoder, "weight")
            >>> nn.Sequential(encoder, decoder).num_parameters()   # 15 + 5 + 5
            25
        """
        mine, name = self._holder(name)
        theirs, other_name = other._holder(other_name)
        old, new = mine._cells[name], theirs._cells[other_name]
        checked(new.value, old.value, f"{type(mine).__name__}.{name} (tied to {type(theirs).__name__}.{other_name})")
        if old.kind != new.kind:
            raise ValueError(f"{name} is a {old.kind} and {other_name} a {new.kind}: tie two of a kind")
        with mine._restructuring(f"{type(mine).__name__}.{name}"):
            release(old)
            mine._cells[name] = new

    def _holder(self, path: str) -> tuple[Module, str]:
        """The module that holds the parameter or buffer at a dotted path, and its name there."""
        prefix, _, name = path.rpartition(".")
        module = dict(self.named_modules(remove_duplicate=False)).get(prefix)
        if module is None or name not in module._cells:
            every = [p for p, _, _, _ in self._entries()]
            near = difflib.get_close_matches(path, every, 1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(every) or 'none'}"
            raise AttributeError(f"{type(self).__name__} has no parameter or buffer `{path}`{hint}")
        return module, name

    # -- what it holds ------------------------------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """`(name, module)` of each direct submodule; in a list `layers`, the names are `layers.0`, `layers.1`, …"""

        return ((path, value) for path, value in self._items_below() if isinstance(value, Module))

    def children(self) -> Iterator[Module]:
        """Each direct submodule."""
        return (module for _, module in self.named_children())

    def named_modules(self, prefix: str = "", remove_duplicate: bool = True) -> Iterator[tuple[str, Module]]:
        """`(path, module)` of this module and all below it, each once (unless `remove_duplicate=False`)."""
        walk_of(self)
        return self._named_modules(prefix, set() if remove_duplicate else None, ())

    def _named_modules(
        self, prefix: str, seen: set[int] | None, above: tuple[int, ...]
    ) -> Iterator[tuple[str, Module]]:
        if id(self) in above:  # a cycle
            return
        if seen is not None:
            if id(self) in seen:
                return
            seen.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            yield from child._named_modules(join(prefix, name), seen, (*above, id(self)))

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def _entries(self) -> Iterator[tuple[str, Module, str, Cell]]:
        """`(path, holder, name, cell)` of every parameter and buffer under each of its names, as in torch's state_dict."""
        for prefix, module in self.named_modules(remove_duplicate=False):
            for name, cell in module._own_cells():
                yield join(prefix, name), module, name, cell

    def _own_cells(self) -> list[tuple[str, Cell]]:
        """Parameters first, then buffers."""
        return sorted(self._cells.items(), key=lambda item: item[1].kind != "parameter")

    def _live(self, gradients: bool) -> LiveList:
        walk = walk_of(self)
        if walk.looked is not lendings.last:
            habits.look(walk, walk.named())
        found = [(p, c) for p, c in zip(walk.spec.paths, walk.cells, strict=True) if c.trainable]
        return LiveList([cell for _, cell in found], [path for path, _ in found], gradients, self)

    def parameters(self) -> LiveList:
        """The trainable parameters' arrays, each once; a live list: `model.parameters()[0] = array` writes to the module.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
            >>> params, grads = layer.parameters(), layer.grads()
            >>> for i in range(len(params)):
            ...     params[i] -= 0.1 * grads[i]
        """
        return self._live(gradients=False)

    def grads(self) -> LiveList:
        """The gradients accumulated for `parameters()`, in the same order; zeros where there is none. Live as well."""
        return self._live(gradients=True)

    def named_parameters(self) -> Iterator[tuple[str, jax.Array]]:
        """`(path, array)` of each trainable parameter, each once."""
        walk = walk_of(self)
        for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
            if cell.trainable:
                array = access.read(cell, self)
                habits.note_read(cell, array, type(self), path)
                yield path, array

    def named_buffers(self) -> Iterator[tuple[str, jax.Array]]:
        """`(path, array)` of each buffer, each once."""
        walk = walk_of(self)
        for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
            if cell.kind == "buffer":
                yield path, access.read(cell, self)

    def buffers(self) -> list[jax.Array]:
        """The buffers' arrays, each once."""
        return [array for _, array in self.named_buffers()]

    def num_parameters(self, trainable_only: bool = False) -> int:
        """How many numbers the parameters hold, tied ones counted once."""
        params = walk_of(self).params
        return sum(int(np.prod(c.value.shape)) for c in params if c.trainable or not trainable_only)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Reset all gradients of this module and those below it to zeros."""
        walk = walk_of(self)
        if frames.is_eager():
            if walk.looked is not lendings.last:
                habits.look(walk, walk.named())
            access.store_all(walk.stored_grads, [None] * len(walk.stored_grads))
            return
        grads = [c.grad for c in walk.params if c.trainable or starting_value(c.grad) is not None]
        for grad in grads:
            access.check_writable(grad, f"the gradient of a {type(self).__name__}", self)
        access.store_all(grads, [None] * len(grads))

    def accumulate(self, grads: Any) -> None:
        """Add gradients to the caches, as `backward` does.

        Args:
            grads: what `jax.grad` or `mt.grad` gave for this module (a Module of the same structure), or a list aligned
                with `parameters()`.

        Raises:
            ValueError: if structures, shapes or dtypes differ; nothing has changed then.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
            >>> grads = jax.grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((5, 2)))
            >>> layer.accumulate(grads)
            >>> layer.grads()[1]
            Array([5.], dtype=float32)
        """
        walk = walk_of(self)
        if isinstance(grads, Module):
            theirs = walk_of(grads)
            if theirs.spec != walk.spec:
                raise ValueError(
                    f"the gradients are a {type(grads).__name__} of another structure than this {type(self).__name__}:"
                    f" {difference(theirs.spec, walk.spec)}. Take them with respect to this very module."
                )
            values = [cell.value for cell, mine in zip(theirs.cells, walk.cells, strict=True) if mine.trainable]
            access.mark_used(theirs.cells)
        else:
            values = list(grads)
        targets = [(p, c) for p, c in zip(walk.spec.paths, walk.cells, strict=True) if c.trainable]
        if len(values) != len(targets):
            raise ValueError(f"{len(values)} gradients were given for {len(targets)} trainable parameters")
        new = []
        for (path, cell), value in zip(targets, values, strict=True):
            label = f"the gradient of {path}"
            grad = checked(value, cell.value, label)
            access.check_writable(cell.grad, label, self)
            before = gradient(cell.grad)
            new.append(grad if before is None else before + grad)
        for _, cell in targets:
            lend(cell.grad)
            cell.grad.reached = True
        access.store_all([cell.grad for _, cell in targets], new)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Make every parameter here and below trainable, or freeze it; gives the module."""
        for cell in walk_of(self).params:
            if cell.trainable is not bool(requires_grad):
                self._check_restructurable(f"{type(self).__name__} (freeze or unfreeze)")
                release(cell)
                cell.trainable = bool(requires_grad)
                cell_changed(cell)
        return self

    def freeze(self) -> Self:
        """Stop training this module: its parameters get no gradient, cost none, and no optimizer changes them."""
        return self.requires_grad_(False)

    def unfreeze(self) -> Self:
        """Train this module (again)."""
        return self.requires_grad_(True)

    # -- modes, devices, dtypes ---------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Put this module and all below it in training mode; gives the module."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Put this module and all below it in evaluation mode; gives the module."""
        return self.train(False)

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` on every submodule, then on this one; gives the module."""
        _apply(self, fn, ())
        return self

    def to(self, target: Any) -> Self:
        """Put all arrays on a device or give them a sharding, in place; gives the module.

        Args:
            target: a `jax.Device`, or a `jax.sharding.Sharding` (the same for every array).

        Raises:
            TypeError: for a dtype, which is what `astype` is for.
        """
        if not isinstance(target, jax.Device | jax.sharding.Sharding):
            raise TypeError(f"to() takes a jax Device or Sharding, not {target!r}; for a dtype use `astype(dtype)`")
        return self._map_arrays(lambda values: jax.device_put(values, target))

    def astype(self, dtype: Any) -> Self:
        """Convert every floating parameter and buffer, and the gradients, to `dtype`, in place; gives the module."""
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise TypeError(f"parameters must be floating: astype() cannot make them {jnp.dtype(dtype)}")
        return self._map_arrays(lambda values: [value.astype(dtype) for value in values], floating_only=True)

    def _map_arrays(self, function: Callable[[list[Any]], list[Any]], floating_only: bool = False) -> Self:
        walk = walk_of(self)
        chosen = [c for c in walk.cells if c.encoding is None or not floating_only]
        chosen += [c.grad for c in walk.params if hasattr(c.grad.value, "dtype")]
        for cell in chosen:
            access.check_writable(cell, f"a {cell.kind} of {type(self).__name__}", self)
        if any(cell.pack is not None for cell in chosen):
            access.check_restructurable(self._birth, type(self).__name__, "was moved or converted out of its pack")
        new = function([cell.value for cell in chosen])
        for cell in walk.params:
            release(cell)
        access.store_all(chosen, new)  # `lent` stays as it was: the new arrays may share the old ones' buffers
        for cell in chosen:
            cell_changed(cell)
        return self

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, jax.Array]:
        """Every parameter and buffer by torch's dotted path, tied ones under each of their names.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn
            >>> {name: array.shape for name, array in nn.Linear(3, 2, key=jax.random.key(0)).state_dict().items()}
            {'weight': (2, 3), 'bias': (2,)}
        """
        entries = list(self._entries())

        def read_all() -> dict[str, jax.Array]:
            return {path: access.read(cell, module) for path, module, _, cell in entries}

        return steadily([cell for *_, cell in entries], read_all) if frames.is_eager() else read_all()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Replace parameters and buffers by the arrays of `state_dict`.

        Args:
            state_dict: path to array (JAX, NumPy, or anything NumPy can read, such as torch tensors).
            strict: whether missing and unexpected names are errors. Wrong shapes and dtypes always are.

        Returns:
            The missing and the unexpected names.

        Raises:
            ValueError: one error that lists everything wrong; nothing has changed then.
        """
        entries = list(self._entries())
        paths = {path for path, _, _, _ in entries}
        missing = [path for path in paths if path not in state_dict]
        missing = [path for path, _, _, _ in entries if path in missing]
        unexpected = [path for path in state_dict if path not in paths]
        problems = [f"  missing: {path}" for path in missing] + [f"  unexpected: {path}" for path in unexpected]
        problems = problems if strict else []
        new: dict[Cell, tuple[str, Any]] = {}
        for path, module, _, cell in entries:
            if path in state_dict:
                given = state_dict[path]
                try:
                    value = encode_checked(cell, given if isinstance(given, jax.Array) else np.asarray(given), path)
                except (ValueError, TypeError) as error:
                    problems.append(f"  {error}")
                    continue
                access.check_writable(cell, path, module)
                if cell in new and not same_values(new[cell][1], value):
                    problems.append(f"  {path} and {new[cell][0]} are one tied parameter, but their arrays differ")
                new.setdefault(cell, (path, value))
        if problems:
            listed = "\n".join(problems)
            raise ValueError(f"state_dict does not fit this {type(self).__name__}; nothing was loaded:\n{listed}")
        for cell in new:
            lend(cell)
        access.store_all(list(new), [value for _, value in new.values()])
        for cell in new:
            cell_changed(cell)  # its array may lie elsewhere
        return IncompatibleKeys(missing, unexpected)

    def __getstate__(self) -> Any:
        return dict(vars(self)), dict(self._cells)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state[0])
        self._cells.update(state[1])
        for name in self._cells:
            names.declare(type(self), name)

    # -- text ---------------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What the repr shows between the parentheses: for layers, their settings."""
        shown = [f"{name}={describe(declared(cell))}" for name, cell in self._cells.items()]
        return ", ".join(shown)

    @recursive_repr("...")
    def __repr__(self) -> str:
        name = type(self).__name__
        children = list(self.named_children())
        if not children:
            return f"{name}({self.extra_repr()})"
        lines = [f"  ({path}): " + repr(child).replace("\n", "\n  ") for path, child in children]
        return "\n".join([f"{name}({self.extra_repr()}", *lines, ")"])

    # -- pytree -------------------------------------------------------------------------------------------------------

    def _items_below(self) -> Iterator[tuple[str, Any]]:
        """`(path, value)` of each attribute that is no array; of containers, of each item."""

        def find(value: Any, path: str) -> Iterator[tuple[str, Any]]:
            if isinstance(value, list | tuple):
                for i, item in enumerate(value):
                    yield from find(item, join(path, str(i)))
            elif isinstance(value, dict):
                for key, item in value.items():
                    yield from find(item, join(path, key))
            else:
                yield path, value

        for name, value in list(vars(self).items()):
            yield from find(value, name)

    def _follows(self) -> Iterator[tuple[str, Any]]:
        return (item for item in self._items_below() if not isinstance(item[1], int | float | str | None))

    def _describe(self, walker: Walker, path: str) -> Node:
        own = tuple([(name, walker.cell(cell, join(path, name))) for name, cell in self._own_cells()])
        items = tuple([(name, walker.visit(value, join(path, name))) for name, value in vars(self).items()])
        return own, items

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        return ((join(path, name), node) for name, node in payload[1])

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Module:
        self = object.__new__(cls)
        builder.begin(self)
        object.__setattr__(self, "_cells", {name: builder.cells[number] for name, number in payload[0]})
        attributes = vars(self)
        for name, node in payload[1]:
            attributes[name] = node[2] if node[0] == "static" else builder.build(node)
        return self


_OUR_NAMES = frozenset({*vars(Module), *vars(Stateful)})


def _has_structure(value: Any) -> bool:
    """Whether `value` is a module or a tracked container, or a tuple with one inside."""
    if type(value) is tuple:
        return any(map(_has_structure, value))
    return isinstance(value, Stateful | TrackedList | TrackedDict)


def _typed(value: Any) -> Any:
    """What is equal for static values that are equal and of equal types: (1, 2) is not (1.0, 2.0)."""
    return type(value), tuple(map(_typed, value)) if type(value) is tuple else value


def _is_property(cls: type, name: str) -> bool:
    return isinstance(names.class_attribute(cls, name), property)


def _apply(module: Module, fn: Callable[[Module], Any], above: tuple[int, ...]) -> None:
    for child in list(module.children()):
        if id(child) not in above and child is not module:  # else a cycle
            _apply(child, fn, (*above, id(module)))
    fn(module)
