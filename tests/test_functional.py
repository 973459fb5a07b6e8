"""The functional form: optimizers and models as values that plain JAX transforms take and return.

(`test_pytree.py` has modules under each transform alone; here are optimizers of every kind, and transforms together.)
"""

import copy
import gc
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import Counting, decaying, mean_error

import minitorch_jax as mt
from minitorch_jax import Buffer, Module, Parameter, nn, optim

BOTH_SPELLINGS = r"opt, loss = jax\.jit\(step\)\(opt, x, y\)(.|\n)*mt\.jit"


OPTIMIZERS = {
    "plain": lambda modules, **kwargs: mt.Optimizer(modules, **{"lr": 0.1, **kwargs}),
    "momentum": lambda modules, **kwargs: optim.SGD(
        modules, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True, **kwargs}
    ),
    "skip_nonfinite": lambda modules, **kwargs: optim.SGD(
        modules, **{"lr": 0.1, "momentum": 0.9, "skip_nonfinite": True, **kwargs}
    ),
    "schedule": lambda modules, **kwargs: optim.SGD(modules, **{"lr": decaying, "momentum": 0.5, **kwargs}),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Centred(Module):
    """A buffer that training changes and the output depends on, and a tied pair of weights with one frozen bias."""

    def __init__(self, *, key):
        one, two = jax.random.split(key)
        self.first = nn.Linear(3, 3, key=one)
        self.second = nn.Linear(3, 3, key=two)
        self.second.tie("weight", self.first, "weight")
        self.second.bias = Parameter(jnp.full(3, 0.5), trainable=False)
        self.mean = Buffer(jnp.zeros(3))
        self.count = Buffer(0)

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
            self.count = self.count + 1
        return self.second(jnp.tanh(self.first(x - self.mean[None])))


def network(key):
    one, two = jax.random.split(key)
    return nn.Sequential(nn.Linear(3, 4, key=one), nn.Tanh(), nn.Linear(4, 2, key=two))


KEY = jax.random.key(0)
X, Y = jax.random.normal(jax.random.key(3), (5, 3)), jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)
SCALES = (1 + jnp.arange(4, dtype=jnp.float32))[:, None, None]
XS, YS = X[None] * SCALES, Y[None] / SCALES


def step(opt, x, y):
    """One step of training: eager code, and a function from an optimizer to an optimizer."""
    opt.zero_grad()
    loss = mt.backward(mean_error, opt.modules[0], x, y)
    opt.step()
    return opt, loss


def eager(opt, xs=XS, ys=YS):
    return opt, [step(opt, x, y)[1] for x, y in zip(xs, ys, strict=True)]


def facts(opt):
    """Everything that an optimizer holds, by name."""
    state = opt.state_dict()
    arrays = {f"module {i} {name}": a for i, m in enumerate(opt.modules) for name, a in m.state_dict().items()}
    arrays |= {f"{path} {name}": value for path, of in state["state"].items() for name, value in of.items()}
    arrays |= {f"grad {i} {j}": g for i, m in enumerate(opt.modules) for j, g in enumerate(m.grads())}
    arrays |= {name: state[name] for name in ("num_steps", "skipped")}
    return {name: np.asarray(value) for name, value in arrays.items()}, state["hyperparameters"]


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=1e-6)


def assert_same(opt, expected, tolerance=1e-5):
    """Two optimizers of one kind hold the same: parameters, buffers, gradients, state, counts and settings."""
    assert type(opt) is type(expected) and not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(opt))
    (mine, my_settings), (theirs, their_settings) = facts(opt), facts(expected)
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype and mine[name].shape == value.shape, name
        np.testing.assert_allclose(mine[name], value, rtol=tolerance, atol=1e-6, err_msg=name)
    assert my_settings.keys() == their_settings.keys()
    for name, value in their_settings.items():
        assert my_settings[name] == value or my_settings[name] == pytest.approx(value, rel=1e-6), name


