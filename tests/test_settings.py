"""Settings of optimizers and groups: in copies, and assigned and read in compiled code."""

import copy
import pickle
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import GROUPED, OPTIMIZERS, matrix, numbers_of, stepped

import minitorch_jax as mt
from minitorch_jax import optim

# -- copies -----------------------------------------------------------------------------------------------------------

COPIES = {
    "tree.map": lambda opt: jax.tree.map(lambda a: a, opt),
    "device_put": jax.device_put,
    "jit": lambda opt: jax.jit(lambda opt: opt)(opt),
    "scan": lambda opt: jax.lax.scan(lambda opt, _: (opt, None), opt, None, length=1)[0],
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "vmap": lambda opt: jax.tree.map(
        lambda a: a[0], jax.vmap(lambda opt: opt)(jax.tree.map(lambda a: jnp.stack([a, a]), opt))
    ),
    "eval_shape": lambda opt: jax.tree.map(lambda _, a: a, jax.eval_shape(lambda opt: opt, opt), opt),
}
CHEAP = {form: COPIES[form] for form in ("tree.map", "device_put", "deepcopy", "pickle", "eval_shape")}


def half(t):
    return 0.5


def halves(t):
    return 0.5, 0.25


def scaled(value, factor):
    return tuple(factor * number for number in value) if isinstance(value, tuple) else factor * value


def with_own(kind, setting, default):
    """An optimizer of which the second group has a number of its own (another than the default, where any will do)."""
    for factor in (0.5, 2, 1):
        try:
            own = scaled(default, factor)
            return kind([{"modules": [matrix()]}, {"modules": [matrix()], setting: own}], **{setting: default}), own
        except ValueError:
            assert factor != 1


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", GROUPED)
def test_a_groups_own_numbers_beside_schedules_survive_every_copy(name):
    """Each hyperparameter, in each way of copying: what a group has of its own, and what follows a schedule."""
    kind = OPTIMIZERS[name]
    for setting, default in numbers_of(kind).items():
        if default == 0:
            continue  # from zero a state may begin; 0.125 for it is another optimizer
        opt, own = with_own(kind, setting, default)
        schedule = halves if isinstance(default, tuple) else half
        try:
            setattr(opt, setting, schedule)
        except ValueError:
            continue  # one that may follow no schedule
        for form, copied in COPIES.items() if setting == "lr" else CHEAP.items():
            other = copied(opt)
            assert getattr(other.groups[1], setting) == own, (setting, form)
            stated = other.state_dict()
            assert stated["hyperparameters"][setting] is schedule, (setting, form)
            assert stated["groups"] == [{}, {setting: own}], (setting, form)


@pytest.mark.parametrize("form", ["jit", "scan", "tree"])
def test_a_copy_steps_with_the_groups_own_number(form):
    opt = optim.SGD([{"modules": [matrix()]}, {"modules": [matrix()], "lr": 1e-3}], lr=half)
    alone = copy.deepcopy(opt)
    stepped(alone)

    def step(opt):
        stepped(opt)
        return opt

    if form == "jit":
        opt = jax.jit(step)(opt)
    elif form == "scan":
        opt = jax.lax.scan(lambda opt, _: (step(opt), None), opt, None, length=1)[0]
    else:
        opt = step(jax.tree.map(lambda a: a, opt))
    for mine, theirs in zip(opt.modules, alone.modules, strict=True):
        np.testing.assert_allclose(mine.weight, theirs.weight, rtol=1e-6)


def test_a_number_is_read_back_from_a_copy_as_it_was_given():
    given = {"alpha": 0.99999999, "lr": 1 / 3, "eps": 1e-12}
    opt = jax.tree.map(lambda a: a, optim.RMSprop([matrix()], **given))
    assert {name: getattr(opt, name) for name in given} == pytest.approx(given, rel=1e-14, abs=0)


