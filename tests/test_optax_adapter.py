"""`OptaxOptimizer` against raw optax, for every transformation that optax has; and our rules as optax transformations."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_sides import discovered
from training import as_jax_comes, squared

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import numpy as mini
from minitorch_jax.adapters.optax import OptaxOptimizer, as_optax
from minitorch_jax.adapters.optax.transformation import Transformation


@pytest.fixture(autouse=True)
def not_strict():
    with as_jax_comes():
        yield


class Net(mt.Module):
    """Matrices of two shapes, a vector and a scalar: what rules treat differently."""

    def __init__(self, names: str = "wvbs") -> None:
        rng = np.random.default_rng(0)
        arrays = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(2, 4)), "b": rng.normal(size=2), "s": 0.5}
        for name in names:
            setattr(self, name, mt.Parameter(jnp.asarray(arrays[name], jnp.float32)))

    def forward(self, x: jax.Array) -> jax.Array:
        return output(dict(self.named_parameters()), x)


def output(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = jnp.tanh(x @ params["w"].T) @ params["v"].T * params.get("s", 0.5)
    return y + params["b"][None] if "b" in params else y


X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)), jnp.float32)


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """The same of a dict, as raw optax has it."""
    return ((output({path.removeprefix("0."): value for path, value in params.items()}, x) - y) ** 2).mean()


# -- every transformation of optax --------------------------------------------------------------------------------------


def constructors() -> dict[str, Callable[..., Any]]:
    """Every public function of optax and optax.contrib that says it gives a transformation."""
    found = {}
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                if "GradientTransformation" in str(inspect.signature(function).return_annotation):
                    found[f"{module.__name__.removeprefix('optax.')}.{name}"] = function
    return found


CONSTRUCTORS = constructors()
SGD = optax.sgd(0.1)
MASK = {"0.w": True, "0.v": False, "0.b": True, "0.s": False}


def every_other(step: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return step % 2 == 0


# of those that need more than defaults: arguments by position, by name, and names of extra arguments of `update`
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "optax.adaptive_grad_clip": ((0.1,), {}, ()),
    "optax.add_decayed_weights": ((0.01,), {}, ()),
    "optax.add_noise": ((0.1, 0.5), {"key": jax.random.key(0)}, ()),
    "optax.apply_if_finite": ((SGD, 3), {}, ()),
    "optax.chain": ((optax.clip_by_global_norm(1.0), optax.adam(0.05)), {}, ()),
    "optax.clip": ((0.01,), {}, ()),
    "optax.clip_by_block_rms": ((0.01,), {}, ()),
    "optax.clip_by_global_norm": ((0.01,), {}, ()),
    "optax.conditionally_mask": ((SGD, every_other), {}, ()),
    "optax.conditionally_transform": ((SGD, every_other), {}, ()),
    "optax.ema": ((0.9,), {}, ()),
    "optax.flatten": ((optax.adam(0.05),), {}, ()),
    "optax.freeze": ((MASK,), {}, ()),
    "optax.lbfgs": ((), {}, ("value", "value_fn")),
    "optax.masked": ((optax.adam(0.05), MASK), {}, ()),
    "optax.multi_transform": (
        ({"a": optax.adam(0.05), "b": optax.sgd(0.1, momentum=0.9)}, {"0.w": "a", "0.v": "b", "0.b": "a", "0.s": "b"}),
        {},
        (),
    ),
    "optax.named_chain": ((("clip", optax.clip(0.1)), ("adam", optax.adam(0.05))), {}, ()),
    "optax.noisy_sgd": ((0.05,), {"key": jax.random.key(0)}, ()),
    "optax.sign_sgd": ((0.05,), {}, ()),
    "optax.scale_by_learning_rate": ((0.05,), {}, ()),
    "optax.optimistic_adam": ((0.05,), {}, ()),
    "optax.partition": (
        (
            {"matrix": optax.adam(0.05), "other": SGD},
            lambda params: jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "other", params),
        ),
        {},
        (),
    ),
    "optax.polyak_sgd": ((), {}, ("value",)),
    "optax.rprop": ((0.01,), {}, ()),
    "optax.scale": ((-0.1,), {}, ()),
    "optax.scale_by_backtracking_linesearch": ((10,), {}, ("value", "value_fn")),
    "optax.scale_by_polyak": ((), {}, ("value",)),
    "optax.scale_by_schedule": ((optax.linear_schedule(-0.1, -0.01, 10),), {}, ()),
    "optax.scale_by_trust_ratio": ((), {}, ()),
    "optax.scale_by_zoom_linesearch": ((10,), {}, ("value", "value_fn")),
    "optax.selective_transform": ((optax.adam(0.05),), {"freeze_mask": MASK}, ()),
    "optax.sm3": ((0.1,), {}, ()),
    "optax.snapshot": (("norm", optax.tree.norm), {}, ()),
    "optax.stateless": ((lambda g, p: jax.tree.map(lambda g: -0.1 * g, g),), {}, ()),
    "optax.stateless_with_tree_map": ((lambda g, p: -0.1 * g,), {}, ()),
    "optax.trace": ((0.9,), {}, ()),
    "optax.with_extra_args_support": ((optax.adam(0.05),), {}, ()),
    "contrib.cocob": ((), {}, ()),
    "contrib.mechanize": ((optax.adam(0.05),), {}, ()),
    "contrib.momo": ((), {}, ("value",)),
    "contrib.momo_adam": ((), {}, ("value",)),
    "contrib.reduce_on_plateau": ((), {"patience": 2}, ("value",)),
    "contrib.sam": ((optax.sgd(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))), {}, ()),
    "contrib.scale_by_madgrad": ((0.05,), {}, ()),
    "contrib.scale_by_muon": (
        (),
        {"weight_dimension_numbers": dict.fromkeys(("0.w", "0.v"), optax.contrib.MuonDimensionNumbers())},
        (),
    ),
    "contrib.schedule_free": ((optax.sgd(0.05),), {"learning_rate": 0.05}, ()),
    "contrib.sophia": ((0.05,), {}, ("obj_fn",)),
    "contrib.split_real_and_imaginary": ((optax.adam(0.05),), {}, ()),
}
NOT_RUN = {
    "optax.inject_hyperparams": "gives a constructor, not a transformation; has tests of its own",
    "optax.inject_stateful_hyperparams": "deprecated: a name of inject_hyperparams",
    "optax.measure_with_ema": "it gives a measurement in the place of updates, for a part of another transformation",
    "optax.lookahead": "its parameters are pairs, fast and slow: LookaheadParams in the place of parameters",
    "contrib.differentially_private_aggregate": "its gradients have a batch axis, one for each example",
    "contrib.dpsgd": "its gradients have a batch axis, one for each example",
}


# rules that raw optax cannot apply to a scalar (it fails, or makes a vector of it), or to anything but a matrix
PARAMETERS = dict.fromkeys(["optax.sm3", "optax.scale_by_sm3", "optax.scale_by_distance_over_gradients"], "wvb")
PARAMETERS["contrib.scale_by_muon"] = "wv"


def transformation(name: str) -> tuple[Any, tuple[str, ...]]:
    args, kwargs, extra = ARGUMENTS.get(name, ((), {}, ()))
    parameters = inspect.signature(CONSTRUCTORS[name]).parameters
    if name not in ARGUMENTS and "learning_rate" in parameters:
        kwargs = {"learning_rate": 0.05}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return CONSTRUCTORS[name](*args, **kwargs), extra


@functools.cache
def raw(name: str, steps: int = 20) -> tuple[dict[str, Any], Any]:
    """Parameters and state after some steps of optax's own loop."""
    tx, extra = transformation(name)
    params = {f"0.{path}": jnp.copy(value) for path, value in Net(PARAMETERS.get(name, "wvbs")).named_parameters()}

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss_of)(params, X, Y)
        fn = lambda params: loss_of(params, X, Y)
        given = {"value": value, "grad": grads, "value_fn": fn, "obj_fn": fn}
        given = {name: given[name] for name in (*extra, *(["grad"] if "value_fn" in extra else []))}
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def train(name: str, how: str, steps: int = 20) -> tuple[Net, OptaxOptimizer]:
    tx, extra = transformation(name)
    model = Net(PARAMETERS.get(name, "wvbs"))
    opt = OptaxOptimizer([model], tx)
    value_fn = functools.partial(squared, model, X, Y) if how == "eager" else lambda: squared(model, X, Y)

    def step() -> jax.Array:
        opt.zero_grad()
        loss = mt.backward(squared, model, X, Y)
        opt.step(**{key: {"value": loss}.get(key, value_fn) for key in extra})
        return loss

    if how == "scan":
        mt.scan(step, length=steps)
        return model, opt
    step = mt.jit(step) if how == "jit" else step
    for _ in range(steps):
        step()
    return model, opt


