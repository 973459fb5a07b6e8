"""Structure is local: what happens to other objects does not touch compiled code, and what happens to its own does."""

import copy
import gc
import pickle
import threading

import jax
import jax.numpy as jnp
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.engine.compiled_function import Function
from minitorch_jax.optim import optimizer as optimizer_file
from minitorch_jax.state import walk

X = jnp.array([[0.1, -0.4, 0.3], [0.8, 0.2, -0.5], [-0.3, 0.6, 0.9]])


def make(rule=optim.SGD, **settings):
    model = nn.Sequential(
        nn.Linear(3, 3, key=jax.random.key(0)), nn.BatchNorm1d(3), nn.Linear(3, 3, key=jax.random.key(1))
    )
    return model, rule([model], lr=0.01, **settings)


def loss_of(model, x):
    return (model(x) ** 2).mean()


def train(model, opt):
    opt.zero_grad()
    loss = mt.backward(loss_of, model, X)
    opt.step()
    return loss


class Form:
    """A way to train, warmed up."""

    def __init__(self, name):
        self.model, self.opt = make(momentum=0.9)
        model, opt = self.model, self.opt
        if name == "jit":
            step = mt.jit(lambda x: train(model, opt))
            self.run = lambda: step(X)
        elif name == "jit of arguments":
            step = mt.jit(lambda model, opt, x: train(model, opt))
            self.run = lambda: step(model, opt, X)
        elif name == "eager":
            self.run = lambda: train(model, opt)
        elif name == "batch in a dict":
            step = mt.jit(lambda batch: train(model, opt))
            self.run = lambda: step({"x": X})
        else:
            step = mt.jit(lambda x, *, y: train(model, opt))
            self.run = lambda: step(X, y=X)
        for _ in range(4):
            self.run()


FORMS = ["jit", "jit of arguments", "eager", "batch in a dict", "keywords"]


@pytest.fixture(scope="module")
def forms():
    made = {}
    yield lambda name: made.setdefault(name, Form(name)) if name in made else made.setdefault(name, Form(name))
    made.clear()


@pytest.fixture(scope="module")
def other():
    model, opt = make(optim.Adam)
    train(model, opt)
    return model, opt


def disturbances():
    def a_module_is_made(model, opt):
        nn.ReLU()

    def a_model_is_made_and_dropped(model, opt):
        make()
        gc.collect()

    def modes(model, opt):
        model.eval()
        model.train()

    def evaluation(model, opt):
        model.eval()
        model(X)
        model.train()

    def flattened(model, opt):
        jax.tree.map(lambda leaf: leaf, opt)

    def copied(model, opt):
        copy.deepcopy(opt)

    def pickled(model, opt):
        pickle.loads(pickle.dumps(model))

    def lr(model, opt):
        opt.lr = 0.02

    def schedule(model, opt):
        opt.lr = optim.schedules.constant(0.1)
        opt.lr = 0.1

    def read(model, opt):
        model[0].weight + 1

    def frozen(model, opt):
        model.freeze()
        model.unfreeze()

    def assigned(model, opt):
        model[0].weight = model[0].weight

    def attribute(model, opt):
        model.note = object.__class__

    def parameter(model, opt):
        model[0].extra = mt.Parameter(jnp.ones(2))
        del model[0].extra

    def layer(model, opt):
        model.append(nn.ReLU())
        del model[3]

    def trained(model, opt):
        train(model, opt)

    def listed(model, opt):
        opt.modules.append(nn.Linear(1, 1, key=jax.random.key(2)))
        opt.state_dict()
        opt.modules.pop()
        opt.state_dict()

    def loaded(model, opt):
        opt.load_state_dict(opt.state_dict())
        model.load_state_dict(model.state_dict())

    def packed(model, opt):
        mt.pack(model)
        mt.unpack(model)

    def in_a_transform(model, opt):
        jax.jit(lambda opt: jax.tree.leaves(opt)[0])(opt)

    def in_a_thread(model, opt):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()

    return {name: function for name, function in locals().items() if callable(function)}


DISTURBANCES = disturbances()


@pytest.mark.one_in(9)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.filterwarnings("ignore:SGD.step:UserWarning", "ignore:Adam holds:UserWarning")
def test_what_happens_to_others_costs_compiled_code_no_walk(form, name, forms, other, monkeypatch):
    """One comparison of stamps: no way but the quick one, no walk, no plan."""
    mine = forms(form)
    mine.run()
    DISTURBANCES[name](*other)
    long_ways = []

    def noted(function, label):
        def call(*args, **kwargs):
            long_ways.append(label)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Function, "run_slowly", noted(Function.run_slowly, "call"))
    monkeypatch.setattr(walk, "_rewalk", noted(walk._rewalk, "walk"))
    monkeypatch.setattr(optimizer_file, "make_plan", noted(optimizer_file.make_plan, "plan"))
    mine.run()
    assert long_ways == []


