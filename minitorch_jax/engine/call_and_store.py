"""Calling compiled functions on cells: donation, and storing of results that no interrupt can come between."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat, starmap
from typing import Any

import jax
import jax.numpy as jnp

from ..runtime import interrupts
from ..runtime.copies import fresh_copies
from ..runtime.free_memory import has_room
from ..runtime.jax_private import forget_effects, forget_refusals, is_debugging
from ..state.access import store_all
from ..state.cell import Cell, get_stored, store
from ..state.concurrent_reads import flights, get_ident, gradient_writes, lend, lendings
from ..state.gradient import CONSUMED

_config: Any = jax.config


from_iterable = chain.from_iterable


class FirstRun(Exception):  # noqa: N818  # a signal to the caller, never an error of the user's
    """JAX is to trace a program, for inputs that are new to it: before that, nothing may be donated."""


class _Tracing(threading.local):
    allowed = False


_tracing = _Tracing()


class Compiled:
    """A jitted function of ours, of two arguments: a list whose arrays are donated, and a tuple of whatever else.

    `calls_back`: it may call Python while it runs (`jax.pure_callback`, `jax.debug.print`, …), which may raise when what is
    donated is gone. Nothing but the lowered program tells: what is differentiated, a custom_vjp's backward pass or a
    primitive of the user's may bring such a call in. So the first call with new inputs is to go by `prepare`: JAX keeps
    what it traces and lowers there. `asks`: the function itself raises FirstRun, for its caller. `options` are XLA's, for
    what it would compute wrongly otherwise (`xla_faults.py`).
    """

    __slots__ = ("donating", "keeping", "calls_back", "asks")

    def __init__(
        self, function: Callable[..., Any], name: str, asks: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        def compiled(owned: list[Any], others: tuple[Any, ...]) -> Any:
            if not asks and not _tracing.allowed:
                raise FirstRun
            out = function(owned, *others)
            if _config.jax_disable_jit:  # then results may be arrays that the user holds
                out = jax.tree.map(jnp.copy, out)
            interrupts.defer()
            return out

        compiled.__name__ = compiled.__qualname__ = name
        self.donating = jax.jit(compiled, donate_argnums=0, compiler_options=options)
        self.keeping = jax.jit(compiled, compiler_options=options)
        self.calls_back, self.asks = False, asks

    def prepare(self, owned: list[Any], others: tuple[Any, ...], to_compile: bool = False) -> bool:
        """Have JAX trace and lower for these inputs, and note whether the program calls Python. Nothing is donated.

        With `to_compile`, also compile. Return True if the program may then donate its inputs: it calls no code but XLA's,
        and there is memory for its results and temporaries.
        """
        if _config.jax_disable_jit or is_debugging():  # then nothing is donated anyway
            return False
        with interrupts.tracing():
            lowered = self.donating.trace(owned, others).lower()
        forget_refusals(self.donating)
        calls = set(_foreign_calls(lowered.compiler_ir("stablehlo").operation))
        self.calls_back = self.calls_back or any(["callback" in name or name in _TRANSFERS for name in calls])
        return to_compile and not calls and has_room(lowered.compile(), owned)


_TRANSFERS = "stablehlo.send", "stablehlo.recv"  # calls of Python, where devices are far from the host


def _foreign_calls(operation: Any) -> Iterator[str]:
    """What a lowered program calls that is not XLA's own: Python's functions and libraries' kernels."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                name = inner.operation.name
                if name == "stablehlo.custom_call":
                    yield str(inner.attributes["call_target_name"])
                elif name in _TRANSFERS:
                    yield name
                else:
                    yield from _foreign_calls(inner.operation)


@contextmanager
def _allowed() -> Iterator[None]:
    """JAX may trace."""
    before, _tracing.allowed = _tracing.allowed, True
    try:
        yield
    finally:
        _tracing.allowed = before