def assert_as_raw(name: str, model: Net, opt: OptaxOptimizer, steps: int = 20) -> None:
    params, state = raw(name, steps)
    assert jax.tree.structure(opt.opt_state) == jax.tree.structure(state)
    for path, value in model.named_parameters():
        assert_allclose(value, params[f"0.{path}"], rtol=1e-5, atol=1e-6, err_msg=path)
    mine = jax.tree_util.tree_flatten_with_path(opt.opt_state)[0]
    for (where, value), wanted in zip(mine, jax.tree.leaves(state), strict=True):
        where = jax.tree_util.keystr(where)
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value, wanted = jax.random.key_data(value), jax.random.key_data(wanted)
        assert value.shape == jnp.shape(wanted) and value.dtype == jnp.asarray(wanted).dtype, where
        assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=where)


def test_every_constructor_is_run_or_has_a_reason() -> None:
    assert len(CONSTRUCTORS) > 80
    assert CONSTRUCTORS.keys() >= ARGUMENTS.keys() and CONSTRUCTORS.keys() >= NOT_RUN.keys()


RUN = sorted(CONSTRUCTORS.keys() - NOT_RUN.keys())
QUICK = {"optax.adamw", "optax.partition", "optax.scale_by_backtracking_linesearch", "contrib.schedule_free"}
MARKS = {name: [pytest.mark.slow] for name in set(RUN) - QUICK}
MARKS["optax.lbfgs"].append(pytest.mark.rounding)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in RUN])
def test_twenty_steps_give_the_parameters_and_state_of_raw_optax(name: str, how: str) -> None:
    assert_as_raw(name, *train(name, how))