def test_a_pickle_of_an_older_version_is_read():
    """Its vector had the numbers alone."""
    opt = optim.RMSprop([matrix()], alpha=0.9999)
    opt._hyper.cell.value = opt._hyper.cell.value[: opt._hyper.cell.value.size // 2]
    opt._hyper.exact = opt._hyper.cell.value
    again, fresh = pickle.loads(pickle.dumps(opt)), optim.RMSprop([matrix()], alpha=0.9999)
    np.testing.assert_array_equal(again._hyper.cell.value, fresh._hyper.cell.value)


def test_a_loss_function_may_assign_a_number():
    opt = optim.SGD([matrix()], lr=half)

    def loss_fn(layer, x):
        opt.lr = 0.25
        return layer(x).sum()

    for _ in range(2):
        mt.backward(loss_fn, opt.modules[0], jnp.ones((1, 2)))
        assert opt.lr == 0.25


# -- numbers assigned in compiled code ---------------------------------------------------------------------------------


def grouped(lr=0.1, **own):
    return optim.SGD([{"modules": [matrix()]}, {"modules": [matrix()], **own}], lr=lr)


def assigns(opt, rate):
    stepped(opt)
    opt.groups[1].lr = rate
    opt.groups[1]["weight_decay"] = 0.5 * rate
    stepped(opt)
    return opt.groups[0].lr + opt.groups[1].lr


def scanned(opt, rate):
    return mt.scan(assigns, opt, jnp.asarray([rate]))[0]


LRS = {"number": 0.1, "schedule": half, "ours": optim.schedules.exponential(0.1, 0.5)}


def numbers(opt):
    """The settings of each group."""
    return [dict(group, modules=None, params=None) for group in opt.groups]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("form", "lr"),
    [("jit", "number"), ("jit", "schedule"), ("jit", "ours"), ("scan", "schedule"), ("closure", "number")]
    + [("nested", "schedule")],
)
def test_numbers_are_replayed_at_each_call_for_each_optimizer(form, lr):
    """The first optimizer is traced with; the others meet the cached program. Each group gets a number of its own."""
    lr, nested = LRS[lr], mt.jit(assigns)
    call = {"jit": mt.jit(assigns), "scan": scanned, "nested": mt.jit(lambda opt, rate: nested(opt, rate))}.get(form)
    for _ in range(3 if call else 1):
        opt, alone = grouped(lr), grouped(lr)
        closed = mt.jit(lambda rate, opt=opt: assigns(opt, rate))
        run = call or (lambda _, rate, closed=closed: closed(rate))
        for rate in (0.25, 0.05):
            np.testing.assert_allclose(run(opt, rate), assigns(alone, rate), rtol=1e-6)
            assert numbers(opt) == numbers(alone)
            assert opt.state_dict()["hyperparameters"] == alone.state_dict()["hyperparameters"]
            for mine, theirs in zip(opt.modules, alone.modules, strict=True):
                np.testing.assert_allclose(mine.weight, theirs.weight, rtol=1e-5)
    if form == "jit":
        assert call.num_compiles == 2  # before the groups have their own, and after


def test_a_number_in_place_of_a_schedule_lasts():
    @mt.jit
    def train(opt, rate):
        stepped(opt)
        opt.lr = rate

    for _ in range(2):  # the second meets the program
        opt = optim.SGD([matrix()], lr=half)
        train(opt, 0.25)
        assert opt.lr == 0.25 and opt.state_dict()["hyperparameters"]["lr"] == 0.25
        opt.lr = half  # a schedule again: the program that was compiled for one drops it again
        train(opt, 0.125)
        assert opt.lr == 0.125


def test_a_scan_takes_its_first_step_with_the_schedule():
    def train(opt, rate):
        lr = opt.lr
        opt.lr = rate
        return lr

    opt = optim.SGD([matrix()], lr=half)
    np.testing.assert_allclose(mt.scan(train, opt, jnp.asarray([0.1, 0.2, 0.3])), [0.5, 0.1, 0.2], rtol=1e-6)
    assert opt.lr == pytest.approx(0.3)


# -- what is refused, and what a raise leaves --------------------------------------------------------------------------


def refused(opt):
    """What compiled code may not do to an optimizer: by name, with the start of the message."""
    extra = matrix()
    return {
        "schedule": (lambda: setattr(opt, "lr", half), "SGD.lr was given a schedule inside compiled code"),
        "group schedule": (lambda: setattr(opt.groups[1], "lr", half), "SGD.lr was given a schedule inside"),
        "append": (lambda: opt.groups[0].modules.append(extra), "SGD.modules was changed inside compiled code"),
        "append and step": (lambda: (opt.groups[0].modules.append(extra), stepped(opt)), "SGD.modules was changed"),
        "remove": (lambda: opt.groups[1].modules.clear(), "SGD.modules was changed inside compiled code"),
        "assign": (lambda: setattr(opt.groups[1], "modules", [extra]), "SGD.modules was assigned inside compiled"),
        "add_group": (lambda: opt.add_group({"modules": [extra]}), "SGD.groups were changed inside compiled code"),
        "flag": (lambda: setattr(opt, "maximize", True), "SGD.maximize was assigned inside compiled code"),
        "state_dict": (lambda: opt.state_dict(), r"SGD.state_dict\(\) was called inside compiled code"),
        "load": (lambda: opt.load_state_dict({}), r"SGD.load_state_dict\(\) was called inside compiled code"),
    }


