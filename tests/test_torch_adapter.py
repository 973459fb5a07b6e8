"""The torch adapter: arrays and who holds their memory, weights both ways, ties, dtypes, and what is refused."""

import copy
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from oracle import actual as torch

import minitorch_jax as mt
from minitorch_jax import nn, optim

adapter = Lazily("minitorch_jax.adapters.torch")


def address(array: Any) -> int:
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.unsafe_buffer_pointer()


# -- arrays -----------------------------------------------------------------------------------------------------------

DTYPES = [
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32", "complex64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
WIDE = ["int64", "uint64", "float64", "complex128"]


@pytest.mark.parametrize("name", DTYPES + WIDE)
def test_every_dtype_both_ways(name: str) -> None:
    """Bit by bit, copied and shared, scalars and empty arrays, with JAX's 64 bits where they are needed."""
    with jax.enable_x64(name in WIDE):
        for shape in ((2, 3), (), (0, 2)):
            values = np.array([[1, 0.5, 4], [2, 1, 0.25]]).reshape(-1)[: max(int(np.prod(shape)), 0)].reshape(shape)
            values = (values * (1 + 2j) if "complex" in name else values).astype(jnp.dtype(name))
            array = jnp.array(values)
            for copied in (True, False, None):
                tensor = adapter.to_torch(array, copy=copied)
                assert tensor.dtype == getattr(torch, name) and tuple(tensor.shape) == shape
                back = adapter.from_torch(tensor, copy=copied)
                assert back.dtype == array.dtype == jnp.dtype(name) and back.shape == shape
                assert np.asarray(back).tobytes() == values.tobytes()
            if "float8" not in name and name != "bfloat16":
                np.testing.assert_array_equal(adapter.to_torch(array).numpy(), values)
            elif values.size:
                np.testing.assert_array_equal(adapter.to_torch(array).double().numpy(), values.astype(np.float64))


def test_who_shares_memory() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    for strided in (tensor, tensor.permute(2, 0, 1), tensor.to(memory_format=torch.contiguous_format)):
        shared = adapter.from_torch(strided)
        assert address(shared) == address(tensor)
        np.testing.assert_array_equal(shared, strided.numpy())
        assert address(adapter.from_torch(strided, copy=True)) != address(tensor)
    array = jnp.arange(6.0)
    assert address(adapter.to_torch(array, copy=False)) == address(adapter.to_torch(array, copy=None)) == address(array)
    assert address(adapter.to_torch(array)) != address(array)


def test_what_cannot_be_shared_is_copied() -> None:
    whole = torch.arange(40, dtype=torch.float32)
    cases = {
        "with gaps": whole[::2],
        "expanded": torch.ones(1).expand(3),
        "not aligned": whole[1:],
        "conjugated": torch.tensor([1 + 2j, 3j]).conj(),
        "negated": torch.tensor([1 + 2j, 3j]).conj().imag,
        "to be converted": torch.arange(3),
    }
    for name, tensor in cases.items():
        np.testing.assert_array_equal(
            adapter.from_torch(tensor), tensor.resolve_conj().resolve_neg().numpy(), err_msg=name
        )
        with pytest.raises(ValueError, match=r"from_torch cannot share the memory of \w+\[\d+\]: .*Use copy=None or"):
            adapter.from_torch(tensor, copy=False)


def test_what_torch_trains_is_not_shared() -> None:
    """Its optimizer changes parameters in place; that must not change an array here."""
    parameter = torch.nn.Parameter(torch.ones(16))
    ours = adapter.from_torch(parameter)
    assert address(ours) != address(parameter) and address(adapter.from_torch(parameter, copy=False)) == address(
        parameter
    )
    parameter.sum().backward()
    torch.optim.SGD([parameter], lr=1.0).step()
    assert float(parameter[0].detach()) == 0
    np.testing.assert_array_equal(ours, np.ones(16))


def test_a_copy_is_complete_when_it_is_given() -> None:
    """Not only once JAX gets round to it."""
    for _ in range(20):
        tensor = torch.ones(1 << 18)
        ours = adapter.from_torch(tensor, copy=True)
        tensor.zero_()
        assert float(ours.min()) == 1
        theirs = adapter.to_torch(ours)
        theirs.zero_()
        assert float(ours.min()) == 1


def test_a_shared_array_outlives_its_tensor() -> None:
    x = adapter.from_torch(torch.full((1 << 16,), 3.0))
    torch.full((1 << 16,), 4.0)  # would take its memory
    assert float(x.min()) == float(x.max()) == 3


def test_a_step_does_not_change_what_torch_has_been_given() -> None:
    """A shared tensor keeps its values when our step uses up the parameter that it was read from."""
    model = nn.Linear(16, 16)
    opt = optim.SGD([model], lr=0.5, momentum=0.9)

    @mt.jit
    def train_step(x: Any) -> None:
        opt.zero_grad()
        mt.backward(lambda x: model(x).sum(), x)
        opt.step()

    x = jnp.ones((2, 16))
    train_step(x)
    weight = model.weight
    theirs = adapter.to_torch(weight, copy=False)
    buffer = adapter.to_torch(opt.state_dict()["state"]["0.weight"]["momentum_buffer"], copy=False)
    before, buffer_before = theirs.clone(), buffer.clone()
    train_step(x)
    model.zero_grad()
    model.accumulate([jnp.ones((16, 16)), jnp.ones(16)])
    opt.step()
    train_step(x)
    assert torch.equal(theirs, before) and torch.equal(buffer, buffer_before)
    np.testing.assert_array_equal(weight, before.numpy())
    assert not np.array_equal(np.asarray(model.weight), before.numpy())


def test_a_step_does_not_write_into_torchs_memory() -> None:
    """Not even if a shared array was assigned as a parameter."""
    tensor = torch.ones(4, 16)
    model = nn.Linear(16, 4, bias=False)
    model.weight = adapter.from_torch(tensor, copy=False)
    opt = optim.SGD([model], lr=0.5)
    for _ in range(2):
        model.accumulate([jnp.ones((4, 16))])
        opt.step()
    assert bool((tensor == 1).all()) and float(model.weight[0, 0]) == -0.5


def test_a_batch_of_another_layout_is_shared_and_means_the_same() -> None:
    images = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    shared, copied = adapter.from_torch(images, copy=False), adapter.from_torch(images, copy=True)
    assert address(shared) == address(images)
    function = mt.jit(lambda x: (x * jnp.arange(5.0)[None, None, None]).cumsum(1))
    np.testing.assert_array_equal(function(shared), function(copied))
    np.testing.assert_array_equal(shared, images.numpy())


def test_a_tensor_goes_where_jax_computes(monkeypatch: Any) -> None:
    """On a machine with an accelerator, which this one only seems to be, as what jnp.asarray gives would."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tensor = torch.ones(16)
    ours = adapter.from_torch(tensor)
    assert address(ours) != address(tensor) and not ours.committed
    with pytest.raises(ValueError, match=r"float32\[16\]: it is on the cpu, and JAX's default device is a gpu"):
        adapter.from_torch(tensor, copy=False)


def test_integers_of_64_bits() -> None:
    classes = adapter.from_torch(torch.tensor([2**31 - 1, -(2**31)]))
    assert classes.dtype == jnp.int32 and classes.tolist() == [2**31 - 1, -(2**31)]
    with pytest.raises(ValueError, match=r"int64 from 0 to 2147483648 does not fit int32, .* call .*jax_enable_x64"):
        adapter.from_torch(torch.tensor([0, 2**31]))
    with pytest.raises(ValueError, match="uint64 from 1 to 4294967296 does not fit uint32"):
        adapter.from_torch(torch.tensor([1, 2**32], dtype=torch.uint64))
    with jax.enable_x64(True):
        assert adapter.from_torch(torch.tensor([0, 2**31])).tolist() == [0, 2**31]


def test_arrays_that_are_refused() -> None:
    for dtype, kept in ((torch.float64, "float32"), (torch.complex128, "complex64")):
        message = rf"got {str(dtype)[6:]}\[2\], which JAX would convert to {kept}: .*`.to\(torch.{kept}\)`, or call"
        with pytest.raises(ValueError, match=message):
            adapter.from_torch(torch.ones(2, dtype=dtype))
    with pytest.raises(TypeError, match=r"takes a dense torch tensor with values; got array\(\[1\]\), a ndarray"):
        adapter.from_torch(np.array([1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"float32\[2, 2\] of layout torch.sparse_coo: convert it with `.to_dense\(\)`"):
        adapter.from_torch(torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"float32\[2\] on the meta device, without values"):
        adapter.from_torch(torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match="an uninitialised parameter: call the lazy torch module on a batch first"):
        adapter.from_torch(torch.nn.LazyLinear(2).weight)
    with pytest.raises(TypeError, match=r"bits8\[2\], a dtype that JAX lacks"):
        adapter.from_torch(torch.empty(2, dtype=torch.bits8))
    with pytest.raises(TypeError, match=r"takes a JAX array, outside of transforms; got array\(\[1\]\)"):
        adapter.to_torch(np.array([1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a tracer of a JAX transform"):
        jax.jit(adapter.to_torch)(jnp.ones(2))
    with pytest.raises(TypeError, match=r"takes a dtype that torch has; got int4\[2\]"):
        adapter.to_torch(jnp.ones(2, jnp.int4))
    with pytest.raises(TypeError, match=r"takes a dtype that torch has; got key<fry>\[\]"):
        adapter.to_torch(jax.random.key(0))
    halves = jax.device_put(jnp.arange(4.0), jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x")))
    assert adapter.to_torch(halves).tolist() == adapter.to_torch(halves, copy=None).tolist() == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"to_torch cannot share the memory of float32\[4\]: .*Use copy=None or copy=True"
    ):
        adapter.to_torch(halves, copy=False)


# -- weights ----------------------------------------------------------------------------------------------------------


def network(nn: Any, base: Any) -> Any:
    """With BatchNorm, which has integers among its buffers, an embedding tied with the output, and a bare buffer."""

    class Net(base):
        def __init__(self, tied: bool = True) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
            self.out = nn.Linear(4, 7, bias=False)
            if tied and base is torch.nn.Module:
                self.out.weight = self.embedding.weight
            elif tied:
                self.out.tie("weight", self.embedding, "weight")

        def forward(self, words: Any) -> Any:
            return self.out(self.body(self.embedding(words)))

    return Net


Ours = network(nn, mt.Module)
WORDS = np.random.default_rng(0).integers(0, 7, 12).astype(np.int32)


def Theirs(**options: Any) -> Any:
    return network(torch.nn, torch.nn.Module)(**options)


def scrambled(model: Any) -> Any:
    """The torch module with no value left at its default."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) * 100 if tensor.dtype == torch.int64 else torch.rand(tensor.shape))
    return model


def assert_same_weights(ours: Any, theirs: Any) -> None:
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(torchs)
    for path, value in torchs.items():
        np.testing.assert_array_equal(np.asarray(mine[path]), value.numpy(), err_msg=path)


def snapshot(model: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(value).copy() for path, value in model.state_dict().items()}


@pytest.mark.parametrize("as_mapping", [False, True])
def test_weights_both_ways(as_mapping: bool) -> None:
    theirs, ours = scrambled(Theirs()), Ours()
    adapter.load_from_torch(ours, theirs.state_dict() if as_mapping else theirs)
    assert_same_weights(ours, theirs)
    assert ours.body[1].num_batches_tracked.dtype == jnp.int32 and int(ours.body[1].num_batches_tracked) > 0
    expected = theirs.eval()(torch.from_numpy(WORDS).long()).detach().numpy()
    np.testing.assert_allclose(ours.eval()(jnp.asarray(WORDS)), expected, rtol=1e-5, atol=1e-6)
    other = scrambled(Theirs())
    tensors = other.state_dict(keep_vars=True)
    adapter.copy_to_torch(ours, other)
    assert_same_weights(ours, other)
    assert all(tensors[path] is tensor for path, tensor in other.state_dict(keep_vars=True).items())
    assert other.body[1].num_batches_tracked.dtype == torch.int64 and other.out.weight is other.embedding.weight
    assert all(p.is_leaf and p.requires_grad for p in other.parameters())


def test_weights_share_no_memory() -> None:
    """torch trains on in place, and so do we: neither sees the other."""
    theirs, ours = Theirs(), Ours()
    adapter.load_from_torch(ours, theirs)
    before = snapshot(ours)
    for tensor in theirs.state_dict().values():
        tensor.zero_()
    for path, value in before.items():
        np.testing.assert_array_equal(ours.state_dict()[path], value)
    opt = optim.Adam([ours], lr=0.1)
    mt.backward(lambda x: (ours(x) ** 2).mean(), jnp.asarray(WORDS))
    opt.step()
    assert not any(tensor.any() for path, tensor in theirs.state_dict().items())
    adapter.copy_to_torch(ours, theirs)
    taken = {path: value.clone() for path, value in theirs.state_dict().items()}
    opt.step()
    assert all(torch.equal(taken[path], value) for path, value in theirs.state_dict().items())
    for tensor in theirs.state_dict().values():
        tensor.zero_()
    assert all(np.asarray(value).any() for value in ours.parameters())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_weights(name: str) -> None:
    with jax.enable_x64(name == "float64"):
        theirs = torch.nn.Linear(3, 2).to(getattr(torch, name))
        ours = nn.Linear(3, 2, dtype=jnp.dtype(name))
        adapter.load_from_torch(ours, theirs)
        assert ours.weight.dtype == jnp.dtype(name)
        np.testing.assert_array_equal(np.asarray(ours.weight, np.float64), theirs.weight.detach().double().numpy())
        other = torch.nn.Linear(3, 2).to(getattr(torch, name))
        adapter.copy_to_torch(ours, other)
        assert torch.equal(other.weight, theirs.weight) and torch.equal(other.bias, theirs.bias)


def test_complex_boolean_and_strided_buffers() -> None:
    class Here(mt.Module):
        def __init__(self) -> None:
            self.phase, self.mask = mt.Buffer(jnp.zeros((2, 2), jnp.complex64)), mt.Buffer(jnp.zeros(2, bool))

    class There(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("phase", torch.tensor([[1 + 2j, 3], [4, 5j]]).mT.conj())
            self.register_buffer("mask", torch.tensor([True, False]))

    ours, theirs = Here(), There()
    adapter.load_from_torch(ours, theirs)
    np.testing.assert_array_equal(ours.phase, np.array([[1 - 2j, 4], [3, -5j]]))
    assert ours.mask.tolist() == [True, False]
    ours.phase, ours.mask = ours.phase * 2, ~ours.mask
    adapter.copy_to_torch(ours, theirs)
    np.testing.assert_array_equal(theirs.phase.resolve_conj().numpy(), ours.phase)
    assert theirs.mask.tolist() == [False, True]


def test_modes_gradients_and_frozen_parameters_stay_each_sides_own() -> None:
    theirs, ours = torch.nn.Linear(3, 2).eval().requires_grad_(False), nn.Linear(3, 2)
    ours.accumulate([jnp.ones((2, 3)), jnp.ones(2)])
    adapter.load_from_torch(ours, theirs)
    assert ours.training and len(ours.parameters()) == 2 and all(grad.all() for grad in ours.grads())
    adapter.copy_to_torch(ours.freeze(), theirs.requires_grad_(True).train())
    assert theirs.training and theirs.weight.requires_grad and theirs.weight.grad is None
    assert_same_weights(ours, theirs)


def test_arrays_stay_on_their_devices() -> None:
    there = jax.devices()[1]
    ours, theirs = nn.BatchNorm1d(4).to(there), scrambled(torch.nn.BatchNorm1d(4))
    adapter.load_from_torch(ours, theirs)
    assert ours.weight.devices() == ours.running_var.devices() == {there}
    assert_same_weights(ours, theirs)
    split = jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x"))
    ours, theirs = nn.Linear(4, 4).to(split), torch.nn.Linear(4, 4)
    adapter.load_from_torch(ours, theirs)
    assert ours.weight.sharding == split
    other = torch.nn.Linear(4, 4)
    adapter.copy_to_torch(ours, other)
    assert torch.equal(other.weight, theirs.weight)


def test_packed_modules() -> None:
    theirs, ours = torch.nn.Linear(3, 2), nn.Linear(3, 2)
    mt.pack(ours)
    adapter.load_from_torch(ours, theirs)
    assert_same_weights(ours, theirs)
    other = torch.nn.Linear(3, 2)
    adapter.copy_to_torch(ours, other)
    assert_same_weights(ours, other)


def test_without_strict_names_may_differ() -> None:
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2, bias=False))
    ours = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    here = ["1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    before = snapshot(ours)
    theirs[1].register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    assert adapter.load_from_torch(ours, theirs, strict=False) == (here, ["1.scale"])
    np.testing.assert_array_equal(ours[0].weight, theirs[0].weight.detach().numpy())
    np.testing.assert_array_equal(ours[1].running_mean, before["1.running_mean"])
    assert adapter.copy_to_torch(ours, theirs, strict=False) == (["1.scale"], here)


def test_one_error_lists_everything_and_nothing_is_loaded() -> None:
    theirs, ours = Theirs(tied=False), Ours(tied=False)
    theirs.out = torch.nn.Linear(5, 7)
    theirs.body[0].double()
    theirs.body[1].num_batches_tracked.fill_(2**40)
    theirs.embedding.half()
    del theirs.body[1]._buffers["running_var"]
    before = snapshot(ours)
    with pytest.raises(ValueError) as caught:
        adapter.load_from_torch(ours, theirs)
    assert str(caught.value) == (
        "load_from_torch: the torch weights do not fit this Net; nothing was loaded:\n"
        "  body.0.bias: float64[4] in torch, float32[4] here: JAX's x64 mode is off. Call"
        ' jax.config.update("jax_enable_x64", True) before the module is made, or use `.float()` in torch\n'
        "  body.0.weight: float64[4, 4] in torch, float32[4, 4] here: JAX's x64 mode is off. Call"
        ' jax.config.update("jax_enable_x64", True) before the module is made, or use `.float()` in torch\n'
        "  body.1.num_batches_tracked: int64 from 1099511627776 to 1099511627776 does not fit int32, JAX's integers while"
        ' its 64 bits are off; call jax.config.update("jax_enable_x64", True) first\n'
        "  embedding.weight: float16[7, 4] in torch, float32[7, 4] here: convert one of them, `module.astype(...)` here or"
        " `.to(dtype)` in torch\n"
        "  missing: body.1.running_var, float32[4], which exists here and not in torch\n"
        "  out.weight: float32[7, 5] in torch, float32[7, 4] here\n"
        "  unexpected: out.bias, float32[7], which exists in torch and not here"
    )
    for path, value in before.items():
        np.testing.assert_array_equal(ours.state_dict()[path], value)


def test_one_error_lists_everything_and_nothing_is_copied() -> None:
    theirs, ours = Theirs(tied=False), Ours(tied=False)
    theirs.out = torch.nn.Linear(5, 7)
    theirs.embedding.half()
    theirs.body[1].running_var = torch.ones(1).expand(4)
    with torch.inference_mode():
        theirs.body[1].running_mean = torch.ones(4)
    before = snapshot(theirs)
    lines = [
        "copy_to_torch: this Net does not fit the torch module; nothing was copied:",
        "body.1.running_mean: made in torch's inference mode, so it cannot change: make the torch module outside that mode",
        "body.1.running_var: an expanded tensor, whose elements share memory in torch: `.clone\\(\\)` it there",
        r"embedding.weight: float16\[7, 4\] in torch, float32\[7, 4\] here: convert one of them, .*",
        r"missing: out.bias, float32\[7\], which exists in torch and not here",
        r"out.weight: float32\[7, 5\] in torch, float32\[7, 4\] here",
    ]
    with pytest.raises(ValueError, match=r"\n  ".join(lines) + "$"):
        adapter.copy_to_torch(ours, theirs)
    for path, value in before.items():
        np.testing.assert_array_equal(theirs.state_dict()[path].numpy(), value)


def test_tensors_without_values() -> None:
    ours = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"bias: torch has float32\[2\] on the meta device, without values"):
        adapter.load_from_torch(ours, torch.nn.Linear(3, 2, device="meta"))
    with pytest.raises(ValueError, match="weight: torch has an uninitialised parameter: call the lazy torch module"):
        adapter.load_from_torch(ours, torch.nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"bias: torch has array\(\[0., 0.\]\), a ndarray"):
        adapter.load_from_torch(ours, {"weight": torch.ones(2, 3), "bias": np.zeros(2)})


