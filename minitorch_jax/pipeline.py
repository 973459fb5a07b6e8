"""Calling compiled functions on cells: donation, and storing of results that no interrupt can come between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, islice, repeat, starmap
from typing import Any

import jax
import jax.numpy as jnp

from . import interrupts
from .cell import CONSUMED, Cell, get_stored, gradients, is_concrete, lend, lendings, store, store_all

_config: Any = jax.config
from_iterable = chain.from_iterable


def _is_debugging() -> bool:
    """Whether JAX is to look for NaN or infinity in results, and so may raise when they have been computed."""
    return _config.jax_debug_nans or _config.jax_debug_infs


is_debugging: Callable[[], bool] = _is_debugging

try:  # the same at a third of the price, where this JAX has it
    from jax._src.config import debug_infs as _infs
    from jax._src.config import debug_nans as _nans

    def is_debugging() -> bool:
        return _nans.value or _infs.value

    is_debugging()
except (ImportError, AttributeError):
    is_debugging = _is_debugging


def fresh_copies(values: list[Any]) -> list[Any]:
    """Copies that share no buffer with `values`, in one call."""
    return jax.device_put(values, may_alias=False)


Placement = tuple[Any, ...]  # of each cell its sharding, None on one device; empty if that is all of them


def placement(cells: Sequence[Cell]) -> Placement:
    """Where the cells' arrays are. XLA would give results whichever sharding it likes; ours stay where they were."""
    found: list[Any] = []
    for cell in cells:
        if cell.pack is not None or cell.kind not in ("parameter", "packed", "buffer", "state"):  # others follow them
            found.append(None)
            continue
        known = is_concrete(cell.value)
        sharding = cell.value.sharding if known else None
        found.append(sharding if sharding is not None and len(sharding.device_set) > 1 else None)
    return tuple(found) if any(sharding is not None for sharding in found) else ()


def follow(param: Cell, others: Sequence[Cell]) -> None:
    """Bring arrays that were left behind on other devices, when `Module.to` moved a parameter, to where that is now."""
    here = param.value
    if not is_concrete(here) or not here.committed:
        return
    whole = here.sharding
    if isinstance(whole, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec())
    for cell in others:
        array = cell.value
        if is_concrete(array) and array.committed and array.sharding.device_set != here.sharding.device_set:
            target = here.sharding if array.shape == here.shape else whole
            store_all([cell], [jax.device_put(array, target, may_alias=False)])


def join_mesh(cells: Sequence[Cell]) -> None:
    """Bind arrays that are bound to no device, but lie beside some on a mesh, to all of it: after a call XLA would have."""
    arrays = [cell for cell in cells if is_concrete(cell.value)]
    meshes = [
        cell.value.sharding.mesh for cell in arrays if isinstance(cell.value.sharding, jax.sharding.NamedSharding)
    ]
    loose = [cell for cell in arrays if not cell.value.committed and cell.kind != "hyperparameters"]
    if loose and meshes and meshes[0].size > 1:
        whole = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
        store_all(loose, jax.device_put([cell.value for cell in loose], whole, may_alias=False))


def placed(value: Any, sharding: Any) -> Any:
    """`value` of a traced computation, in the sharding that its cell has."""
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


class Compiled:
    """A jitted function of ours, of two arguments: a list whose arrays are donated, and a tuple of whatever else.

    `options` are XLA's, for what it would compute wrongly otherwise (`ynnpack.py`).
    """

    __slots__ = ("donating", "keeping")

    def __init__(self, function: Callable[..., Any], name: str, options: dict[str, Any] | None = None) -> None:
        def compiled(owned: list[Any], others: tuple[Any, ...]) -> Any:
            with interrupts.unwrapped():
                out = function(owned, *others)
            if _config.jax_disable_jit:  # then results may be arrays that the user holds
                out = jax.tree.map(jnp.copy, out)
            interrupts.defer()
            return out

        compiled.__name__ = compiled.__qualname__ = name
        self.donating = jax.jit(compiled, donate_argnums=0, compiler_options=options)
        self.keeping = jax.jit(compiled, compiler_options=options)


