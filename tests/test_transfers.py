"""`jax.transfer_guard("disallow")`: what brings numbers of ours to a device does so explicitly."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import OPTIMIZERS, loss_of, matrix, stepped

import minitorch_jax as mt
from minitorch_jax import nn, optim

X = jnp.ones((3, 2))
HALF = optim.schedules.exponential(0.5, 0.5)


class Net(mt.Module):
    def __init__(self):
        self.inner, self.norm = matrix(), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.inner(x))


def train(model, opt, x):
    opt.zero_grad()
    loss = mt.backward(loss_of, model, x)
    mt.clip_grad_norm(model, 1.0)
    opt.step()
    return loss


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_is_set_under_the_guard(name):
    """From its construction on, compiled or not: settings, schedules, states; of one optimizer also in compiled code."""
    kind, model, batches = OPTIMIZERS[name], matrix(), X[None]
    with jax.transfer_guard("disallow"):
        opt = kind([model])
        stepped(opt, X)
        opt.lr = 0.05
        stepped(opt, X)
        assert opt.lr == 0.05 and repr(opt)
        opt.lr = HALF
        stepped(opt, X)
        assert 0 < opt.lr < 0.5 and opt.num_steps == 3 and opt.skipped == 0
        opt.lr = 0.1
        opt.load_state_dict(opt.state_dict())
        for _ in range(2 if name == "AdamW" else 0):
            mt.jit(train)(model, opt, X)
            mt.scan(train, model, opt, batches)
            opt.lr = 0.2  # after compiled code has stored the vector
            opt.track_grad_norm = opt.skip_nonfinite = True
            stepped(opt, X)
            assert float(opt.grad_norm) > 0 and opt.grads_finite and opt.lr == 0.2


def actions():
    model = Net()
    opt, averaged, equal = optim.Adam([model]), optim.AveragedModel(model, 0.9), optim.AveragedModel(model)
    other, third = Net(), matrix()
    scaler, plateau = mt.LossScaler(), optim.ReduceOnPlateau(opt, patience=0)

    def scaled():
        scaler.backward(loss_of, model, X)
        scaler.unscale(opt)
        scaler.step(opt)
        scaler.scale = 2.0 * scaler.scale
        scaler.load_state_dict(scaler.state_dict())
        return scaler.skipped

    def grouped():
        groups = optim.Adam([{"modules": [model.inner], "lr": 0.1}, {"modules": [third]}])
        groups.groups[1].betas = (0.5, 0.75)
        groups.add_group({"modules": [model.norm], "lr": HALF})
        mt.backward(lambda: loss_of(model, X) + loss_of(third, X))
        groups.step()

    def stepped_of(opt):
        mt.backward(loss_of, model, X)
        opt.step()

    def clipped():
        mt.backward(loss_of, model, X)
        mt.clip_grad_norm(model, 1.0)
        mt.clip_grad_norm(model, 1.0, norm_type=float("inf"), error_if_nonfinite=True)
        mt.clip_grad_value(opt, 0.5)
        mt.scale_grads([model], 0.5)

    def packed():
        other_opt = optim.Adam([other])
        mt.pack(other)
        train(other, other_opt, X)
        return jax.tree.map(lambda a: a, (other, other_opt)), other.inner.weight, other.grads()[0]

    def saved(path):
        mt.save(path / "a.npz", model=model, opt=opt, scaler=scaler)
        mt.load(path / "a.npz", model=model, opt=opt, scaler=scaler)

    compiled = mt.jit(lambda averaged, model: averaged.update(model))
    return {
        "backward": lambda _: mt.backward(loss_of, model, X),
        "value_and_grad": lambda _: mt.value_and_grad(loss_of)(model, X),
        "clip": lambda _: clipped(),
        "batch norm": lambda _: (model.train()(X), model.eval()(X), model.train(), mt.backward(loss_of, model, X)),
        "average": lambda _: (averaged.update(model), equal.update(model), averaged(X)),
        "a new average": lambda _: optim.AveragedModel(model, 0.5).update(model),
        "average in jit": lambda _: compiled(averaged, model),
        "scaler": lambda _: scaled(),
        "a new scaler": lambda _: mt.LossScaler(),
        "plateau": lambda _: [plateau.step(value) for value in (1.0, 2.0, 3.0)],
        "groups": lambda _: grouped(),
        "grads": lambda _: (model.zero_grad(), model.grads()[0], model.accumulate(model.grads())),
        "copies": lambda _: (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), jax.tree.map(lambda a: a, opt)),
        "pack": lambda _: packed(),
        "save": saved,
        "seed": lambda _: (mt.seed(1), mt.next_key()),
        "freeze": lambda _: (model.inner.freeze(), stepped_of(opt), model.inner.unfreeze(), stepped_of(opt)),
    }


@pytest.mark.one_in(4)
@pytest.mark.parametrize("what", actions())
def test_what_else_trains_works_under_the_guard(what, tmp_path):
    run = actions()[what]
    for _ in range(2):
        with jax.transfer_guard("disallow"):
            run(tmp_path)


def test_the_guard_still_holds_for_the_users_own_transfers():
    model = matrix()
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # noqa: B017
            mt.backward(lambda model, x: loss_of(model, x), model, np.ones((3, 2), np.float32))
