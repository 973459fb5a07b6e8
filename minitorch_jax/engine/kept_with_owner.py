"""What is kept for a function or an object of the user's: it lies with its owner, and goes when that goes."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from ..runtime.bounded_cache import Kept
from ..state.id_map import IdMap
from .names.watch import Same


class Functions:
    """What is compiled for one use of functions (`backward`, say). Functions made from the same code share it.

    It lies with each function of that code, and goes with the last one. For a lambda in a loop, which has gone before the
    next one comes, that of the codes that were used last is kept.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        self._by_code = Kept(most=_MOST_CODES)
        self._others = IdMap()  # what is kept for objects without a `__dict__`
        self._lock = threading.RLock()

    def get(self, fn: Any) -> Any:
        """What is compiled for a function: what `make` has returned for it, or for another of its code."""
        if type(fn) is types.FunctionType:
            kept = fn.__dict__.get(_KEPT)
            if kept is not None and kept.owner() is fn:
                code, known = kept.items.get(self, _NOTHING)
                if code is fn.__code__:
                    return known
            return self._of_code(fn)
        return self._of_owner(fn)

    def _of_code(self, fn: types.FunctionType) -> Any:
        code, name = fn.__code__, (fn.__module__, fn.__qualname__)
        codes = tuple(map(Same, _codes(fn)))
        with self._lock:
            known, _ = self._by_code.get(codes) or _NOTHING
            if known is None:
                known = self._make(fn)
                if (
                    "<" not in fn.__qualname__
                ):  # defined again, as in a notebook: the function before lies with its users
                    self._by_code.drop(lambda entry: entry.value[1] == name)
                self._by_code.set(codes, (known, name))
        kept_for(fn)[self] = code, known  # type: ignore[index]  # a function can keep things
        return known

    def _of_owner(self, fn: Any) -> Any:
        owner, key = (fn.__self__, (self, fn.__func__)) if isinstance(fn, types.MethodType) else (fn, self)
        kept = kept_for(owner)
        if kept is None:
            try:
                kept = self._others.get(owner)
                if kept is None:
                    kept = {}
                    self._others.set(owner, kept)
            except TypeError:  # cannot be referred to weakly: traced anew at each call
                return self._make(fn)
        if key not in kept:
            kept.setdefault(key, self._make(fn))
        return kept[key]


def _codes(fn: types.FunctionType) -> Iterator[types.CodeType]:
    """The code of a function, and of what it wraps: all that a decorator returns has the decorator's code."""
    seen: set[int] = set()
    while type(fn) is types.FunctionType and id(fn) not in seen:
        seen.add(id(fn))
        yield fn.__code__
        fn = fn.__dict__.get("__wrapped__")  # type: ignore[assignment]


_MOST_CODES = 32
_NOTHING = (None, None)
_KEPT = "_minitorch_jax_compiled"


class _Kept:
    """What is kept for one object, in its `__dict__`: it goes when that goes, and is not copied with it.

    (It may refer to the object, by what a function reaches. A map of the library's would then keep both for ever.)
    """

    def __init__(self, owner: Any = None) -> None:
        self.items: dict[Any, Any] = {}
        self.owner = nobody if owner is None else weakref.ref(owner)  # a shallow copy has another's

    def __reduce__(self) -> Any:
        return _Kept, ()


def nobody() -> None:
    return None


def kept_for(owner: Any) -> dict[Any, Any] | None:
    """What is kept for an object, by keys of the caller's; None if the object cannot keep anything."""
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict):  # none, or that of a class
        return None
    kept = attributes.get(_KEPT)
    if kept is None or kept.owner() is not owner:
        try:
            kept = attributes[_KEPT] = _Kept(owner)
        except TypeError:  # cannot be referred to weakly
            return None
    items: dict[Any, Any] = kept.items
    return items