def told(call):
    """The texts of the warnings during a call and the death of what it gave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        gc.collect()
    assert all(issubclass(warning.category, mt.DroppedUpdateWarning) for warning in caught), list(map(str, caught))
    return [str(warning.message) for warning in caught]


# -- loops -------------------------------------------------------------------------------------------------------------


def by_calls(call):
    def loop(opt, xs, ys):
        losses = []
        for x, y in zip(xs, ys, strict=True):
            opt, loss = call(opt, x, y)
            losses.append(loss)
        return opt, losses

    return loop


def scan(opt, xs, ys):
    return jax.lax.scan(lambda opt, xy: step(opt, *xy), opt, (xs, ys))


def fori(opt, xs, ys):
    def body(i, carry):
        opt, losses = carry
        opt, loss = step(opt, xs[i], ys[i])
        return opt, losses.at[i].set(loss)

    return jax.lax.fori_loop(0, len(xs), body, (opt, jnp.zeros(len(xs))))


def vmap_of_one(opt, x, y):
    stacked = jax.tree.map(lambda leaf: leaf[None], opt)
    stacked, losses = jax.vmap(step)(stacked, x[None], y[None])
    return jax.tree.map(lambda leaf: leaf[0], (stacked, losses))


compiled_step = mt.jit(step)


def our_scan(opt, xs, ys):
    losses = mt.scan(lambda x, y: step(opt, x, y)[1], xs, ys, keep_grads=True)
    return opt, losses


def our_scan_with_the_optimizer_among_its_arguments(opt, xs, ys):
    losses = mt.scan(lambda opt, x, y: step(opt, x, y)[1], opt, xs, ys, keep_grads=True)
    return opt, losses


def ours_by_closure_of_the_inner(opt, x, y):
    loss = mt.jit(lambda x: step(opt, x, y)[1])(x)
    return opt, loss


LOOPS = {
    "jit": by_calls(jax.jit(step)),
    "jit, donated": by_calls(jax.jit(step, donate_argnums=0)),
    "jit of jit": by_calls(jax.jit(lambda *args: jax.jit(step)(*args))),
    "jit of scan, donated": jax.jit(scan, donate_argnums=0),
    "scan": scan,
    "scan of jit": lambda opt, xs, ys: jax.lax.scan(lambda opt, xy: jax.jit(step)(opt, *xy), opt, (xs, ys)),
    "fori_loop": jax.jit(fori),
    "vmap of one": by_calls(jax.jit(vmap_of_one)),
    "checkpoint": by_calls(jax.jit(jax.checkpoint(step))),
    "mt.jit in jit": by_calls(jax.jit(lambda *args: compiled_step(*args))),
    "mt.jit in jit, by closure": by_calls(jax.jit(ours_by_closure_of_the_inner)),
    "mt.jit in scan": lambda opt, xs, ys: jax.lax.scan(lambda opt, xy: compiled_step(opt, *xy), opt, (xs, ys)),
    "mt.scan in jit": jax.jit(our_scan),
    "mt.scan in jit, donated": jax.jit(our_scan, donate_argnums=0),
    "mt.scan in jit, argument": jax.jit(our_scan_with_the_optimizer_among_its_arguments),
    "mt.scan in mt.jit in jit": jax.jit(lambda *args: mt.jit(our_scan)(*args)),
    "jit in mt.jit": by_calls(mt.jit(lambda *args: jax.jit(step)(*args))),
    "scan in mt.jit": mt.jit(scan),
}
# each kind of optimizer by loops that treat it differently, and the other loops by one kind
CASES = [(kind, loop) for kind in OPTIMIZERS for loop in ("jit, donated", "scan", "vmap of one", "mt.scan in jit")]
CASES += [("momentum", loop) for loop in LOOPS if ("momentum", loop) not in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("kind, loop", CASES)
def test_a_functional_loop_is_the_eager_loop(kind, loop):
    make = OPTIMIZERS[kind]
    bad = XS.at[1, 0, 0].set(jnp.nan) if kind == "skip_nonfinite" else XS
    expected, losses = eager(make([network(KEY)]), bad)
    start = make([network(KEY)])
    opt, found = LOOPS[loop](copy.deepcopy(start) if "donated" not in loop else make([network(KEY)]), bad, YS)
    np.testing.assert_allclose(np.asarray(found), np.asarray(losses), rtol=1e-5)
    assert_same(opt, expected)
    assert (opt.num_steps, opt.skipped) == ((3, 1) if kind == "skip_nonfinite" else (4, 0))
    assert_same(start, make([network(KEY)]), 0)
    # and what came back goes on eagerly, as the eager one does
    for one in (opt, expected):
        step(one, X, Y)
        one.lr = 0.05
        step(one, X, Y)
    assert opt.lr == 0.05
    assert_same(opt, expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("loop", ["jit, donated", "scan", "vmap of one", "mt.jit in jit", "mt.scan in jit, donated"])
def test_tied_and_frozen_parameters_and_buffers_in_functional_loops(loop):
    def make():
        return optim.SGD([Centred(key=KEY)], lr=0.1, momentum=0.9, weight_decay=0.01)

    expected, losses = eager(make(), XS, 0.5 * XS)
    opt, found = LOOPS[loop](make(), XS, 0.5 * XS)
    close(found, losses)
    assert_same(opt, expected)
    model = opt.modules[0]
    assert int(model.count) == 4 and model.count.dtype == jnp.int32 and np.asarray(model.mean).any()
    np.testing.assert_array_equal(model.second.bias, jnp.full(3, 0.5))
    np.testing.assert_array_equal(model.first.weight, model.second.weight)
    model.first.weight = jnp.ones((3, 3))
    assert np.asarray(model.second.weight).all()  # one parameter still
    step(opt, X, X)
    np.testing.assert_array_equal(model.first.weight, model.second.weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("loop", ["scan", "fori_loop", "mt.scan in jit"])
def test_the_dtypes_of_a_carried_optimizer_do_not_change(loop, dtype):
    def make():
        return optim.SGD([network(KEY).astype(dtype)], lr=0.1, momentum=0.9, weight_decay=0.01)

    def in_dtype(opt, xs, ys):
        return our_scan(opt, xs, ys)

    xs, ys = XS.astype(dtype), YS.astype(dtype)
    if loop == "fori_loop":
        body = lambda i, opt: step(opt, xs[i], ys[i])[0]
        opt = jax.lax.fori_loop(0, 4, body, make())
    else:
        opt, losses = scan(make(), xs, ys) if loop == "scan" else jax.jit(in_dtype)(make(), xs, ys)
        assert losses.dtype == dtype
    expected, _ = eager(make(), xs, ys)
    assert all(p.dtype == dtype for p in [*opt.modules[0].parameters(), *opt.modules[0].grads()])
    assert_same(opt, expected, 0.05)


@pytest.mark.one_in(3)
@every
def test_a_functional_loop_compiles_once_from_a_fresh_optimizer_on(make):
    counting = Counting(step)
    call = jax.jit(counting)
    opt = make([network(KEY)])
    for x, y in zip(XS, YS, strict=True):
        opt, _ = call(opt, x, y)
    step(opt, X, Y)  # eager use in between changes no structure either
    opt, _ = call(opt, X, Y)
    call(make([network(jax.random.key(1))]), X, Y)
    if "schedule" not in repr(opt) and not callable(opt.state_dict()["hyperparameters"]["lr"]):
        opt.lr = 0.5
    call(opt, X, Y)
    assert counting.calls == call._cache_size() == 1


@pytest.mark.one_in(2)
@every
def test_structures_and_shapes_are_the_same_after_a_step(make):
    opt = make([network(KEY)])
    shapes, loss = jax.eval_shape(step, opt, X, Y)
    assert jax.tree.structure(shapes) == jax.tree.structure(opt)
    for mine, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(opt), strict=True):
        assert (mine.shape, mine.dtype) == (leaf.shape, leaf.dtype)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert (shapes.modules[0][0].weight.shape, shapes.modules[0][0].weight.dtype) == ((4, 3), jnp.float32)
    assert_same(opt, make([network(KEY)]), 0)

    def train(key, xs, ys):
        return scan(make([network(key)]), xs, ys)

    made, losses = jax.eval_shape(train, KEY, XS, YS)
    assert jax.tree.structure(made) == jax.tree.structure(opt) and losses.shape == (4,)
    ensemble = jax.eval_shape(jax.vmap(train, in_axes=(0, None, None)), jax.random.split(KEY, 3), XS, YS)[0]
    assert ensemble.modules[0][2].bias.shape == (3, 2)


@pytest.mark.slow
def test_a_whole_training_in_one_pure_function_of_a_key():
    def train(key, xs, ys):
        opt, losses = scan(optim.SGD([network(key)], lr=0.1, momentum=0.9), xs, ys)
        return opt, losses

    opt, losses = jax.jit(train)(KEY, XS, YS)
    expected, by_step = eager(optim.SGD([network(KEY)], lr=0.1, momentum=0.9))
    close(losses, by_step)
    assert_same(opt, expected)
    assert told(lambda: jax.jit(train)(jax.random.key(1), XS, YS)) == []


def test_ahead_of_time_compilation():
    call = jax.jit(step).lower(OPTIMIZERS["momentum"]([network(KEY)]), X, Y).compile()
    opt, losses = by_calls(call)(OPTIMIZERS["momentum"]([network(KEY)]), XS, YS)
    expected, by_step = eager(OPTIMIZERS["momentum"]([network(KEY)]))
    close(losses, by_step)
    assert_same(opt, expected)


def test_gradients_that_our_scan_used_up_are_not_given_out_here_either():
    """As leaves they are NaN, never an old value; everything else is what it is with `keep_grads`."""

    def default(opt, xs, ys):
        return opt, mt.scan(lambda x, y: step(opt, x, y)[1], xs, ys)

    opt, losses = jax.jit(default)(OPTIMIZERS["momentum"]([network(KEY)]), XS, YS)
    expected, by_step = eager(OPTIMIZERS["momentum"]([network(KEY)]))
    close(losses, by_step)
    assert all(np.isnan(grad).all() for grad in opt.modules[0].grads())
    for one in (opt, expected):
        one.zero_grad()
    assert_same(opt, expected)
    step(opt, X, Y)
    step(expected, X, Y)
    assert_same(opt, expected)


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("compiled", ["jax.jit", "mt.jit", "lax.scan", "vmap"])
def test_lr_may_be_assigned_within_compiled_code(nesterov, compiled):
    def warmed(opt, lr, x, y):
        opt.lr = lr
        return step(opt, x, y)

    def make():
        return optim.SGD([network(KEY)], lr=0.5, momentum=0.9, nesterov=nesterov)

    opt, expected, lrs = make(), make(), jnp.array([0.01, 0.05, 0.1, 0.2])
    for lr, x, y in zip(lrs, XS, YS, strict=True):
        warmed(expected, float(lr), x, y)
    if compiled == "lax.scan":
        opt, _ = jax.lax.scan(lambda opt, xs: warmed(opt, *xs), opt, (lrs, XS, YS))
    elif compiled == "vmap":
        for lr, x, y in zip(lrs, XS, YS, strict=True):
            stacked = jax.tree.map(lambda leaf: leaf[None], opt)
            stacked, _ = jax.vmap(warmed, in_axes=(0, 0, None, None))(stacked, lr[None], x, y)
            opt = jax.tree.map(lambda leaf: leaf[0], stacked)
    else:
        call = (jax.jit if compiled == "jax.jit" else mt.jit)(warmed)
        for lr, x, y in zip(lrs, XS, YS, strict=True):
            opt, _ = call(opt, lr, x, y)
        opt.zero_grad()
        expected.zero_grad()
    assert opt.lr == pytest.approx(0.2)
    assert_same(opt, expected)


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
def test_lr_of_a_whole_ensemble_may_be_assigned(nesterov):
    make = lambda key: optim.SGD([network(key)], lr=0.5, momentum=0.9, nesterov=nesterov)
    ensemble = jax.vmap(make)(KEYS)
    ensemble.lr = 0.1
    ensemble, _ = jax.vmap(step, in_axes=(0, None, None))(ensemble, X, Y)
    for i in range(3):
        alone = make(KEYS[i])
        alone.lr = 0.1
        step(alone, X, Y)
        assert_same(member(ensemble, i), alone)


# -- donation ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@every
def test_donated_optimizers_are_used_up_and_the_result_is_whole(make):
    opt = make([network(KEY)])
    step(opt, X, Y)
    unused = {id(grad) for grad in opt.modules[0].grads()}  # `zero_grad` comes first
    given = [leaf for leaf in jax.tree.leaves(opt) if id(leaf) not in unused]
    assert len(given) == len(jax.tree.leaves(opt)) - 4
    assert {id(p) for p in opt.modules[0].parameters()} < {id(leaf) for leaf in given}
    new, _ = jax.jit(step, donate_argnums=0)(opt, X, Y)
    assert all(leaf.is_deleted() for leaf in given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(opt.modules[0][0].weight)
    expected = make([network(KEY)])
    for _ in range(2):
        step(expected, X, Y)
    assert_same(new, expected)
    again, _ = jax.jit(step, donate_argnums=0)(new, X, Y)
    step(again, X, Y)
    for _ in range(2):
        step(expected, X, Y)
    assert_same(again, expected)


def test_without_donation_nothing_is_used_up():
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    leaves = jax.tree.leaves(opt)
    new, _ = jax.jit(step)(opt, X, Y)
    step(new, X, Y)
    step(opt, X, Y)
    assert not any(leaf.is_deleted() for leaf in [*leaves, *jax.tree.leaves(opt), *jax.tree.leaves(new)])
    expected = OPTIMIZERS["momentum"]([network(KEY)])
    step(expected, X, Y)
    assert_same(opt, expected)
    step(expected, X, Y)
    assert_same(new, expected)


def test_tied_parameters_are_donated_once():
    opt = optim.SGD([Centred(key=KEY)], lr=0.1, momentum=0.9)
    assert len(jax.tree.leaves(opt.modules[0])) == 5
    call = jax.jit(step, donate_argnums=0)
    for _ in range(3):  # JAX refuses to take one buffer twice
        opt, _ = call(opt, X, X)
    expected = optim.SGD([Centred(key=KEY)], lr=0.1, momentum=0.9)
    for _ in range(3):
        step(expected, X, X)
    assert_same(opt, expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("which", ["the original", "the copy"])
def test_donation_of_one_leaves_a_copy_of_it_alone(copied, which):
    """A snapshot taken before a donated loop is there after it: `copy.deepcopy` of an array is another array."""
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    step(opt, X, Y)
    other = copied(opt)
    used, left = (opt, other) if which == "the original" else (other, opt)
    new, _ = jax.jit(step, donate_argnums=0)(used, X, Y)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(left))
    expected = OPTIMIZERS["momentum"]([network(KEY)])
    step(expected, X, Y)
    assert_same(left, expected)
    step(left, X, Y)
    assert_same(left, new)


def test_a_donated_call_that_fails_while_it_is_traced_uses_nothing_up():
    def failing(opt, x, y):
        step(opt, x, y)
        raise ValueError("mine")

    opt = OPTIMIZERS["momentum"]([network(KEY)])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="mine"):
        warnings.simplefilter("ignore")  # of the copy's death
        jax.jit(failing, donate_argnums=0)(opt, X, Y)
    gc.collect()
    assert_same(opt, OPTIMIZERS["momentum"]([network(KEY)]), 0)
    opt, _ = jax.jit(step, donate_argnums=0)(opt, X, Y)
    assert opt.num_steps == 1


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
def test_what_comes_back_is_an_optimizer_like_any_other(make):
    opt, _ = jax.jit(step)(make([network(KEY)]), X, Y)
    expected = make([network(KEY)])
    step(expected, X, Y)

    fresh = make([network(jax.random.key(9))])
    fresh.modules[0].load_state_dict(opt.modules[0].state_dict())
    fresh.load_state_dict(opt.state_dict())
    fresh.modules[0].accumulate(list(expected.modules[0].grads()))
    assert_same(fresh, expected)

    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert_same(copied, expected)
    compiled = mt.jit(step)
    for one in (opt, expected, fresh):
        compiled(one, X, Y)
        mt.scan(lambda x, one=one: step(one, x, Y)[1], XS)
        step(one, X, Y)
    assert compiled.num_compiles == 1
    assert_same(opt, expected)
    assert_same(fresh, expected)

    extra = nn.Linear(3, 2, key=jax.random.key(5))
    for one in (opt, expected):
        one.modules.append(copy.deepcopy(extra))
        mt.backward(mean_error, one.modules[1], X, Y)
        one.step()
        assert one.num_steps == 8
    assert_same(opt, expected)
    assert not np.array_equal(opt.modules[1].weight, extra.weight)


def test_what_passes_through_unchanged_is_a_copy():
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    step(opt, X, Y)
    same = jax.jit(lambda opt: opt)(opt)
    one, two = jax.jit(lambda opt: (opt, opt))(opt)
    expected = OPTIMIZERS["momentum"]([network(KEY)])
    step(expected, X, Y)
    all_of_them = [opt, same, one, two]
    for i, trained in enumerate(all_of_them):
        step(trained, X, Y)
        for other in all_of_them[i + 1 :]:
            assert_same(other, expected)
    step(expected, X, Y)
    for trained in all_of_them:
        assert_same(trained, expected)


def test_an_optimizer_that_is_returned_twice_at_different_times():
    def both(opt, x, y):
        before = jax.tree.map(lambda leaf: leaf, opt)
        return before, step(opt, x, y)[0]

    before, after = jax.jit(both)(OPTIMIZERS["momentum"]([network(KEY)]), X, Y)
    assert_same(before, OPTIMIZERS["momentum"]([network(KEY)]), 0)
    step(before, X, Y)
    assert_same(before, after)


def test_an_optimizer_as_one_of_many_things_that_are_carried():
    def body(carry, x):
        opt, loss = step(carry["opt"], x, Y)
        average = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, carry["average"], opt.modules[0])
        return {"opt": opt, "average": average, "n": carry["n"] + 1}, loss

    opt = OPTIMIZERS["momentum"]([network(KEY)])
    carry = {"opt": opt, "average": copy.deepcopy(opt.modules[0]), "n": 0}
    carry, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, XS))(carry)
    average = [np.asarray(p) for p in opt.modules[0].parameters()]
    for x in XS:
        step(opt, x, Y)
        average = [0.5 * a + 0.5 * np.asarray(p) for a, p in zip(average, opt.modules[0].parameters(), strict=True)]
    assert carry["n"] == 4
    assert_same(carry["opt"], opt)
    for mine, theirs in zip(carry["average"].parameters(), average, strict=True):
        close(mine, theirs)


# -- ensembles ---------------------------------------------------------------------------------------------------------

LRS = jnp.array([0.05, 0.1, 0.2])
KEYS = jax.random.split(KEY, 3)


def member(ensemble, i):
    return jax.tree.map(lambda leaf: leaf[i], ensemble)


def built(make):
    return jax.vmap(lambda key, lr: make([network(key)], lr=lr))(KEYS, LRS)


def stacked(make):
    alone = [make([network(key)], lr=float(lr)) for key, lr in zip(KEYS, LRS, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)


def scan_of_vmap(ensemble):
    body = lambda ensemble, xy: jax.vmap(step, in_axes=(0, None, None))(ensemble, *xy)
    ensemble, losses = jax.lax.scan(body, ensemble, (XS, YS))
    return ensemble, losses.T


def vmap_of_scan(ensemble):
    return jax.vmap(lambda opt: scan(opt, XS, YS))(ensemble)


def map_of_scan(ensemble):
    return jax.lax.map(lambda opt: scan(opt, XS, YS), ensemble)


def steps_of_vmap(ensemble):
    call = jax.jit(jax.vmap(step, in_axes=(0, None, None)), donate_argnums=0)
    ensemble, losses = by_calls(call)(ensemble, XS, YS)
    return ensemble, jnp.stack(losses).T


ENSEMBLES = {
    "jit of scan of vmap": jax.jit(scan_of_vmap),
    "jit of vmap of scan": jax.jit(vmap_of_scan, donate_argnums=0),
    "jit of vmap of jit of scan": jax.jit(lambda ensemble: jax.vmap(jax.jit(lambda o: scan(o, XS, YS)))(ensemble)),
    "jit of map of scan": jax.jit(map_of_scan),
    "vmap of jit of scan": jax.vmap(jax.jit(lambda opt: scan(opt, XS, YS))),
    "vmap of mt.scan": jax.jit(jax.vmap(lambda opt: our_scan(opt, XS, YS))),
    "donated jit of vmap": steps_of_vmap,
    "mt.jit of scan of vmap": mt.jit(scan_of_vmap),
}


@pytest.mark.slow
@pytest.mark.parametrize("train", ENSEMBLES.values(), ids=ENSEMBLES)
def test_each_member_of_an_ensemble_is_the_model_trained_alone(train):
    make = OPTIMIZERS["momentum"]
    ensemble, losses = train(built(make))
    assert losses.shape == (3, 4)
    np.testing.assert_allclose(ensemble.lr, LRS)
    for i in range(3):
        alone, by_step = eager(make([network(KEYS[i])], lr=float(LRS[i])))
        close(losses[i], by_step)
        assert_same(member(ensemble, i), alone)
        one = member(ensemble, i)
        one.lr = alone.lr = 0.3
        step(one, X, Y)
        step(alone, X, Y)
        assert_same(one, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "skip_nonfinite"])
@pytest.mark.parametrize("build", [built, stacked])
def test_ensembles_of_other_optimizers(build, kind):
    make = OPTIMIZERS[kind]
    ensemble, losses = jax.jit(scan_of_vmap)(build(make))
    for i in range(3):
        alone, by_step = eager(make([network(KEYS[i])], lr=float(LRS[i])))
        close(losses[i], by_step)
        assert_same(member(ensemble, i), alone)


def test_an_ensemble_with_a_schedule():
    make = OPTIMIZERS["schedule"]
    ensemble, losses = jax.jit(scan_of_vmap)(jax.vmap(lambda key: make([network(key)]))(KEYS))
    close(ensemble.lr, jnp.full(3, 0.2 / 5))
    for i in range(3):
        alone, by_step = eager(make([network(KEYS[i])]))
        close(losses[i], by_step)
        assert_same(member(ensemble, i), alone)


def test_a_nonfinite_batch_of_one_member_skips_its_step_only():
    make = OPTIMIZERS["skip_nonfinite"]
    xs = jnp.stack([X, X.at[0, 0].set(jnp.inf), X])
    ensemble, _ = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(built(make), xs, Y)
    np.testing.assert_array_equal(ensemble.skipped, [0, 1, 0])
    np.testing.assert_array_equal(ensemble.num_steps, [1, 0, 1])
    start = built(make)
    for i in range(3):
        moved = not np.array_equal(ensemble.modules[0][0].weight[i], start.modules[0][0].weight[i])
        assert moved == (i != 1)


@pytest.mark.slow
def test_one_optimizer_and_many_data_become_an_ensemble():
    make = OPTIMIZERS["momentum"]
    opt = make([network(KEY)])
    ensemble, losses = jax.vmap(step, in_axes=(None, 0, 0))(opt, XS, YS)
    assert_same(opt, make([network(KEY)]), 0)
    for i in range(4):
        alone = make([network(KEY)])
        close(losses[i], step(alone, XS[i], YS[i])[1])
        assert_same(member(ensemble, i), alone)


@pytest.mark.slow
def test_ensembles_of_ensembles():
    make = OPTIMIZERS["momentum"]
    grid = jax.vmap(lambda key: jax.vmap(lambda lr: make([network(key)], lr=lr))(LRS))(KEYS[:2])
    assert grid.modules[0][0].weight.shape == (2, 3, 4, 3)
    grid, losses = jax.jit(jax.vmap(vmap_of_scan))(grid)
    assert losses.shape == (2, 3, 4)
    for i, j in ((0, 2), (1, 0)):
        alone, by_step = eager(make([network(KEYS[i])], lr=float(LRS[j])))
        close(losses[i, j], by_step)
        assert_same(member(member(grid, i), j), alone)


@pytest.mark.slow
def test_the_members_of_an_ensemble_may_share_their_average():
    """Collectives over the axis of the ensemble: data-parallel training, written with vmap."""
    make = OPTIMIZERS["momentum"]

    def parallel(opt, x, y):
        loss, grads = jax.value_and_grad(mean_error)(opt.modules[0], x, y)
        opt.zero_grad()
        opt.modules[0].accumulate(jax.lax.pmean(grads, "replica"))
        opt.step()
        return opt, jax.lax.pmean(loss, "replica")

    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), make([network(KEY)]))
    halves = jnp.stack([X[:2], X[2:4]]), jnp.stack([Y[:2], Y[2:4]])
    many, losses = jax.jit(jax.vmap(parallel, axis_name="replica"))(many, *halves)
    alone = make([network(KEY)])
    close(losses, [step(alone, X[:4], Y[:4])[1]] * 2)
    for i in range(2):
        assert_same(member(many, i), alone)


# -- gradients, checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["eager", "jit", "scan"])
def test_plain_gradients_feed_the_optimizer(where):
    def pure(opt, x, y):
        loss, grads = jax.value_and_grad(mean_error)(opt.modules[0], x, y)
        opt.zero_grad()
        opt.modules[0].accumulate(grads)
        opt.step()
        return opt, loss

    make = OPTIMIZERS["momentum"]
    if where == "scan":
        opt, losses = jax.lax.scan(lambda opt, xy: pure(opt, *xy), make([network(KEY)]), (XS, YS))
    else:
        opt, losses = by_calls(jax.jit(pure) if where == "jit" else pure)(make([network(KEY)]), XS, YS)
    expected, by_step = eager(make([network(KEY)]))
    close(losses, by_step)
    assert_same(opt, expected)


def test_the_gradient_with_respect_to_the_module_of_an_optimizer():
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    grads = jax.grad(lambda model: mean_error(model, X, Y))(opt.modules[0])
    mt.backward(mean_error, opt.modules[0], X, Y)
    for mine, theirs in zip(grads.parameters(), opt.modules[0].grads(), strict=True):
        close(mine, theirs)
    assert np.asarray(grads[0].weight).any()
    many = jax.grad(lambda modules: sum(mean_error(m, X, Y) for m in modules))([*opt.modules, network(KEYS[1])])
    close(many[0][0].weight, grads[0].weight)
    assert np.asarray(many[1][0].weight).any()


def checkpointed(model, x, policy=None):
    run = jax.checkpoint(lambda part, x: part(x), policy=policy)
    return run(model[2], model[1](run(model[0], x)))


def checkpointed_by_closure(model, x):
    inner = jax.checkpoint(lambda x: model[1](model[0](x)))
    return model[2](inner(x))


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "forward",
    [
        checkpointed,
        lambda model, x: checkpointed(model, x, jax.checkpoint_policies.dots_saveable),
        checkpointed_by_closure,
        lambda model, x: jax.checkpoint(lambda model, x: model(x))(model, x),
    ],
    ids=["parts", "policy", "closure", "whole"],
)
@pytest.mark.parametrize("way", ["jax.grad", "mt.backward", "mt.jit", "jax.jit", "mt.grad"])
def test_a_checkpoint_around_modules_in_a_loss_gives_the_same_gradients(forward, way):
    def loss_fn(model, x, y):
        return nn.functional.mse_loss(forward(model, x), y)

    model = network(KEY)
    expected = jax.grad(mean_error)(model, X, Y).parameters()
    if way == "jax.grad":
        grads = jax.grad(loss_fn)(model, X, Y).parameters()
    elif way == "mt.grad":
        grads = mt.grad(loss_fn)(model, X, Y).parameters()
    elif way == "jax.jit":

        def inside(opt):
            mt.backward(loss_fn, opt.modules[0], X, Y)
            return opt

        grads = jax.jit(inside)(mt.Optimizer([model])).modules[0].grads()
    else:
        run = lambda: mt.backward(loss_fn, model, X, Y)
        mt.jit(run)() if way == "mt.jit" else run()
        grads = model.grads()
    assert len(grads) == 4
    for mine, theirs in zip(grads, expected, strict=True):
        close(mine, theirs)


def test_a_checkpoint_is_in_the_program_of_backward():
    """So that there is something to save: its computation is done again."""

    def count(loss_fn):
        text = str(jax.make_jaxpr(lambda model: mt.grad(loss_fn)(model, X, Y))(network(KEY)))
        return text.count("tanh")

    plain = count(mean_error)
    assert count(lambda model, x, y: nn.functional.mse_loss(checkpointed_by_closure(model, x), y)) > plain > 0


@pytest.mark.parametrize("around", ["plain", "backward"])
def test_statistics_changed_within_a_checkpoint(around):
    model = Centred(key=KEY)

    def by_argument(model, x):
        out, new = jax.checkpoint(lambda model, x: (model(x), model))(model, x)
        return (out**2).mean(), new

    def by_closure(model, x):
        return (jax.checkpoint(lambda x: model(x))(x) ** 2).mean()

    def returned(model, x):
        loss, new = by_argument(model, x)
        model.mean = new.mean
        model.count = new.count
        return loss

    before = model.state_dict()
    with pytest.raises(mt.TraceError, match=rf"Centred\.mean(.|\n)*{BOTH_SPELLINGS}"):
        jax.grad(by_closure)(model, X) if around == "plain" else mt.backward(by_closure, model, X)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    eager_model = Centred(key=KEY)
    mt.backward(lambda model, x: (model(x) ** 2).mean(), eager_model, X)
    if around == "plain":
        grads, new = jax.grad(by_argument, has_aux=True)(model, X)
        found = grads.first.weight
    else:
        mt.backward(returned, model, X)
        found, new = model.grads()[0], model
    close(found, eager_model.grads()[0])
    close(new.mean, eager_model.mean)
    assert int(new.count) == 1


def adapted(params, x, y):
    """Two steps of plain gradient descent on a network's arrays, by hand; gives the loss after them."""

    def loss(params):
        w0, b0, w2, b2 = params
        return ((jnp.tanh(x @ w0.T + b0[None]) @ w2.T + b2[None] - y) ** 2).mean()

    for _ in range(2):
        params = [p - 0.1 * g for p, g in zip(params, jax.grad(loss)(params), strict=True)]
    return loss(params)


