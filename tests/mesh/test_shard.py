"""`mt.shard`: where it puts what, what a maker costs, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal, assert_array_max_ulp
from training import compilations

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.module import random

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
OTHER = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)


class Net(mt.Module):
    """What a layout must cope with: lists, tied weights, buffers that are not floating, a key, and random layers."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(16, 8)
        self.back = nn.Linear(16, 8)
        self.back.tie("weight", self.last, "weight")
        self.key = mt.Buffer(mt.next_key())

    def forward(self, x: Any) -> Any:
        x = self.norm(self.first(x))
        for layer in self.layers:
            x = self.drop(nn.functional.relu(layer(x)))
        return self.last(x) + self.back(x)


RULES = {
    "first.weight": P("model"),
    "layers.1.*": P(None),
    "layers.*.weight": P(None, "model"),
    "*last.weight": P("model"),
}


def specs(module: mt.Module) -> dict[str, tuple[Any, ...]]:
    """What is split, by path: the spec without its end of Nones."""
    found = {}
    for path, array in module.state_dict().items():
        entries = list(array.sharding.spec)
        while entries and entries[-1] is None:
            entries.pop()
        if entries:
            found[path] = tuple(entries)
    return found


def numbers(module: mt.Module) -> dict[str, np.ndarray]:
    arrays = module.state_dict()
    keys = {path for path, a in arrays.items() if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)}
    return {path: np.asarray(jax.random.key_data(a) if path in keys else a) for path, a in arrays.items()}


def assert_same(one: mt.Module, other: mt.Module, ulps: int = 0) -> None:
    theirs = numbers(other)
    for path, array in numbers(one).items():
        assert array.dtype == theirs[path].dtype
        if ulps:
            assert_array_max_ulp(array, theirs[path], ulps)
        else:
            assert_array_equal(array, theirs[path], err_msg=path)


def stream() -> np.ndarray:
    return np.asarray(random.current().cell.value)


def test_the_first_rule_that_matches_counts_and_the_rest_is_replicated() -> None:
    net = Net()
    assert mt.shard(net, MESH, RULES) is net
    tied = dict.fromkeys(("last.weight", "back.weight"), ("model",))
    assert specs(net) == {"first.weight": ("model",), "layers.0.weight": (None, "model"), **tied}
    assert all(array.sharding.mesh == MESH for array in net.state_dict().values())
    assert net.last._cells["weight"] is net.back._cells["weight"]


def test_fsdp_splits_the_largest_dimension_that_is_free_and_divides() -> None:
    net = Net()
    net.odd = mt.Parameter(jnp.ones((3, 5)))
    net.wide = mt.Parameter(jnp.ones((4, 30, 12)))
    net.table = mt.Buffer(jnp.ones((8, 8)))
    mt.shard(net, MESH, RULES, fsdp="data")
    tied = dict.fromkeys(("last.weight", "back.weight"), ("model", "data"))
    assert specs(net) == {
        "wide": (None, None, "data"),  # 30 is larger, and does not divide
        "first.weight": ("model", "data"),
        "layers.0.weight": ("data", "model"),
        "layers.1.weight": ("data",),
        **tied,
    }
    assert specs(mt.shard(net, MESH)) == {}


def test_a_module_keeps_its_numbers_and_gradients_follow() -> None:
    net, same = Net(), Net()
    same.load_state_dict(net.state_dict())
    mt.backward(lambda m, x: (m(x) ** 2).mean(), net.eval(), X)
    grads = [np.asarray(g) for g in net.grads()]
    mt.shard(net, MESH, RULES, fsdp="data")
    assert_same(net, same)
    for param, grad, before in zip(net.parameters(), net.grads(), grads, strict=True):
        assert grad.sharding == param.sharding
        assert_array_equal(grad, before)
    mt.shard(net, OTHER, {"layers.*.weight": P("data", "model")})
    assert_same(net, same)
    assert specs(net) == dict.fromkeys(("layers.0.weight", "layers.1.weight"), ("data", "model"))