@pytest.mark.one_in(4)
@pytest.mark.parametrize("form", FORMS)
def test_back_and_forth_between_modes_costs_no_walk(form, forms, monkeypatch):
    """Each mode has its stamp, so that `train()` after `eval()` is what was there before."""
    mine = forms(form)
    for _ in range(2):
        mine.model.eval()
        mine.run()
        mine.model.train()
        mine.run()
    walks = []
    again = walk._rewalk
    monkeypatch.setattr(walk, "_rewalk", lambda obj: walks.append(obj) or again(obj))
    mine.model.eval()
    mine.model.train()
    mine.run()
    assert walks == []


CHANGES = {
    "eval": (lambda model, opt: model.eval(), lambda model, opt: model.train()),
    "freeze": (lambda model, opt: model[0].freeze(), lambda model, opt: model[0].unfreeze()),
    "a static attribute": (
        lambda model, opt: setattr(model[1], "eps", 0.5),
        lambda model, opt: setattr(model[1], "eps", 1e-5),
    ),
    "a layer": (lambda model, opt: model.append(nn.Tanh()), lambda model, opt: model.pop(3)),
    "a schedule": (
        lambda model, opt: setattr(opt, "lr", optim.schedules.constant(0.05)),
        lambda model, opt: setattr(opt, "lr", 0.01),
    ),
    "a flag": (lambda model, opt: setattr(opt, "nesterov", True), lambda model, opt: setattr(opt, "nesterov", False)),
    "the list of modules": (
        lambda model, opt: opt.modules.append(nn.Linear(1, 1)),
        lambda model, opt: opt.modules.pop(),
    ),
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_happens_to_its_own_objects_is_seen(form, change, forms):
    """The same as a model and an optimizer that were made so from the start."""
    do, undo = CHANGES[change]
    mine = forms(form)
    mine.run()
    twin_opt = copy.deepcopy(mine.opt)
    twin_model = twin_opt.modules[0]
    do(mine.model, mine.opt), do(twin_model, twin_opt)
    try:
        mine.run()
        train(twin_model, twin_opt)
        for (name, array), (_, expected) in zip(
            mine.model.state_dict().items(), twin_model.state_dict().items(), strict=True
        ):
            assert jnp.allclose(array, expected, rtol=1e-5, atol=1e-6), name
    finally:
        undo(mine.model, mine.opt)


def test_a_copy_of_an_optimizer_is_opened_when_something_of_it_is_asked_for():
    model, opt = make(optim.Adam)
    train(model, opt)
    leaves, treedef = jax.tree.flatten(opt)
    copied = jax.tree.unflatten(treedef, leaves)
    again, same = jax.tree.flatten(copied)
    assert same == treedef and all(a is b for a, b in zip(again, leaves, strict=True))
    assert copied.lr == opt.lr and copied.num_steps == 1
    copied.lr = 0.5
    assert opt.lr == 0.01 and jax.tree.structure(copied) == treedef
    train(copied.modules[0], copied)
    assert copied.num_steps == 2 and opt.num_steps == 1
    assert not jnp.array_equal(copied.modules[0][0].weight, model[0].weight)


def test_a_copy_is_opened_once_whatever_threads_ask():
    model, opt = make(optim.Adam)
    train(model, opt)
    for _ in range(20):
        copied = jax.tree.map(lambda leaf: leaf, opt)
        found = []
        threads = [threading.Thread(target=lambda c=copied, f=found: f.append(c.modules[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and all(module is found[0] for module in found)


@pytest.mark.slow
def test_a_step_in_functional_form_makes_no_walk_and_no_plan(monkeypatch):
    model, opt = make(optim.Adam)

    @jax.jit
    def step(opt, x):
        loss = train(opt.modules[0], opt)
        return opt, loss

    opt, _ = step(opt, X)
    opt, _ = step(opt, X)
    made = []
    monkeypatch.setattr(walk, "_rewalk", made.append)
    monkeypatch.setattr(optimizer_file, "make_plan", made.append)
    for _ in range(3):
        opt, loss = step(opt, X)
    assert made == [] and jnp.isfinite(loss)
    monkeypatch.undo()
    assert opt.num_steps == 5