def test_wrong_kinds_of_arguments() -> None:
    ours, theirs = nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"loads into a minitorch_jax Module; got Linear\(.*\) \(Linear\)"):
        adapter.load_from_torch(theirs, ours)
    with pytest.raises(TypeError, match=r"from a torch module or its state_dict\(\); got Linear\(.*\) \(Linear\)"):
        adapter.load_from_torch(ours, ours)
    with pytest.raises(TypeError, match="from a minitorch_jax Module into a torch module; got a Linear and a dict"):
        adapter.copy_to_torch(ours, {})


# -- ties -------------------------------------------------------------------------------------------------------------


def num_tied(model: Any) -> int:
    return len(model.state_dict()) - len(jax.tree.leaves(model))


def test_tied_in_torch_alone() -> None:
    theirs, ours = Theirs(), Ours(tied=False)
    before = snapshot(ours)
    message = (
        r"out.weight and embedding.weight are one tensor in torch, and two here: tie them with"
        r" `module.tie\('out.weight', module, 'embedding.weight'\)`, or pass tie=True"
    )
    for source in (theirs, theirs.state_dict(), copy.deepcopy(theirs.state_dict())):
        with pytest.raises(ValueError, match=message):
            adapter.load_from_torch(ours, source)
    with pytest.raises(
        ValueError, match=r"and two here: .*torch_module.out.weight = torch.nn.Parameter\(torch_module.emb"
    ):
        adapter.copy_to_torch(ours, theirs)
    for path, value in before.items():
        np.testing.assert_array_equal(ours.state_dict()[path], value)
    adapter.load_from_torch(ours, theirs, tie=True)
    assert num_tied(ours) == 1
    assert_same_weights(ours, theirs)
    ours.embedding.weight = ours.embedding.weight + 1
    np.testing.assert_array_equal(ours.out.weight, ours.embedding.weight)
    adapter.copy_to_torch(ours, theirs)
    assert_same_weights(ours, theirs)


