"""The fast path of a call that differs from the last one only in data."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from itertools import chain, starmap
from typing import Any

import jax

from ..module import random
from ..runtime import interrupts
from ..runtime.jax_private import is_debugging
from ..runtime.numpy_memory import immutable, owned_data
from ..state.cell import store
from ..state.concurrent_reads import flights, get_ident, gradient_writes, lendings
from ..state.gradient import CONSUMED
from ..state.static_values import holds_state
from ..state.structure import Snapshot, process
from .arguments import FLAT, OBJECT, Arguments
from .call_and_store import FirstRun
from .program import Binding, Repartition

from_iterable = chain.from_iterable


Quick = Callable[[Any, tuple[Any, ...], dict[str, Any]], list[Any] | None]  # of a function and its arguments


def quick_call(
    call: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Any, binding: Binding, snapshot: Snapshot
) -> Quick | None:
    """Return a function that repeats a call with other data, or None if this call cannot be repeated so.

    The function returns the results. It returns None for a call that differs in more than its data, and for one that must
    take the full path. Shapes and dtypes are left to JAX, which retraces when they change. `snapshot` covers all structures
    that the call depends on.

    Only the thread that made the function may call it. Its values are in its closure, which Python reads fastest. The
    binding holds the function, so the function refers to the binding weakly.
    """
    program, pipeline, reads = binding.program, binding.pipeline, binding.reads
    take = _taking(call, args, kwargs)
    if take is None or program.num_donated or pipeline.compiled.calls_back or any(program.settings):
        return None
    holds, are_same = snapshot.holds, None if reads.is_empty else reads.are_same
    fetch = reads.fetch if reads.partition.named else None
    # weak references, since the checks of a walk refer to the objects
    watched = [weakref.ref(walk) for walk in binding.live_walks() if walk.watched]
    sharding = getattr(stream.cell.stored, "sharding", None)  # the stream may move to another device between calls
    stream = stream if binding.takes(stream.cell) else None
    donating, dropped = pipeline.compiled.donating, pipeline.dropped
    stored, owned, read = pipeline.stored, pipeline.owned, binding.read
    replaced = list(set(stored).intersection(pipeline.replaced))  # what is dropped holds no array in a quick call
    gradients = [cell.grad for cell in binding.cells if cell.grad is not None]
    lendable = list(dict.fromkeys([*binding.cells, *gradients, *stored, *owned]))
    writes_gradients, bound, types = program.writes_gradients, weakref.ref(binding), list(map(type, args))
    ident, calls = get_ident(), flights
    lent_at = written_at = None  # `lendings.last` and `gradient_writes.last` at the last check of the cells

    def quick(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        nonlocal lent_at, written_at
        if snapshot.version is not process.version and not holds():
            return None
        data = take(args, kwargs)
        if data is None or (are_same is not None and not are_same(fn)) or is_debugging():
            return None
        if stream is not None:
            now: Any = random.local.stream if random.innermost_block.get() is None else random.current()
            if stream is not now or stream.cell.stored.sharding != sharding:
                return None
        if watched:
            for reference in watched:
                walk = reference()
                for look in walk.watched if walk is not None else ():
                    look()
            if not holds():
                return None
        if data and not immutable.issuperset(map(type, data)):
            data = owned_data(data)
        if fetch is not None:
            named = fetch(fn)
            if named is None:
                return None
            data += named
        calls[ident] = pipeline  # before the check of what is lent; see `concurrent_reads.py`
        try:
            last, written = lendings.last, gradient_writes.last
            if (last is lent_at or not any([cell.lent for cell in lendable])) and (
                not dropped or written is written_at or all([cell.stored is CONSUMED for cell in dropped])
            ):
                others = [cell.stored for cell in read], data
                results = from_iterable(starmap(donating, (([cell.stored for cell in owned], others),)))
                before = [cell.stored for cell in replaced] if replaced else None  # noqa: F841  # see `Pipeline.replaced`
                deque(map(store, stored, results), 0)
                lent_at, written_at = last, written
                if writes_gradients:
                    written_at = gradient_writes.last = object()
                return list(results)
        except (FirstRun, Repartition, TypeError):
            return None  # JAX raises TypeError before it runs: the data is not data
        except ValueError as error:  # and ValueError: the data is on other devices
            interrupts.unwrap(error)
            return None
        finally:
            if ident in calls:
                del calls[ident]
        mine = bound()
        if mine is None or types != list(map(type, args)):
            return None
        mine.look()
        try:
            out = pipeline.run(([cell.stored for cell in read], data))
        except (FirstRun, Repartition):
            return None
        except ValueError as error:
            interrupts.unwrap(error)
            return None
        lent_at, written_at = pipeline.last_seen, gradient_writes.last
        return out

    return quick


def _taking(call: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a function that takes the data out of arguments, or returns None for arguments that differ in more than data.

    Returns None if that cannot be checked quickly: with static arguments, or with modules inside containers.
    """
    objects = [(i, weakref.ref(arg)) for i, arg in enumerate(args) if holds_state(arg)]
    if any([type(code) is tuple for code in call.template]) or call.template.count(OBJECT) != len(objects):
        return None
    count, flat = len(args), call.treedef is FLAT
    if flat and count == len(objects) == 1:
        (first_object,) = (reference for _, reference in objects)
        return lambda args, kwargs: None if kwargs or len(args) != 1 or args[0] is not first_object() else ()
    if flat and not objects:
        return lambda args, kwargs: None if kwargs or len(args) != count else args
    places = [i for i in range(count) if not holds_state(args[i])]
    first = count - len(places)  # if all data come last, a slice from here takes them, which is faster
    last = places == list(range(first, count))
    known: Any = jax.tree.structure(([args[i] for i in places], kwargs))

    def take(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if len(args) != count:
            return None
        for place, reference in objects:
            if reference() is not args[place]:
                return None
        if flat:
            return None if kwargs else args[first:] if last else tuple([args[i] for i in places])
        leaves, treedef = jax.tree.flatten(([args[i] for i in places], kwargs))
        return tuple(leaves) if treedef == known else None

    return take
