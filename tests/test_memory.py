"""NumPy memory that was given to a call is the caller's again when the call has returned."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import mean_square

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.runtime.numpy_memory import owned

SIDE = 1500  # JAX copies smaller arrays before it returns, as it happens
TRIES = 3


class Holder(mt.Module):
    """A module with one large parameter and one large buffer."""

    def __init__(self, weight=None, state=None):
        zeros = jnp.zeros((SIDE, SIDE))
        self.weight = mt.Parameter(zeros if weight is None else weight)
        self.state = mt.Buffer(zeros if state is None else state)

    def forward(self, x):
        return x + self.weight


def assigned(given):
    model = Holder()
    model.weight = given
    return model.weight


def assigned_buffer(given):
    model = Holder()
    model.state = given
    return model.state


def listed(given):
    model = Holder()
    model.parameters()[0] = given
    return model.weight


def listed_slice(given):
    model = Holder()
    model.grads()[:] = [given]
    return model.grads()[0]


def gradient(given):
    model = Holder()
    model.grads()[0] = given
    return model.grads()[0]


def accumulated(given):
    model = Holder()
    model.accumulate([given])
    return model.grads()[0]


def accumulated_twice(given):
    model = Holder()
    model.accumulate([jnp.zeros((SIDE, SIDE))])
    model.accumulate([given])
    return model.grads()[0]


def loaded(given):
    model = Holder()
    model.load_state_dict({"weight": given, "state": given})
    return model.weight


def loaded_where_the_module_is(given):
    model = Holder().to(jax.devices()[0])
    model.load_state_dict({"weight": given, "state": given})
    return model.state


def loaded_into_the_optimizer(given):
    model = nn.Linear(SIDE, SIDE, bias=False, key=jax.random.key(0))
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    state = opt.state_dict()
    ((path, fields),) = state["state"].items()
    name = next(name for name in fields if name != "step")
    state["state"][path] = {**fields, name: given}
    opt.load_state_dict(state)
    return opt.state_dict()["state"][path][name]


def unpickled(given):
    buffers = []
    data = pickle.dumps(Holder(jnp.asarray(np.array(given))), protocol=5, buffer_callback=buffers.append)
    theirs = [np.frombuffer(bytearray(buffer.raw()), np.uint8) for buffer in buffers]
    model = pickle.loads(data, buffers=theirs)  # noqa: S301
    for buffer in theirs:
        if buffer.flags.writeable:
            buffer[:] = 0
    return model.weight


def unflattened(given):
    leaves, treedef = jax.tree.flatten(Holder())
    model = jax.tree.unflatten(treedef, [given for _ in leaves])
    return mt.backward(lambda model: (model.weight.sum(), model.weight * 1), model, has_aux=True)[1]


def filled(given):
    model = Holder()
    nn.init.constant_(model, "weight", given)
    return model.weight


WAYS_IN = {
    "Parameter": lambda given: Holder(given).weight,
    "Buffer": lambda given: Holder(None, given).state,
    "nested list": lambda given: Holder([*given]).weight,
    "init.constant": lambda given: nn.init.constant((SIDE, SIDE), given),
    **{
        f.__name__: f
        for f in (assigned, assigned_buffer, listed, listed_slice, gradient, accumulated, accumulated_twice, loaded)
    },
    **{f.__name__: f for f in (loaded_where_the_module_is, loaded_into_the_optimizer, unpickled, unflattened, filled)},
}

x = jnp.zeros((SIDE, SIDE))


def scaled(model, given):
    return (given * model.scale).sum(), given * model.scale + 0.0 * x


class Scale(mt.Module):
    def __init__(self):
        self.scale = mt.Parameter(jnp.ones(()))

    def forward(self, given, *, other=None):
        found = given if other is None else other
        if isinstance(found, list | tuple):
            (found,) = found
        return (found["image"] if isinstance(found, dict) else found) * self.scale


jitted = mt.jit(lambda model, given: scaled(model, given)[1])
jitted_tree = mt.jit(lambda model, given, *, more: (given["a"] + more[0]) * 0.5 * model.scale)
model = Scale()
compute = mt.jit(model)


CALLS = {
    "backward": lambda given: mt.backward(scaled, model, given, has_aux=True)[1],
    "value_and_grad": lambda given: mt.value_and_grad(scaled, has_aux=True)(model, given)[0][1],
    "jit": lambda given: jitted(model, given),
    "jit, a pytree and a keyword": lambda given: jitted_tree(model, {"a": given}, more=[given]),
    "jit of a module": lambda given: compute(given),
    "scan": lambda given: mt.scan(lambda row: row * model.scale, given),
    "module": lambda given: model(given),
    "module, by name": lambda given: model(None, other=given),
    "module, in containers": lambda given: model([{"image": given}]),
    "Sequential": lambda given: nn.Sequential(nn.Identity(), nn.ReLU())(given),
    "functional": lambda given: nn.functional.relu(given),
    "functional, by name": lambda given: nn.functional.relu(input=given),
}


def given_arrays():
    """Ones in NumPy memory of every kind, with what overwrites it."""
    plain = np.ones((SIDE, SIDE), np.float32)
    yield "plain", plain, plain
    aligned = np.empty(SIDE * SIDE + 16, np.float32)
    start = -aligned.ctypes.data % 64 // 4
    aligned = aligned[start : start + SIDE * SIDE].reshape(SIDE, SIDE)
    aligned[:] = 1  # JAX would share this one's memory
    yield "aligned", aligned, aligned
    writable = np.ones((SIDE, SIDE), np.float32)
    view = writable.view()
    view.flags.writeable = False
    yield "read-only view", view, writable
    raw = bytearray(np.ones(SIDE * SIDE, np.float32).tobytes())
    yield "frombuffer", np.frombuffer(raw, np.float32).reshape(SIDE, SIDE), np.frombuffer(raw, np.float32)
    wide = np.ones((SIDE, 2 * SIDE), np.float32)
    yield "strided", wide[:, ::2], wide
    wide = np.ones((SIDE, 2 * SIDE), np.float32)
    yield "transposed", wide[:, :SIDE].T, wide
    plain = np.ones((SIDE, SIDE), np.float32)
    yield "subclass", plain.view(np.matrix), plain


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS_IN)
def test_what_is_given_is_copied_before_the_call_returns(way):
    for _ in range(TRIES):
        theirs = np.ones((SIDE, SIDE), np.float32)
        ours = WAYS_IN[way](theirs)
        theirs[:] = 7
        assert (np.asarray(ours) == 1).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("call", CALLS)
def test_data_is_copied_before_the_call_returns(call):
    CALLS[call](np.ones((SIDE, SIDE), np.float32))
    for _, theirs, memory in [*given_arrays()][:TRIES]:
        ours = CALLS[call](theirs)
        memory[:] = 7
        assert (np.asarray(ours) == 1).all()


@pytest.mark.parametrize("way", [assigned, CALLS["jit"], CALLS["functional"]], ids=["assigned", "jit", "functional"])
def test_numpy_memory_of_every_kind_is_copied(way):
    for kind, theirs, memory in given_arrays():
        ours = way(theirs)
        memory[:] = 7
        assert (np.asarray(ours) == 1).all(), kind


def test_what_shares_its_memory_with_numpy_is_copied():
    class Tensor:  # as torch's, or any array of another library
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return self.values

    for wrap in (Tensor, memoryview):
        theirs = np.ones((SIDE, SIDE), np.float32)
        weight = mt.Parameter(wrap(theirs))._cell.value
        theirs[:] = 7
        assert (np.asarray(weight) == 1).all()


def test_owned_leaves_alone_what_nobody_can_change():
    layer, array = nn.Linear(2, 2), jnp.ones(3)
    for value in (array, layer, 1.0, "text", None, np.float32(2), [array, 1], {"a": (array, None)}, len):
        assert owned(value) is value
    theirs = np.ones(3)
    assert owned([theirs, array])[1] is array and owned([theirs])[0] is not theirs
    assert type(owned(jax.tree_util.Partial(len, theirs))) is jax.tree_util.Partial


def test_loop_with_one_buffer_trains_on_each_batch():
    batches = np.random.default_rng(0).normal(size=(8, 64, 784)).astype(np.float32)

    def loss_fn(model, x):
        return ((model(x) - 1) ** 2).mean()

    def trained(make_step, reuse):
        model = nn.Sequential(
            nn.Linear(784, 64, key=jax.random.key(0)), nn.ReLU(), nn.Linear(64, 10, key=jax.random.key(1))
        )
        opt, buffer = optim.SGD([model], lr=0.1), np.empty((64, 784), np.float32)
        step = make_step(lambda x: eager(model, opt, x))
        for i in range(40):
            buffer[:] = batches[i % 8]
            step(buffer if reuse else batches[i % 8])
            buffer[:] = 1e3
        return np.asarray(model[0].weight)

    def eager(model, opt, x):
        opt.zero_grad()
        mt.backward(loss_fn, model, x)
        opt.step()

    for make_step in (lambda step: step, mt.jit, lambda step: lambda x: mt.scan(step, x[None])):
        np.testing.assert_array_equal(trained(make_step, True), trained(make_step, False))


def test_hyperparameters_do_not_follow_the_array_that_was_given():
    rate = np.array(0.5)
    opt = optim.SGD([nn.Linear(1, 1)], lr=rate)
    rate[...] = 7.0
    assert float(opt.lr) == 0.5
    opt.lr = rate
    rate[...] = 9.0
    assert float(opt.lr) == 7.0


def test_keys_do_not_follow_the_array_that_was_given():
    key = np.asarray(jax.random.PRNGKey(3)).copy()
    with mt.rng(key):
        key[:] = 0
        first = mt.next_key()
    with mt.rng(jax.random.PRNGKey(3)):
        assert (jax.random.key_data(mt.next_key()) == jax.random.key_data(first)).all()


def test_large_arrays_keep_their_dtype_in_eager_calls():
    class Index(mt.Module):
        def forward(self, ids):
            return ids % 7

    ids = np.full(1000, 2**40 + 3)
    np.testing.assert_array_equal(Index()(ids), ids % 7)


def test_functions_are_pickled_by_their_public_names():
    assert pickle.loads(pickle.dumps(nn.functional.relu)) is nn.functional.relu  # noqa: S301
    assert pickle.loads(pickle.dumps(nn.init.uniform_)) is nn.init.uniform_  # noqa: S301


@pytest.mark.parametrize("module", [nn.functional, nn.init], ids=["functional", "init"])
def test_every_public_function_owns_its_arguments(module):
    functions = {name: f for name, f in vars(module).items() if callable(f) and not name.startswith("_")}
    mine = {name: f for name, f in functions.items() if getattr(f, "__module__", "") == module.__name__}
    assert len(mine) > 20 and all(f.__wrapped__.__name__ == name for name, f in mine.items())
    inside = [name for name, f in functions.items() if f.__module__.startswith(f"{module.__name__}.")]
    assert not inside, "public, and not wrapped"


@pytest.mark.parametrize("reuse", [False, True])
def test_what_a_closure_is_given_is_copied(reuse):
    """LBFGS calls its closure several times in a step; each call is given the buffer, and overwrites it."""
    model = nn.Linear(784, 1, bias=False, key=jax.random.key(0))
    opt, found = optim.LBFGS([model], lr=0.1, max_iter=3), []
    batch = np.random.default_rng(0).normal(size=(512, 784)).astype(np.float32)

    def closure():
        buffer = batch.copy()
        opt.zero_grad()
        loss = mt.backward(mean_square, model, buffer)
        if reuse:
            buffer[:] = 1e6
        found.append(float(loss))
        return loss

    opt.step(closure)
    assert len(found) > 1 and max(found) < 10
