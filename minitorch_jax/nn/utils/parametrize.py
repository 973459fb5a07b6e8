"""Parametrizations: attributes of a module that other modules compute from the original parameters, as in torch.

A module `m` with a parametrized `weight` has no parameter of that name. It has a submodule `m.parametrizations.weight`, a
`ParametrizationList`, which holds the originals. Reading `m.weight` calls it, wherever the module is: in eager code, while a
program is traced, in a copy. The module's class stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax

from ...module import parametrized
from ...module.module import Module
from ...module.tree import is_module
from ...state.cell import Cell
from ...state.static_values import is_array, module_of, shown
from ...state.walk import join
from ..container import ModuleDict, ModuleList, check_name
from ..parameter_container import ParameterDict, ParameterList
from .parametrization_list import ParametrizationList as ParametrizationList
from .parametrization_list import cached as cached
from .parametrization_list import check_same, declared_as

M = TypeVar("M", bound=Module)


def register_parametrization(module: M, tensor_name: str, parametrization: Module, *, unsafe: bool = False) -> M:
    """Have a parametrization compute an attribute of a module from the parameter or buffer of that name.

    From now on `module.weight` is `parametrization(original)`, with `original` at `module.parametrizations.weight.original`.
    Gradients go through the parametrization to the original, which optimizers of the module train. A second one on the same
    attribute takes the result of the first.

    If a parametrization has a method `right_inverse`, it computes the first original from the present value, and later
    ones from what is assigned: `module.weight = array`. It may return several arrays; `forward` then takes them all, and
    they are the parameters `original0`, `original1`, …

    Args:
        module: the module. Its class stays what it is.
        tensor_name: the name of one of its own parameters or buffers.
        parametrization: a module whose `forward` returns an array of the same shape and dtype.
        unsafe: True leaves out the checks of shape and dtype.

    Returns:
        The module.

    Raises:
        ValueError: if the module has no parameter or buffer of that name, or something does not fit. Nothing has changed.
        TypeError: if `parametrization` is no Module, or `module` one whose parameters have no names of their own.
        TraceError: inside compiled code, for a module from outside.

    Source: torch.nn.utils.parametrize.register_parametrization. Differs from PyTorch: if `right_inverse` returns the
    array that it got, the original is the same parameter as before, as in torch; if it returns another one, the
    original is a new parameter, so that one that was tied to the old one keeps its value. Such a module can be pickled.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.nn.utils import parametrize
        >>> class Symmetric(mt.Module):
        ...     def forward(self, x):
        ...         return jnp.triu(x) + jnp.triu(x, 1).T
        ...     def right_inverse(self, a):
        ...         return jnp.triu(a)
        >>> layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Symmetric())
        >>> bool((layer.weight == layer.weight.T).all())
        True
        >>> [name for name, _ in layer.named_parameters()]
        ['bias', 'parametrizations.weight.original']
    """
    attach(module_of(module), tensor_name, module_of(parametrization), unsafe)
    return module


def attach(module: Any, name: str, parametrization: Any, unsafe: bool = False, trusted: bool = False) -> None:
    """See `register_parametrization`. With `trusted` nothing is checked, and the original is the present value."""
    _check_host(module, name)
    if not is_module(parametrization):
        raise TypeError(
            f"a parametrization is a Module, whose `forward` takes the original array; got {shown(parametrization)}"
            f" ({type(parametrization).__name__})"
        )
    held = parametrized.list_of(module, name)
    if held is None and name not in module._cells:
        known = ", ".join([*module._cells, *parametrized.names(module)])
        raise ValueError(f"{type(module).__name__} has no parameter or buffer {name!r}; it has {known or 'none'}")
    label = f"{type(module).__name__}.{name}"
    with module._restructuring(label):
        parametrization.train(module.training)
        if held is not None:
            if not unsafe and not trusted:
                _check_link(parametrization, held._value())
            held.append(parametrization)
            held.unsafe = held.unsafe or unsafe
            return
        made = ParametrizationList.__new__(ParametrizationList)
        made._set_up([parametrization], module._cells[name], unsafe, trusted)
        made.train(module.training)
        _put(module, name, made)


def _check_host(module: Any, name: str) -> None:
    if not is_module(module):
        raise TypeError(f"a parametrization is registered on a Module; got {shown(module)} ({type(module).__name__})")
    if isinstance(module, ParameterList | ParameterDict) or type(module)._holder is not Module._holder:
        raise TypeError(
            f"{type(module).__name__} cannot have a parametrization of {name!r}: it counts its parameters, or keeps them for"
            " another library. Assign the parameter to a Module of your own"
        )
    lists = vars(module).get("parametrizations")
    if "parametrizations" in module._cells or (lists is not None and type(lists) is not ModuleDict):
        raise ValueError(f"{type(module).__name__} has an attribute `parametrizations` of its own: rename that one")
    check_name(name, ModuleDict(), "parametrization")


def _check_link(parametrization: Any, value: Any) -> None:
    """Check that a further parametrization, and its `right_inverse`, take arrays like `value` to such arrays."""
    out = parametrization(value)
    check_same(out, value, "the parametrization")
    inverse = getattr(parametrization, "right_inverse", None)
    if inverse is not None:
        try:
            back = inverse(out)
        except NotImplementedError:
            return
        check_same(back, value, "right_inverse, of a further parametrization,")


def _put(module: Any, name: str, made: ParametrizationList) -> None:
    """Have a list compute the attribute `name` of a module, in place of its parameter or buffer."""
    lists = vars(module).get("parametrizations")
    first = next(iter(lists.values()), None) if lists is not None else None
    made._order = tuple(module._cells) if first is None else first._order
    if lists is None:
        lists = ModuleDict()
        lists.train(module.training)
        module.parametrizations = lists
    module._cells.pop(name, None)
    lists[name] = made


def is_parametrized(module: Module, tensor_name: str | None = None) -> bool:
    """True if a module has a parametrization of the attribute `tensor_name`, or of any attribute if that is None.

    Source: torch.nn.utils.parametrize.is_parametrized.

    Example:
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.nn.utils import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 2))
        >>> parametrize.is_parametrized(layer), parametrize.is_parametrized(layer, "bias")
        (True, False)
    """
    names = parametrized.names(module_of(module))
    return bool(names) if tensor_name is None else tensor_name in names


def remove_parametrizations(module: M, tensor_name: str, leave_parametrized: bool = True) -> M:
    """Remove the parametrizations of an attribute, which becomes a parameter or buffer again.

    Args:
        module: the module.
        tensor_name: the name of the attribute. It may be a path, or a glob over paths, in which `*` also matches dots:
            `remove_parametrizations(model, "*.weight")` removes those of all submodules.
        leave_parametrized: True keeps the present value, as a new parameter. False brings back the original.

    Returns:
        The module, with the structure that it had before the parametrization.

    Raises:
        ValueError: if nothing of that name is parametrized, or if `leave_parametrized` is False and there are several
            originals. Nothing has changed then.
        TraceError: inside compiled code, for a module from outside.

    Source: torch.nn.utils.parametrize.remove_parametrizations. Differs from PyTorch: it takes paths and globs; and the value
    is put in a new parameter, not in the original, so that one that is tied to the original keeps its value.

    Example:
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.nn.utils import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 2))
        >>> before = layer.weight
        >>> bool((parametrize.remove_parametrizations(layer, "weight").weight == before).all())
        True
    """
    given, module = module, module_of(module)
    if not is_module(module):
        raise TypeError(f"remove_parametrizations takes a Module; got {shown(module)} ({type(module).__name__})")
    places = [
        (join(prefix, name), holder, name)
        for prefix, holder in module.named_modules()
        for name in parametrized.names(holder)
    ]
    found = matching(tensor_name, places)
    if not found:
        known = ", ".join(path for path, *_ in places)
        raise ValueError(
            f"nothing in this {type(module).__name__} that {tensor_name!r} names is parametrized; there are {known or 'none'}"
        )
    new: dict[Any, Any] = {}  # so that what two modules compute in the same way stays one parameter
    cells: list[Cell] = []
    for path, holder, name in found:
        held = parametrized.list_of(holder, name)
        if not leave_parametrized:
            if not held.is_tensor:
                raise ValueError(
                    f"{path} is computed from {held.ntensors} originals, so there is none to bring back. Leave out"
                    " `leave_parametrized=False`, or assign `Parameter(array)` after it was removed"
                )
            cells.append(held._cells["original"])
            continue
        sources = list(held._cells.values())
        key = (*sources, *map(id, held._modules()))
        if key not in new:
            value = held._value()
            same = held.is_tensor and value is held.original
            trainable = any(cell.trainable for cell in sources)
            new[key] = sources[0] if same else declared_as(sources[0].kind, trainable, value)._cell
        cells.append(new[key])
    for (_, holder, name), cell in zip(found, cells, strict=True):
        _restore(holder, name, cell)
    return given


def _restore(module: Any, name: str, cell: Cell) -> None:
    """Make `cell` the parameter or buffer `name` again, in its old place among the others."""
    with module._restructuring(f"{type(module).__name__}.{name}"):
        lists = vars(module)["parametrizations"]
        order = {name: i for i, name in enumerate(vars(lists)[name]._order)}
        del lists[name]
        if not len(lists):
            del module.parametrizations
        all_cells = {**module._cells, name: cell}
        module._cells.clear()
        module._cells.update(sorted(all_cells.items(), key=lambda item: order.get(item[0], len(order))))


def array_of(module: Any, name: str) -> jax.Array:
    """Return the parameter or buffer `name`, whose shape a parametrization is made for."""
    array: Any = getattr(module, name, None)
    if not is_array(array):
        raise ValueError(f"{type(module_of(module)).__name__} has no parameter or buffer {name!r}")
    found: jax.Array = array
    return found


def matching(names: Any, places: Iterable[tuple[str, Any, str]]) -> list[tuple[str, Any, str]]:
    """Return the places, of `(path, module, name)`, whose path one of the names, which may be globs, matches."""
    globs = [names] if isinstance(names, str) else list(names)
    return [place for place in places if any(fnmatchcase(place[0], glob) for glob in globs)]


def type_before_parametrizations(module: Module) -> type:
    """Return the module's class. (In torch a parametrized module has another class; here it keeps its own.)"""
    return type(module_of(module))


