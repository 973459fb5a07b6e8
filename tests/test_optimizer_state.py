"""State goes where it belongs: modules listed in another order are found out, and settings keep their kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim


def layers():
    return [nn.Linear(3, 2, key=jax.random.key(i)) for i in range(2)]


def trained():
    """Two layers of the same shapes, and their optimizer after a step."""
    modules = layers()
    opt = optim.SGD(modules, lr=0.1, momentum=0.9)
    for i, layer in enumerate(modules):
        layer.accumulate([jnp.full((2, 3), i + 1.0), jnp.full(2, i + 1.0)])
    opt.step()
    return modules, opt


def restored(modules):
    others = [nn.Linear(3, 2) for _ in modules]
    for other, module in zip(others, modules, strict=True):
        other.load_state_dict(module.state_dict())
    return others


def test_modules_in_another_order_do_not_swap_state():
    modules, opt = trained()
    one, two = restored(modules)
    other = optim.SGD([two, one], lr=0.1, momentum=0.9)
    message = r"(?s)0\.bias: its state was saved for the parameter that is 1\.bias now.*0\.weight.*1\.weight now"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(opt.state_dict())
    assert other.num_steps == 0
    other.modules = [one, two]
    other.load_state_dict(opt.state_dict())
    np.testing.assert_array_equal(other.state_dict()["state"]["1.weight"]["momentum_buffer"], np.full((2, 3), 2.0))


def test_a_cycle_of_three_is_found_too():
    modules = [*layers(), nn.Linear(3, 2, key=jax.random.key(7))]
    state = optim.SGD(modules, lr=0.1).state_dict()
    one, two, three = restored(modules)
    with pytest.raises(ValueError, match="2.weight: its state was saved for the parameter that is 1.weight now"):
        optim.SGD([two, three, one], lr=0.1).load_state_dict(state)


def test_a_state_may_be_loaded_before_its_model():
    """Nothing can be said of other values; parameters that are alike belong to each other as well as to themselves."""
    modules, opt = trained()
    fresh = [nn.Linear(3, 2, key=jax.random.key(9 + i)) for i in range(2)]
    other = optim.SGD(fresh, lr=0.1, momentum=0.9)
    other.load_state_dict(opt.state_dict())
    assert other.num_steps == 1
    for layer in fresh:
        layer.weight, layer.bias = jnp.ones((2, 3)), jnp.zeros(2)
    other.load_state_dict(optim.SGD(fresh[::-1], lr=0.1, momentum=0.9).state_dict())


def test_a_state_without_fingerprints_is_taken_as_it_is():
    _, opt = trained()
    state = opt.state_dict()
    del state["fingerprints"]
    other = optim.SGD(layers(), lr=0.1, momentum=0.9)
    other.load_state_dict(state)
    assert other.num_steps == 1


def test_fingerprints_tell_rearranged_values_apart():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight = jnp.array([[1.0, 2.0, 3.0]])
    first = mt.Optimizer([layer]).state_dict()["fingerprints"]["0.weight"]
    layer.weight = jnp.array([[3.0, 2.0, 1.0]])
    second = mt.Optimizer([layer]).state_dict()["fingerprints"]["0.weight"]
    assert first[0] == second[0] and first[1] != second[1]


def test_whole_numbers_are_read_back_as_such():
    opt = optim.LBFGS(layers(), lr=0.5, max_iter=4, history_size=3)
    copied = jax.tree.map(jnp.copy, opt)
    for each in (opt, copied):
        found = each.max_iter, each.history_size, each.max_eval
        assert found == (4, 3, 5) and all(type(number) is int for number in found)
    assert type(copied.lr) is float


@pytest.mark.parametrize("members", [3, 4])  # 4 is also how many counts of steps there are
def test_an_ensemble_takes_its_own_state(tmp_path, members):
    def make(key):
        return optim.Adam([nn.Linear(2, 1, key=key)], lr=0.1)

    @jax.jit
    @jax.vmap
    def step(opt):
        opt.zero_grad()
        mt.backward(lambda: (opt.modules[0](jnp.ones((1, 2))) ** 2).sum())
        opt.step()
        return opt

    one, other = (jax.vmap(make)(jax.random.split(jax.random.key(i), members)) for i in range(2))
    one = step(one)
    mt.save(tmp_path / "a", opt=one, model=one.modules[0])
    mt.load(tmp_path / "a", opt=other, model=other.modules[0])
    assert other.num_steps.tolist() == [1] * members and other.lr.shape == (members,)
    for mine, theirs in zip(jax.tree.leaves(step(other)), jax.tree.leaves(step(one)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    state = one.state_dict()
    state["hyperparameters"]["lr"] = np.full(members, -1.0)
    with pytest.raises(ValueError, match="lr must be a finite number"):
        one.load_state_dict(state)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_state_follows_its_parameter_to_other_devices(compiled, packed):
    """The model is moved between steps; what the optimizer keeps was on the devices before."""
    here, there = jax.devices()
    mesh = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array([here, there]), "x"), jax.sharding.PartitionSpec("x"))

    def trained(places):
        model = nn.Linear(2, 4, key=jax.random.key(0))
        opt = optim.Adam([model], lr=0.1, track_grad_norm=True)
        if packed:
            mt.pack(model)

        def loss():
            return (model(jnp.ones((1, 2))) ** 2).mean()

        def step():
            opt.zero_grad()
            mt.backward(loss)
            opt.step()

        step = mt.jit(step) if compiled else step
        for place in places:
            if place is not None:
                model.to(place)
            step()
            step()
        return model, opt

    model, opt = trained([there, mesh, there, here])
    still, _ = trained([None] * 4)
    np.testing.assert_allclose(model.weight, still.weight, rtol=1e-6)
    assert opt.state_dict()["state"]["0.weight"]["exp_avg"].devices() == {here}
