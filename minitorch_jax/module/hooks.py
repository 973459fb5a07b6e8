"""Forward hooks: functions of the user's that run before or after a module's `forward`, in eager code and in traces.

A module keeps its hooks in one attribute, a tuple of `Hook`s, which is not there if it has none. It is a static attribute as
any other: part of the structure, so that compiled code sees a change, and part of every copy.
"""

from __future__ import annotations

import copy
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

from ..runtime.tracebacks import warn
from ..state.static_values import holds_state, shown
from ..state.walk import Spec, walk_of
from . import attributes
from .call_errors import note_hook
from .kept_values import references
from .numpy_arguments import copied_arguments

HOOKS = "_call_hooks"  # the attribute

# What an eager call of a module must ask for: a hook that is alive, an open block of `detect_anomaly`. Of all threads: a
# global list is the quickest to look at, which each call does.
watchers: list[Any] = []
_A_HOOK = "a hook"


class Hook:
    """One registration of a function. Two of the same function, with the same settings, are equal, so the structures are."""

    __slots__ = ("function", "is_pre", "with_kwargs", "always_call", "owner", "__weakref__")

    def __init__(self, function: Any, is_pre: bool, with_kwargs: bool, always_call: bool, owner: str) -> None:
        self.function, self.is_pre, self.with_kwargs, self.always_call = function, is_pre, with_kwargs, always_call
        self.owner = owner  # the class of the module, for messages
        watchers.append(_A_HOOK)

    def __del__(self, forget: Callable[[str], None] = watchers.remove, hook: str = _A_HOOK) -> None:
        forget(hook)  # by defaults, which are there when Python ends, too

    @property
    def settings(self) -> tuple[bool, bool, bool]:
        """All but the function."""
        return self.is_pre, self.with_kwargs, self.always_call

    def __eq__(self, other: object) -> bool:
        return type(other) is Hook and self.settings == other.settings and _key(self.function) == _key(other.function)

    def __hash__(self) -> int:
        return hash((self.settings, _key(self.function)))

    def weakened(self, weaken: Any) -> Any:
        """Return its weak form for a cache key, which keeps no functions alive; see `bounded_cache.py`."""
        return Hook, self.settings, weaken.identity(self.function)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """As in torch: a function stays the same, a method becomes that of the copied object."""
        function = copy.deepcopy(self.function, memo)
        return self if function is self.function else Hook(function, *self.settings, self.owner)

    def __reduce__(self) -> tuple[Any, ...]:
        function = self.function
        if type(function) is types.FunctionType and not _is_importable(function):
            raise pickle.PicklingError(
                f"the {self} cannot be pickled, as its function has no name by which another process finds it. Remove it"
                " before (`handle.remove()`), define the function at the top of a file, or save the arrays alone"
                " (`mt.save`, `state_dict()`)"
            )
        return Hook, (function, *self.settings, self.owner)

    def __str__(self) -> str:
        return f"forward {'pre-hook' if self.is_pre else 'hook'} `{_name(self.function)}` of {self.owner}"

    def __repr__(self) -> str:
        function = getattr(self.function, "__func__", self.function)
        return (
            f"{self} ({id(getattr(function, '__code__', function)):x})"  # a RecompileWarning tells two of a name apart
        )


def _key(function: Any) -> tuple[int, int]:
    """What tells functions apart. A method is a new object at each look, so its object and its function do."""
    if isinstance(function, types.MethodType):
        return id(function.__self__), id(function.__func__)
    return id(function), 0


def _is_importable(function: types.FunctionType) -> bool:
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _name(function: Any) -> str:
    function = getattr(function, "func", function)  # of a partial
    return str(getattr(function, "__qualname__", type(function).__qualname__)).rpartition("<locals>.")[2]


class RemovableHandle:
    """Removes a hook: call `remove()`, or use it as a context. It does not keep the module alive, nor need it.

    Source: torch.utils.hooks.RemovableHandle.
    """

    __slots__ = ("_module", "_hook", "__weakref__")

    def __init__(self, module: Any, hook: Hook | None) -> None:
        self._module: Callable[[], Any] = type(None) if module is None else weakref.ref(module)
        self._hook = hook

    def remove(self) -> None:
        """Remove the hook. Does nothing if it is not there any more. Hooks of the module's copies are theirs."""
        module = self._module()
        if module is not None:
            mine = hooks_of(module)
            left = tuple([hook for hook in mine if hook is not self._hook])
            if len(left) < len(mine):
                _store(module, left)
        self._hook = None  # nor does it keep what the function holds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemovableHandle, (self._module(), self._hook)  # a copy of both is the handle of the copy


