"""Flax: its modules trained by this library's loop, and this library's modules as nnx modules.

`NNX(module)` is a Module around an nnx module, `Linen(module, variables)` one around a linen module and its variables: list
them in an optimizer's `modules`, use them in `mt.backward`, `mt.jit` and `mt.scan`. The Variables of the nnx module are the
parameters and buffers themselves, so the module that you wrapped always has the values of now. The other way,
`to_flax(module)` gives an nnx module that computes what one of ours does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax.module.parameter import assign
from minitorch_jax.runtime.jax_private import at_top_level
from minitorch_jax.state import access
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.errors import changed_by_closure
from minitorch_jax.state.pytree import Builder
from minitorch_jax.state.structure import changed
from minitorch_jax.state.walk import Node, Walker, join, walk_of

from ._bridge import Bridge, TreeHolder, decoded, run_copy, without_numbers
from ._extra import missing

try:
    import flax.linen
    from flax import nnx
except ImportError as error:
    raise missing("flax", error) from error

from . import _nnx
from ._nnx import Graph, Held, Seen


class NNX(Bridge):
    """A Module around an nnx module, whose Variables are its parameters and buffers.

    Each `nnx.Param` is a parameter, each other Variable (`BatchStat`, `RngCount`, `Cache`, …) a buffer, under nnx's dotted
    path (`layers.0.kernel`). A Variable that is in several places is one parameter. Nothing is copied: the Variables of
    the module that you give keep their values in the wrapper's cells from now on, and have them back when the wrapper is
    gone. So `module` stays usable: printed, read, split, updated, saved or trained by flax's own functions, it
    shows and changes what the wrapper trains. (For that, the first wrapper makes `Variable._raw_value` a property, in all
    of flax.)

    Static attributes may change between calls, on the module itself: another rate, `module.eval()`, another layer is
    noticed, and is another program. `train()` and `eval()` call the module's; nothing is set before. Arrays that are plain
    attributes are constants of the program: assign another one, a change in place is not seen.

    Inside compiled code the call runs on a copy made in that trace, as `nnx.jit` does it, and what it changed is written
    back. So nnx's own transforms work in it; what it cannot change is the structure, which is an error: `sow`, a
    counter that is a number. Another method than `__call__` is called by `call("encode", x)`. Outside of the wrapper
    `module` itself can be called in compiled code, too, unless it uses transforms of nnx's. Pass the wrapper to compiled code
    as an argument: an nnx module or `nnx.Rngs` among the arguments is a copy there, as in `jax.jit`.

    Args:
        module: an nnx module, made where it is wrapped: at the top level, or in the same transform.
        trainable: which of the Params are trained, as an nnx filter (`nnx.LoRAParam`, `nnx.PathContains("head")`,
            `nnx.Not(...)`); the others are frozen. (`unfreeze()` trains all of them.)

    Raises:
        TypeError: if `module` is no nnx module.
        ValueError: if there is anything that cannot be held (a Param that is not floating, a hijax Variable, a static
            attribute without a hash), all of it listed; if `trainable` chooses nothing.
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
    _net: Any  # of copies, made when it is asked for
    _graph: Graph
    _held: dict[int, tuple[Any, Held]]  # by the Variable's id
    _seen: Seen | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._set_slots(None, None)
        return self

    def __init__(self, module: Any, trainable: Any = None) -> None:
        if not isinstance(module, nnx.Module):
            raise TypeError(f"NNX takes an nnx module, not a {type(module).__name__}")
        predicate = None if trainable is None else nnx.filterlib.to_predicate(trainable)
        self._set_slots(module, Graph(None, (), (), predicate))
        self._look_again()

    def _set_slots(self, net: Any, graph: Any) -> None:
        for name, value in (("_net", net), ("_graph", graph), ("_held", {}), ("_seen", None)):
            object.__setattr__(self, name, value)

    @property
    def module(self) -> Any:
        """The nnx module: the one that was wrapped, or, of a copy of the wrapper, one of its own."""
        if self._net is None:
            net = self._graph.merged(dict.fromkeys(self._cells))
            held = {}
            for entry, (_, leaf) in zip(self._graph.entries, _nnx.flattened(net)[1], strict=True):
                if entry.constant is None:
                    found = [self._cells[name] for name in entry.names]
                    held[id(leaf)] = leaf, Held(found, entry.treedef, f"{type(self).__name__}.{entry.path}")
                    held[id(leaf)][1].hold(leaf, self)
            for name, value in (("_net", net), ("_held", held), ("_seen", Seen(net))):
                object.__setattr__(self, name, value)
            changed(self)  # it is to be watched from now on
        return self._net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self._call("__call__", args, kwargs)

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call another method of the module, by name.

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
        """Take over the nnx module as it is now: all of it, or, if it raises, nothing."""
        net, trainable = self._net, self._graph.trainable
        graphdef, leaves = _nnx.flattened(net)
        problems = _nnx.check_hashable(net, graphdef) + _nnx.modules_of_ours(net)
        entries: list[Any] = []
        new: dict[str, Cell] = {}
        held: dict[int, tuple[Any, Held]] = {}
        for path, leaf in leaves:
            if not isinstance(leaf, nnx.Variable):
                entries.append(_nnx.entry_of(path, leaf, None))
                continue
            if not (leaf.hijax or leaf._can_update):
                raise changed_by_closure(f"an nnx module that was wrapped ({type(net).__name__})")
            trained = trainable is None or bool(trainable(path, leaf))
            known = self._held.get(id(leaf))
            found, wrong = _nnx.adopt(leaf, _nnx.dotted(path), self, known and known[1], trained)
            problems += wrong
            if known is None and trainable is not None and any(c.trainable is not trained for c in _parameters(found)):
                other = "frozen" if trained else "trained"
                problems.append(f"  {_nnx.dotted(path)} is part of another NNX, where it is {other}")
            entry = _nnx.entry_of(path, leaf, found)
            problems += [f"  {name} is the name of two arrays" for name in entry.names if name in new]
            if not wrong:
                new |= zip(entry.names, found.cells, strict=True)
            entries.append(entry)
            held[id(leaf)] = leaf, found
        if not self._held and not problems and trainable is not None and not any(c.trainable for c in new.values()):
            raise ValueError(
                f"NNX: trainable={trainable!r} chooses none of the module's Params: nothing would be trained"
            )
        if problems:
            listed = "\n".join(problems)
            raise ValueError(f"NNX cannot hold this {type(net).__name__}; nothing has changed:\n{listed}")
        statics = tuple(_nnx.statics_of(net))
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
        if self._seen is not None:  # of a copy that nobody has asked for its module, there is nothing to see
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
    """Notice what was changed on the nnx module itself. (Its walk holds this, so it must not hold the wrapper.)"""
    found = reference()
    if found is not None and found._seen is not None and not found._seen.is_same():
        changed(found)