@pytest.mark.parametrize("name", ["optax.adamw", pytest.param("optax.lbfgs", marks=MARKS["optax.lbfgs"])])
def test_a_scan_gives_the_same(name: str) -> None:
    assert_as_raw(name, *train(name, "scan", 6), 6)


# -- the facade ---------------------------------------------------------------------------------------------------------


def step(model: Net, opt: Any, **extra: Any) -> jax.Array:
    opt.zero_grad()
    loss = mt.backward(squared, model, X, Y)
    opt.step(**extra)
    return loss


def adam_pair(tx: Any = None, **options: Any) -> tuple[Net, OptaxOptimizer]:
    model = Net()
    return model, OptaxOptimizer([model], tx or optax.adam(0.05), **options)


def values(*objects: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(objects)]


def assert_equal_values(mine: list[np.ndarray], theirs: list[np.ndarray], rtol: float = 1e-6) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_the_functional_form_copies_and_checkpoints(tmp_path: Any) -> None:
    model, opt = adam_pair()
    step(model, opt)
    other = copy.deepcopy(opt)
    pure = jax.jit(lambda opt: (opt, step(opt.modules[0], opt)))
    returned, _ = pure(opt)
    mt.save(tmp_path / "run", model=model, opt=opt)
    step(model, opt)
    step(other.modules[0], other)
    assert_equal_values(values(returned.modules[0], returned.opt_state), values(model, opt.opt_state))
    assert_equal_values(values(other.modules[0], other.opt_state), values(model, opt.opt_state))
    mine, again = adam_pair()
    mt.load(tmp_path / "run", model=mine, opt=again)
    step(mine, again)
    for a, b in zip(values(mine, again.opt_state), values(model, opt.opt_state), strict=True):
        assert_array_equal(a, b)
    assert int(again.opt_state[0].count) == again.num_steps == 2


@pytest.mark.slow
def test_an_ensemble_of_optimizers_trains_under_vmap() -> None:
    def made(value: jax.Array) -> OptaxOptimizer:
        model = Net()
        model.s = value
        return OptaxOptimizer([model], optax.adam(0.05))

    def train(opt: OptaxOptimizer) -> OptaxOptimizer:
        step(opt.modules[0], opt)
        return opt

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), made(jnp.asarray(0.5)), made(jnp.asarray(1.5)))
    trained = jax.vmap(train)(stacked)
    alone = train(made(jnp.asarray(1.5)))
    assert_equal_values([leaf[1] for leaf in values(trained)], values(alone), rtol=1e-5)


def test_tied_parameters_are_one_and_frozen_ones_are_left_alone() -> None:
    first, second = nn.Linear(3, 3, key=jax.random.key(0)), nn.Linear(3, 3, key=jax.random.key(1))
    second.tie("weight", first, "weight")
    model = nn.Sequential(first, second)
    first.freeze()  # the tied weight, too
    opt = OptaxOptimizer([model], optax.adam(0.1))
    assert list(opt.opt_state[0].mu) == ["0.1.bias"]
    before = np.asarray(first.weight)
    mt.backward(lambda model: model(X).sum(), model)
    opt.step()
    assert_array_equal(first.weight, before)
    first.unfreeze()
    assert list(opt.opt_state[0].mu) == ["0.0.bias", "0.0.weight", "0.1.bias"]


