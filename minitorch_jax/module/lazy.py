"""Lazy layers: they take their sizes from their first input, and are plain layers from then on.

In eager code a layer makes its parameters when it is called. A function that is to be compiled is first run abstractly, in a
`Search`: there, each lazy layer that is called has a stand-in, a plain layer of zeros, which only this thread sees. The
search changes nothing. After it, the layers get their parameters in the order in which they were called, in eager code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax

from ..runtime import interrupts
from ..runtime.jax_private import trace_state
from ..state import frame as frames
from ..state.pytree import Builder
from ..state.structure import changed
from ..state.uninitialized import Unsized, error_for, is_unsized, local
from ..state.walk import Node, Walker
from . import compiled_calls
from .module import Module
from .sizes import Search, all_or_nothing, of_shapes, with_any_key


class Lazy(Module):
    """Base of the lazy layers. `class LazyLinear(Lazy, Linear)` sets `_plain = Linear`, and writes two methods."""

    _plain: ClassVar[type[Module]]  # what the layer becomes
    _cells: Any

    # -- what a lazy layer writes -------------------------------------------------------------------------------------

    def _sizes(self, input: jax.Array) -> dict[str, int]:
        """Return the arguments of the plain layer's constructor that an input shows. Raises ValueError for a wrong rank."""
        raise NotImplementedError

    def _sizes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
        """Return the same from the shapes of a state_dict's arrays, by name; None if they do not tell."""
        raise NotImplementedError

    def _wait(self, smallest: dict[str, int], **settings: Any) -> None:
        """Check the arguments, and set the attributes that do not depend on the sizes. Called by the constructor.

        Args:
            smallest: for each size that is not known, the smallest that the plain layer takes.
            **settings: the other arguments of its constructor.
        """
        like = of_shapes(partial(self._plain, **smallest, **with_any_key(settings)))
        object.__setattr__(self, "_cells", Unsized(self, like, settings, smallest))
        vars(self).update({**vars(like), **dict.fromkeys(smallest, 0)})

    # -- torch's methods ----------------------------------------------------------------------------------------------

    def has_uninitialized_params(self) -> bool:
        """Return True. (The plain layer that this one becomes has no such method, as in torch.)"""
        return is_unsized(self)

    def initialize_parameters(self, input: jax.Array) -> None:
        """Make the parameters for inputs of this shape, as the first call does. The layer is a plain one from then on.

        Args:
            input: an array, or a `jax.ShapeDtypeStruct`.

        Raises:
            ValueError: if the rank is wrong. The layer is unchanged then.
        """
        with all_or_nothing() as undo:
            self._make(self._sizes(input), undo)

    if not TYPE_CHECKING:  # for type checkers, it is the plain layer's

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not is_unsized(self):  # a bound method that was taken before
                return self.forward(*args, **kwargs)
            if local.search is not None and not self._is_made_here():
                return local.search.add(self, self._sizes(*args, **kwargs)).forward(*args, **kwargs)
            if not frames.is_eager() and not self._is_made_here():
                raise error_for(self)
            with all_or_nothing() as undo:
                self._make(self._sizes(*args, **kwargs), undo)
                return self.forward(*args, **kwargs)

    def _is_made_here(self) -> bool:
        """True if the code that is traced now has made this layer."""
        if frames.is_eager():
            return False
        frame: Any = frames.local.frame
        made = self._birth is not None and self._birth == trace_state()
        while frame is not None and not made:
            frame, made = frame.parent, id(self) in frame.own
        return made

    # -- becoming a plain layer ---------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return the arguments of the plain constructor without the sizes: attributes may have been assigned since."""
        mine = vars(self)
        return {n: mine[n] if n in mine and n != "bias" else value for n, value in self._cells.settings.items()}

    def _make(self, sizes: dict[str, int], undo: list[Callable[[], None]], key: Any = None) -> None:
        """Become a plain layer of these sizes. `undo` gets what makes the layer lazy again."""
        settings = self._settings()
        if key is not None and "key" in settings:
            settings["key"] = key
        self._become(self._plain(**sizes, **settings), sizes, undo)

    def _become(self, made: Module, sizes: dict[str, int], undo: list[Callable[[], None]]) -> None:
        """Take the parameters of a plain layer, and its class. Attributes that a user has assigned stay."""
        mine, cells = vars(self), self._cells
        attributes = {n: mine[n] if n in mine and n not in sizes else value for n, value in vars(made).items()}
        attributes |= {name: value for name, value in mine.items() if name not in attributes}
        undo.append(partial(_turn, self, type(self), cells, mine))
        _turn(self, self._plain, {**made._cells, **cells.added()}, attributes)
        compiled_calls.follow_class(self)

    # -- pytree and text ----------------------------------------------------------------------------------------------

    def _describe(self, walker: Walker, path: str) -> Node:
        if not is_unsized(self):
            return super()._describe(walker, path)
        search = local.search
        if search is None:
            raise error_for(self, path)
        walker.watch(partial(_forget, self, search))
        stand_in = search.stand_in(self)
        return _Itself(self), None if stand_in is None else (type(stand_in), stand_in._describe(walker, path))

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        return iter(())

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Module:
        """Return a copy of the stand-in; without one, the layer itself, so that the search sees the call of it."""
        itself, stand_in = payload
        if stand_in is not None:
            copied: Module = stand_in[0]._rebuild(stand_in[1], builder)
            return copied
        layer: Module = itself.layer
        builder.walker.objects[id(layer)] = len(builder.objects)
        builder.objects.append(layer)
        return layer

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._cells.like._cells, *self._cells.added()})

    def extra_repr(self) -> str:
        like, shown = self._cells.like, {**vars(self)}
        vars(like).update(shown)
        return str(like.extra_repr())


class _Itself:
    """Stands for a lazy layer in a Spec, which compares it by identity."""

    __slots__ = ("layer",)

    def __init__(self, layer: Lazy) -> None:
        self.layer = layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.layer is self.layer

    def __hash__(self) -> int:
        return id(self.layer)


def _turn(layer: Any, kind: type, cells: Any, attributes: dict[str, Any]) -> None:
    """Give a layer another class, other cells and other attributes."""
    with interrupts.deferred:
        object.__setattr__(layer, "_cells", cells)
        object.__setattr__(layer, "__dict__", attributes)
        object.__setattr__(layer, "__class__", kind)
        changed(layer)


def _forget(layer: Any, search: Search) -> None:
    """Make walks over a lazy layer of the time of a search void when the search is over, and in other threads."""
    if local.search is not search:
        changed(layer)