LAYERS = {
    "Net": Net,
    "Conv2d": lambda: nn.Conv2d(8, 16, 3),
    "Conv1d": lambda: nn.Conv1d(16, 8, 4),
    "Embedding": lambda: nn.Embedding(32, 8, padding_idx=3),
    "LSTM": lambda: nn.LSTM(8, 8),
    "attention": lambda: nn.MultiheadAttention(16, 4),
    "normal": lambda: _initialised(nn.init.normal_),
    "kaiming_normal": lambda: _initialised(nn.init.kaiming_normal_),
    "trunc_normal": lambda: _initialised(nn.init.trunc_normal_),
}

SCALED = ("kaiming_normal", "trunc_normal")  # XLA joins the scale with factors of the generator


def _initialised(init: Any) -> nn.Linear:
    layer = nn.Linear(16, 8, bias=False)
    init(layer, "weight")
    return layer


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", LAYERS)
def test_a_maker_has_the_numbers_of_eager_code(name: str) -> None:
    made = mt.shard(LAYERS[name], MESH, fsdp="data")
    after = stream()
    mt.seed(0)
    with mt.rng(mt.next_key()):
        eager = LAYERS[name]()
    assert_array_equal(stream(), after)
    assert_same(made, eager, 2 if name in SCALED else 0)
    assert specs(made)


def test_a_maker_is_called_once_and_compiled_once() -> None:
    Net.made = 0
    mt.next_key()  # its own program
    with compilations() as found:
        net = mt.shard(Net, MESH, RULES, fsdp="data")
    assert (Net.made, len(found)) == (1, 1), found
    assert net.last._cells["weight"] is net.back._cells["weight"]
    assert not any(cell.lent for *_, cell in net._entries())  # so that a step copies nothing


@pytest.mark.parametrize(
    "maker, rules",
    [
        (lambda: nn.Linear(512, 256), {}),
        (lambda: nn.Linear(512, 256), {"weight": P(None, "model")}),
        (lambda: nn.Conv2d(32, 64, 3), {"weight": P(None, ("data", "model"))}),
        (lambda: nn.Conv2d(32, 64, 3), {"weight": P(("data", "model"))}),
        (lambda: nn.Conv1d(32, 64, 5), {"weight": P(None, ("data", "model"))}),
        (lambda: nn.Embedding(512, 128), {"weight": P(("data", "model"))}),
    ],
    ids=["fsdp", "both", "conv inputs", "conv outputs", "conv1d inputs", "embedding"],
)
def test_making_takes_a_fixed_multiple_of_the_shard(maker: Any, rules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *args: compiled.append(compile_(*args)) or compiled[-1])
    made = mt.shard(maker, MESH, rules, fsdp=None if any("data" in str(spec) for spec in rules.values()) else "data")
    sizes = [(a.nbytes, a.addressable_shards[0].data.nbytes) for a in made.parameters()]
    memory = compiled[-1].memory_analysis()
    shard = sum(part for _, part in sizes)
    assert memory.output_size_in_bytes < shard + 1000
    assert memory.temp_size_in_bytes < 4 * shard + 1000
    assert sum(whole for whole, _ in sizes) > 3.5 * shard


def train(net: mt.Module, opt: Any, x: Any, steps: int = 3) -> list[float]:
    @mt.jit
    def step(x: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(lambda m, x: (m(x) ** 2).mean(), net, x)
        opt.step()
        return loss

    return [float(step(x)) for _ in range(steps)]


@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "optimizer last"])
def test_it_trains_as_on_one_device(before: bool) -> None:
    def run(place: Any, x: Any) -> tuple[mt.Module, list[float]]:
        mt.seed(3)
        net = Net()
        opt = optim.SGD([net], lr=0.05, momentum=0.9) if before else None
        place(net)
        opt = opt or optim.SGD([net], lr=0.05, momentum=0.9)
        return net, train(net, opt, x)

    one, losses = run(lambda net: None, X)
    many, theirs = run(
        lambda net: mt.shard(net, MESH, RULES, fsdp="data"), jax.device_put(X, NamedSharding(MESH, P("data")))
    )
    assert_allclose(theirs, losses, rtol=1e-5)
    for path, array in numbers(many).items():
        assert_allclose(array, numbers(one)[path], atol=1e-5, err_msg=path)
    assert specs(many)["first.weight"] == ("model", "data")
    assert int(many.norm.num_batches_tracked) == 3