def test_the_state_stays_with_its_parameter() -> None:
    a, b = nn.Linear(3, 2, key=jax.random.key(0)), nn.Linear(3, 2, key=jax.random.key(1))
    opt = OptaxOptimizer([a, b], optax.adam(0.1))

    def loss(a: Any, b: Any) -> jax.Array:
        return (a(X) ** 2).mean() + (b(2 * X) ** 2).mean()

    mt.backward(loss, a, b)
    opt.step()
    mu = dict(opt.opt_state[0].mu)
    opt.modules[:] = [b, nn.Linear(2, 2, key=jax.random.key(2)), a]
    new = opt.opt_state[0]
    assert_array_equal(new.mu["0.weight"], mu["1.weight"])
    assert_array_equal(new.mu["2.bias"], mu["0.bias"])
    assert not new.mu["1.weight"].any() and int(new.count) == 1
    a.freeze()
    assert "2.bias" not in opt.opt_state[0].mu
    a.unfreeze()
    assert_array_equal(opt.opt_state[0].mu["2.bias"], mu["0.bias"])


def test_a_state_of_all_parameters_as_one_vector_begins_anew_with_others() -> None:
    model, opt = adam_pair(optax.flatten(optax.adam(0.1)))
    step(model, opt)
    size = opt.opt_state[0].mu.size
    opt.modules.append(nn.Linear(2, 1, key=jax.random.key(0)))
    assert opt.opt_state[0].mu.size == size + 3 and not opt.opt_state[0].mu.any()


def test_multi_steps_applies_the_mean_of_gradients_every_other_time() -> None:
    model, opt = adam_pair(optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2))
    before, grads = values(model), []
    for factor in (1.0, 3.0):
        opt.zero_grad()
        mt.backward(lambda model, factor: factor * squared(model, X, Y), model, factor)
        grads.append(values(list(model.grads())))
        assert all(np.array_equal(a, b) for a, b in zip(before, values(model), strict=True))
        opt.step()
    order = [name for name, _ in model.named_parameters()]
    assert order == list("wvbs")
    for p, now, one, three in zip(before, values(model), *grads, strict=True):
        assert_allclose(now, p - 0.1 * (one + three) / 2, rtol=1e-5, atol=1e-7)


def test_numpy_modules_are_updated_in_place() -> None:
    net = mini.Sequential(mini.Linear(3, 2, rng=0, dtype=np.float64))
    ours = mini.to_jax(mini.Sequential(mini.Linear(3, 2, rng=0)))
    arrays = net.parameters()
    opt, other = OptaxOptimizer([net], optax.adam(0.1)), OptaxOptimizer([ours], optax.adam(0.1))
    for _ in range(3):
        opt.zero_grad(), other.zero_grad()
        net.backward(net(np.asarray(X, np.float64)))
        mt.backward(lambda model: 0.5 * (model(X) ** 2).sum(), ours)
        opt.step(), other.step()
    assert all(a is b for a, b in zip(arrays, net.parameters(), strict=True))
    for mine, theirs in zip(net.parameters(), ours.parameters(), strict=True):
        assert mine.dtype == np.float64
        assert_allclose(mine, theirs, rtol=1e-4)


def test_skipped_steps_and_norms() -> None:
    model, opt = adam_pair(skip_nonfinite=True, track_grad_norm=True)
    step(model, opt)
    before = values(model, opt.opt_state)
    assert float(opt.grad_norm) > 0
    model.grads()[2] = jnp.asarray([jnp.nan, 0.0])
    opt.step()
    for a, b in zip(before, values(model, opt.opt_state), strict=True):
        assert_array_equal(a, b)
    assert (opt.num_steps, opt.skipped) == (1, 1)


def test_what_is_kept_by_the_transformation_itself_is_never_used_up() -> None:
    key = jax.random.key(3)
    tx = optax.add_noise(0.1, 0.5, key)
    for _ in range(2):
        model, opt = adam_pair(tx)
        step(model, opt)
        step(model, opt)
    jax.block_until_ready(jax.random.key_data(key))


def test_an_array_that_a_rule_of_the_user_gives_is_never_used_up() -> None:
    zero = jnp.zeros((2,))

    class Kept(mt.Optimizer):
        @staticmethod
        def init_state(p: jax.Array, h: Any) -> Any:
            return zero

        @staticmethod
        def update(p: jax.Array, g: jax.Array, s: Any, h: Any) -> Any:
            return p - h.lr * g, s + 1

    model = Net()
    opt = Kept([model], lr=0.1)
    step(model, opt)
    step(model, opt)
    assert_array_equal(zero, np.zeros(2))
    assert_array_equal(opt.state_dict()["state"]["0.b"]["state"], np.full(2, 2.0))