def after_two_steps(model, x, y):
    opt = optim.SGD([model], lr=0.1)
    for _ in range(2):
        step(opt, x, y)
    return mean_error(opt.modules[0], x, y), opt


@pytest.mark.slow
def test_the_gradient_through_steps_of_training():
    model = network(KEY)
    expected = jax.grad(adapted)(list(model.parameters()), X, Y)
    found, opt = jax.jit(jax.grad(after_two_steps, has_aux=True))(model, X, Y)
    for mine, theirs in zip(found.parameters(), expected, strict=True):
        close(mine, theirs, 1e-4)
    close(mean_error(opt.modules[0], X, Y), adapted(list(model.parameters()), X, Y))
    assert_same(opt, after_two_steps(network(KEY), X, Y)[1])


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_training_within_a_loss_is_told_unless_what_was_trained_is_returned(kept):
    """An inner loop (meta-learning): nothing tells it from an update that was forgotten, but handing it on as `aux`."""
    grads = []
    loss = after_two_steps if kept else lambda *args: after_two_steps(*args)[0]
    messages = told(lambda: grads.append(jax.grad(loss, has_aux=kept)(network(KEY), X, Y)))
    assert (messages == []) is kept
    found = grads[0][0] if kept else grads[0]
    close(found[0].weight, jax.grad(adapted)(list(network(KEY).parameters()), X, Y)[0], 1e-4)


