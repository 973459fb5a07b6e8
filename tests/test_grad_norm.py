"""`track_grad_norm=True`: the norm and the finiteness of the last step's gradients, from the program of the step."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import X, Y, pair, squared, step

import minitorch_jax as mt
from minitorch_jax import optim


def expected(model, x=X, y=Y):
    grads = jax.grad(lambda leaves, x, y: squared(jax.tree.unflatten(jax.tree.structure(model), leaves), x, y))(
        [jnp.copy(leaf) for leaf in jax.tree.leaves(model)], x, y
    )
    return float(np.sqrt(sum(np.square(np.float64(g)).sum() for g in grads)))


def test_it_is_the_norm_of_all_gradients():
    model, opt = pair(track_grad_norm=True)
    assert (float(opt.grad_norm), bool(opt.grads_finite)) == (0.0, True)
    for _ in range(3):
        wanted = expected(model.eval())
        model.train()
        step(model, opt, X, Y)
        np.testing.assert_allclose(opt.grad_norm, wanted, rtol=1e-6)
        assert opt.grad_norm.shape == opt.grads_finite.shape == () and opt.grad_norm.dtype == np.float32
        assert opt.grads_finite.dtype == bool and opt.grads_finite


def norms_of(loop):
    model, opt = pair(track_grad_norm=True)
    found = []
    loop(model, opt, found)
    return found


def eager(model, opt, found):
    for _ in range(3):
        step(model, opt, X, Y)
        found.append(float(opt.grad_norm))


def jitted(model, opt, found):
    train = mt.jit(step)
    for _ in range(3):
        train(model, opt, X, Y)
        found.append(float(opt.grad_norm))


def within(model, opt, found):
    @mt.jit
    def train(x, y):
        step(model, opt, x, y)
        return opt.grad_norm, opt.grads_finite

    for _ in range(3):
        norm, finite = train(X, Y)
        assert finite
        found.append(float(norm))


def scanned(model, opt, found):
    def train(x, y):
        step(model, opt, x, y)
        return opt.grad_norm

    found += mt.scan(train, jnp.stack([X] * 3), jnp.stack([Y] * 3)).tolist()
    assert float(opt.grad_norm) == found[-1]


def functional(model, opt, found):
    @jax.jit
    def train(opt, x, y):
        step(opt.modules[0], opt, x, y)
        return opt

    for _ in range(3):
        opt = train(opt, X, Y)
        found.append(float(opt.grad_norm))


def packed(model, opt, found):
    mt.pack(model)
    eager(model, opt, found)


@pytest.mark.parametrize("loop", [jitted, within, scanned, functional, packed])
def test_it_is_the_same_in_every_loop(loop):
    np.testing.assert_allclose(norms_of(loop), norms_of(eager), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("skip", [False, True])
def test_it_tells_of_gradients_that_are_not_finite(bad, skip):
    model, opt = pair(track_grad_norm=True, skip_nonfinite=skip)
    step(model, opt, X, Y)
    before = np.array(model.weight)
    model.grads()[0] = jnp.full(3, bad)
    opt.step()
    assert not opt.grads_finite and not np.isfinite(opt.grad_norm)
    assert opt.skipped == int(skip) and np.array_equal(before, model.weight) == skip


def test_a_norm_that_overflows_is_not_taken_for_a_gradient_that_is_not_finite():
    model, opt = pair(track_grad_norm=True)
    model.accumulate([jnp.full(3, 1e30), jnp.zeros(())])
    opt.step()
    assert opt.grads_finite and np.isinf(opt.grad_norm)


def test_it_is_of_all_groups_and_can_be_a_groups_setting():
    one, two = pair()[0], pair()[0]
    opt = optim.SGD([{"modules": [one], "track_grad_norm": True}, {"modules": [two], "lr": 0.0}], lr=0.1)
    for model, value in ((one, 3.0), (two, 4.0)):
        model.accumulate([jnp.array([value, 0.0, 0.0]), jnp.zeros(())])
    opt.step()
    assert float(opt.grad_norm) == 5.0


def test_it_counts_numpy_modules_too():
    class Old:
        def __init__(self):
            self.p, self.g = np.ones(2), np.array([3.0, 4.0])

        def parameters(self):
            return [self.p]

        def grads(self):
            return [self.g]

    opt = mt.Optimizer([Old()], lr=0.5, track_grad_norm=True)
    opt.step()
    assert float(opt.grad_norm) == 5.0 and opt.grad_norm.dtype == np.float32
    np.testing.assert_array_equal(opt.modules[0].p, [-0.5, -1.0])


def test_it_can_be_turned_on_and_off():
    model, opt = pair()
    for read in ("grad_norm", "grads_finite"):
        with pytest.raises(RuntimeError, match=r"track_grad_norm=True.*opt\.track_grad_norm = True"):
            getattr(opt, read)
    opt.track_grad_norm = True
    step(model, opt, X, Y)
    assert float(opt.grad_norm) > 0
    opt.track_grad_norm = False
    step(model, opt, X, Y)
    with pytest.raises(RuntimeError, match="takes no note"):
        opt.grad_norm  # noqa: B018


def test_reading_it_lends_nothing_and_compiles_nothing():
    """Else the next step would copy; and the array that was read stays what it was."""
    from minitorch_jax.state.concurrent_reads import lendings

    model, opt = pair(track_grad_norm=True)
    step(model, opt, X, Y)
    first, value = opt.grad_norm, float(opt.grad_norm)
    last = lendings.last
    opt.grad_norm, opt.grads_finite  # noqa: B018
    assert lendings.last is last
    step(model, opt, X, Y)
    assert float(first) == value != float(opt.grad_norm)


def test_it_travels_with_copies_but_is_no_state():
    model, opt = pair(track_grad_norm=True)
    step(model, opt, X, Y)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), jax.tree.map(jnp.copy, opt)):
        assert float(other.grad_norm) == float(opt.grad_norm)
        other.step()
        assert float(other.grad_norm) == float(opt.grad_norm)
    other = pair(track_grad_norm=True)[1]
    other.load_state_dict(opt.state_dict())
    assert float(other.grad_norm) == 0.0


def test_ensembles_have_one_each():
    opts = [pair(value, track_grad_norm=True)[1] for value in (1.0, 2.0)]

    @jax.jit
    @jax.vmap
    def train(opt):
        step(opt.modules[0], opt, X, Y)
        return opt

    many = train(jax.tree.map(lambda a, b: jnp.stack([a, b]), *opts))
    assert many.grad_norm.shape == (2,)
    for i, opt in enumerate(opts):
        step(opt.modules[0], opt, X, Y)
        np.testing.assert_allclose(many.grad_norm[i], opt.grad_norm, rtol=1e-6)


def test_lbfgs_refuses_it():
    with pytest.raises(ValueError, match="track_grad_norm does not apply"):
        optim.LBFGS([pair()[0]]).track_grad_norm = True
