"""What every layer and loss must do, with torch as the oracle: `class TestLayers(LayerContract)` in a test file runs it.

The file lists `CASES`, calls that torch and we must agree on, `INITIAL`, layers large enough to see how their parameters
are distributed, and `REFUSALS`, calls that both must refuse. A name in lower case is a function of nn.functional.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import signature, torch, unrecordable

import minitorch_jax as mt
from minitorch_jax import nn


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal random numbers, float32."""
    return np.asarray(scale * np.random.default_rng(seed).standard_normal(shape), np.float32)


def integers(high: int, *shape: int, seed: int = 0, low: int = 0) -> np.ndarray:
    """Random integers from `low` up to, not including, `high`, int32."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


@dataclass(frozen=True)
class Made:
    """An argument that each side makes from its own `nn`: a layer, or a function."""

    make: Callable[[Any], Any] = field(repr=False)


@dataclass(frozen=True)
class Case:
    """One layer, and one call of it.

    `inputs` are arrays, or trees of them; float32 ones are differentiated. `call` are further keyword arguments of the
    call. For a function, `args` and `kwargs` are what follows the inputs.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Any, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    random: bool = False  # draws in training, so that only `eval` has one right answer
    repr: bool = True  # whether its repr must be torch's
    half: bool = True  # whether it must work in bfloat16
    differentiable: bool = True
    composed: bool = False  # made of layers with cases of their own, which are the ones to run what takes `first`
    rtol: float = 1e-4
    atol: float = 2e-6  # of the largest expected number
    prepare: Callable[[Any], Any] | None = None  # changes torch's layer before its state is taken

    def __str__(self) -> str:
        given = [*map(_shown, self.args), *(f"{k}={_shown(v)}" for k, v in (self.kwargs | self.call).items())]
        shapes = "x".join("_".join(map(str, np.shape(leaf))) or "0d" for leaf in jax.tree.leaves(self.inputs))
        return self.id or f"{self.name}({', '.join(given)})-{shapes}"

    @property
    def is_function(self) -> bool:
        return self.name[0].islower()

    def ours(self) -> Any:
        if self.is_function:
            return functools.partial(
                _after, getattr(nn.functional, self.name), ours_of(self.args), ours_of(self.kwargs)
            )
        return getattr(nn, self.name)(*ours_of(self.args), **ours_of(self.kwargs))

    def theirs(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        if self.is_function:
            function = getattr(torch.nn.functional, self.name)
            return functools.partial(_after, function, theirs_of(self.args), theirs_of(self.kwargs))
        made = getattr(torch.nn, self.name)(*theirs_of(self.args), **theirs_of(self.kwargs))
        if self.prepare is not None:
            self.prepare(made)
        return made

    def pair(self, training: bool = False, seed: int = 0) -> tuple[Any, Any]:
        """Our layer and torch's, with the same parameters and buffers."""
        theirs, ours = self.theirs(seed), self.ours()
        if not self.is_function:
            ours.load_state_dict(theirs.state_dict())
            ours.train(training)
            theirs.train(training)
        return ours, theirs


@dataclass(frozen=True)
class Refusal:
    """A constructor or a call (with `inputs`) that torch refuses, and we must refuse with a message that matches."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Any, ...] | None = None
    match: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    torch_too: bool = True  # False where torch lets it pass, and we say why we do not
    errors: tuple[type[Exception], ...] = (ValueError, TypeError)

    def __str__(self) -> str:
        return str(Case(self.name, self.args, self.kwargs, self.inputs or (), self.call))


def _shown(value: Any) -> str:
    return f"{list(value.shape)}" if hasattr(value, "shape") else getattr(value, "__name__", repr(value))


def _after(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *inputs: Any, **call: Any) -> Any:
    return function(*inputs, *args, **kwargs, **call)


def ours_of(tree: Any) -> Any:
    """NumPy arrays as jax arrays."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Made):
            return leaf.make(nn)
        return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(convert, tree)


def theirs_of(tree: Any) -> Any:
    """NumPy arrays as tensors (class numbers are int64 there), and dtypes as torch's."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            tensor = torch.from_numpy(leaf.copy())
            return tensor.long() if leaf.dtype == np.int32 else tensor
        if isinstance(leaf, Made):
            return leaf.make(torch.nn)
        return torch.float32 if leaf is jnp.float32 else leaf

    return jax.tree.map(convert, tree)


def numpy_of(tree: Any) -> list[np.ndarray]:
    """The arrays or tensors of a result as NumPy arrays."""
    leaves = jax.tree.leaves(tree)
    return [leaf.detach().numpy() if isinstance(leaf, torch.Tensor) else np.asarray(leaf) for leaf in leaves]


def is_float(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def close(got: Any, expected: Any, case: Case, what: str) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, torch's {expected.shape}"
    if expected.dtype.kind == "f":
        assert got.dtype == expected.dtype, f"{what}: {got.dtype}, torch's {expected.dtype}"
    finite = np.abs(expected[np.isfinite(expected)])
    atol = case.atol * finite.max() if expected.dtype.kind == "f" and finite.size else 0
    np.testing.assert_allclose(got, expected, rtol=case.rtol, atol=atol, err_msg=what)


def their_side(case: Case, theirs: Any) -> tuple[Any, list[np.ndarray | None], dict[str, Any], list[np.ndarray]]:
    """torch's outputs, gradients of inputs, gradients of parameters, and the cotangents that they belong to."""
    inputs = theirs_of(case.inputs)
    floats = [leaf for leaf in jax.tree.leaves(inputs) if leaf.is_floating_point()]
    floats = [leaf.requires_grad_(case.differentiable) for leaf in floats]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = theirs(*inputs, **theirs_of(case.call))
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if leaf.is_floating_point()]
    cotangents = [numbers(*leaf.shape, seed=90 + i) for i, leaf in enumerate(leaves)]
    if case.differentiable:
        total = sum((leaf * torch.from_numpy(np.asarray(c))).sum() for leaf, c in zip(leaves, cotangents, strict=True))
        if total.requires_grad:
            total.backward()
    parameters = {} if case.is_function else dict(theirs.named_parameters())
    gradients = {name: None if p.grad is None else p.grad.numpy() for name, p in parameters.items() if p.requires_grad}
    return outputs, [None if x.grad is None else x.grad.numpy() for x in floats], gradients, cotangents