# -- control flow ------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@every
def test_a_step_under_a_condition(make):
    def maybe(opt, pred, x, y):
        return jax.lax.cond(pred, lambda opt: step(opt, x, y)[0], lambda opt: opt, opt)

    call = jax.jit(maybe)
    opt, expected = make([network(KEY)]), make([network(KEY)])
    for pred in (False, True, False, True):
        before = facts(opt)
        opt = call(opt, pred, X, Y)
        if pred:
            step(expected, X, Y)
        else:
            for name, value in facts(opt)[0].items():
                np.testing.assert_array_equal(value, before[0][name])
    assert opt.num_steps == 2
    assert_same(opt, expected)
    step(opt, X, Y)
    step(expected, X, Y)
    assert_same(opt, expected)


def test_a_switch_between_what_is_done():
    def slower(opt):
        opt.lr = 0.5 * opt.lr
        return opt

    def cleared(opt):
        opt.zero_grad()
        return opt

    branches = [lambda opt: step(opt, X, Y)[0], slower, cleared]
    call = jax.jit(lambda i, opt: jax.lax.switch(i, branches, opt))
    opt, expected = (optim.SGD([network(KEY)], lr=0.1, momentum=0.9) for _ in range(2))
    for i in (0, 1, 0, 2):
        opt = call(i, opt)
        branches[i](expected)
    assert opt.lr == 0.05 and not np.asarray(opt.modules[0].grads()[0]).any()
    assert_same(opt, expected)


