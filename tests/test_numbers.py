"""Numbers at the ends of what float32 and int32 hold: averages near 1, step counts, float64 outside of x64 mode."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import OPTIMIZERS, loss_of, matrix, numbers_of, stepped

import minitorch_jax as mt
from minitorch_jax import nn, optim

LAST = 2**31 - 1

# -- 1 - α ------------------------------------------------------------------------------------------------------------


def trained(kind, dtype, setting, number, steps=3):
    """The parameter after some steps with gradients that are given, in float32 or in float64 (which is the reference)."""
    layer = matrix(dtype=dtype)
    opt = kind([layer], **{setting: number})
    for i in range(steps):
        layer.zero_grad()
        layer.accumulate([jnp.asarray([[1.0, -2.0], [3.0, 0.5]], dtype) * (i + 1)])
        opt.step()
    return np.asarray(layer.weight, np.float64)


def averages():
    """Every optimizer's numbers that may be nearly 1 and are below it, with the numbers to try: (name, setting, number)."""
    for name, kind in OPTIMIZERS.items():
        for setting, default in numbers_of(kind).items():
            first = default[0] if isinstance(default, tuple) else default
            if 0.5 <= first < 1 and setting not in ("lr", "etas"):
                for near in (0.9999, 0.999999, 0.99999999):
                    number = tuple(min(near, 0.9999999) for _ in default) if isinstance(default, tuple) else near
                    yield name, setting, number
    yield from (("SGD", "dampening", near) for near in (0.9999, 0.99999999))


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("name", "setting", "number"), list(averages()))
def test_one_minus_a_number_near_one_is_exact(name, setting, number):
    """In float32 as in float64: 1 - 0.99999999 is 0 in float32, and 1 - 0.999999 is off by 5 %."""
    kind = OPTIMIZERS[name]
    more = {"momentum": 0.9} if setting == "dampening" else {}
    kind_ = (lambda modules, **given: kind(modules, **given, **more)) if more else kind
    narrow = trained(kind_, jnp.float32, setting, number)
    with jax.enable_x64(True):
        wide = trained(kind_, jnp.float64, setting, number)
    start = np.asarray([[1.0, -2.0], [3.0, 0.5]])
    np.testing.assert_allclose(narrow - start, wide - start, rtol=2e-4, atol=2e-6)


def test_numbers_near_one_are_torchs():
    """RMSprop and Adadelta, three steps from [1, -2, 3, 0.5] with its multiples as gradients: torch 2.13's, in float64."""
    for kind, setting in ((optim.RMSprop, "alpha"), (optim.Adadelta, "rho")):
        for number in (0.999999, 0.99999999):
            got = trained(kind, jnp.float32, setting, number)
            np.testing.assert_allclose(got, TORCH[kind.__name__, number], rtol=2e-5)


TORCH = {
    ("RMSprop", 0.999999): [[-25.961950352167342, 24.96203106553454], [-23.962057970127624, -26.461788927287127]],
    ("RMSprop", 0.99999999): [[-268.6049496365491, 267.61302013806767], [-266.6157104425688, -269.08881048717075]],
    ("Adadelta", 0.999999): [[-1.931851899183822, 1.480784049160988], [-0.6378486024147654, -1.6084598330142508]],
    ("Adadelta", 0.99999999): [[-4.83338956824214, 8.89370636886649], [-12.017229598041194, -2.4779516403534014]],
}


def test_a_users_rule_has_one_minus_each_number_too():
    class Mine(mt.Optimizer):
        def __init__(self, modules, lr=1.0, decay=0.9, pair=(0.5, 0.25)):
            super().__init__(modules, lr, decay=decay, pair=pair)

        @staticmethod
        def update(p, g, s, h):
            return p - h.lr * jnp.stack([h.one_minus.decay, *h.one_minus.pair, h.one_minus.lr]).reshape(2, 2), s

    layer = matrix(0.0)
    opt = Mine([layer], lr=lambda t: 0.75, decay=0.99999999, pair=(0.9999999, 0.25))
    for again in (opt, jax.tree.map(lambda a: a, opt)):
        stepped(again)
        got = -np.asarray(again.modules[0].weight).reshape(-1) / 0.75
        np.testing.assert_allclose(got, [1e-8, 1e-7, 0.75, 0.25], rtol=1e-6)
        layer.weight = jnp.zeros((2, 2))


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_counts_stay_at_their_end(name):
    """The steps that follow are those of an optimizer that has taken very many: finite, and equal to each other's."""
    layer = matrix(0.5)
    opt = OPTIMIZERS[name]([layer])
    stepped(opt)
    state = opt.state_dict()
    state |= {"num_steps": LAST - 1, "skipped": LAST}
    for fields in state["state"].values():
        fields["step"] = LAST - 1
    opt.load_state_dict(state)
    counts = []
    for _ in range(3):
        stepped(opt)
        assert np.isfinite(layer.weight).all()
        found = opt.state_dict()
        counts.append((opt.num_steps, opt.skipped, *(fields["step"] for fields in found["state"].values())))
    assert counts == [(LAST, LAST, LAST)] * 3