def weighted(outputs: Any, cotangents: list[np.ndarray]) -> Any:
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if is_float(leaf)]
    return sum((leaf * jnp.asarray(c, leaf.dtype)).sum() for leaf, c in zip(leaves, cotangents, strict=True))


def split(case: Case) -> tuple[list[Any], Callable[[list[Any]], tuple[Any, ...]]]:
    """The floating inputs, and a function that puts others in their places."""
    leaves, treedef = jax.tree.flatten(ours_of(case.inputs))
    places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def join(floats: list[Any]) -> tuple[Any, ...]:
        new = list(leaves)
        for place, value in zip(places, floats, strict=True):
            new[place] = value
        return treedef.unflatten(new)

    return [leaves[i] for i in places], join


def gradients_of(case: Case, cotangents: list[np.ndarray]) -> tuple[Any, list[Any]]:
    """A pure function of (layer, floating inputs) that gives outputs, the layer afterwards, and all gradients."""
    floats, join = split(case)

    def loss(layer: Any, floats: list[Any]) -> Any:
        outputs = layer(*join(floats), **ours_of(case.call))
        return weighted(outputs, cotangents), (outputs, None if case.is_function else layer)

    if not case.differentiable:
        return lambda layer, floats: (loss(layer, floats)[1], None), floats

    def run(layer: Any, floats: list[Any]) -> Any:
        if case.is_function:
            gradients, (outputs, _) = jax.grad(lambda floats: loss(layer, floats), has_aux=True)(floats)
            return (outputs, None), (None, gradients)
        gradients, aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, floats)
        return aux, gradients

    return run, floats


def compiled(case: Case, run: Any, ours: Any, floats: list[Any]) -> Any:
    """`run` under plain jax.jit."""
    if case.is_function:
        return jax.jit(lambda floats: run(ours, floats))(floats)
    return jax.jit(run)(ours, floats)


# What torch stumbles over where nothing is, or refuses in one of several like functions; ours go on.
STUMBLES = (
    "select(): index 0 out of range",  # the weights of an InstanceNorm, which it repeats for each sample
    "the unspecified dimension size -1 can be any value",  # in bilinear, and in attention with masks
    "step must be nonzero",  # of bags of none
    "Target 0 is out of bounds",  # a class of none: compiled code cannot raise, the loss is NaN
    "adaptive_avg_pool3d(): Expected input to have non-zero size",  # no channels, which those of 1 and 2 axes take
)
# What ours look at, as always, where torch does not because nothing is there.
LOOKED_AT = ("channels on axis 1; got", "one per channel; got", "attn_mask must have shape")
# Losses whose mean or sum over a batch of none is what torch finds in memory.
LEFT = ("MultiMarginLoss", "MultiLabelMarginLoss", "multi_margin_loss", "multilabel_margin_loss")
MISSHAPEN = ("PixelUnshuffle", "pixel_unshuffle")  # torch gives them the input's shape: see test_nn_vision.py