def test_an_abstract_module_gets_shardings_and_nothing_is_allocated() -> None:
    abstract = jax.eval_shape(lambda key: nn.Linear(2**20, 2**20, key=key), jax.random.key(0))
    mt.shard(abstract, MESH, {"weight": P("model")}, fsdp="data")
    weight = abstract.state_dict()["weight"]
    assert weight == jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=NamedSharding(MESH, P("model", "data")))
    assert abstract.bias.sharding == NamedSharding(MESH, P())


REFUSED = {
    "an unknown axis": (
        {"first.weight": P("rows")},
        {},
        r"  'first\.weight': .*'rows'.* no such axis, it has 'data', 'model'",
    ),
    "a spec that is too long": (
        {"*norm.bias": P(None, "data")},
        {},
        r"  norm\.bias: .* 2 entries, .*\(16,\) has 1 dim",
    ),
    "too long for a count": ({"norm.*": P("data")}, {}, r"  norm\.num_batches_tracked: .* 1 entries, .*\(\) has 0 dim"),
    "does not divide": (
        {"odd": P("data")},
        {},
        r"  odd: .* dimension 0, which is 3, into 4 parts \('data' of 4\): it does",
    ),
    "two axes do not divide": (
        {"twelve": P(("data", "model"))},
        {},
        r"  twelve: .* which is 12, into 8 parts \('data' of 4 x 'model' of 2\)",
    ),
    "tied with different rules": (
        {"last.weight": P("model"), "back.*": P()},
        {},
        r"  last\.weight and back\.weight are one tied parameter, but the rule 'last\.weight' says .*model.*'back\.\*' says",
    ),
    "a rule that matches nothing": (
        {"frist.*": P()},
        {},
        r"  'frist\.\*' matches no parameter or buffer; there are .*first",
    ),
    "no PartitionSpec": (
        {"odd": "data"},
        {},
        r"  'odd': a rule must be a jax\.sharding\.PartitionSpec, .*; got 'data'",
    ),
    "a sharding": ({"odd": NamedSharding(MESH, P())}, {}, r"  'odd': a rule must be a jax\.sharding\.PartitionSpec"),
    "a name that is no string": ({0: P()}, {}, r"  0: the name of a rule must be a string"),
    "an axis twice": ({"first.weight": P("data", "data")}, {}, r"  'first\.weight': .* names an axis twice"),
    "unconstrained": ({"first.weight": P(P.UNCONSTRAINED)}, {}, r"  'first\.weight': .*UNCONSTRAINED"),
    "fsdp of an unknown axis": (
        {},
        {"fsdp": "rows"},
        r"  fsdp='rows': the mesh has no such axis, it has 'data', 'model'",
    ),
    "fsdp of a used axis": (
        {"first.weight": P("data")},
        {"fsdp": "data"},
        r"  first\.weight: the rule 'first\.weight' has used the axis 'data' already",
    ),
}


class Odd(Net):
    def __init__(self) -> None:
        super().__init__()
        self.odd = mt.Parameter(jnp.ones((3, 5)))
        self.twelve = mt.Parameter(jnp.ones(12))


def unchanged_by(refused: Any, net: mt.Module) -> None:
    before, key, cells = net.state_dict(), stream(), [cell for *_, cell in net._entries()]
    refused()
    assert_array_equal(stream(), key)
    assert [cell for *_, cell in net._entries()] == cells
    for path, array in net.state_dict().items():
        assert array.sharding == before[path].sharding