def repeated(pipeline: Pipeline, read: Sequence[Cell]) -> Callable[[Any], list[Any]]:
    """`Pipeline.run` for calls before which all is as it was after the last one, so that nothing is to be compiled either.

    Gives a function of the data; `read` are the cells whose values come before those. What it needs is in its closure,
    where Python finds it fastest.
    """
    call, stored, owned = pipeline.compiled.donating, pipeline.stored, pipeline.owned

    def run_again(data: Any) -> list[Any]:
        inputs = list(map(get_stored, owned)), (list(map(get_stored, read)), data)
        results = from_iterable(starmap(call, (inputs,)))
        deque(map(store, stored, results), 0)
        return list(results)

    return run_again


class Pipeline:
    """A compiled function bound to cells: those that it updates in place (`owned`), those that take its first results.

    `compiled` may be one for many pipelines. `dropped` are gradients that it uses up and does not give out. `last_seen`
    is `lendings.last` at a time when no owned cell was lent.
    """

    __slots__ = ("compiled", "stored", "owned", "dropped", "last_seen")

    def __init__(
        self, compiled: Compiled, stored: Sequence[Cell], owned: Sequence[Cell], dropped: Sequence[Cell] = ()
    ) -> None:
        self.compiled, self.stored, self.owned, self.dropped = compiled, stored, owned, dropped
        self.last_seen: object = None

    def run(self, others: tuple[Any, ...], fallible: bool = False, donated: Sequence[Any] = ()) -> list[Any]:
        """Call, store the first results, return the rest.

        From the start of the call to the last store there is no bytecode at which Python could handle a signal, so a
        Ctrl-C comes before everything or after everything. (Where JAX itself has to run Python, to trace and to compile,
        the signal is put off from the end of tracing on.) `fallible`: the program may fail while it runs, as it may
        under JAX's debugging switches: then nothing is donated, and nothing stored before all has succeeded. `donated`:
        further arrays that may be used up.
        """
        if fallible or is_debugging():
            return self._run_slowly(others, donated)
        last = lendings.last
        values = list(map(get_stored, self.owned))
        if self.last_seen is not last:
            self._copy_lent(values)
        values += donated
        results = from_iterable(starmap(self.compiled.donating, ((values, others),)))
        try:
            if self.dropped:
                new = chain(islice(results, len(self.stored)), repeat(CONSUMED))
                deque(map(store, chain(self.stored, self.dropped), new), 0)
            else:
                deque(map(store, self.stored, results), 0)
            rest = list(results)
        finally:
            interrupts.release()
        gradients.last = object()
        if self.last_seen is not last:
            for cell in self.stored:  # their arrays are new, and ours alone
                cell.lent = False
            self.last_seen = last
        return rest

    def _copy_lent(self, values: list[Any]) -> None:
        """Put copies into `values` for what someone else may hold; the cells keep the original until results come."""
        lent = [i for i, cell in enumerate(self.owned) if cell.lent and values[i] is not None]
        if lent:
            for i, copied in zip(lent, fresh_copies([values[i] for i in lent]), strict=True):
                values[i] = copied

    def run_first(self, others: tuple[Any, ...], donated: Sequence[Any] = ()) -> list[Any]:
        """`run` for a program that has not run yet: on copies, and awaited, since memory may turn out not to suffice."""
        values = list(map(get_stored, self.owned))
        held = [i for i, value in enumerate(values) if isinstance(value, jax.Array)]
        for i, copied in zip(held, fresh_copies([values[i] for i in held]), strict=True):
            values[i] = copied
        compiled = self.compiled.keeping if is_debugging() else self.compiled.donating
        return self._await(compiled, [*values, *donated], others)

    def _run_slowly(self, others: tuple[Any, ...], donated: Sequence[Any]) -> list[Any]:
        return self._await(self.compiled.keeping, [*map(get_stored, self.owned), *donated], others)

    def _await(self, compiled: Callable[..., Any], values: list[Any], others: tuple[Any, ...]) -> list[Any]:
        try:
            results = jax.block_until_ready(compiled(values, others))
            jax.effects_barrier()
        finally:
            interrupts.release()
        for cell in self.stored:
            lend(cell)
        new = [*results[: len(self.stored)], *repeat(CONSUMED, len(self.dropped))]
        store_all([*self.stored, *self.dropped], new)
        return list(results[len(self.stored) :])
