"""What is compiled is bounded, and keeps nobody's objects alive."""

import functools
import gc
import weakref

import jax.numpy as jnp
import pytest
from optimizers import loss_of, matrix, stepped

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.optim import update
from minitorch_jax.runtime.bounded_cache import Kept

X = jnp.ones((3, 2))


@mt.jit
def train(model, opt, loss_fn, x):  # one function for all, as a library has it
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, x)
    opt.step()
    return loss


class Rate:
    def __init__(self, owner):
        self.owner = owner

    def __call__(self, t):
        return self.owner.base


SCHEDULES = {
    "method": lambda owner: owner.rate,
    "lambda": lambda owner: lambda t: owner.base,
    "partial": lambda owner: functools.partial(Trainer.rate, owner),
    "object": Rate,
    "within ours": lambda owner: optim.schedules.warmup(owner.rate, 3),
    "joined": lambda owner: optim.schedules.join([0.1, owner.rate], [1]),
}
USES = {
    "step": lambda self: stepped(self.opt, X),
    "packed": lambda self: (mt.pack(self.model), stepped(self.opt, X)),
    "jit": lambda self: train(self.model, self.opt, loss_of, X),
    "static": lambda self: train(self.model, self.opt, self.loss, X),
    "static of a shared model": lambda self: train(SHARED.modules[0], SHARED, self.loss, X),
    "scan": lambda self: mt.scan(train, self.model, self.opt, loss_of, X[None]),
    "scaler": lambda self: scaled(mt.LossScaler(), self.model, self.opt),
    "closure": lambda self: (mt.backward(lambda: self.loss(self.model, X)), self.opt.step()),
    "average": lambda self: (stepped(self.opt, X), optim.AveragedModel(self.model).update(self.model)),
    "clip": lambda self: (stepped(self.opt, X), mt.clip_grad_norm(self.opt, 1.0)),
    "lbfgs": lambda self: stepped(optim.LBFGS([self.model], lr=self.opt._stated("lr"), max_iter=2), X),
}


def scaled(scaler, model, opt):
    scaler.backward(loss_of, model, X)
    scaler.step(opt)


SHARED = optim.SGD([matrix()], lr=0.0)


class Trainer:
    def __init__(self, schedule, **group):
        self.model, self.base = matrix(), 0.1
        rate = SCHEDULES[schedule](self)
        modules = [{"modules": [self.model], "lr": rate}] if group else [self.model]
        self.opt = optim.Adam(modules, **group or {"lr": rate})

    def rate(self, t):
        return self.base

    def loss(self, model, x):
        return loss_of(model, x) * self.base


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("schedule", "use", "group"),
    [("method", use, {}) for use in USES]
    + [(name, use, group) for name in SCHEDULES for use, group in (("step", {}), ("jit", {"lr": 0.1}))],
)
@pytest.mark.filterwarnings("ignore::minitorch_jax.RecompileWarning", "ignore:train reaches:UserWarning")
def test_a_schedule_does_not_keep_its_owner(schedule, use, group):
    trainers = []
    for _ in range(2):
        trainer = Trainer(schedule, **group)
        USES[use](trainer)
        trainers.append(weakref.ref(trainer))
        del trainer
    gc.collect()
    assert [reference() for reference in trainers] == [None, None]


def test_equal_schedules_share_their_programs_one_after_another(monkeypatch):
    """A sweep: each optimizer has gone when the next one is made."""
    monkeypatch.setattr(update, "_steps", Kept())
    for make in (lambda: 0.1, lambda: optim.schedules.cosine(0.1, 7), lambda: optim.schedules.warmup(half, 7)):
        for _ in range(3):
            stepped(optim.NAdam([matrix()], lr=make()), X)
            gc.collect()
    assert len(update._steps) == 3


def half(t):
    return 0.5


def program_count():
    gc.collect()
    return sum(isinstance(obj, mt.engine.call_and_store.Compiled) for obj in gc.get_objects())


def loops():
    """What notebooks run again and again: something is defined anew each time."""

    def schedules():
        stepped(optim.SGD([matrix()], lr=lambda t: 0.1), X)

    def losses(model=SHARED.modules[0]):
        train(model, SHARED, lambda model, x: loss_of(model, x), X)

    def rules():
        class Mine(mt.Optimizer):
            @staticmethod
            def update(p, g, s, h):
                return p - h.lr * g, s

        stepped(Mine([matrix()], lr=0.1), X)

    def models():
        class Net(mt.Module):
            def __init__(self):
                self.inner = matrix()

            def forward(self, x):
                return self.inner(x)

        net = Net()
        train(net, optim.SGD([net]), loss_of, X)

    lengths = iter(range(1, 1000))

    def scans(model=SHARED.modules[0]):
        mt.scan(lambda_of_scan, model, jnp.ones((next(lengths), 2)))

    return {f.__name__: f for f in (schedules, losses, rules, models, scans)}