# -- learning rates and other numbers -----------------------------------------------------------------------------------


def test_injected_hyperparameters_are_assigned_without_compiling() -> None:
    model, opt = adam_pair(optax.inject_hyperparams(optax.adam)(learning_rate=0.05, b1=0.8))
    reference, plain = adam_pair(optax.adam(0.05, b1=0.8))
    compiled = mt.jit(lambda: step(model, opt))
    compiled(), step(reference, plain)
    assert opt.lr == 0.05 and opt.hyperparams["b1"] == 0.8 and set(opt.hyperparams) >= {"learning_rate", "b1", "eps"}
    assert_equal_values(values(model), values(reference), rtol=1e-5)
    opt.lr = np.float32(0.0)
    before = values(model)
    compiled()
    for a, b in zip(before, values(model), strict=True):
        assert_array_equal(a, b)
    opt.hyperparams["learning_rate"] = 1
    compiled()
    assert opt.lr == 1.0 and compiled.num_compiles == 1
    assert repr(opt.hyperparams).startswith("{")


def test_reduce_on_plateau_reduces_an_injected_rate() -> None:
    _, opt = adam_pair(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    plateau = optim.ReduceOnPlateau(opt, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        plateau.step(loss)
    assert opt.lr == opt.groups[0].lr == pytest.approx(0.05)


def test_what_cannot_be_assigned_says_why() -> None:
    model, opt = adam_pair()
    with pytest.raises(AttributeError, match=r"inside the transformation.*inject_hyperparams"):
        _ = opt.lr
    with pytest.raises(AttributeError, match="inject_hyperparams"):
        opt.lr = 0.1
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    model, opt = adam_pair(optax.inject_hyperparams(optax.adam)(learning_rate=schedule))
    assert opt.lr == 0.1
    with pytest.raises(AttributeError, match="learning_rate follows a schedule"):
        opt.lr = 0.2
    with pytest.raises(ValueError, match="b1 must be a finite number; got nan"):
        opt.hyperparams["b1"] = float("nan")
    with pytest.raises(KeyError, match="'beta' is not an injected hyperparameter; these are"):
        opt.hyperparams["beta"] = 0.9
    with pytest.raises(TypeError, match="cannot be deleted"):
        del opt.hyperparams["b1"]
    step(model, opt)
    step(model, opt)
    assert opt.lr == pytest.approx(0.09)  # of the step that was taken, as optax has it


def test_names_that_two_transformations_share_are_preceded_by_their_place() -> None:
    sgd = optax.inject_hyperparams(optax.sgd)
    model, opt = adam_pair(optax.chain(sgd(learning_rate=0.1), sgd(learning_rate=0.2)))
    assert list(opt.hyperparams) == ["0.hyperparams.learning_rate", "1.hyperparams.learning_rate"]
    assert opt.hyperparams["1.hyperparams.learning_rate"] == 0.2
    with pytest.raises(AttributeError, match="the injected hyperparameters are 0.hyperparams"):
        _ = opt.lr


def test_the_state_of_optax_can_be_taken_over() -> None:
    tx = optax.adamw(0.05)
    params, state = raw("optax.adamw")
    model, opt = adam_pair(tx)
    model.load_state_dict({path.removeprefix("0."): value for path, value in params.items()})
    opt.opt_state = state
    assert_equal_values(values(opt.opt_state), values(state), rtol=0)
    with pytest.raises(ValueError, match="opt_state has the structure.*of another transformation"):
        opt.opt_state = optax.sgd(0.1).init(params)
    wrong = jax.tree.map(lambda leaf: jnp.zeros((7, *leaf.shape)), state)
    with pytest.raises(ValueError, match=r"opt_state: 0\.count is int32\[\]"):
        opt.opt_state = wrong
    assert_equal_values(values(opt.opt_state), values(state), rtol=0)


# -- programs -----------------------------------------------------------------------------------------------------------


def label(params: dict[str, Any]) -> dict[str, str]:
    return dict.fromkeys(params, "a")


def recipe(lr: Any = 0.05) -> Any:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition({"a": optax.adamw(lr)}, label))


def compiled_step() -> Any:
    @mt.jit
    def train(model: Net, opt: OptaxOptimizer) -> jax.Array:
        return step(model, opt)

    return train


def test_transformations_made_alike_share_programs() -> None:
    train = compiled_step()
    schedule = optax.cosine_decay_schedule
    for _ in range(3):
        train(*adam_pair(recipe()))
        train(*adam_pair(recipe(schedule(0.1, 10))))
    assert train.num_compiles == 2
    train(*adam_pair(recipe(0.06)))
    train(*adam_pair(recipe(schedule(0.1, 11))))
    assert train.num_compiles == 4


def test_a_transformation_is_only_like_itself_where_its_likeness_cannot_be_told() -> None:
    train, factors = compiled_step(), iter([0.1, 0.2])
    for factor in factors:
        before = Net()
        model, opt = adam_pair(optax.stateless_with_tree_map(lambda g, p: -globals_of_the_user["factor"] * g))
        globals_of_the_user["factor"] = factor
        train(model, opt)
        moved = np.asarray(model.s - before.s)
        step(before, plain := OptaxOptimizer([before], optax.sgd(factor)))
        assert_allclose(moved, np.asarray(before.s - Net().s), rtol=1e-5)
        assert plain.num_steps == 1
    assert train.num_compiles == 2


globals_of_the_user: dict[str, float] = {}


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    model = Net()
    for tx in (optax.adam, 0.1, None):
        with pytest.raises(TypeError, match="OptaxOptimizer takes an optax transformation, such as"):
            OptaxOptimizer([model], tx)
    with pytest.raises(ValueError, match="takes a list of modules, no groups"):
        OptaxOptimizer([{"modules": [model]}], optax.adam(0.1))
    opt = OptaxOptimizer([model], optax.sgd(0.1))
    with pytest.raises(ValueError, match="no groups"):
        opt.add_group({"modules": [Net()]})
    with pytest.raises(TypeError, match="cannot be pickled. Save the optimizer's state with `mt.save"):
        pickle.dumps(opt)
    mt.backward(squared, model, X, Y)
    plain = OptaxOptimizer([model], optax.GradientTransformation(*optax.sgd(0.1)))
    with pytest.raises(TypeError, match="got value, and the transformation takes no extra arguments"):
        plain.step(value=1.0)
    before = values(model)
    with pytest.raises(TypeError, match="value"):
        OptaxOptimizer([model], optax.polyak_sgd()).step()
    for a, b in zip(before, values(model), strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize(
    "update, message",
    [
        (lambda g, s, p: (g, (s, s)), "the rule's update gave a state of another structure than its init"),
        (lambda g, s, p: (g, s[None]), r"the update makes float32\[\] of the state.state into float32\[1\]"),
        (lambda g, s, p: (jax.tree.map(lambda x: x[None], g), s), r"of 0\.w into float32\[1, 4, 3\]"),
    ],
)
def test_an_update_that_changes_structure_or_shapes_is_refused_and_changes_nothing(update: Any, message: str) -> None:
    model, opt = adam_pair(optax.GradientTransformation(lambda params: jnp.zeros(()), update))
    mt.backward(squared, model, X, Y)
    before = values(model)
    with pytest.raises(ValueError, match=message):
        opt.step()
    for a, b in zip(before, values(model), strict=True):
        assert_array_equal(a, b)


def test_a_state_with_something_that_is_no_array_is_refused() -> None:
    tx = optax.GradientTransformation(lambda params: {"name": "x"}, lambda g, s, p: (g, s))
    with pytest.raises(TypeError, match="the state has a str at name, which is no array"):
        OptaxOptimizer([Net()], tx)


@pytest.mark.slow
def test_a_line_search_reaches_other_modules_and_changes_none() -> None:
    norm = nn.BatchNorm1d(3)
    model = Net()
    opt = OptaxOptimizer([model], optax.chain(optax.sgd(0.5), optax.scale_by_backtracking_linesearch(5)))
    whole = lambda x, y: squared(model, norm(x), y)

    @mt.jit
    def train(x: jax.Array, y: jax.Array) -> jax.Array:
        opt.zero_grad()
        loss = mt.backward(whole, x, y)
        opt.step(value=loss, value_fn=lambda: whole(x, y))
        return loss

    losses = [float(train(X, Y)) for _ in range(4)]
    assert losses[-1] < losses[0] and int(norm.num_batches_tracked) == 4


# -- our rules as transformations ---------------------------------------------------------------------------------------


def quick_first(cls: Any) -> Any:
    return cls if cls in (mt.Optimizer, optim.AdamW, optim.Muon) else pytest.param(cls, marks=pytest.mark.slow)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("cls", [quick_first(cls) for cls in discovered()], ids=lambda cls: cls.__name__)
def test_a_rule_as_a_transformation_steps_as_its_optimizer_does(cls: Any) -> None:
    model = Net("wv" if cls is optim.Muon else "wvbs")
    opt, tx = cls([model], lr=0.03), as_optax(cls, lr=0.03)
    params = dict(model.named_parameters())
    state = tx.init(params)

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: ((output(params, X) - Y) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = update(params, state)
        step(model, opt)
    for name, value in model.named_parameters():
        assert_allclose(params[name], value, rtol=1e-4, atol=2e-6, err_msg=name)
    assert int(state.num_steps) == 5 and float(state.hyperparams["lr"]) == pytest.approx(0.03)


def test_settings_schedules_and_chains_of_a_rule() -> None:
    schedule = optim.schedules.cosine(0.1, 10)
    tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        as_optax(optim.SGD, lr=schedule, momentum=0.9, decay_matrices_only=True, weight_decay=0.1),
    )
    model, ours = Net(), Net()
    opt = OptaxOptimizer([model], tx)
    mine = optim.SGD([ours], lr=schedule, momentum=0.9, decay_matrices_only=True, weight_decay=0.1)
    for _ in range(4):
        step(model, opt)
        mine.zero_grad()
        mt.backward(squared, ours, X, Y)
        mt.clip_grad_norm(ours, 0.5)
        mine.step()
    assert_equal_values(values(model), values(ours), rtol=1e-4)
    opt = OptaxOptimizer([Net()], as_optax(mt.Optimizer, 0.25))
    assert opt.lr == 0.25 and list(opt.hyperparams) == ["lr"]
    opt.lr = 0.5
    assert opt.hyperparams["lr"] == 0.5


def test_master_weights_of_a_rule() -> None:
    params = {"w": jnp.ones((3,), jnp.bfloat16)}
    tx = as_optax(optim.SGD, lr=1e-3, master_weights=True)
    state = tx.init(params)
    for _ in range(8):  # each step by itself is less than bfloat16 can tell from nothing
        updates, state = tx.update({"w": jnp.ones((3,), jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    assert params["w"].dtype == jnp.bfloat16
    assert_allclose(np.asarray(params["w"], np.float32), 0.992, rtol=4e-3)
    assert float(params["w"][0]) < 1


def test_rules_that_are_none_are_refused() -> None:
    for rule in (optim.LBFGS, OptaxOptimizer, optim.SGD([Net()]), optax.adam, nn.Linear):
        with pytest.raises(
            TypeError, match="as_optax takes the class of an optimizer that updates each array by itself"
        ):
            as_optax(rule)
    with pytest.raises(ValueError, match="SGD: lr must be a finite number"):
        as_optax(optim.SGD, lr=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        as_optax(optim.SGD, momentun=0.9)
    with pytest.raises(ValueError, match="as_optax does not take skip_nonfinite"):
        as_optax(optim.SGD, skip_nonfinite=True)
    tx = as_optax(optim.SGD)
    with pytest.raises(ValueError, match=r"as_optax\(SGD\) needs the parameters; got params=None"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


# -- what a review found ------------------------------------------------------------------------------------------------


def linear(seed: int) -> nn.Linear:
    return nn.Linear(3, 2, key=jax.random.key(seed))


def test_modules_of_equal_names_in_another_order_keep_their_own_state() -> None:
    a, b = linear(0), linear(1)

    def mask(params: Any) -> Any:
        return {path: path.startswith("0.") for path in params}

    opt = OptaxOptimizer([a, b], optax.chain(optax.masked(optax.trace(0.9), mask), optax.scale(-1.0)))
    mt.backward(lambda a, b: a(X).sum() + b(X).sum(), a, b)
    opt.step()
    opt.modules = [b, a]
    opt.step()
    assert "0.weight" in opt.opt_state[0].inner_state.trace


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(optax.chain(tx), 2)])
def test_a_dict_by_path_does_not_come_to_mean_other_parameters(wrap: Any) -> None:
    a, b = linear(0), linear(1)
    labels = {"0.weight": "fast", "0.bias": "fast", "1.weight": "still", "1.bias": "still"}
    opt = OptaxOptimizer([a, b], wrap(optax.partition({"fast": optax.adam(0.1), "still": optax.set_to_zero()}, labels)))
    mt.backward(lambda a, b: a(X).sum() + b(X).sum(), a, b)
    opt.step()
    before = values(a, b)
    opt.modules.reverse()
    with pytest.raises(
        ValueError,
        match=r"has a dict by path .*, and paths changed: .*1\.weight is 0\.weight now, .*lambda params: {path",
    ):
        opt.step()
    opt.modules.reverse()
    a.freeze()
    with pytest.raises(ValueError, match="pytree") as raised:
        opt.step()
    assert raised.value.__notes__ == [
        "(The rule was given 1.weight, 1.bias. A mask, or labels, as a dict must name just these.)"
    ]
    a.unfreeze()
    assert_array_equal(values(a, b)[0], before[0])
    for _ in range(2):
        opt.step()
    assert not np.array_equal(a.weight, before[0])
    assert_array_equal(b.weight, linear(1).weight)


def test_a_vector_of_all_parameters_is_not_taken_over_by_others() -> None:
    a, b = linear(0), linear(1)
    opt = OptaxOptimizer([a, b], optax.chain(optax.flatten(optax.trace(0.9)), optax.scale(-1.0)))
    mt.backward(lambda a, b: a(X).sum() + 0 * b(X).sum(), a, b)
    opt.step()
    opt.modules = [b, a]
    opt.zero_grad()
    before = values(a, b)
    with pytest.warns(UserWarning, match="no gradient accumulated"):
        opt.step()
    for was, now in zip(before, values(a, b), strict=True):
        assert_array_equal(was, now)


def test_multi_steps_hands_extra_arguments_on() -> None:
    def update(g: Any, s: Any, p: Any = None, *, value: Any, **_: Any) -> Any:
        return jax.tree.map(lambda g: -g * value, g), s

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    model, opt = adam_pair(optax.MultiSteps(inner, every_k_schedule=1))
    mt.backward(squared, model, X, Y)
    before, grads = values(model), values(list(model.grads()))
    opt.step(value=10)
    for was, now, g in zip(before, values(model), grads, strict=True):
        assert_allclose(now, was - 10 * g, rtol=1e-5, atol=1e-5)


def test_transformations_that_look_alike_and_are_not() -> None:
    def init(params: Any) -> Any:
        return ()

    def update(g: Any, s: Any, p: Any = None, **extra: Any) -> Any:
        return jax.tree.map(lambda g: -g * extra.get("value", 1.0), g), s

    @functools.wraps(optax.sgd(0.1).update)
    def wrapped(g: Any, s: Any, p: Any = None) -> Any:
        return g, s

    kinds = [
        (optax.GradientTransformation(init, update), optax.GradientTransformationExtraArgs(init, update)),
        (optax.scale(jnp.asarray(0.1)), optax.scale(jnp.asarray(0.1, jnp.float32))),
        (optax.GradientTransformation(init, wrapped), optax.sgd(0.1)),
        (optax.sgd(0.1), optax.sgd(0.2)),
        (optax.adam(0.1), optax.adam(0.1, nesterov=True)),
        (optax.scale(1), optax.scale(1.0)),
        (optax.scale(1), optax.scale(True)),
    ]
    for one, other in kinds:
        assert Transformation(one) != Transformation(other)
    for make in (lambda: optax.adamw(0.1), lambda: optax.MultiSteps(optax.sgd(0.1), 2), lambda: optax.lbfgs()):
        assert Transformation(make()) == Transformation(make())
        assert hash(Transformation(make())) == hash(Transformation(make()))


def test_a_mask_that_was_changed_since_is_told() -> None:
    mask = dict.fromkeys(["0.w", "0.v", "0.b", "0.s"], True)
    model, opt = adam_pair(optax.masked(optax.sgd(0.1), mask))
    mt.backward(squared, model, X, Y)
    mask["0.w"] = False
    with pytest.raises(RuntimeError, match="was changed after OptaxOptimizer was made"):
        opt.step()


def test_hyperparameters_of_a_rule_are_all_there_and_numbers() -> None:
    _, opt = adam_pair(as_optax(optim.Adam, lr=0.1, betas=(0.8, 0.9)))
    assert opt.hyperparams["betas.0"] == 0.8 and opt.hyperparams["betas.1"] == 0.9
    for value in (lambda t: 0.1, "0.1", None, True, jnp.inf, np.nan):
        with pytest.raises(ValueError, match=r"must be a finite number; got .*\(lr=schedule\)"):
            opt.lr = value
    assert opt.lr == 0.1


def test_frozen_parameters_alone_do_for_rules_that_can_do_without() -> None:
    model = Net().freeze()
    OptaxOptimizer([model], optax.adam(0.1))
    with pytest.raises(ValueError, match="every parameter is frozen, and this rule cannot do without any"):
        OptaxOptimizer([model], optax.flatten(optax.adam(0.1)))


def test_a_number_for_all_members_of_an_ensemble() -> None:
    _, opt = adam_pair(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), opt)
    stacked.lr = 0.5
    assert_array_equal(np.asarray(stacked.lr), np.full(3, 0.5, np.float32))