def test_training_until_the_loss_is_small():
    def train(opt):
        def going(carry):
            opt, loss = carry
            return (loss > 0.1) & (opt.num_steps < 100)

        return jax.lax.while_loop(going, lambda carry: step(carry[0], X, Y), (opt, jnp.float32(jnp.inf)))

    opt, loss = jax.jit(train)(OPTIMIZERS["momentum"]([network(KEY)]))
    expected, last = OPTIMIZERS["momentum"]([network(KEY)]), np.inf
    while last > 0.1 and expected.num_steps < 100:
        last = float(step(expected, X, Y)[1])
    assert 1 < opt.num_steps < 100
    close(loss, last)
    assert_same(opt, expected, 1e-4)


def test_a_condition_by_closure_is_an_error():
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    with pytest.raises(mt.TraceError, match=BOTH_SPELLINGS):
        jax.lax.cond(True, lambda x: step(opt, x, Y)[1], lambda x: x.sum(), X)
    assert_same(opt, OPTIMIZERS["momentum"]([network(KEY)]), 0)


# -- shardings ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sharded_optimizer_stays_sharded():
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    opt = jax.device_put(OPTIMIZERS["momentum"]([network(KEY)]), everywhere)
    x, y = jax.device_put((X[:4], Y[:4]), by_batch)
    call = jax.jit(step, donate_argnums=0)
    for _ in range(2):
        opt, loss = call(opt, x, y)
    assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(opt.modules[0]))
    expected = OPTIMIZERS["momentum"]([network(KEY)])
    for _ in range(2):
        _, by_step = step(expected, X[:4], Y[:4])
    close(loss, by_step)
    step(opt, x, y)
    step(expected, X[:4], Y[:4])
    assert_same(opt, expected)
    assert opt.modules[0][0].weight.sharding.is_equivalent_to(everywhere, 2)


