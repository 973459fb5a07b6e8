"""Models of shapes alone: they keep their shardings while they are loaded, and are lowered with nothing allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lazily import Lazily
from meshes import mesh
from numpy.testing import assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim

orbax = Lazily("minitorch_jax.adapters.orbax")
MESH, OTHER = mesh(4, 2), mesh(2, 4)
RULES = {"0.weight": P("model")}


def net(width: int = 16) -> mt.Module:
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Dropout(0.25), nn.Linear(width, 8))


def abstract(on: Any = MESH, width: int = 16) -> mt.Module:
    def make(key: Any) -> mt.Module:
        with mt.rng(key):
            return net(width)

    return mt.shard(jax.eval_shape(make, jax.random.key(0)), on, RULES, fsdp="data")


def step(model: Any, opt: Any, x: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(lambda m, x: (m(x) ** 2).mean(), model, x)
    mt.clip_grad_norm(model, 1.0)
    opt.step()
    return loss


def trained() -> tuple[mt.Module, mt.Optimizer]:
    model = mt.shard(net, MESH, RULES, fsdp="data")
    opt = optim.AdamW([model], lr=0.1)
    step(model, opt, batch())
    return model, opt


def batch() -> Any:
    return jax.device_put(np.ones((8, 8), np.float32), NamedSharding(MESH, P("data")))


def places(model: mt.Module) -> dict[str, Any]:
    return {path: array.sharding for path, array in model.state_dict().items()}


def is_abstract(model: mt.Module) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert_array_equal(a, b)


WAYS = ["load", "orbax", "load_state_dict", "load_state_dict of NumPy's", "assignment"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS)
def test_shardings_are_kept(way: str, tmp_path: Path) -> None:
    model, opt = trained()
    mine = abstract(OTHER)
    before = places(mine)
    arrays = model.state_dict()
    if way == "load":
        mt.save(tmp_path / "run.npz", model=model)
        mt.load(tmp_path / "run.npz", model=mine)
    elif way == "orbax":
        with orbax.Manager(tmp_path / "run") as checkpoints:
            checkpoints.save(1, model=model)
            checkpoints.restore(model=mine)
    elif way == "load_state_dict":
        mine.load_state_dict({path: jnp.asarray(np.asarray(array)) for path, array in arrays.items()})
    elif way == "load_state_dict of NumPy's":
        mine.load_state_dict({path: np.asarray(array) for path, array in arrays.items()})
    else:
        for path, array in arrays.items():
            holder, name = mine._holder(path)
            setattr(holder, name, np.asarray(array))
    assert places(mine) == before
    assert_same(mine, model)


@pytest.mark.parametrize("way", ["load", "orbax"])
def test_an_optimizer_of_an_abstract_model_is_restored_beside_it(way: str, tmp_path: Path) -> None:
    model, opt = trained()
    mine = abstract(OTHER)
    my_opt = optim.AdamW([mine], lr=0.1)
    state = my_opt.state_dict()["state"]["0.0.weight"]
    assert state["exp_avg"] == jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=mine[0].weight.sharding)
    if way == "load":
        mt.save(tmp_path / "run.npz", model=model, opt=opt)
        mt.load(tmp_path / "run.npz", model=mine, opt=my_opt)
    else:
        with orbax.Manager(tmp_path / "run") as checkpoints:
            checkpoints.save(1, model=model, opt=opt)
            checkpoints.restore(model=mine, opt=my_opt)
    assert_same(my_opt.state_dict()["state"], opt.state_dict()["state"])
    assert my_opt.state_dict()["state"]["0.0.weight"]["exp_avg"].sharding == mine[0].weight.sharding
    mt.seed(1)
    x = batch()
    mine, my_opt = mt.shard(mine, MESH, RULES, fsdp="data"), my_opt
    ours = float(step(mine, my_opt, x))
    mt.seed(1)
    assert ours == float(step(model, opt, x))


def test_what_does_not_fit_leaves_it_abstract(tmp_path: Path) -> None:
    model, opt = trained()
    mine = abstract()
    my_opt = optim.SGD([mine], lr=0.1, momentum=0.9)
    mt.save(tmp_path / "run.npz", model=model, opt=opt)
    with pytest.raises(ValueError, match="does not fit; nothing was loaded") as raised:
        mt.load(tmp_path / "run.npz", model=mine, opt=my_opt)
    assert not getattr(raised.value, "__notes__", None)
    assert is_abstract(mine)


def test_states_begin_when_the_parameters_come() -> None:
    model = net()
    mine = abstract()
    opt = optim.AdamW([mine], lr=0.1)
    opt.state_dict()
    mine.load_state_dict({path: np.asarray(array) for path, array in model.state_dict().items()})
    step(mine, opt, batch())
    moment = opt.state_dict()["state"]["0.0.weight"]["exp_avg"]
    assert moment.sharding == mine[0].weight.sharding and np.asarray(moment).any()


def bytes_there() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("whole", [False, True], ids=["optimizer of the model", "both from eval_shape"])
def test_a_step_is_lowered_with_nothing_allocated(whole: bool) -> None:
    width = 2**16
    before = bytes_there()
    if whole:

        def make(key: Any) -> mt.Optimizer:
            with mt.rng(key):
                return optim.AdamW([net(width)], lr=0.1)

        opt = jax.eval_shape(make, jax.random.key(0))
        model = mt.shard(opt.modules[0], MESH, RULES, fsdp="data")
    else:
        model = abstract(width=width)
        opt = optim.AdamW([model], lr=0.1)
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(MESH, P("data")))
    memory = mt.jit(step).lower(model, opt, x).compile().memory_analysis()
    assert bytes_there() - before < 10_000
    assert is_abstract(model)
    matrices, vectors = 8 * width // 8 + 8 * width // 4, 3 * width
    size = 4 * (3 * (matrices + vectors) + 2 * width)  # with two moments each, and with the means and variances
    assert size < memory.argument_size_in_bytes < size + 10_000
    assert memory.alias_size_in_bytes > 0.9 * memory.argument_size_in_bytes  # updated in place


def test_what_is_lowered_of_shapes_is_what_runs() -> None:
    model, opt = trained()
    mine = abstract()
    my_opt = optim.AdamW([mine], lr=0.1)
    x = batch()
    there = mt.jit(step).lower(model, opt, x).compile().memory_analysis()
    here = mt.jit(step).lower(mine, my_opt, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)).compile()
    for name in ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes"):
        assert getattr(here.memory_analysis(), name) == getattr(there, name), name


def test_shapes_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save\(\): model\.0\.weight is only a shape .*Load or make the arrays first"):
        mt.save(tmp_path / "run.npz", model=abstract())
    assert not list(tmp_path.iterdir())


def test_a_shape_is_static_in_a_call() -> None:
    assert mt.jit(lambda like: jnp.zeros(like.shape))(jax.ShapeDtypeStruct((3,), jnp.float32)).shape == (3,)


def test_to_and_astype() -> None:
    mine = abstract().to(NamedSharding(OTHER, P())).astype(jnp.bfloat16)
    assert mine[0].weight == jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=NamedSharding(OTHER, P()))
