"""`compiler_options`: options of XLA's for one compiled function, checked and in the form of a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import jax

from ..state.static_values import shown
from .disabled_jit import is_plain

CompilerOptions = Mapping[str, str | bool | int | float]
Options = tuple[tuple[str, str | bool | int | float], ...]  # sorted by name, so that equal options are one key


def as_options(options: CompilerOptions | None, name: str) -> Options:
    """Return what the user gave as `compiler_options`. Names are checked by XLA, when it compiles.

    Raises:
        TypeError: if it is no dict of options.
    """
    if options is None:
        return ()
    if not isinstance(options, Mapping):
        raise TypeError(
            f"{name}: compiler_options must be a dict of XLA's options, such as {{'xla_cpu_enable_fast_math': True}}; got"
            f" {shown(options)} ({type(options).__name__})"
        )
    for option, value in options.items():
        if not isinstance(option, str) or not isinstance(value, str | bool | int | float):
            raise TypeError(
                f"{name}: each of compiler_options is a name and a string, a bool or a number; got"
                f" {shown(option)}: {shown(value)}. A list is written as one string, with commas"
            )
    return tuple(sorted(options.items()))


def refuse_inside(options: Options, name: str) -> None:
    """Raise ValueError for options of a function that becomes part of another program, which XLA compiles as a whole."""
    if options and not is_plain():
        raise ValueError(
            f"{name} has compiler_options ({', '.join(option for option, _ in options)}), and it is called within another"
            " program, which XLA compiles as a whole. Give the options to that program, the outermost `mt.jit`, `mt.scan` or"
            f" `jax.jit`, and call {name} without them here"
        )


@contextmanager
def naming_options(options: Options, name: str, forget: Callable[[], None]) -> Iterator[None]:
    """Raise ValueError, with the name of the function, if XLA refuses its options, and `forget` the program."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if options and text.startswith("INVALID_ARGUMENT") and any(option in text for option, _ in options):
            forget()
            raise ValueError(
                f"{name}: XLA refuses its compiler_options: {text.partition(': ')[2].rstrip('.')}. Their names and values are"
                " XLA's, and depend on the version of jaxlib and on the platform"
            ) from error
        raise