def add(
    module: Any, function: Any, is_pre: bool, prepend: bool, with_kwargs: bool, always_call: bool = False
) -> RemovableHandle:
    """See `Module.register_forward_hook` and `Module.register_forward_pre_hook`."""
    kind = type(module).__name__
    if not callable(function) or holds_state(function):
        method = f"register_forward_{'pre_' if is_pre else ''}hook"
        raise TypeError(
            f"{kind}.{method} takes a function; got {shown(function)} ({type(function).__name__}): write"
            f" `def hook(module, args{'' if is_pre else ', output'}): ...`"
        )
    hook = Hook(function, is_pre, bool(with_kwargs), bool(always_call), kind)
    both = [[other for other in hooks_of(module) if other.is_pre is first] for first in (True, False)]
    both[not is_pre].insert(0 if prepend else len(both[not is_pre]), hook)
    _store(module, (*both[0], *both[1]))
    return RemovableHandle(module, hook)


def hooks_of(module: Any) -> tuple[Hook, ...]:
    """Return a module's hooks: those that run before `forward`, then those that run after it, each in their order."""
    found: tuple[Hook, ...] = vars(module).get(HOOKS, ())
    return found


def _store(module: Any, hooks: tuple[Hook, ...]) -> None:
    attributes.put_static(module, HOOKS, hooks or attributes.MISSING, f"{type(module).__name__}'s set of hooks")


# -- calls ------------------------------------------------------------------------------------------------------------


def run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module's `forward` with its hooks around it, in the order of torch."""
    if HOOKS not in vars(module):
        return module.forward(*args, **kwargs)
    output, begun = None, set[int]()
    try:
        for hook in hooks_of(module):
            if hook.is_pre:
                args, kwargs = _prepared(hook, module, args, kwargs)
        output = module.forward(*args, **kwargs)
        for hook in hooks_of(module):  # those of now: a hook may have added or removed one
            if not hook.is_pre:
                begun.add(id(hook))
                output = _finished(hook, module, args, kwargs, output)
        return output
    except Exception:
        for hook in hooks_of(module):
            if hook.always_call and id(hook) not in begun:
                output = _finished_anyway(hook, module, args, kwargs, output)
        raise


def _prepared(
    hook: Hook, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run a pre-hook, and return the arguments that it leaves."""
    result = _called(hook, module, args, kwargs) if hook.with_kwargs else _called(hook, module, args)
    if result is None:
        return args, kwargs
    if not hook.with_kwargs:
        return copied_arguments(result if isinstance(result, tuple) else (result,), kwargs)
    if (
        not (isinstance(result, tuple) and len(result) == 2)
        or not isinstance(result[0], tuple | list)
        or not isinstance(result[1], dict)
    ):
        raise RuntimeError(
            f"the {hook}, with with_kwargs=True, must return None or a tuple (new_args, new_kwargs) of a tuple and a dict;"
            f" it returned {shown(result)}"
        )
    return copied_arguments(tuple(result[0]), result[1])


def _finished(hook: Hook, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Run a forward hook, and return the output that it leaves."""
    given = (args, kwargs, output) if hook.with_kwargs else (args, output)
    result = _called(hook, module, *given)
    return output if result is None else result


def _finished_anyway(hook: Hook, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Run a forward hook after an error: its own is no more than a warning."""
    try:
        return _finished(hook, module, args, kwargs, output)
    except Exception as error:
        warn(
            f"the {hook}, with always_call=True, raised an exception that was silenced as another error was raised before:"
            f" {error}"
        )
        return output


def _called(hook: Hook, module: Any, *given: Any) -> Any:
    held = references(module, given)
    before = held and held.counts()
    try:
        result = hook.function(module, *given)
    except Exception as error:
        note_hook(error, str(hook))
        raise
    if held is not None:
        held.note(before, held.counts(), result, str(hook), module)
    return result


# -- structures -------------------------------------------------------------------------------------------------------


def hooks_below(obj: Any) -> Iterator[Hook]:
    """Iterate over the hooks of all modules in an object."""
    return _hooks_in(walk_of(obj).spec.node) if watchers else iter(())


def without_functions(spec: Spec) -> Spec:
    """Return a structure with the functions of its hooks left out: for compiled code, a search by name says what they are."""
    return Spec(_stripped(spec.node), spec.facts, spec.paths) if watchers and any(_hooks_in(spec.node)) else spec


def _hooks_in(node: Any) -> Iterator[Hook]:
    for part in node:
        if type(part) is Hook:
            yield part
        elif type(part) is tuple:
            yield from _hooks_in(part)


def _stripped(node: Any) -> Any:
    if type(node) is Hook:
        return node.settings
    return tuple(map(_stripped, node)) if type(node) is tuple else node
