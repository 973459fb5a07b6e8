"""`NNX`: a Module around an nnx module."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

from flax import nnx

from minitorch_jax.module.parameter import assign
from minitorch_jax.runtime.jax_private import at_top_level
from minitorch_jax.state import access
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.errors import changed_by_closure
from minitorch_jax.state.pytree import Builder
from minitorch_jax.state.structure import changed
from minitorch_jax.state.walk import Node, Walker, join, walk_of

from .._wrapper import Wrapper
from . import graph
from .graph import Graph, Seen
from .variable import Held, adopt


class NNX(Wrapper):
    """A Module around an nnx module. The Variables of the nnx module are its parameters and buffers.

    Each `nnx.Param` is a parameter, and each other Variable (`BatchStat`, `RngCount`, `Cache`, …) is a buffer, under nnx's
    dotted path (`layers.0.kernel`). A Variable that is in several places is one parameter.

    Nothing is copied. While the wrapper exists, the Variables keep their values in the wrapper's cells. You can still
    print, read, split, update, save or train `module` with flax's own functions: they read and change the values that the
    wrapper trains. After the wrapper is gone, the Variables have their values themselves again.

    Patch of flax: while any Variable keeps its value in a cell, the slot `_raw_value` of the class `flax.nnx.Variable` is
    replaced by a property, for the whole process. For other Variables the property reads and writes the slot, so they
    behave as before; each access costs one more Python call. Importing the adapter changes nothing. The slot is
    put back once no Variable needs the property: each wrapped Variable was read after its wrapper was gone, or is gone
    itself.

    Static attributes may change between calls, on the module itself. The wrapper notices another rate, `module.eval()` or
    another layer, and compiles another program. `train()` and `eval()` call those of the module; wrapping a module does
    not change its mode. Arrays that are plain attributes are constants of the program: assign a new array, since a change
    in place is not noticed.

    In compiled code, a call runs on a copy that is made in the trace, as in `nnx.jit`, and its changes are written back.
    nnx's own transforms work inside such a call. The call cannot change the module's structure (`sow`, a counter that is
    a plain number): that is an error. Call methods other than `__call__` by `call("encode", x)`. Compiled code can also
    call `module` itself, unless `module` uses nnx's transforms. Pass the wrapper to compiled code as an argument: an nnx
    module or `nnx.Rngs` among the arguments is a copy there, as in `jax.jit`.

    Args:
        module: an nnx module. Wrap it where it was made: at the top level, or in the same transform.
        trainable: the Params to train, as an nnx filter (`nnx.LoRAParam`, `nnx.PathContains("head")`, `nnx.Not(...)`).
            The other Params are frozen. By default, all Params are trained, as after `unfreeze()`.

    Raises:
        TypeError: if `module` is not an nnx module.
        ValueError: if the wrapper cannot hold part of the module: a Param that is not floating, a hijax Variable, a static
            attribute without a hash. One error lists all such parts. Also if `trainable` selects no Param.
        TraceError: if the module was made outside of the transform that wraps it.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from flax import nnx
        >>> from minitorch_jax import optim
        >>> from minitorch_jax.adapters.flax import NNX
        >>> net = nnx.Sequential(nnx.Linear(2, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1)))
        >>> model = NNX(net)
        >>> opt = optim.SGD([model], lr=0.1)
        >>> def loss_fn(model, x, y):
        ...     return ((model(x) - y) ** 2).mean()
        >>> losses = []
        >>> for _ in range(5):
        ...     opt.zero_grad()
        ...     losses.append(float(mt.backward(loss_fn, model, jnp.ones((4, 2)), jnp.ones((4, 1)))))
        ...     opt.step()
        >>> losses[-1] < losses[0], bool((net.layers[0].kernel[...] == model.state_dict()["layers.0.kernel"]).all())
        (True, True)
    """

    __slots__ = ("_net", "_graph", "_held", "_seen")
    _holds = "an nnx module"
    _net: Any  # the nnx module; a copy of the wrapper makes its own at the first use of `module`
    _graph: Graph
    _held: dict[int, tuple[Any, Held]]  # the Variables, by id, and their Helds
    _seen: Seen | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._set_slots(None, None)
        return self

    def __init__(self, module: Any, trainable: Any = None) -> None:
        if not isinstance(module, nnx.Module):
            raise TypeError(f"NNX takes an nnx module; got a {type(module).__name__}")
        predicate = None if trainable is None else nnx.filterlib.to_predicate(trainable)
        self._set_slots(module, Graph(None, (), (), predicate))
        self._look_again()

    def _set_slots(self, net: Any, graph: Any) -> None:
        for name, value in (("_net", net), ("_graph", graph), ("_held", {}), ("_seen", None)):
            object.__setattr__(self, name, value)

    @property
    def module(self) -> Any:
        """The wrapped nnx module. A copy of the wrapper has an nnx module of its own."""
        if self._net is None:
            net = self._graph.merged(dict.fromkeys(self._cells))
            held = {}
            for entry, (_, leaf) in zip(self._graph.entries, graph.flattened(net)[1], strict=True):
                if entry.constant is None:
                    found = [self._cells[name] for name in entry.names]
                    held[id(leaf)] = leaf, Held(found, entry.treedef, f"{type(self).__name__}.{entry.path}")
                    held[id(leaf)][1].hold(leaf, self)
            for name, value in (("_net", net), ("_held", held), ("_seen", Seen(net))):
                object.__setattr__(self, name, value)
            changed(self)  # from now on, changes of this module must be noticed
        return self._net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self._call("__call__", args, kwargs)

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the module by its name.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from minitorch_jax.adapters.flax import NNX
            >>> NNX(nnx.Embed(5, 3, rngs=nnx.Rngs(0))).call("attend", jnp.ones((2, 3))).shape
            (2, 5)
        """
        return self._call(method, args, kwargs)

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if at_top_level():
            return getattr(self.module, method)(*args, **kwargs)
        walk_of(self)
        values = {name: access.read(cell, self) for name, cell in self._cells.items()}
        out, changed = self._graph.call(values, method, args, kwargs)
        for name, value in changed.items():
            assign(self._cells[name], value, f"{type(self).__name__}.{name}", self)
        return out

    def _set_mode(self, training: bool) -> None:
        net = self.module
        (net.train if training else net.eval)()

    def _look_again(self) -> None:
        """Update cells and graph to the nnx module as it is now. If this raises, nothing has changed."""
        net, trainable = self._net, self._graph.trainable
        graphdef, leaves = graph.flattened(net)
        problems = graph.check_hashable(net, graphdef) + graph.modules_of_ours(net)
        entries: list[Any] = []
        new: dict[str, Cell] = {}
        held: dict[int, tuple[Any, Held]] = {}
        for path, leaf in leaves:
            if not isinstance(leaf, nnx.Variable):
                entries.append(graph.entry_of(path, leaf, None))
                continue
            if not (leaf.hijax or leaf._can_update):
                raise changed_by_closure(f"an nnx module that was wrapped ({type(net).__name__})")
            trained = trainable is None or bool(trainable(path, leaf))
            known = self._held.get(id(leaf))
            found, wrong = adopt(leaf, graph.dotted(path), self, known and known[1], trained)
            problems += wrong
            if known is None and trainable is not None and any(c.trainable is not trained for c in _parameters(found)):
                other = "frozen" if trained else "trained"
                problems.append(f"  {graph.dotted(path)} is part of another NNX, where it is {other}")
            entry = graph.entry_of(path, leaf, found)
            problems += [f"  {name} is the name of two arrays" for name in entry.names if name in new]
            if not wrong:
                new |= zip(entry.names, found.cells, strict=True)
            entries.append(entry)
            held[id(leaf)] = leaf, found
        if not self._held and not problems and trainable is not None and not any(c.trainable for c in new.values()):
            raise ValueError(
                f"NNX: trainable={trainable!r} selects none of the module's Params, so nothing would be trained. Pass a"
                " filter that selects at least one."
            )
        if problems:
            listed = "\n".join(problems)
            raise ValueError(f"NNX cannot hold parts of this {type(net).__name__}; nothing has changed:\n{listed}")
        statics = tuple(graph.statics_of(net))
        for leaf, found in held.values():
            found.hold(leaf, self)
        self._cells.clear()
        self._cells.update(new)
        slots = ("_graph", Graph(graphdef, tuple(entries), statics, trainable)), ("_held", held), ("_seen", Seen(net))
        for name, value in slots:
            object.__setattr__(self, name, value)
        changed(self)

    def extra_repr(self) -> str:
        return f"{self._graph.graphdef.nodes[0].type.__name__}: {super().extra_repr()}"

    def __getstate__(self) -> Any:
        walk_of(self)
        return super().__getstate__(), self._graph

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        self._set_slots(None, state[1])

    def _describe(self, walker: Walker, path: str) -> Node:
        if self._seen is not None:  # a copy whose `module` was never used has no nnx module to watch
            if not self._seen.is_same():
                self._look_again()
            walker.watch(partial(_look, weakref.ref(self)))
        return *super()._describe(walker, path), self._graph

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        yield from super()._statics(payload[:2], path)
        for name, kind, value in payload[2].statics:
            yield join(path, name), ("static", kind, value)

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Any:
        self: Any = super()._rebuild(payload[:2], builder)
        self._set_slots(None, payload[2])
        return self


def _look(reference: weakref.ref[NNX]) -> None:
    """Notice changes on the nnx module itself. The wrapper's walk holds this call, so it must not hold the wrapper."""
    found = reference()
    if found is not None and found._seen is not None and not found._seen.is_same():
        changed(found)


def _parameters(held: Held) -> list[Cell]:
    return [cell for cell in held.cells if cell.kind == "parameter"]
