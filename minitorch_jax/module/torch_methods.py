"""Methods of torch's Module: parts by path, registration, dtypes, which name what a module does anyway; hooks, `compile`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Never, Self, overload

import jax
import jax.numpy as jnp

from ..state.pytree import Stateful
from ..state.static_values import shown
from . import compiled_calls, conversion, hooks, torch_names
from .hooks import RemovableHandle
from .parameter import Buffer, Parameter
from .tree import is_module

_MISSING = object()

PreHook = Callable[[Any, tuple[Any, ...]], Any]
PreHookWithKwargs = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, dict[str, Any]] | None]
ForwardHook = Callable[[Any, tuple[Any, ...], Any], Any]
ForwardHookWithKwargs = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]


class TorchMethods(Stateful):
    """Base of Module that adds the methods of this file. As in torch, `self.half = size // 2` hides such a method."""

    __slots__ = ()

    # -- parts by path ------------------------------------------------------------------------------------------------

    def get_submodule(self, target: str) -> Any:
        """Return the module at a dotted path; "" is this module. Modules in a list `layers` are `layers.0`, `layers.1`, …

        Raises:
            AttributeError: if there is no module at that path.

        Example:
            >>> from minitorch_jax import nn
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
            >>> net.get_submodule("1.0")
            ReLU()
        """
        module: Any = self
        found = dict(module.named_modules(remove_duplicate=False))
        if target not in found:
            near, paths = difflib.get_close_matches(target, found, 1), list(filter(None, found))
            listed = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
            hint = f"; did you mean `{near[0]}`?" if near else f"; it has {listed or 'none'}"
            raise AttributeError(f"{type(self).__name__} has no submodule `{target}`{hint}")
        return found[target]

    def get_parameter(self, target: str) -> jax.Array:
        """Return the array of the parameter at a dotted path, trainable or frozen.

        Raises:
            AttributeError: if there is no parameter at that path.

        Example:
            >>> from minitorch_jax import nn
            >>> nn.Sequential(nn.Linear(2, 3)).get_parameter("0.weight").shape
            (3, 2)
        """
        return _array_at(self, target, "parameter")

    def get_buffer(self, target: str) -> jax.Array:
        """Return the array of the buffer at a dotted path. See `get_parameter`.

        Raises:
            AttributeError: if there is no buffer at that path.
        """
        return _array_at(self, target, "buffer")

    # -- registration -------------------------------------------------------------------------------------------------

    def add_module(self, name: str, module: Any) -> None:
        """Assign a module, or None, to the attribute `name`.

        Raises:
            TypeError: if `module` is neither, or `name` is no string.
            KeyError: if `name` is empty, has a dot, or is an attribute that is no submodule.

        Example:
            >>> from minitorch_jax import nn
            >>> net = nn.Sequential()
            >>> net.add_module("act", nn.ReLU())
            >>> net
            Sequential(
              (act): ReLU()
            )
        """
        label = _label(self, name, "submodule")
        if module is not None and not is_module(module):
            raise TypeError(
                f"{label}: add_module takes a Module or None; got {shown(module)} ({type(module).__name__})"
            )
        setattr(self, name, module)

    def register_module(self, name: str, module: Any) -> None:
        """Do the same as `add_module`."""
        self.add_module(name, module)

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Assign `Buffer(tensor)`, or None, to the attribute `name`.

        Raises:
            TypeError: if `tensor` cannot be a Buffer.
            KeyError: if `name` is empty, has a dot, or is an attribute that is no buffer.
            ValueError: if `persistent` is False: every buffer is part of `state_dict()`.

        Example:
            >>> import minitorch_jax as mt
            >>> net = mt.Module()
            >>> net.register_buffer("mask", [True, False])
            >>> net.mask
            Array([ True, False], dtype=bool)
        """
        label = _label(self, name, "buffer")
        if not persistent:
            raise ValueError(
                f"{label}: persistent=False is not there, since every buffer is part of state_dict(). Compute the array in"
                " `forward` (in compiled code a constant costs nothing), or leave `persistent` out"
            )
        if isinstance(tensor, Parameter):
            raise TypeError(f"{label}: register_buffer takes an array; a Parameter is assigned: `module.{name} = ...`")
        setattr(self, name, tensor if tensor is None or isinstance(tensor, Buffer) else Buffer(tensor))

    def register_parameter(self, name: str, param: Any) -> None:
        """Assign a Parameter, or None, to the attribute `name`.

        Raises:
            TypeError: if `param` is neither.
            KeyError: if `name` is empty, has a dot, or is an attribute that is no parameter.

        Example:
            >>> import jax.numpy as jnp, minitorch_jax as mt
            >>> net = mt.Module()
            >>> net.register_parameter("scale", mt.Parameter(jnp.ones(2)))
            >>> [name for name, _ in net.named_parameters()]
            ['scale']
        """
        label = _label(self, name, "parameter")
        if param is not None and not isinstance(param, Parameter):
            raise TypeError(
                f"{label}: register_parameter takes a Parameter or None; got {shown(param)} ({type(param).__name__}): write"
                f" `register_parameter({name!r}, mt.Parameter(array))`"
            )
        setattr(self, name, param)

    # -- hooks ---------------------------------------------------------------------------------------------------------

    @overload
    def register_forward_pre_hook(
        self, hook: PreHook, *, prepend: bool = False, with_kwargs: Literal[False] = False
    ) -> RemovableHandle: ...
    @overload
    def register_forward_pre_hook(
        self, hook: PreHookWithKwargs, *, prepend: bool = False, with_kwargs: Literal[True]
    ) -> RemovableHandle: ...
    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Have a function run before `forward` at each call of this module, as torch does.

        Args:
            hook: `hook(module, args)`, where `args` is the tuple of positional arguments. It returns None, or new ones: a
                tuple, or one value.
            prepend: True runs it before those that are there, False after them.
            with_kwargs: True calls `hook(module, args, kwargs)`, which returns None or a pair `(new_args, new_kwargs)`.

        Returns:
            A handle: `handle.remove()` removes the hook, as does the end of `with handle:`.

        Raises:
            TypeError: if `hook` is no function.
            RuntimeError: at a call, if a hook `with_kwargs` returns something else.

        See `register_forward_hook` for what compiled code does.

        Example:
            >>> import jax.numpy as jnp
            >>> from minitorch_jax import nn
            >>> layer = nn.ReLU()
            >>> with layer.register_forward_pre_hook(lambda module, args: -args[0]):
            ...     print(layer(jnp.array([-1.0, 2.0])))
            [1. 0.]
        """
        return hooks.add(self, hook, True, prepend, with_kwargs)

    @overload
    def register_forward_hook(
        self,
        hook: ForwardHook,
        *,
        prepend: bool = False,
        with_kwargs: Literal[False] = False,
        always_call: bool = False,
    ) -> RemovableHandle: ...
    @overload
    def register_forward_hook(
        self,
        hook: ForwardHookWithKwargs,
        *,
        prepend: bool = False,
        with_kwargs: Literal[True],
        always_call: bool = False,
    ) -> RemovableHandle: ...
    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """Have a function run after `forward` at each call of this module, as torch does.

        Compiled code (`mt.jit`, `mt.scan`, `mt.backward`, a compiled module, JAX's own transforms) runs hooks while it is
        traced: what they compute is a part of the program, and what they do in Python happens once. A hook that is added or
        removed is seen at the next call. Copies of a module have its hooks; `state_dict` and `mt.save` leave them out.

        Args:
            hook: `hook(module, args, output)`. It returns None, or a value that replaces the output.
            prepend: True runs it before those that are there, False after them.
            with_kwargs: True calls `hook(module, args, kwargs, output)`.
            always_call: True runs it after an error of `forward` or another hook, too; the output is then None, or as far as
                it came.

        Returns:
            A handle: `handle.remove()` removes the hook, as does the end of `with handle:`.

        Raises:
            TypeError: if `hook` is no function.
            TraceError: at the first call of compiled code, if a hook keeps a value, which is no more than a tracer there.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from minitorch_jax import nn
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            >>> shapes = {}
            >>> def note(module, args, output):
            ...     shapes[type(module).__name__] = output.shape
            >>> handles = [layer.register_forward_hook(note) for layer in net]
            >>> y = net(jnp.ones((2, 3)))
            >>> shapes
            {'Linear': (2, 4), 'ReLU': (2, 4)}
            >>> for handle in handles:
            ...     handle.remove()
        """
        return hooks.add(self, hook, False, prepend, with_kwargs, always_call)

    # -- state that is no array ---------------------------------------------------------------------------------------

    def get_extra_state(self) -> Any:
        """Return what `state_dict` holds under `_extra_state`. Classes with such state write this and `set_extra_state`.

        `mt.save` saves numbers, strings, arrays, and lists, tuples and dicts of these.

        Example:
            >>> import minitorch_jax as mt
            >>> class Vocabulary(mt.Module):
            ...     def __init__(self, *words):
            ...         self.words = words
            ...     def get_extra_state(self):
            ...         return list(self.words)
            ...     def set_extra_state(self, state):
            ...         self.words = tuple(state)
            >>> vocabulary = Vocabulary()
            >>> vocabulary.load_state_dict(Vocabulary("a", "b").state_dict())
            IncompatibleKeys(missing_keys=[], unexpected_keys=[])
            >>> vocabulary.words
            ('a', 'b')
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no extra state: write `get_extra_state`, which returns it"
        )

    def set_extra_state(self, state: Any) -> None:
        """Take what `get_extra_state` returned. `load_state_dict` calls it after it has loaded the arrays."""
        raise NotImplementedError(f"{type(self).__name__} has no extra state: write `set_extra_state`, which takes it")

    # -- compiled calls --------------------------------------------------------------------------------------------------

    def compile(
        self, *, compiler_options: Mapping[str, str | bool | int | float] | None = None, **others: Never
    ) -> None:
        """Have later calls of this module in eager code run as one compiled program, as `mt.jit(model)` does, in place.

        The module stays what it is: `eval()`, `train()`, assignments, `state_dict()` and pytree functions are as before, and
        state that a call changes is written back. Within `mt.jit`, `mt.backward` or a JAX transform, a call is an ordinary
        part of the program around it, so this is for evaluation and generation in eager code. Arguments are as those of
        `mt.jit`: arrays and numbers are traced, and a new shape compiles another program. A copy is not compiled.
        `compiler_options` are options for XLA, as those of `mt.jit`; called again, the method replaces them.

        Example:
            >>> import jax.numpy as jnp
            >>> from minitorch_jax import nn
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
            >>> net.compile()
            >>> net(jnp.ones((8, 3))).shape
            (8, 2)
        """
        torch_names.refuse_all("compile", "compile()", others)
        compiled_calls.compile_in_place(self, compiler_options)

    # -- dtypes -------------------------------------------------------------------------------------------------------

    def half(self) -> Self:
        """Convert every floating parameter and buffer to float16, in place, as `astype` does. Returns the module.

        Example:
            >>> from minitorch_jax import nn
            >>> nn.Linear(2, 1).half().weight.dtype
            dtype('float16')
        """
        conversion.convert(self, jnp.float16)
        return self

    def bfloat16(self) -> Self:
        """Convert every floating parameter and buffer to bfloat16, in place, as `astype` does. Returns the module."""
        conversion.convert(self, jnp.bfloat16)
        return self

    def float(self) -> Self:
        """Convert every floating parameter and buffer to float32, in place, as `astype` does. Returns the module."""
        conversion.convert(self, jnp.float32)
        return self

    def double(self) -> Self:
        """Convert every floating parameter and buffer to float64, in place, as `astype` does. Returns the module.

        Raises:
            ValueError: if JAX's 64-bit types are off.
        """
        conversion.convert(self, jnp.float64)
        return self


def _array_at(module: Any, path: str, kind: str) -> jax.Array:
    holder, name = module._holder(path)
    found = holder._cells[name].kind
    if found != kind:
        raise AttributeError(f"`{path}` of {type(module).__name__} is a {found}: write `get_{found}({path!r})`")
    array: jax.Array = getattr(holder, name)
    return array


def _label(module: Any, name: Any, kind: str) -> str:
    """Return a new attribute's name in messages, after the checks of torch."""
    owner = type(module).__name__
    if not isinstance(name, str):
        raise TypeError(f"{owner}: the name of a {kind} must be a string; got {shown(name)} ({type(name).__name__})")
    if not name or "." in name:
        raise KeyError(f"{owner}: the name of a {kind} must be a non-empty string without dots; got {name!r}")
    cell, value = module._cells.get(name), vars(module).get(name, _MISSING)
    held = cell.kind if cell is not None else "submodule" if is_module(value) else None
    if held != kind and value is not None and hasattr(module, name):
        raise KeyError(f"{owner} has an attribute `{name}` already, and it is no {kind}: choose another name")
    return f"{owner}.{name}"