@pytest.mark.parametrize("makes", [False, True], ids=["module", "maker"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changes(name: str, makes: bool) -> None:
    rules, options, message = REFUSED[name]
    net = Odd()

    def refused() -> None:
        with pytest.raises(ValueError, match=r"shard\(\): .* this Odd; nothing has changed:\n" + message):
            mt.shard(Odd if makes else net, MESH, rules, **options)

    unchanged_by(refused, net)


def test_one_error_lists_everything() -> None:
    rules = {"first.weight": P("rows"), "odd": P("data"), "norm.weight": P(None, None), "none": P(), "twelve": 3}
    with pytest.raises(ValueError, match="nothing has changed") as raised:
        mt.shard(Odd(), MESH, rules, fsdp="columns")
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(":")[0].split(" matches")[0] for line in lines] == [
        *("  'first.weight'", "  'twelve'", "  fsdp='columns'", "  'none'", "  odd", "  norm.weight")
    ]


@pytest.mark.parametrize(
    "args, message",
    [
        ((nn.ReLU(), {"data": 4}), r"takes a mesh made by `jax\.make_mesh`.*; got {'data': 4}"),
        ((nn.ReLU(), NamedSharding(MESH, P())), r"takes a mesh made by `jax\.make_mesh`"),
        (
            (nn.ReLU, jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))),
            r"shard\(\) was given a mesh with Explicit .*_mesh\(\(8,\),",
        ),
        ((nn.ReLU(), MESH, ["weight"]), r"takes rules as a dict of PartitionSpecs by name; got \['weight'\]"),
        ((3, MESH), r"takes a Module, or a function without arguments that returns one; got 3"),
        ((lambda: 3, MESH), r"takes a maker that returns a Module; this one has returned a int"),
        ((lambda x: nn.ReLU(), MESH), r"missing 1 required positional argument"),
    ],
    ids=[
        "a dict",
        "a sharding",
        "Explicit axes",
        "rules that are a list",
        "a number",
        "a maker of a number",
        "a maker with an argument",
    ],
)
def test_arguments_of_other_kinds_are_refused(args: Any, message: str) -> None:
    key = stream()
    with pytest.raises(TypeError, match=message):
        mt.shard(*args)
    assert_array_equal(stream(), key)


def test_an_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="The state of an optimizer follows the parameters of its modules: shard those"):
        mt.shard(optim.SGD([nn.Linear(2, 2)]), MESH)


def test_it_is_refused_inside_compiled_code() -> None:
    net = nn.Linear(8, 8)
    with pytest.raises(mt.TraceError, match=r"mt\.shard\(\) was called inside compiled code"):
        mt.jit(lambda: mt.shard(net, MESH))()
    with pytest.raises(mt.TraceError, match=r"mt\.shard\(\) was called inside compiled code"):
        jax.jit(lambda x: mt.shard(lambda: nn.Linear(8, 8), MESH)(x))(X)
    assert not specs_or_none(net)


def specs_or_none(net: mt.Module) -> bool:
    return any(isinstance(a.sharding, NamedSharding) for a in net.state_dict().values())


def test_packed_parameters_leave_their_pack() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = numbers(net)
    mt.pack(net)
    mt.shard(net, MESH, fsdp="data")
    assert specs(net) == {"0.weight": ("data",), "1.weight": ("data",)}
    for path, array in numbers(net).items():
        assert_array_equal(array, before[path])


def test_a_mesh_of_one_device() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    net = mt.shard(lambda: nn.Linear(8, 8), mesh, fsdp="data")
    assert net.weight.sharding.device_set == {jax.devices()[0]}


def test_to_names_what_one_sharding_does_not_fit() -> None:
    net = Odd()

    def refused() -> None:
        with pytest.raises(
            ValueError, match=r"(?s)nothing was moved:.*  odd: .*which is 3, into 4 parts.*mt\.shard"
        ) as e:
            net.to(NamedSharding(MESH, P("data")))
        assert "  norm.num_batches_tracked: " in str(e.value) and "first" not in str(e.value)

    unchanged_by(refused, net)
    assert all(a.sharding == NamedSharding(OTHER, P()) for a in net.to(NamedSharding(OTHER, P())).parameters())