def lambda_of_scan(model, x):
    return model(x[None]).sum()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("what", loops())
@pytest.mark.filterwarnings("ignore::minitorch_jax.RecompileWarning")
def test_what_is_defined_anew_in_a_loop_does_not_pile_up(what, monkeypatch):
    """With room for three of each kind, so that a few rounds show what a hundred would."""
    monkeypatch.setattr(Kept.__init__, "__defaults__", (3,))
    for kept in [update._steps, train._function.programs]:
        monkeypatch.setattr(kept, "_most", 3)
    run = loops()[what]
    for _ in range(4):
        run()
        gc.collect()  # a model that is gone by then makes room, if its class is defined again
    before = program_count()
    for _ in range(4):
        run()
        gc.collect()  # a model that is gone by then makes room, if its class is defined again
    assert program_count() <= before


def test_a_key_keeps_no_function_and_no_object_alive():
    class Object:
        def method(self):
            return 0

    kept, first, second = Kept(most=2), Object(), Object()
    kept.set(("a", (first.method, 1)), "first")
    kept.set(("a", second), "second")
    assert kept.get(("a", (first.method, 1))) == "first" and kept.get(("a", second)) == "second"
    assert kept.get(("a", (second.method, 1))) is None and kept.get(("a", first)) is None
    del first
    gc.collect()
    assert len(kept) == 1
    kept.set(1, "third")
    assert kept.get(("a", second)) == "second"
    kept.set(2, "fourth")  # the one that was used last stays
    assert kept.get(1) is None and kept.get(("a", second)) == "second" and len(kept) == 2


def test_every_layer_can_be_part_of_a_key():
    """A function that a module holds is compared by identity, as before: two models that share it share a program."""

    class Net(mt.Module):
        def __init__(self, act):
            self.inner, self.act = matrix(), act

        def forward(self, x):
            return self.act(self.inner(x))

    call = mt.jit(lambda model, x: model(x))
    for act in (nn.functional.relu, nn.functional.relu, jnp.tanh):
        call(Net(act), X)
    assert call.num_compiles == 2


@pytest.mark.one_in(4)
@pytest.mark.parametrize("what", ["models", "rules", "functions", "lambdas"])
@pytest.mark.filterwarnings("ignore::minitorch_jax.RecompileWarning")
def test_what_is_defined_again_takes_the_place_of_what_was_before(what):
    """As in a notebook, long before the bounds are reached."""
    scope = {"mt": mt, "matrix": matrix, "X": X, "loss_of": loss_of, "train": train, "optim": optim, "stepped": stepped}
    run = compile(DEFINED_AGAIN[what], "<cell>", "exec")
    again = compile(DEFINED_AGAIN[what] + "\n", "<another cell>", "exec")
    counts = []
    for code in [run, again] * 3 if what != "lambdas" else [run] * 6:
        exec(code, scope)
        counts.append(program_count())
    assert counts[-1] <= counts[1]


DEFINED_AGAIN = {
    "models": """class Net(mt.Module):
    def __init__(self):
        self.inner = matrix()
    def forward(self, x):
        return self.inner(x)
net = Net()
opt = optim.SGD([net])
train(net, opt, loss_of, X)
opt.zero_grad()
mt.backward(loss_of, net, X)""",
    "rules": """class Rule(mt.Optimizer):
    @staticmethod
    def update(p, g, s, h):
        return p - h.lr * g, s
stepped(Rule([matrix()], lr=0.1), X)""",
    "functions": """model = matrix()
def loss(x):
    return (model(x) ** 2).mean()
mt.backward(loss, X)
step = mt.jit(loss)
step(X)
mt.scan(loss, X[None])""",
    "lambdas": """model = matrix()
for _ in range(10):
    mt.backward(lambda x: (model(x) ** 2).mean(), X)
    mt.jit(lambda x: (model(x) ** 2).mean())(X)
    mt.scan(lambda x: (model(x) ** 2).mean(), X[None])""",
}