def test_other_counts_stay_at_their_end():
    norm = nn.BatchNorm1d(2, momentum=None)
    norm.num_batches_tracked = jnp.full_like(norm.num_batches_tracked, LAST - 1)
    averaged, scaler = optim.AveragedModel(norm), mt.LossScaler()
    averaged.num_averaged = jnp.int32(LAST)
    scaler.load_state_dict({**scaler.state_dict(), "skipped": LAST})
    opt = optim.SGD([norm])
    for _ in range(2):
        loss = scaler.backward(lambda x: (norm(x) * jnp.inf).sum(), jnp.asarray([[1.0, 2.0], [3.0, 5.0]]))
        scaler.step(opt)
        averaged.update(norm)
        assert norm.num_batches_tracked == averaged.num_averaged == scaler.skipped == LAST, loss
        assert np.isfinite(norm.running_mean).all() and np.isfinite(averaged.module.running_mean).all()


# -- float64 outside of x64 mode ----------------------------------------------------------------------------------------


def wide_setup(kind=optim.Adam):
    with jax.enable_x64(True):
        layer = matrix(dtype=jnp.float64)
        opt = kind([layer])
        stepped(opt, jnp.ones((3, 2), jnp.float64))
    return layer, opt


def wide(*objects):
    leaves = [a for obj in objects for a in jax.tree.leaves(obj)]
    return [a.dtype for a in leaves if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim == 2]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_float64_model_stays_one_outside_of_its_block(name):
    layer, opt = wide_setup(OPTIMIZERS[name])
    alone, other = wide_setup(OPTIMIZERS[name])

    def closure(opt):
        with jax.enable_x64(True):  # the losses are the user's: they ask for float64 where they are computed
            opt.zero_grad()
            return mt.backward(loss_of, opt.modules[0], jnp.ones((3, 2)))

    def step(opt):
        if isinstance(opt, optim.LBFGS):
            opt.step(lambda: closure(opt))
        else:
            closure(opt)
            opt.step()

    with jax.enable_x64(True):
        step(other)
    step(opt)
    assert layer.weight.dtype == layer.grads()[0].dtype == jnp.float64
    assert {*wide(opt)} == {np.dtype("float64")}
    np.testing.assert_allclose(layer.weight, alone.weight, rtol=1e-12)


ACTIONS = {
    "step in jit": lambda layer, opt: mt.jit(lambda opt: opt.step())(opt),
    "clip_grad_norm": lambda layer, opt: mt.clip_grad_norm(layer, 0.1),
    "clip_grad_value": lambda layer, opt: mt.clip_grad_value(layer, 0.1),
    "scale_grads": lambda layer, opt: mt.scale_grads(layer, 0.1),
    "clip in jit": lambda layer, opt: mt.jit(
        lambda layer: (layer.accumulate(layer.grads()), mt.clip_grad_norm(layer, 0.1), None)[-1]
    )(layer),
    "average": lambda layer, opt: averaged_twice(layer),
    "deepcopy": lambda layer, opt: copy.deepcopy(opt),
    "pickle": lambda layer, opt: pickle.loads(pickle.dumps(opt)),
    "pack": lambda layer, opt: (mt.pack(layer), opt.step()),
    "scaler": lambda layer, opt: scaled(mt.LossScaler(), layer, opt),
    "load": lambda layer, opt: (layer.load_state_dict(layer.state_dict()), opt.load_state_dict(opt.state_dict())),
    "another optimizer": lambda layer, opt: optim.AdamW([layer]).step(),
    "skip_nonfinite": lambda layer, opt: (setattr(opt, "skip_nonfinite", True), opt.step()),
}


def averaged_twice(layer):
    averaged = optim.AveragedModel(layer, 0.5)
    averaged.update(layer)
    averaged.update(layer)
    return averaged


def scaled(scaler, layer, opt):
    with jax.enable_x64(True):
        scaler.backward(loss_of, layer, jnp.ones((3, 2)))
    scaler.unscale(opt)
    scaler.step(opt)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("what", ACTIONS)
def test_nothing_makes_float32_of_float64_unasked(what):
    layer, opt = wide_setup()
    result = ACTIONS[what](layer, opt)
    assert layer.weight.dtype == layer.grads()[0].dtype == jnp.float64
    assert {*wide(layer, opt, *([result] if isinstance(result, mt.Module | mt.Optimizer) else []))} == {
        np.dtype("float64")
    }
