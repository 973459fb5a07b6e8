"""What may be a static part of a module, and the errors for what may not: bare arrays, hidden modules, unhashable values."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .cell import Cell
from .errors import UndeclaredArrayError
from .hidden_state import PLAIN, Found, find, leads_somewhere


def describe(value: Any) -> str:
    """Return the type of an array as `float32[3, 4]`, or the name of another value's class."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


def shown(value: Any) -> str:
    """Return a value that was passed, for a message: an array by its type, and nothing that prints one."""
    kind = type(value).__name__
    if getattr(value, "shape", ()) != () and hasattr(value, "dtype"):
        return f"an array, {describe(value)}"
    if isinstance(value, list | tuple | dict) and any(getattr(x, "shape", ()) != () for x in jax.tree.leaves(value)):
        return f"a {kind} of {len(value)}"
    text = repr(value)
    if isinstance(value, int | str | bytes):
        return text if len(text) <= 80 else f"{text[:60]}…"
    return text if len(text) <= 80 and "\n" not in text else f"a {kind}"


def bare_array(label: str, value: Any) -> UndeclaredArrayError:
    """The error for an array that was assigned without a Parameter or Buffer around it."""
    name, bracket, _ = label.rpartition(".")[2].partition("[")
    shown = describe(value)
    if bracket:
        return UndeclaredArrayError(
            f"{label} was given a bare array ({shown}), but each array of a module is declared, and a list, tuple or dict"
            f" gives it no name. Declare it in `__init__`:\n{_in_a_container(label)}"
        )
    return UndeclaredArrayError(
        f"{label} was given a bare array ({shown}), but each array of a module is declared. Declare it in `__init__`:\n"
        f"    self.{name} = Parameter(array)   # trained by an optimizer\n"
        f"    self.{name} = Buffer(array)      # kept and saved, not trained\n"
        "`forward` need not keep activations for a hand-written `backward`: JAX computes the gradients."
    )


def _in_a_container(label: str) -> str:
    """The lines to write for the arrays of the list, tuple or dict that `label` points into."""
    name, _, key = label.rpartition(".")[2].partition("[")
    if key.startswith(("'", '"')):
        kind, loop, suffix = "ParameterDict", "key, array in arrays.items()", "{key}"
    else:
        kind, loop, suffix = "ParameterList", "i, array in enumerate(arrays)", "{i}"
    return (
        f"    self.{name} = nn.{kind}(arrays)   # trained by an optimizer: each is a Parameter(array)\n"
        f'    for {loop}: setattr(self, f"{name}_{suffix}", Buffer(array))   # kept and saved, not trained'
    )


def is_array(value: Any) -> bool:
    """True for an array of JAX, NumPy or another library. A NumPy scalar counts as a number."""
    if isinstance(value, jax.Array | np.ndarray):
        return True
    kind = type(value)
    return hasattr(kind, "__jax_array__") or (hasattr(kind, "__array__") and not isinstance(value, np.generic))


def holds_state(value: Any) -> bool:
    """True for a module, an optimizer or another Stateful object."""
    return getattr(type(value), "_holds_cells", False)


def module_of(value: Any) -> Any:
    """Return the module of which `mt.jit` made a function; anything else as it is."""
    inner = getattr(value, "__wrapped__", None)
    return inner if holds_state(inner) else value


def is_declaration(value: Any) -> bool:
    """True for a Parameter or a Buffer."""
    return getattr(type(value), "_declares", False)


def check_static(value: Any, label: str) -> None:
    """Raise TypeError unless `value` is a module, or a static value: it has a hash, and holds no array or module."""
    if type(value) in PLAIN or holds_state(value):
        return
    if is_array(value):
        raise bare_array(label, value)
    if is_declaration(value):
        raise TypeError(
            f"{label}: a {type(value).__name__} inside a list, tuple or dict has no name of its own. Write:\n"
            f"{_in_a_container(label)}"
        )
    found = find_hidden(value)
    if found is not None:
        raise _hidden(value, found, label)
    if not _has_hash(value):
        raise TypeError(
            f"{label}: a static attribute of a module must be hashable, since compiled programs depend on its value; got"
            f" {type(value).__name__}. Use a tuple or a frozen dataclass instead."
        )


def find_hidden(value: Any) -> Found | None:
    """Return a module, an optimizer or an array that `value` leads to, or None."""
    return find(value, holds_state, is_array)


def _hidden(value: Any, found: Found, label: str) -> TypeError:
    inner = found.value
    what = "an array" if is_array(inner) else f"a {'parameter' if isinstance(inner, Cell) else type(inner).__name__}"
    holds = f"{label}: a {type(value).__name__} that holds {what}"
    hides = "would hide it from parameters(), state_dict() and every optimizer"
    if module_of(value) is inner:
        return TypeError(
            f"{label}: the function that `mt.jit` made of a {type(inner).__name__} {hides}. Assign the module itself, and"
            " write `module.compile()`, which compiles its calls"
        )
    if callable(value) and not is_array(inner):
        name = label.rpartition(".")[2].partition("[")[0]
        way = f" ({found.way})" if found.way else ""
        return TypeError(
            f"{holds}{way} {hides}, and copies of this module (jax.grad, jax.jit and copy.deepcopy make some) would share"
            f" it. Write a method instead, `def {name}(self, ...)`, and assign each module that it uses to an attribute"
            " (`self.net = net`)."
        )
    return TypeError(
        f"{holds} {hides}. Assign modules to attributes directly, or in lists, tuples and dicts with string keys;"
        " declare arrays as Parameter(...) or Buffer(...)."
    )


def check_walked(value: Any, path: str) -> None:
    """Raise TypeError for a static value that `__setattr__` has not checked, or whose closure has been bound since."""
    kind = type(value)
    if is_array(value) or is_declaration(value) or kind in (list, dict) or not _has_hash(value):
        raise TypeError(
            f"{path} holds a {kind.__name__} that was set without `Module.__setattr__` (by `vars(module)[...] = ...`, by"
            " `object.__setattr__`, or by a `__setattr__` of the class that does not call `super().__setattr__`), so"
            " nothing tracks it. Assign it: `module.name = ...`. Declare arrays as Parameter(...) or Buffer(...)."
        )
    if callable(value) and leads_somewhere(value):
        check_static(value, path)


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