def test_tying_is_part_of_all_or_nothing() -> None:
    theirs, ours = Theirs(), Ours(tied=False)
    theirs.body[0] = torch.nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"body.0.weight: float32\[4, 5\] in torch, float32\[4, 4\] here"):
        adapter.load_from_torch(ours, theirs, tie=True)
    assert num_tied(ours) == 0


def test_tied_weights_may_be_nan() -> None:
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    theirs[0].weight.data[0, 0] = torch.nan
    theirs[1].weight = theirs[0].weight
    for source in (theirs, {name: tensor.clone() for name, tensor in theirs.state_dict().items()}):
        ours = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        if source is not theirs:
            ours[1].tie("weight", ours[0], "weight")
        adapter.load_from_torch(ours, source, tie=True)
        assert num_tied(ours) == 1
        np.testing.assert_array_equal(ours[1].weight, theirs[0].weight.detach().numpy())


def test_a_tie_of_a_parameter_and_a_buffer() -> None:
    class Here(mt.Module):
        def __init__(self) -> None:
            self.a, self.b = mt.Parameter(jnp.ones(2)), mt.Buffer(jnp.ones(2))

    weight = torch.ones(2)
    with pytest.raises(ValueError, match="b and a are one tensor in torch, but a buffer and a parameter here"):
        adapter.load_from_torch(Here(), {"a": weight, "b": weight}, tie=True)