@pytest.mark.one_in(3)
@pytest.mark.parametrize("compiled", [mt.jit, lambda f: lambda: mt.scan(f, length=2)], ids=["jit", "scan"])
@pytest.mark.parametrize("what", refused(None))
def test_what_a_program_would_not_do_again_is_refused_and_undone(what, compiled):
    opt = grouped(half, weight_decay=0.5)
    stepped(opt)
    act, message = refused(opt)[what]

    def train():
        opt.groups[1].lr = 0.1
        opt.lr = 0.2
        act()

    before, lists = opt.state_dict(), [list(group.modules) for group in opt.groups]
    for _ in range(2):
        with pytest.raises(mt.TraceError, match=message):
            compiled(train)()
        assert_as_it_was(opt, before, lists)
    alone = grouped(half, weight_decay=0.5)
    for each in (alone, alone, opt):
        stepped(each)
    for mine, theirs in zip(opt.modules, alone.modules, strict=True):
        np.testing.assert_array_equal(mine.weight, theirs.weight)


def assert_as_it_was(opt, before, lists):
    after = opt.state_dict()
    assert after["hyperparameters"] == before["hyperparameters"] and after["groups"] == before["groups"]
    assert after["num_steps"] == before["num_steps"]
    assert all(
        a is b for now, then in zip(opt.groups, lists, strict=True) for a, b in zip(now.modules, then, strict=True)
    )
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(opt))


@pytest.mark.parametrize("where", ["jit", "scan", "backward", "nested", "runtime"])
def test_a_raise_leaves_no_setting_behind(where):
    opt = grouped(half)
    before, lists = opt.state_dict(), [list(group.modules) for group in opt.groups]

    def fails(x):
        opt.lr = x.mean()
        opt.groups[1].lr = 0.1
        raise ValueError("no")

    def late(x):
        opt.lr = x.mean()
        jax.debug.callback(lambda x: (_ for _ in ()).throw(ValueError("no")), x)

    call = {
        "jit": mt.jit(fails),
        "scan": lambda x: mt.scan(fails, x),
        "backward": lambda x: mt.backward(fails, x),
        "nested": mt.jit(lambda x: mt.jit(fails)(x)),
        "runtime": mt.jit(late),
    }[where]
    with pytest.raises(Exception, match="no"):  # noqa: B017, PT011  # JAX wraps what a callback raises
        call(jnp.ones(3))
    assert_as_it_was(opt, before, lists)


# -- what is read ------------------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, opt):
        self.group, self.plateau = opt.groups[0], optim.ReduceOnPlateau(opt)


def readings(opt):
    """Functions that reach an optimizer in many ways, and read it."""
    group, items, held, plateau = opt.groups[0], deque([opt]), [opt.groups], optim.ReduceOnPlateau(opt)
    holder, getter = Holder(opt), {"opt": lambda: opt}
    return {
        "name": lambda: opt.lr,
        "group": lambda: group.lr,
        "key": lambda: group["lr"],
        "groups": lambda: opt.groups[0].lr,
        "deque": lambda: items[0].lr,
        "nested": lambda: held[0][0].lr,
        "plateau": lambda: plateau.opt.lr,
        "object": lambda: holder.group.lr + holder.plateau.opt.lr,
        "function": lambda: getter["opt"]().lr,
        "num_steps": lambda: jnp.asarray(items[0].num_steps, jnp.float32),
        "skipped": lambda: jnp.asarray(items[0].skipped, jnp.float32) + group.lr,
        "grad_norm": lambda: items[0].grad_norm + group.lr,
        "weight": lambda: items[0].groups[0].modules[0].weight[0, 0],
    }


@pytest.mark.parametrize("how", readings(optim.SGD([matrix()])))
def test_what_compiled_code_reads_is_followed(how):
    opt = optim.SGD([matrix()], lr=0.1, track_grad_norm=True)
    read = readings(opt)[how]
    compiled = mt.jit(lambda: jnp.asarray(read(), jnp.float32))
    for rate in (0.1, 0.2):
        opt.lr = rate
        stepped(opt)
        np.testing.assert_allclose(compiled(), np.float32(read()), rtol=1e-6)
    assert compiled.num_compiles == 1


def test_a_group_is_an_argument_like_its_optimizer():
    read = mt.jit(lambda group, x: group.lr * x)
    for rate in (0.1, 0.2):
        opt = optim.SGD([{"modules": [matrix()]}, {"modules": [matrix()], "lr": rate}], lr=0.5)
        np.testing.assert_allclose(read(opt.groups[1], 2.0), 2 * rate, rtol=1e-6)
    assert read.num_compiles == 1
    assert mt.jit(lambda group: group)(opt.groups[1]).lr == 0.2