def emptied(case: Case) -> Iterator[tuple[str, Case]]:
    """The case with arrays without numbers: along one axis of all inputs, or along all axes of one size."""
    leaves, treedef = jax.tree.flatten((case.inputs, case.call))
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray)]
    shape = np.shape(leaves[arrays[0]]) if arrays else ()
    found: dict[Any, str] = {}
    for axis, size in enumerate(shape):
        like = [i for i in arrays if leaves[i].ndim > axis and leaves[i].shape[axis] == size]
        found.setdefault(tuple((i, axis) for i in like), f"axis {axis}")
    for size in sorted(set(shape)):
        like = [(i, axis) for i in arrays for axis, n in enumerate(leaves[i].shape) if n == size]
        found.setdefault(tuple(like), f"size {size}")
    for places, what in found.items():
        new = list(leaves)
        for i, axis in places:
            new[i] = np.delete(new[i], slice(None), axis)
        inputs, call = treedef.unflatten(new)
        yield what, replace(case, inputs=inputs, call=call)


def _forward(join: Any, call: Any, layer: Any, floats: Any) -> Any:
    return layer(*join(floats), **call)


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a function gives, or what it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(), None
    except Exception as error:  # noqa: BLE001 - of whatever type
        return None, error


COMPILED: list[str] = []  # an entry for each program that XLA compiles
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)


def kept_objects() -> int:
    """How many functions and jaxprs there are, which JAX's caches keep with what was compiled for them."""
    gc.collect()
    return sum(isinstance(found, types.FunctionType | jax.extend.core.Jaxpr) for found in gc.get_objects())


def check_later_calls(what: str, call: Callable[[], Any]) -> None:
    """Calls of the same shapes compile nothing from the third on, and leave nothing behind."""
    call(), call()
    programs = len(COMPILED)
    call()
    assert len(COMPILED) == programs, f"{what} compiled {len(COMPILED) - programs} programs in its third call"
    objects = kept_objects()
    for _ in range(3):
        call()
    assert kept_objects() - objects < 3, f"each call of {what} leaves a function or a jaxpr in some cache"


def later_calls(case: Case) -> tuple[Callable[[], None], Callable[[], None]]:
    """`check_later_calls` of an eager call, and of the gradient of one."""
    layer, (floats, join), call = case.ours(), split(case), ours_of(case.call)
    if not case.is_function:
        layer.train(case.random or case.name.startswith(MODAL))

    def loss(layer: Any, floats: Any) -> Any:
        with mt.rng(jax.random.key(0)):
            outputs = layer(*join(floats), **call)
        return sum(leaf.sum() for leaf in jax.tree.leaves(outputs) if is_float(leaf)), layer

    def gradients() -> Any:
        if case.is_function:
            return jax.grad(lambda floats: loss(layer, floats)[0])(floats)
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, floats)

    return (
        lambda: check_later_calls("the call", lambda: layer(*join(floats), **call)),
        lambda: check_later_calls("the gradient", gradients),
    )


def state(layer: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in layer.state_dict().items()}


def compare_state(case: Case, ours: Any, theirs: Any) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name, tensor in other.items():
        close(mine[name], tensor.detach().numpy(), case, name)


QUICK = 1  # cases of each layer that are in the quick suite; the others are marked slow
REPRESENTATIVES = 2  # layers of each file with which the quick suite looks at what all owe to Module: `first`
MODAL = ("BatchNorm", "InstanceNorm")  # layers that compute something else in training


