"""`shard`: laying a model's arrays over a mesh of devices, by rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .engine.sharding import explicit_axes, is_explicit
from .module import conversion, random
from .module.globs import Globs
from .module.module import Module
from .module.parameter import declared
from .state.cell import Cell
from .state.errors import TraceError
from .state.frame import is_eager
from .state.static_values import module_of
from .state.walk import walk_of

_M = TypeVar("_M", bound=Module)


@overload
def shard(
    module_or_maker: _M, mesh: Mesh, rules: Mapping[str, PartitionSpec] | None = None, *, fsdp: str | None = None
) -> _M: ...
@overload
def shard(
    module_or_maker: Callable[[], _M],
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    fsdp: str | None = None,
) -> _M: ...
def shard(
    module_or_maker: Any,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    fsdp: str | None = None,
) -> Any:
    """Lay the parameters and buffers of a model over the devices of a mesh.

    A Module is laid out in place, its gradients with it. A maker is a function without arguments that returns a Module: it
    runs as one compiled program whose results are made in their places, so that no device ever holds the whole model.
    Optimizers may be made before or after, since their state follows the parameters.

    A maker draws one key from the random stream, and all that it draws comes from that key. The numbers are those of
    `with mt.rng(key): maker()`, bit by bit if they are drawn from a uniform distribution. XLA may round the last bit of
    scaled normal numbers otherwise.

    Args:
        module_or_maker: a Module, whose arrays may be `jax.ShapeDtypeStruct`s (they get shardings, and nothing is
            allocated), or a maker.
        mesh: the devices, as `jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)` arranges them.
        rules: `PartitionSpec`s by the names of `state_dict`. A name may be a glob: `*` also matches dots. The first rule
            that matches a name counts. What no rule matches is replicated, or split by `fsdp`.
        fsdp: the name of a mesh axis, over which each parameter of two or more dimensions is split further, along its largest
            dimension that no rule has split and that the axis divides. Vectors, buffers, and what does not divide stay whole.

    Returns:
        The module: the same object, or the one that the maker has made.

    Raises:
        TypeError: if the first argument is neither a Module nor a maker, `mesh` is no Mesh or has Explicit axes, or `rules`
            is no dict.
        ValueError: if something in the rules does not fit. One error lists everything. Nothing has changed then, and the
            random stream has not moved.
        TraceError: inside compiled code.

    Example:
        >>> import jax
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> import minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        >>> net = mt.shard(lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), mesh, {"0.*": P("model")}, fsdp="data")
        >>> net[0].bias.sharding.spec == P("model")
        True
    """
    if not is_eager():
        raise TraceError(
            "mt.shard() was called inside compiled code or a JAX transform. Call it outside, between calls"
        )
    module_or_maker = module_of(module_or_maker)
    is_module = isinstance(module_or_maker, Module)
    if not is_module and not callable(module_or_maker):
        raise TypeError(
            f"shard() takes a Module, or a function without arguments that returns one; got {module_or_maker!r}. (The state"
            " of an optimizer follows the parameters of its modules: shard those.)"
        )
    if not isinstance(mesh, Mesh):
        raise TypeError(f"shard() takes a mesh made by `jax.make_mesh`, as the second argument; got {mesh!r}")
    if is_explicit(mesh):
        raise explicit_axes("shard() was given", mesh)
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(f"shard() takes rules as a dict of PartitionSpecs by name; got {rules!r}")
    if is_module:
        conversion.place(module_or_maker, _shardings(module_or_maker, mesh, rules or {}, fsdp))
        return module_or_maker
    return _made(module_or_maker, mesh, rules or {}, fsdp)


def _made(maker: Callable[[], Any], mesh: Mesh, rules: Mapping[str, Any], fsdp: str | None) -> Module:
    """Return the maker's module, each array of which is made in its place."""
    stream = random.current()

    def make(data: jax.Array) -> Module:
        with random.rng(jax.random.wrap_key_data(data, impl=stream.impl)), random.drawing_in_place():
            made = maker()
        if not isinstance(made, Module):
            raise TypeError(
                f"shard() takes a maker that returns a Module; this one has returned a {type(made).__name__}"
            )
        return made

    key = jax.ShapeDtypeStruct(stream.cell.value.shape, stream.cell.value.dtype)
    abstract = jax.eval_shape(make, key)
    places = _shardings(abstract, mesh, rules, fsdp)
    treedef: Any = jax.tree.structure(abstract)
    out = treedef.unflatten([places[cell] for cell in walk_of(abstract).cells])
    compiled = jax.jit(make, out_shardings=out).lower(key).compile()
    # NumPy's array, because one of JAX belongs to one device, or to one process
    made: Module = compiled(np.asarray(jax.random.key_data(stream.next())))
    for cell in walk_of(made).cells:
        cell.lent = False  # nobody else has seen the arrays
    return made