def transfer_parametrizations_and_params(from_module: Module, to_module: M, tensor_name: str | None = None) -> M:
    """Have the parametrizations of one module compute attributes of another one, too, from the same originals.

    The two modules then share parametrizations and originals, as tied parameters.

    Args:
        from_module: the module with parametrizations.
        to_module: the other one. What it has by these names is replaced.
        tensor_name: the name of one attribute; None for all that are parametrized.

    Returns:
        `to_module`.

    Raises:
        ValueError: if `tensor_name` is not parametrized in `from_module`.

    Source: torch.nn.utils.parametrize.transfer_parametrizations_and_params.

    Example:
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.nn.utils import parametrizations, parametrize
        >>> one, two = parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2)
        >>> _ = parametrize.transfer_parametrizations_and_params(one, two)
        >>> bool((one.weight == two.weight).all())
        True
    """
    given, from_module, to_module = to_module, module_of(from_module), module_of(to_module)
    for name in parametrized.names(from_module) if tensor_name is None else [tensor_name]:
        held = parametrized.list_of(from_module, name)
        if held is None:
            raise ValueError(f"{name!r} of this {type(from_module).__name__} is not parametrized")
        _check_host(to_module, name)
        with to_module._restructuring(f"{type(to_module).__name__}.{name}"):
            made = ParametrizationList.__new__(ParametrizationList)
            ModuleList.__init__(made, held._modules())
            made._cells.update(held._cells)
            for attribute in ("unsafe", "_order", "_shape", "is_tensor", "ntensors"):
                setattr(made, attribute, getattr(held, attribute))
            made.training = held.training
            _put(to_module, name, made)
    return given
