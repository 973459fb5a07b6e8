"""`Module.compile()`: later calls of a module in eager code run as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..runtime.tracebacks import trim
from ..state.frame import is_eager
from ..state.id_map import IdMap

# `jit.py` sets these, since this file cannot import it.
compiler: Any = None  # takes the `__call__` of a class, its name and options for XLA, and returns the same compiled
as_options: Any = None  # checks options for XLA, and returns them as a key

_compiled = IdMap()  # the options of the modules on which `compile()` was called; a copy of one is another module


def compile_in_place(module: Any, compiler_options: Any) -> None:
    """Have later calls of a module run as one program.

    Only classes of such modules get a `__call__` that asks which modules these are: others have nothing to ask.
    """
    _compiled.set(module, as_options(compiler_options, f"{type(module).__name__}.compile()"))
    follow_class(module)


def follow_class(module: Any) -> None:
    """Have the class of a module ask, if `compile()` was called on the module. A lazy layer gets another class."""
    cls = type(module)
    # a wrapper that a user put around it has the attribute, too
    if _compiled.get(module) is not None and getattr(cls.__call__, "chooses", None) is not cls.__call__:
        cls.__call__ = _choosing(cls.__call__, cls.__name__)


def _choosing(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a `__call__` that runs the program for modules that are to be compiled, and `plain` for others."""
    programs = {(): compiler(plain, name, ())}  # by options

    @wraps(plain, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = _compiled.get(self)
        try:
            if options is None or not is_eager():
                return plain(self, *args, **kwargs)
            if options not in programs:
                programs.setdefault(options, compiler(plain, name, options))
            return programs[options](self, *args, **kwargs)
        except Exception as error:
            trim(error)
            raise

    __call__.chooses = __call__  # type: ignore[attr-defined]
    return __call__