class Pipeline:
    """A compiled function bound to cells: those that it updates in place (`owned`), those that take its first results.

    `compiled` may be one for many pipelines. `dropped` are gradients that it uses up and does not give out. `last_seen`
    is `lendings.last` at a time when no owned cell was lent. `replaced` are the cells that the call stores to
    and does not read: it keeps their old arrays until all results are stored, since freeing an array lets other threads run.
    """

    __slots__ = ("compiled", "stored", "owned", "dropped", "replaced", "last_seen")

    def __init__(
        self, compiled: Compiled, stored: Sequence[Cell], owned: Sequence[Cell], dropped: Sequence[Cell] = ()
    ) -> None:
        self.compiled, self.stored, self.owned, self.dropped = compiled, stored, owned, dropped
        self.replaced = list({*stored, *dropped}.difference(owned))
        self.last_seen: object = None

    def run(self, others: tuple[Any, ...], donated: Sequence[Any] = ()) -> list[Any]:
        """Call, store the first results, return the rest.

        From the start of the call to the last store there is no bytecode at which Python could handle a signal, so a
        Ctrl-C comes before everything or after everything. (Where JAX itself has to run Python, to trace and to compile,
        the signal is put off from the end of tracing on.) A program that may fail while it runs, as it calls Python or
        under JAX's debugging switches, uses nothing up, and stores nothing before all has succeeded. `donated`: further
        arrays that may be used up.
        """
        if self.compiled.calls_back or is_debugging():
            return self._run_on_copies(others, donated)
        ident = get_ident()
        try:
            flights[ident] = self  # before the look at what is lent; see `concurrent_reads.py`
            try:
                last = lendings.last
                held = list(map(get_stored, self.owned))
                values = held
                if self.last_seen is not last:
                    values = list(held)
                    self._copy_lent(values)
                if donated:
                    values = [*values, *donated]
                before = list(map(get_stored, self.replaced)) if self.replaced else None  # noqa: F841
                results = from_iterable(starmap(self.compiled.donating, ((values, others),)))
                if self.dropped:
                    new = chain(islice(results, len(self.stored)), repeat(CONSUMED))
                    deque(map(store, chain(self.stored, self.dropped), new), 0)
                else:
                    deque(map(store, self.stored, results), 0)
                rest = list(results)
                gradient_writes.last = object()
                if self.last_seen is not last:
                    for cell in self.stored:  # their arrays are new, and ours alone
                        cell.lent = False
                    self.last_seen = last
                return rest
            finally:
                if ident in flights:
                    del flights[ident]
        except FirstRun:
            if self.compiled.asks or _tracing.allowed:
                raise
            with _allowed():
                self.compiled.prepare([*map(get_stored, self.owned), *donated], others)
                return self.run(others, donated)
        finally:
            interrupts.release()

    def _copy_lent(self, values: list[Any]) -> None:
        """Put copies into `values` for what someone else may hold; the cells keep the original until results come."""
        lent = [i for i, cell in enumerate(self.owned) if cell.lent and values[i] is not None]
        if lent:
            for i, copied in zip(lent, fresh_copies([values[i] for i in lent]), strict=True):
                values[i] = copied

    def run_first(self, others: tuple[Any, ...], donated: Sequence[Any] = ()) -> list[Any]:
        """`run` for a program that has not run yet. It is awaited, and runs on copies if it may fail; see `prepare`."""
        values = [*map(get_stored, self.owned), *donated]
        try:
            if self.compiled.prepare(values, others, to_compile=True):
                with interrupts.tracing():
                    return jax.block_until_ready(self.run(others, donated))
            values = [*self._copies(), *donated]
            return self._await(self.compiled.keeping if is_debugging() else self.compiled.donating, values, others)
        finally:
            interrupts.release()

    def _run_on_copies(self, others: tuple[Any, ...], donated: Sequence[Any]) -> list[Any]:
        if is_debugging():  # JAX runs the program again, bit by bit
            return self._await(self.compiled.keeping, [*map(get_stored, self.owned), *donated], others)
        return self._await(self.compiled.donating, [*self._copies(), *donated], others)

    def _copies(self) -> list[Any]:
        """The owned cells' values, for a program that may use them up and fail."""
        values = list(map(get_stored, self.owned))
        held = [i for i, value in enumerate(values) if isinstance(value, jax.Array)]
        for i, copied in zip(held, fresh_copies([values[i] for i in held]), strict=True):
            values[i] = copied
        return values

    def _await(self, compiled: Callable[..., Any], values: list[Any], others: tuple[Any, ...]) -> list[Any]:
        try:
            with _allowed(), interrupts.tracing():
                results = jax.block_until_ready(compiled(values, others))
                if self.compiled.calls_back or is_debugging():
                    jax.effects_barrier()
        except Exception as error:
            if self.compiled.calls_back and not isinstance(error, FirstRun):
                forget_effects()
            raise
        finally:
            interrupts.release()
        for cell in self.stored:
            lend(cell)
        new = [*results[: len(self.stored)], *repeat(CONSUMED, len(self.dropped))]
        flights[get_ident()] = self
        try:
            store_all([*self.stored, *self.dropped], new)
        finally:
            flights.pop(get_ident(), None)
        return list(results[len(self.stored) :])