def _shardings(module: Module, mesh: Mesh, rules: Mapping[str, Any], fsdp: str | None) -> dict[Cell, NamedSharding]:
    """Return the sharding of each parameter and buffer.

    Raises:
        ValueError: if something does not fit. One error lists everything.
    """
    problems = [f"  {name!r}: {problem}" for name, spec in rules.items() if (problem := _wrong(name, spec, mesh))]
    if fsdp is not None and fsdp not in mesh.axis_names:
        problems.append(f"  fsdp={fsdp!r}: {_no_axis(mesh)}")
        fsdp = None
    usable = {name: spec for name, spec in rules.items() if not _wrong(name, spec, mesh)}
    globs, rules_named = Globs(usable), list(usable)
    entries = [(path, cell, globs.matching(path)) for path, _, _, cell in module._entries()]
    used = {i for _, _, matching in entries for i in matching}
    unused = [name for i, name in enumerate(usable) if i not in used]
    names = ", ".join(path for path, _, _ in entries[:20]) + (", …" if len(entries) > 20 else "")
    problems += [f"  {name!r} matches no parameter or buffer; there are {names or 'none'}" for name in unused]
    chosen: dict[Cell, tuple[str, str, PartitionSpec]] = {}
    for path, cell, matching in entries:
        if not matching:
            continue
        name = rules_named[matching[0]]
        first, its_rule, spec = chosen.setdefault(cell, (path, name, usable[name]))
        if _entries(spec) != _entries(usable[name]):
            problems.append(
                f"  {first} and {path} are one tied parameter, but the rule {its_rule!r} says {spec} and the rule {name!r}"
                f" says {usable[name]}"
            )
    places = {}
    for path, cell in walk_of(module).named():
        path, rule, spec = chosen.get(cell, (path, None, PartitionSpec()))
        sharding = NamedSharding(mesh, spec)
        shape = getattr(declared(cell), "shape", ())
        if problem := conversion.misfit(sharding, shape):
            problems.append(f"  {path}: {problem} (the rule {rule!r})")
        elif fsdp is not None and cell.kind == "parameter" and len(shape) >= 2:
            if fsdp in _axes(spec):
                problems.append(
                    f"  {path}: the rule {rule!r} has used the axis {fsdp!r} already, over which fsdp is to split it; leave"
                    f" {fsdp!r} out of the rule, or split without fsdp"
                )
            else:
                sharding = NamedSharding(mesh, _further_split(spec, shape, fsdp, mesh.shape[fsdp]))
        places[cell] = sharding
    if problems:
        listed = "\n".join(problems)
        raise ValueError(f"shard(): the rules do not fit this {type(module).__name__}; nothing has changed:\n{listed}")
    return places


def _wrong(name: Any, spec: Any, mesh: Mesh) -> str | None:
    """Return what is wrong with a rule for any module, or None."""
    if not isinstance(name, str):
        return "the name of a rule must be a string"
    if not isinstance(spec, PartitionSpec):
        return f"a rule must be a jax.sharding.PartitionSpec, such as P('model') or P(); got {spec!r}"
    axes = _axes(spec)
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown:
        return f"{spec} names the axis {unknown[0]!r}; {_no_axis(mesh)}"
    if len(set(axes)) < len(axes):
        return f"{spec} names an axis twice"
    return None


def _no_axis(mesh: Mesh) -> str:
    return "the mesh has no such axis, it has " + ", ".join(map(repr, mesh.axis_names))


def _entries(spec: PartitionSpec) -> list[tuple[Any, ...]]:
    """Return for each dimension the axes that it is split over, without dimensions at the end that are not split."""
    found = [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in spec]
    while found and not found[-1]:
        found.pop()
    return found


def _axes(spec: PartitionSpec) -> list[Any]:
    return [axis for entry in _entries(spec) for axis in entry]


def _further_split(spec: PartitionSpec, shape: tuple[int, ...], axis: str, size: int) -> PartitionSpec:
    """Return `spec` with the largest free dimension that divides split over `axis`; `spec` itself if none does."""
    parts = [*spec, *[None] * (len(shape) - len(spec))]
    free = [i for i, part in enumerate(parts) if part in (None, ()) and shape[i] % size == 0]
    if not free:
        return spec
    parts[max(free, key=lambda i: shape[i])] = axis
    return PartitionSpec(*parts)