# -- what would be lost ------------------------------------------------------------------------------------------------

DROPPED = {
    "mt.jit in jit": lambda opt: jax.jit(lambda opt: compiled_step(opt, X, Y)[1])(opt),
    "mt.scan in jit": lambda opt: jax.jit(lambda opt: our_scan(opt, XS, YS)[1])(opt),
    "vmap": lambda opt: jax.vmap(lambda opt, x, y: step(opt, x, y)[1], in_axes=(None, 0, 0))(opt, XS, YS),
    "cond": lambda opt: jax.lax.cond(True, lambda opt: step(opt, X, Y)[1], lambda opt: jnp.float32(0), opt),
    "jit of jit": lambda opt: jax.jit(lambda opt: jax.jit(lambda opt: step(opt, X, Y)[1])(opt))(opt),
    "checkpoint": lambda opt: jax.checkpoint(lambda opt: step(opt, X, Y)[1])(opt),
    "jit in mt.jit": lambda opt: mt.jit(lambda opt: jax.jit(lambda opt: step(opt, X, Y)[1])(opt))(opt),
    "vmap in mt.jit": lambda opt: mt.jit(
        lambda opt: jax.vmap(lambda opt, x, y: step(opt, x, y)[1], in_axes=(None, 0, 0))(opt, XS, YS)
    )(opt),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("call", DROPPED.values(), ids=DROPPED)
def test_an_update_of_a_copy_that_is_dropped_is_told(call):
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    texts = told(lambda: call(opt))
    assert len(texts) >= 1
    for text in texts:
        assert text.startswith("A copy of SGD was changed inside a JAX transform (")
    with pytest.warns(mt.DroppedUpdateWarning, match=BOTH_SPELLINGS):
        jax.jit(lambda opt: step(opt, X, Y)[1])(opt)
        gc.collect()
    assert_same(opt, OPTIMIZERS["momentum"]([network(KEY)]), 0)
    step(opt, X, Y)
    assert opt.num_steps == 1


def test_a_model_and_its_optimizer_passed_apart_are_two_copies_and_that_is_told():
    """Inside, `model` is not the one in `opt.modules`: the habit of PyTorch's loops would train nothing."""

    def apart(opt, model, x, y):
        opt.zero_grad()
        loss = mt.backward(mean_error, model, x, y)
        opt.step()
        return opt, loss

    opt = mt.Optimizer([network(KEY)], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(apart)(opt, opt.modules[0], X, Y)
        gc.collect()
    texts = [str(warning.message) for warning in caught]
    assert any("A copy of Sequential was changed" in text and "a gradient" in text for text in texts), texts
    assert any("no gradient accumulated since zero_grad" in text for text in texts), texts


@pytest.mark.slow
def test_loops_that_return_the_optimizer_are_not_told():
    make = OPTIMIZERS["momentum"]
    assert told(lambda: jax.jit(our_scan)(make([network(KEY)]), XS, YS)) == []
    assert told(lambda: jax.jit(lambda *args: compiled_step(*args))(make([network(KEY)]), X, Y)) == []
    assert told(lambda: jax.jit(scan_of_vmap)(built(make))) == []
    assert told(lambda: jax.jit(vmap_of_scan)(built(make))) == []
    cond = lambda opt: jax.lax.cond(True, lambda opt: step(opt, X, Y)[0], lambda opt: opt, opt)
    assert told(lambda: jax.jit(cond)(make([network(KEY)]))) == []
    assert told(lambda: mt.jit(scan)(make([network(KEY)]), XS, YS)) == []


FROZEN = {
    "jit": lambda opt: jax.jit(step)(opt, X, Y),
    "scan": lambda opt: jax.lax.scan(lambda opt, xy: step(opt, *xy), opt, (XS, YS)),
    "mt.jit in jit": lambda opt: jax.jit(lambda *args: compiled_step(*args))(opt, X, Y),
    "mt.scan in jit": lambda opt: jax.jit(our_scan)(opt, XS, YS),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("call", FROZEN.values(), ids=FROZEN)
def test_a_returned_optimizer_with_frozen_parameters_is_not_told(call):
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    opt.modules[0][0].freeze()
    assert told(lambda: call(opt)) == []


CLOSURES = {
    "mt.jit in jit": lambda opt: jax.jit(lambda x: compiled_step(opt, x, Y)[1])(X),
    "mt.jit by closure in jit": lambda opt: jax.jit(mt.jit(lambda x: step(opt, x, Y)[1]))(X),
    "mt.scan in jit": lambda opt: jax.jit(lambda xs: mt.scan(lambda x: step(opt, x, Y)[1], xs))(XS),
    "mt.scan in vmap": lambda opt: jax.vmap(lambda x: mt.scan(lambda: step(opt, x, Y)[1], length=2))(XS),
    "map": lambda opt: jax.lax.map(lambda x: step(opt, x, Y)[1], XS),
    "while": lambda opt: jax.lax.while_loop(
        lambda loss: loss > 0.1, lambda loss: step(opt, X, Y)[1], jnp.float32(jnp.inf)
    ),
    "fori_loop": lambda opt: jax.lax.fori_loop(0, 3, lambda i, loss: loss + step(opt, X, Y)[1], 0.0),
    "eval_shape": lambda opt: jax.eval_shape(lambda x: step(opt, x, Y)[1], X),
    "make_jaxpr": lambda opt: jax.make_jaxpr(lambda x: step(opt, x, Y)[1])(X),
    "jit in mt.jit": lambda opt: mt.jit(lambda x: jax.jit(lambda x: step(opt, x, Y)[1])(x))(X),
    "scan in mt.jit": lambda opt: mt.jit(
        lambda xs: jax.lax.scan(lambda total, x: (total + step(opt, x, Y)[1], None), 0.0, xs)
    )(XS),
    "vmap in mt.scan": lambda opt: mt.scan(lambda x: jax.vmap(lambda row: step(opt, row[None], Y[:1])[1])(x), XS),
    "opt.step itself": lambda opt: jax.jit(opt.step)(),
    "opt.zero_grad itself": lambda opt: jax.jit(opt.zero_grad)(),
    "outer": lambda opt: jax.jit(lambda opt: (jax.vmap(lambda x: step(opt, x, Y)[1])(XS), opt))(opt),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("call", CLOSURES.values(), ids=CLOSURES)
def test_an_optimizer_changed_by_closure_is_an_error_that_names_what_works(call):
    opt = OPTIMIZERS["momentum"]([network(KEY)])
    step(opt, X, Y)
    with pytest.raises(mt.TraceError, match=BOTH_SPELLINGS):
        call(opt)
    expected = OPTIMIZERS["momentum"]([network(KEY)])
    step(expected, X, Y)
    assert_same(opt, expected, 0)
    step(opt, X, Y)
    step(expected, X, Y)
    assert_same(opt, expected, 0)


def test_an_optimizer_is_no_static_argument():
    opt = OPTIMIZERS["plain"]([network(KEY)])
    with pytest.raises((TypeError, ValueError), match="(?i)hash"):
        jax.jit(step, static_argnums=0)(opt, X, Y)