def _parameters(held: Held) -> list[Cell]:
    return [cell for cell in held.cells if cell.kind == "parameter"]


class Linen(TreeHolder):
    """A Module around a linen module and its variables.

    The arrays of the collection `params` are parameters, those of others (`batch_stats`, …) buffers, under their paths
    (`params.Dense_0.kernel`). A call is `module.apply` with the variables as they are now, and writes back the collections
    that it changes. Linen's modules get their mode as an argument of the call: pass `train=model.training`, or
    whatever it is named there; `train()` and `eval()` set nothing but `training`.

    Args:
        module: a linen module.
        variables: what `module.init` gave: a dict of collections.
        mutable: the collections that a call may change; by default all that there are besides `params`.
        rngs: the names of the streams that the module draws from, such as `"dropout"`: each call is given keys for them,
            from the stream of `mt.seed`.

    Raises:
        TypeError: if `module` is no linen module, or `variables` is not a dict of collections.
        ValueError: if there is anything that cannot be held, all of it listed; if `mutable` names a collection that is not
            there.

    Example:
        >>> import flax.linen, jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import optim
        >>> from minitorch_jax.adapters.flax import Linen
        >>> dense = flax.linen.Dense(1)
        >>> model = Linen(dense, dense.init(jax.random.key(0), jnp.ones((1, 2))))
        >>> opt = optim.SGD([model], lr=0.1)
        >>> loss = mt.backward(lambda model, x: (model(x) ** 2).mean(), model, jnp.ones((4, 2)))
        >>> opt.step()
        >>> [name for name, _ in model.named_parameters()]
        ['params.bias', 'params.kernel']
    """

    __slots__ = ()
    _holds = "the variables of a linen module"
    _inside = "variables"
    _prefixes = {"variables": "", "settings": "settings"}

    def __init__(
        self, module: Any, variables: Any, mutable: Sequence[str] | None = None, rngs: Sequence[str] = ()
    ) -> None:
        if not isinstance(module, flax.linen.Module):
            raise TypeError(f"Linen takes a linen module, not a {type(module).__name__}")
        self.variables = variables
        if mutable is not None and not isinstance(mutable, str | list | tuple | set | frozenset):
            raise TypeError(f"Linen: mutable must be a list of names of collections; got {mutable!r}")
        mutable = (mutable,) if isinstance(mutable, str) else mutable
        mutable = [name for name in variables if name != "params"] if mutable is None else list(mutable)
        if absent := [name for name in mutable if name not in variables]:
            raise ValueError(f"Linen: mutable has {absent}, and the collections are {list(variables)}")
        rngs = (rngs,) if isinstance(rngs, str) else tuple(rngs)
        self._set("settings", (module, tuple(mutable), rngs))

    @property
    def module(self) -> Any:
        """The linen module."""
        return self._get("settings")[0]

    @property
    def variables(self) -> Any:
        """The variables, with their arrays as they are now."""
        return self._get("variables")

    @variables.setter
    def variables(self, value: Any) -> None:
        is_dict = hasattr(value, "keys")
        wrong = [name for name, collection in value.items() if not hasattr(collection, "keys")] if is_dict else []
        if not is_dict or wrong:
            inside = f" with {', '.join(map(repr, wrong))}, no collections: pass all that `init` gave" if wrong else ""
            raise TypeError(
                "Linen: variables must be a dict of collections, as `module.init` gives it; got a"
                f" {type(value).__name__}{inside}"
            )
        self._set("variables", without_numbers(value))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module; `method=` and the arguments of the call are linen's.

        With `mutable=` linen gives `(output, changed collections)`: what the wrapper may change of those is written back.
        """
        module, mutable, streams = self._get("settings")
        if streams and "rngs" not in kwargs:
            kwargs["rngs"] = {name: mt.next_key() for name in streams}
        variables, asked = self.variables, "mutable" in kwargs
        kwargs.setdefault("mutable", list(mutable) or False)
        out = module.apply(variables, *args, **kwargs)
        if kwargs["mutable"] is False:
            return out
        result, changed = out
        merged = {**variables, **{name: changed[name] for name in mutable if name in changed}}
        self.variables = flax.core.freeze(merged) if isinstance(variables, flax.core.FrozenDict) else merged
        return out if asked else result

    def _kinds(self, part: str, tree: Any, names: Sequence[str]) -> dict[str, str]:
        return {name: "parameter" for name in names if name.startswith("params.")}


# -- the other way ----------------------------------------------------------------------------------------------------


class Frozen(nnx.BatchStat[Any]):
    """A frozen parameter: state that is not trained."""


class Ported(nnx.Module):
    """One of our modules as an nnx module: see `to_flax`."""

    def __init__(self, module: mt.Module, rngs: Any) -> None:
        walk = walk_of(module)
        self._spec = walk.spec
        self._rngs = rngs
        self.deterministic = not module.training
        for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
            kind: Any = nnx.Param if cell.trainable else Frozen if cell.kind == "parameter" else nnx.BatchStat
            *outer, name = path.split(".")
            node: Any = self
            for part in outer:
                if not hasattr(node, part):
                    setattr(node, part, nnx.Dict())
                node = getattr(node, part)
                if not isinstance(node, nnx.Dict):
                    raise ValueError(f"to_flax: {path} would be in the place of an attribute that an nnx module has")
            if hasattr(node, name):
                raise ValueError(f"to_flax: {path} would be in the place of an attribute that an nnx module has")
            setattr(node, name, kind(jnp.copy(decoded(cell))))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        variables = {path: self._variable(path) for path in self._spec.paths}
        values = {path: variable[...] for path, variable in variables.items()}
        key = None if self._rngs is None else self._rngs()
        out, changed = run_copy(self._spec, values, not self.deterministic, key, args, kwargs)
        for path, value in changed.items():
            variables[path][...] = value
        return out

    def _variable(self, path: str) -> Any:
        found: Any = self
        for part in path.split("."):
            found = getattr(found, part)
        return found


def to_flax(module: mt.Module, rngs: Any = None) -> Any:
    """One of our modules as an nnx module, for `nnx.jit`, `nnx.grad` and `nnx.Optimizer`.

    It has a Variable for each parameter (`nnx.Param`, or for frozen ones a `BatchStat` that is never changed) and each
    buffer (`nnx.BatchStat`), under our paths; tied ones are one, under the first of their names. The arrays are copies. Its
    call runs our forward, and writes back the buffers that change. The module's mode comes along, and `train()` and `eval()`
    change it (for all layers alike).

    Args:
        module: the module.
        rngs: an `nnx.Rngs`, of which the stream `dropout` is forked for random layers. Without it they draw from the
            stream of `mt.seed`, which no transform of JAX's allows.

    Raises:
        TypeError: if it is no Module of ours, or `rngs` no `nnx.Rngs`.
        ValueError: if a parameter is named as something that an nnx module has.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.adapters.flax import to_flax
        >>> net = to_flax(nn.Sequential(nn.Linear(2, 3, key=jax.random.key(0)), nn.BatchNorm1d(3)))
        >>> grads = nnx.grad(lambda net, x: (net(x) ** 2).sum())(net, jnp.ones((4, 2)))
        >>> grads["0"]["weight"].shape, int(getattr(net, "1").num_batches_tracked[...])
        ((3, 2), 1)
    """
    if not isinstance(module, mt.Module):
        raise TypeError(f"to_flax takes a Module of minitorch_jax, not a {type(module).__name__}")
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"to_flax: rngs must be an nnx.Rngs; got a {type(rngs).__name__}")
    return Ported(module, None if rngs is None else rngs.dropout.fork())