class LayerContract:
    """The tests; they take `case`, every case, or `first`, the first case of each layer."""

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        cases: list[Case] = getattr(metafunc.module, "CASES", [])
        number: dict[int, int] = {}  # of a case (its id), among those of its layer
        for i, case in enumerate(cases):
            number[id(case)] = sum(other.name == case.name for other in cases[:i])
        layers = [case for case in cases if not case.is_function]
        firsts = [case for case in layers if number[id(case)] == 0]
        lists = {
            "case": cases,
            "layer": layers,
            "trained": [c for c in layers if not c.random and (number[id(c)] == 0 or c.name.startswith(MODAL))],
            "first": [case for case in firsts if not case.composed],
            "eager": firsts,
            "every": [
                case for case in cases if number[id(case)] == 0
            ],  # torch's own code crashes on some of the others
            "initial": getattr(metafunc.module, "INITIAL", []),
            "refusal": getattr(metafunc.module, "REFUSALS", []),
        }
        for name, values in lists.items():
            if name in metafunc.fixturenames:
                rest = [cls.is_slow(name, value, i, number.get(id(value), 0)) for i, value in enumerate(values)]
                marked = [
                    pytest.param(v, marks=pytest.mark.slow if s else ()) for v, s in zip(values, rest, strict=True)
                ]
                metafunc.parametrize(name, marked, ids=[str(value) for value in values])

    @staticmethod
    def is_slow(name: str, value: Any, place: int, number: int) -> bool:
        """Whether a test runs with the slow sweeps: `place` is that in its list, `number` that among its layer's cases."""
        if name == "case":
            return number >= QUICK
        if name == "trained":  # most layers compute in training what they do in evaluation, which `case` has looked at
            return number >= QUICK or not value.name.startswith(MODAL)
        return name == "first" and place >= REPRESENTATIVES

    # -- values -------------------------------------------------------------------------------------------------------

    def check(self, case: Case, training: bool) -> None:
        ours, theirs = case.pair(training)
        outputs, input_gradients, parameter_gradients, cotangents = their_side(case, theirs)
        run, floats = gradients_of(case, cotangents)
        (got, after), gradients = compiled(case, run, ours, floats)
        assert jax.tree.structure(plain(got)) == jax.tree.structure(plain(numpy_tree(outputs)))
        for i, (mine, other) in enumerate(zip(numpy_of(got), numpy_of(outputs), strict=True)):
            close(mine, other, case, f"output {i}")
        if not case.is_function:
            compare_state(case, after, theirs)
        if not case.differentiable:
            return
        for i, (mine, other) in enumerate(zip(gradients[1], input_gradients, strict=True)):
            close(mine, np.zeros_like(mine) if other is None else other, case, f"gradient of input {i}")
        for name, other in parameter_gradients.items():
            mine = gradients[0].state_dict()[name]
            close(mine, np.zeros_like(mine) if other is None else other, case, f"gradient of {name}")

    @pytest.mark.one_in(9)
    def test_it_computes_what_torchs_does_in_eval_mode(self, case: Case) -> None:
        self.check(case, training=False)

    @pytest.mark.one_in(4)
    def test_it_computes_what_torchs_does_in_training(self, trained: Case) -> None:
        if any(module.training != other.training for module, other in zip(*both(trained), strict=True)):
            pytest.fail("submodules differ")
        self.check(trained, training=True)

    @pytest.mark.one_in(9)
    @pytest.mark.filterwarnings("ignore:.*holds more than is looked through")  # the oracle's record
    def test_eager_code_and_mt_jit_give_the_same(self, first: Case) -> None:
        """As plain jax.jit does, which the tests above compare with torch: outputs, state, and gradients."""
        training = not first.random
        reference, theirs = first.pair(training)
        cotangents = their_side(first, theirs)[3]
        run, floats = gradients_of(first, cotangents)
        (outputs, after), gradients = compiled(first, run, reference, floats)
        _, join = split(first)

        def work(layer: Any, floats: Any) -> Any:
            if not (first.differentiable and has_parameters(layer)):
                return layer(*join(floats), **ours_of(first.call))

            def loss(layer: Any) -> Any:
                out = layer(*join(floats), **ours_of(first.call))
                return weighted(out, cotangents), out

            return mt.backward(loss, layer, has_aux=True)[1]

        for wrap in (lambda f: f, mt.jit):
            layer = first.pair(training)[0]
            got = wrap(work)(layer, floats)
            for mine, other in zip(numpy_of(got), numpy_of(outputs), strict=True):
                close(mine, other, first, "output")
            for name, value in after.state_dict().items():
                close(layer.state_dict()[name], value, first, name)
            if first.differentiable and has_parameters(layer):
                for mine, other in zip(layer.grads(), gradients[0].parameters(), strict=True):
                    close(mine, other, first, "gradient")

    @pytest.mark.one_in(9)
    def test_it_takes_no_numbers_where_torchs_does(self, every: Case) -> None:
        """A batch of none, and every other axis of size 0: both compute the same, or both refuse."""
        if every.name in MISSHAPEN:
            return
        if every.name in LEFT:  # torch leaves memory as it is: other numbers each time
            unrecordable()
        modal = every.name.startswith(MODAL) and not every.is_function
        for what, empty in emptied(every):
            for training in (False, True)[: 1 + modal]:
                ours, theirs = every.pair(training)
                expected, refused = attempt(lambda empty=empty, theirs=theirs: their_side(empty, theirs))
                if refused is not None and every.differentiable:  # torch has no gradient of some that it computes
                    empty = replace(empty, differentiable=False)
                    expected, refused = attempt(lambda empty=empty, theirs=theirs: their_side(empty, theirs))
                if refused is None:
                    run, floats = gradients_of(empty, expected[3])
                else:
                    floats, join = split(empty)
                    run = functools.partial(_forward, join, ours_of(empty.call))
                got, error = attempt(
                    lambda run=run, ours=ours, floats=floats, empty=empty: compiled(empty, run, ours, floats)
                )
                if refused is not None:
                    stumbled = any(text in str(refused) for text in STUMBLES)
                    assert error is not None or stumbled, f"{what}: torch refuses, {refused}"
                if error is not None:
                    assert isinstance(error, ValueError | TypeError), f"{what}: {error!r} is no refusal"
                    looked = any(text in str(error) for text in LOOKED_AT)
                    assert refused is not None or looked, f"{what}: torch computes, ours: {error}"
                if refused is None and error is None:
                    self.compare_empty(empty, what, got, expected, theirs)

    def compare_empty(self, case: Case, what: str, got: Any, expected: Any, theirs: Any) -> None:
        (outputs, after), gradients = got
        assert jax.tree.structure(plain(outputs)) == jax.tree.structure(plain(numpy_tree(expected[0])))
        for mine, other in zip(numpy_of(outputs), numpy_of(expected[0]), strict=True):
            close(mine, mine if case.name in LEFT and not other.ndim else other, case, what)
        if not case.is_function:
            compare_state(case, after, theirs)
        if case.differentiable and gradients is not None:
            for mine, other in zip(gradients[1], expected[1], strict=True):
                close(mine, np.zeros_like(mine) if other is None else other, case, f"{what}: gradient of an input")
            for name, other in expected[2].items():
                mine = gradients[0].state_dict()[name]
                close(mine, np.zeros_like(mine) if other is None else other, case, f"{what}: gradient of {name}")

    @pytest.mark.one_in(9)
    def test_its_third_eager_gradient_compiles_nothing(self, eager: Case) -> None:
        """Nor does what it calls on the way forward, which eager code runs as well."""
        call_later, differentiate_later = later_calls(eager)
        (differentiate_later if eager.differentiable else call_later)()

    @pytest.mark.filterwarnings("ignore:shape requires")  # of JAX, before the error
    def test_it_takes_a_packed_sequence_or_says_so(self, eager: Case) -> None:
        layer, packed = eager.ours(), nn.utils.rnn.pack_sequence([jnp.ones((2, 3)), jnp.ones((1, 3))])
        if isinstance(layer, nn.RNN | nn.LSTM | nn.GRU):
            assert layer(packed)[0].lengths.tolist() == [2, 1]
        elif eager.name != "Identity":
            with pytest.raises(TypeError, match=r"^\w+(\(.*\))? takes an array; it was given a PackedSequence: write"):
                layer(packed, *eager.inputs[1:], **ours_of(eager.call))

    @pytest.mark.slow
    def test_neither_its_third_eager_call_nor_gradient_compiles_anything(self, case: Case) -> None:
        for check in later_calls(case)[: 1 + case.differentiable]:
            check()

    def test_its_state_and_its_repr_are_torchs(self, layer: Case) -> None:
        """Names, shapes and dtypes; and the text, where it can be the same."""
        mine, other = layer.ours(), layer.theirs()
        shapes = [(name, tuple(a.shape), str(a.dtype)) for name, a in mine.state_dict().items()]
        narrow = {"int64": "int32"}  # JAX without x64
        assert shapes == [
            (name, tuple(t.shape), narrow.get(kind := str(t.dtype).removeprefix("torch."), kind))
            for name, t in other.state_dict().items()
        ]
        if layer.repr:
            assert repr(mine) == repr(other)

    # -- a layer is a pytree, and an object ---------------------------------------------------------------------------

    @pytest.mark.one_in(8)
    def test_it_survives_being_a_pytree_a_copy_and_a_pickle(self, first: Case) -> None:
        layer = first.pair()[0]
        inputs, call = ours_of(first.inputs), ours_of(first.call)
        expected = numpy_of(layer(*inputs, **call))
        leaves, treedef = jax.tree.flatten(layer)
        for other in (treedef.unflatten(leaves), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
            assert repr(other) == repr(layer) and list(other.state_dict()) == list(layer.state_dict())
            for mine, value in zip(numpy_of(other(*inputs, **call)), expected, strict=True):
                np.testing.assert_array_equal(mine, value)

    @pytest.mark.one_in(9)
    def test_stacked_layers_run_under_vmap(self, first: Case) -> None:
        layers = [first.pair(seed=seed)[0] for seed in (0, 1)]
        floats, join = split(first)
        call = ours_of(first.call)
        shifted = [[f * scale for f in floats] for scale in (1.0, 0.5)]
        stacked, inputs = (jax.tree.map(lambda a, b: jnp.stack([a, b]), *pair) for pair in (layers, shifted))
        if not jax.tree.leaves((stacked, inputs)):
            pytest.skip("nothing to stack")
        got = jax.vmap(lambda layer, floats: layer(*join(floats), **call))(stacked, inputs)
        for i, (layer, floats) in enumerate(zip(layers, shifted, strict=True)):
            for mine, other in zip(numpy_of(got), numpy_of(layer(*join(floats), **call)), strict=True):
                close(mine[i], other, first, f"layer {i}")

    @pytest.mark.slow
    def test_it_can_be_rematerialised(self, first: Case) -> None:
        if not first.differentiable:
            return
        layer = first.pair()[0]
        floats, join = split(first)

        def loss(layer: Any, floats: Any) -> Any:
            out = layer(*join(floats), **ours_of(first.call))
            return sum(leaf.sum() for leaf in jax.tree.leaves(out) if is_float(leaf))

        plain, again = (jax.jit(jax.grad(f, argnums=(0, 1)))(layer, floats) for f in (loss, jax.checkpoint(loss)))
        for mine, other in zip(numpy_of(again), numpy_of(plain), strict=True):
            close(mine, other, first, "gradient")

    @pytest.mark.one_in(9)
    def test_it_works_in_bfloat16(self, first: Case) -> None:
        if not first.half:
            return
        layer = first.pair()[0]
        floats, join = split(first)
        call = ours_of(first.call)
        expected = numpy_of(layer(*join(floats), **call))
        half = copy.deepcopy(layer).astype(jnp.bfloat16)
        call = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if is_float(a) else a, call)
        for mine, other in zip(
            jax.tree.leaves(half(*join([f.astype(jnp.bfloat16) for f in floats]), **call)), expected, strict=True
        ):
            if is_float(mine):
                assert mine.dtype == jnp.bfloat16
                finite = np.isfinite(other)
                scale = np.abs(other[finite]).max(initial=1e-3)
                np.testing.assert_allclose(np.float32(mine)[finite], other[finite], rtol=0.05, atol=0.05 * scale)

    @pytest.mark.one_in(9)
    def test_its_gradient_is_traced_in_64_bits(self, layer: Case) -> None:
        """With strict promotion, a number of NumPy's (an int64 there) does not meet an int32."""
        if not layer.differentiable or layer.call or any(isinstance(arg, Made) for arg in layer.args):
            return
        floats, join = split(layer)

        def loss(module: Any, floats: Any) -> Any:
            with mt.rng(jax.random.key(0)):
                out = module(*join(floats))
            return sum(leaf.sum() for leaf in jax.tree.leaves(out) if is_float(leaf)), module

        with jax.enable_x64(True):
            wide = [jnp.asarray(number, jnp.float64) for number in floats]
            ours = layer.ours().eval().astype(jnp.float64)
            gradients, _ = jax.eval_shape(jax.grad(loss, (0, 1), has_aux=True), ours, wide)
        assert {gradient.dtype.name for gradient in gradients[1]} <= {"float64"}

    # -- construction -------------------------------------------------------------------------------------------------

    @pytest.mark.one_in(9)
    def test_it_starts_from_torchs_distributions(self, initial: tuple[Any, ...]) -> None:
        """Mean, deviation and bounds of every parameter, each within five standard errors of torch's."""
        name, args, kwargs = (*initial, {})[:3]
        mt.seed(5)
        torch.manual_seed(5)
        ours, theirs = getattr(nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for path, tensor in theirs.state_dict().items():
            mine, other = np.float64(ours.state_dict()[path]), tensor.double().numpy()
            assert mine.shape == other.shape
            if other.std() == 0:
                np.testing.assert_array_equal(mine, other.astype(np.float32), err_msg=path)
                continue
            n, std = other.size, other.std()
            assert n >= 100, f"{path}: too few numbers to see a distribution; make the layer larger"
            assert abs(mine.mean() - other.mean()) < 5 * std * (2 / n) ** 0.5, path
            assert abs(mine.std() / std - 1) < 5 / n**0.5, path
            if abs(other).max() / std < 1.8:  # uniform: both ends are sharp
                assert abs(abs(mine).max() / abs(other).max() - 1) < 20 / n, path
            flat = mine.ravel()
            assert len(np.unique(flat)) > 0.9 * min(n, 2**16) or (flat == 0).any(), path

    def test_a_key_makes_the_same_layer_again(self, first: Case) -> None:
        kind = getattr(nn, first.name)
        if "key" not in inspect.signature(kind).parameters:
            return
        key = jax.random.key(3)
        one, two = (state(kind(*ours_of(first.args), **ours_of(first.kwargs), key=key)) for _ in range(2))
        for name, value in one.items():
            np.testing.assert_array_equal(value, two[name])

    def test_it_refuses_what_torch_refuses(self, refusal: Refusal) -> None:
        case = Case(refusal.name, refusal.args, refusal.kwargs, refusal.inputs or (), refusal.call)
        if refusal.torch_too:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(Exception):  # noqa: B017 - of whatever type
                    made = case.theirs()
                    if refusal.inputs is not None:
                        made(*theirs_of(case.inputs), **theirs_of(case.call))
        assert refusal.match, "say what the message must hold"
        with pytest.raises(refusal.errors, match=refusal.match):
            made = case.ours()
            if refusal.inputs is not None:
                made(*ours_of(case.inputs), **ours_of(case.call))


NOT_TAKEN = {
    "device",  # arrays go where JAX puts them: `jax.default_device`, `Module.to`
    "size_average",  # torch has deprecated these two in favour of `reduction`
    "reduce",
    "generator",  # `key` is what JAX has
    "out",  # arrays are immutable
    "_weight",  # torch's own use
    "_freeze",
    "_stacklevel",
    "min_value",  # the deprecated names of two arguments of Hardtanh
    "max_value",
}
ADDED = {"key", "dropout_key"}  # the second where torch has another `key`


def compare_arguments(ours: Any, theirs: Any) -> None:
    """The same arguments and defaults; those that may be given by place, in torch's places."""
    mine, other = arguments(ours), arguments(theirs)
    assert mine.keys() - other.keys() <= ADDED
    assert other.keys() - mine.keys() <= NOT_TAKEN
    for name in mine.keys() & other.keys() - {"dtype"}:  # torch's None for dtype is its default, float32
        one, two = (getattr(value, "__name__", value) for value in (mine[name], other[name]))  # functions by name
        assert one == two, name
    places = positions(ours)
    assert places == positions(theirs)[: len(places)]


def arguments(function: Any) -> dict[str, Any]:
    """The arguments that a caller can give by name, with their defaults."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in kinds and p.name != "self"}


def positions(function: Any) -> list[str]:
    """The arguments that a caller can give by place."""
    parameters = signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.name != "self"]


def both(case: Case) -> tuple[list[Any], list[Any]]:
    """All modules of both layers, by path."""
    ours, theirs = case.pair(training=True)
    named = dict(theirs.named_modules())
    paths = [path for path, _ in ours.named_modules() if path in named]
    mine = dict(ours.named_modules())
    return [mine[path] for path in paths], [named[path] for path in paths]


def has_parameters(layer: Any) -> bool:
    return len(layer.parameters()) > 0


def numpy_tree(outputs: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.detach().numpy() if isinstance(leaf, torch.Tensor) else leaf, outputs)


def plain(outputs: Any) -> Any:
    """Named tuples as tuples: ours have other types than torch's."""
    return tuple(outputs) if hasattr(outputs, "_fields") else outputs