def test_tied_here_alone() -> None:
    theirs, ours = Theirs(tied=False), Ours()
    message = (
        "out.weight and embedding.weight are one parameter here, and two in torch: tie them there,"
        " `torch_module.out.weight = torch_module.embedding.weight`, or make a module here without the tie"
    )
    with pytest.raises(ValueError, match=message):
        adapter.load_from_torch(ours, theirs)
    with pytest.raises(ValueError, match=message):
        adapter.copy_to_torch(ours, theirs)
    with pytest.raises(ValueError, match="are one parameter here, and two tensors with different values in torch"):
        adapter.load_from_torch(ours, theirs.state_dict())
    lost = {path: tensor.clone() for path, tensor in Theirs().state_dict().items()}  # as files without ties give them
    adapter.load_from_torch(ours, lost)
    assert num_tied(ours) == 1
    np.testing.assert_array_equal(ours.out.weight, lost["out.weight"].numpy())


# -- without torch ----------------------------------------------------------------------------------------------------


def test_without_torch_the_error_says_how_to_install_it() -> None:
    code = """
import sys
from minitorch_jax.runtime.install import command
sys.modules["torch"] = None
try:
    import minitorch_jax.adapters.torch
except ImportError as error:
    assert command("torch") in str(error), error
    assert error.name == "torch"
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# -- tensors where there is no adapter ----------------------------------------------------------------------------------

UNREADABLE = {
    "requires grad": lambda: torch.ones(3, 2, requires_grad=True),
    "bfloat16": lambda: torch.ones(3, 2, dtype=torch.bfloat16),
    "meta": lambda: torch.ones(3, 2, device="meta"),
    "sparse": lambda: torch.eye(3, 2).to_sparse(),
}
PLACES = {
    "a layer": lambda tensor: nn.Linear(2, 1)(tensor),
    "a model": lambda tensor: nn.Sequential(nn.ReLU(), nn.Linear(2, 1))(tensor),
    "a keyword": lambda tensor: nn.Linear(2, 1)(input=tensor),
    "a function": lambda tensor: nn.functional.relu(tensor),
    "a Parameter": mt.Parameter,
    "a Buffer": mt.Buffer,
    "an assignment": lambda tensor: setattr(nn.Linear(2, 3), "weight", tensor),
    "state_dict": lambda tensor: nn.Linear(2, 3, bias=False).load_state_dict({"weight": tensor}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_tensor_that_numpy_cannot_read_names_the_adapter(kind: str, place: str) -> None:
    tensor = UNREADABLE[kind]()
    expected = r"array of JAX or NumPy, got a torch Tensor, b?float\d\d\[3, 2\].*from_torch\(tensor\).*adapters\.torch"
    with pytest.raises((TypeError, ValueError), match=expected) as error:
        PLACES[place](tensor)
    assert place != "state_dict" or "\n  weight: expected" in str(error.value)


def test_the_lines_that_are_named_work() -> None:
    theirs = torch.nn.Linear(2, 1).bfloat16()
    ours = nn.Linear(2, 1, dtype=jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"nothing was loaded:\n  weight: expected .* got a torch Tensor, bfloat16\[1, 2\]"
    ):
        ours.load_state_dict(theirs.state_dict())
    adapter.load_from_torch(ours, theirs)
    assert mt.Parameter(adapter.from_torch(theirs.weight)) is not None
    with pytest.raises(
        TypeError, match=r"modules\[0\] is .*It is torch's: build the same model of `minitorch_jax\.nn`"
    ):
        optim.SGD([theirs])
    with pytest.raises(TypeError, match=r"modules\[0\] is an array, torch\.bfloat16\[1, 2\].*write `SGD\(\[model\]\)`"):
        optim.SGD(theirs.parameters())


def test_lazy_layers_take_their_sizes_from_torchs_weights():
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1, bias=False))
    ours = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(), nn.LazyLinear(1, bias=False))
    assert adapter.load_from_torch(ours, theirs).missing_keys == []
    assert repr(ours) == repr(theirs)
    other = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(1, bias=False))
    with pytest.raises(ValueError, match="do not fit this Sequential; nothing was loaded"):
        adapter.load_from_torch(other, theirs)
    assert other[0].has_uninitialized_params() and other[1].has_uninitialized_params()
