"""`adapters.safetensors`: exchange with torch, every dtype bit by bit, ties, and files that are damaged or hostile."""

import json
import os
import stat
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from oracle import HAS_TORCH
from oracle import actual as torch
from safetensors import safe_open

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.adapters import safetensors as st

safetensors_torch = Lazily("safetensors.torch") if HAS_TORCH else torch


def ours(seed=0):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.load_state_dict(values_of(theirs(seed)))
    model[2].tie("weight", model[0], "weight")
    return model


def theirs(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model(torch.randn(8, 4))
    return model


def values_of(model):
    return {
        name: a.numpy().copy() if isinstance(a, torch.Tensor) else np.array(a) for name, a in model.state_dict().items()
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


# -- with torch --------------------------------------------------------------------------------------------------------


def test_torch_loads_what_we_save(tmp_path):
    model, other = ours(1), theirs(2)
    st.save(tmp_path / "a", model)
    missing, unexpected = safetensors_torch.load_model(other, tmp_path / "a")
    assert not missing and not unexpected
    assert_same(values_of(model), values_of(other))
    assert other[2].weight is other[0].weight
    with safe_open(tmp_path / "a", "np") as file:
        assert "2.weight" not in file.keys() and file.metadata() == {"format": "pt", "2.weight": "0.weight"}


def test_what_torch_saves_is_loaded(tmp_path):
    other, model = theirs(1), ours(2)
    safetensors_torch.save_model(other, tmp_path / "a", metadata={"by": "torch"})
    assert st.load(tmp_path / "a", model) == ([], [])
    assert_same(values_of(model), values_of(other))
    assert model.num_parameters() == 16 + 4 + 8 + 4  # still tied
    arrays, metadata = st.read(tmp_path / "a")
    assert metadata == {"by": "torch"} and arrays["2.weight"] is arrays["0.weight"]
    assert_same(dict(sorted(arrays.items())), dict(sorted(values_of(other).items())))


def test_ties_that_the_metadata_does_not_note(tmp_path):
    """As transformers writes them: a name is just not there. Whichever of the two it is."""
    for gone in ("0.weight", "2.weight"):
        state = theirs(3).state_dict()
        want = values_of(theirs(3))
        del state[gone]
        safetensors_torch.save_file(state, tmp_path / "a", {"format": "pt"})
        model = ours()
        assert st.load(tmp_path / "a", model) == ([], [])
        assert_same(values_of(model), want)


def test_both_names_of_a_tied_parameter(tmp_path):
    state = {name: tensor.clone() for name, tensor in theirs(4).state_dict().items()}
    safetensors_torch.save_file(state, tmp_path / "a")
    model = ours()
    st.load(tmp_path / "a", model)
    assert_same(values_of(model), values_of(theirs(4)))
    state["2.weight"] += 1
    safetensors_torch.save_file(state, tmp_path / "a")
    before = values_of(model)
    with pytest.raises(ValueError, match=r"2\.weight and 0\.weight are one tied parameter, but their arrays differ"):
        st.load(tmp_path / "a", model)
    assert_same(values_of(model), before)


def test_tied_in_the_file_and_not_here(tmp_path):
    st.save(tmp_path / "a", ours())
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"(?s)a: .*missing: 2\.weight.*2\.weight and 0\.weight are tied in the file.*tie"
    ):
        st.load(tmp_path / "a", model)
    arrays, _ = st.read(tmp_path / "a")
    model.load_state_dict(arrays)  # two parameters of one value
    np.testing.assert_array_equal(model[0].weight, model[2].weight)


def test_counts_of_64_bits(tmp_path):
    state = theirs().state_dict()
    assert state["1.num_batches_tracked"].dtype == torch.int64
    safetensors_torch.save_model(theirs(), tmp_path / "a")
    model = ours()
    model[1].num_batches_tracked = jnp.asarray(7, jnp.int32)
    st.load(tmp_path / "a", model)
    assert model[1].num_batches_tracked.dtype == jnp.int32 and int(model[1].num_batches_tracked) == 1
    other = theirs()
    other[1].num_batches_tracked += 2**40
    safetensors_torch.save_model(other, tmp_path / "a")
    with pytest.raises(ValueError, match=r"1\.num_batches_tracked is .*int64 for int32"):
        st.load(tmp_path / "a", model)


# -- arrays ------------------------------------------------------------------------------------------------------------

FLOATS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float16", "bfloat16"]
DTYPES = [*FLOATS, "bool", "complex64", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32))]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_dtype(tmp_path, dtype):
    bits = np.arange(256, dtype=np.uint8) & (1 if dtype == "bool" else 255)
    array = jnp.asarray(bits.repeat(jnp.dtype(dtype).itemsize).view(jnp.dtype(dtype)).reshape(16, 16))
    st.save(tmp_path / "a", {"x": array, "t": array.T, "one": array[3, 5]})
    got, _ = st.read(tmp_path / "a")
    for name, want in (("x", array), ("t", array.T), ("one", array[3, 5])):
        assert got[name].dtype == array.dtype and got[name].shape == want.shape
        assert got[name].tobytes() == np.asarray(want).tobytes()

    class Holder(mt.Module):
        def __init__(self, value):
            self.x = mt.Buffer(value)

    holder = Holder(jnp.zeros_like(array))
    st.save(tmp_path / "b", Holder(array))
    st.load(tmp_path / "b", holder)
    assert holder.x.dtype == array.dtype and np.asarray(holder.x).tobytes() == np.asarray(array).tobytes()
    if dtype not in ("uint16", "uint32"):  # which torch knows by name only
        tensor = safetensors_torch.load_file(tmp_path / "a")["x"]
        assert bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) == np.asarray(array).tobytes()


def test_numpy_arrays_of_other_orders(tmp_path):
    want = np.arange(6, dtype=np.float64).reshape(2, 3)
    arrays = {"big": want.astype(">f8"), "fortran": np.asfortranarray(want), "strided": np.repeat(want, 2, 1)[:, ::2]}
    st.save(tmp_path / "a", arrays | {"empty": np.zeros((0, 3), np.int64), "scalar": np.float32(2)})
    got, metadata = st.read(tmp_path / "a")
    for name in arrays:
        np.testing.assert_array_equal(got[name], want)
    assert got["empty"].shape == (0, 3) and got["scalar"].shape == () and metadata == {"format": "pt"}
    assert {name: t.shape for name, t in safetensors_torch.load_file(tmp_path / "a").items()}["big"] == (2, 3)


def test_one_array_under_several_names(tmp_path):
    shared, empty = jnp.ones((2, 2)), jnp.zeros(0)
    st.save(tmp_path / "a", {"b": shared, "a": shared, "c": jnp.ones((2, 2)), "d": empty, "e": empty})
    with safe_open(tmp_path / "a", "np") as file:
        assert sorted(file.keys()) == ["a", "c", "d", "e"] and file.metadata()["b"] == "a"
    assert st.read(tmp_path / "a")[0].keys() == set("abcde")


def test_packed_and_frozen_parameters(tmp_path):
    model = ours(5)
    want = values_of(model)
    mt.pack(model)
    model[0].freeze()
    st.save(tmp_path / "a", model)
    other = ours(6)
    mt.pack(other)
    st.load(tmp_path / "a", other)
    assert_same(values_of(other), want)


def test_arrays_stay_on_their_devices(tmp_path):
    there = jax.devices()[1]
    st.save(tmp_path / "a", ours(1))
    model = ours(2).to(there)
    st.load(tmp_path / "a", model)
    assert_same(values_of(model), values_of(ours(1)))
    assert all(array.devices() == {there} for array in model.parameters())


def test_strict_or_not(tmp_path):
    st.save(tmp_path / "a", {"weight": jnp.ones((2, 3)), "other": jnp.ones(1)})
    model = nn.Linear(3, 2)
    bias = np.array(model.bias)
    with pytest.raises(
        ValueError,
        match=r"(?s)a: .*nothing was loaded:\n  missing: bias, float32\[2\]\n  unexpected: other, float32\[1\]",
    ):
        st.load(tmp_path / "a", model)
    assert not (np.asarray(model.weight) == 1).all()
    assert st.load(tmp_path / "a", model, strict=False) == (["bias"], ["other"])
    assert (np.asarray(model.weight) == 1).all()
    np.testing.assert_array_equal(model.bias, bias)
    st.save(tmp_path / "a", {"weight": jnp.ones((3, 2)), "bias": np.ones(2)})  # float64: not cut to float32
    with pytest.raises(ValueError, match=r"(?s)weight is .*shape \(3, 2\) for \(2, 3\).*bias is .*float64 for float32"):
        st.load(tmp_path / "a", model, strict=False)


def test_metadata(tmp_path):
    st.save(tmp_path / "a", {"x": jnp.ones(1)}, {"format": "flax", "licence": "Apache ✓", "": "x y"})
    assert st.read(tmp_path / "a")[1] == {"format": "flax", "licence": "Apache ✓", "": "x y"}


# -- what cannot be written --------------------------------------------------------------------------------------------


def test_all_that_cannot_be_written_is_said_at_once_and_the_old_file_stays(tmp_path):
    st.save(tmp_path / "a", {"x": jnp.ones(1)})
    content = {
        "key": jax.random.key(0),
        "four": jnp.ones(2, jnp.int4),
        "eight": jnp.ones(2, jnp.float8_e3m4),
        "list": [1.0],
        "words": np.array(["a"]),
        "__metadata__": jnp.ones(1),
        3: jnp.ones(1),
    }
    lines = [
        "key, a random key: leave it out, or pass `jax.random.key_data",
        "four, which has dtype int4: convert it to one of bool, ",
        "eight, which has dtype float8_e3m4",
        "list, a list: pass arrays of JAX or NumPy",
        "words, which has dtype str32",
        "the name '__metadata__'",
        "the name 3",
        r"metadata\['epoch'\] = 3: names and values must be strings",
        r"metadata\['key'\]: an array has this name",
        r"metadata\['best'\] = 'four': an array has this name, so it would be read as a tie",
    ]
    with pytest.raises(
        ValueError, match="(?s)a was not written. A safetensors file cannot hold:" + ".*".join(["", *lines])
    ):
        st.save(tmp_path / "a", content, {"epoch": 3, "key": "x", "best": "four"})
    assert st.read(tmp_path / "a")[0].keys() == {"x"} and os.listdir(tmp_path) == ["a"]


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="takes a Module or a dict of arrays by name; got a list"):
        st.save(tmp_path / "a", [1])
    with pytest.raises(TypeError, match="takes metadata as a dict of strings; got 'x'"):
        st.save(tmp_path / "a", {}, "x")
    st.save(tmp_path / "a", {})
    with pytest.raises(TypeError, match="takes a Module to load into; got a dict"):
        st.load(tmp_path / "a", {})
    for path in (tmp_path / "none", tmp_path / "none.json", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            st.load(path, nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError):
        st.save(tmp_path / "no folder" / "a", {})


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    st.save(tmp_path / "a", {"x": jnp.ones(1)})

    def full(_, path, __):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(st, "serialize_file", full)
    with pytest.raises(OSError, match="no space left"):
        st.save(tmp_path / "a", {"y": jnp.ones(1)})
    assert st.read(tmp_path / "a")[0].keys() == {"x"} and os.listdir(tmp_path) == ["a"]


# -- damaged, foreign, hostile -----------------------------------------------------------------------------------------


def file_of(header, data=b"\0" * 8, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


TWICE = f'{{"bias": {json.dumps(entry())}, "bias": {json.dumps(entry())}}}'.encode()
HOSTILE = {
    "nothing": b"",
    "a beginning": b"\3\0",
    "another format": b"PK\3\4" + bytes(300),
    "a huge header": file_of({"bias": entry()}, length=2**60),
    "a header that is not all there": file_of({"bias": entry()}, length=500),
    "no JSON": file_of(b"{"),
    "a list": file_of(b"[1]"),
    "deep JSON": file_of(b"[" * 10**5),
    "one name twice": file_of(TWICE),
    "overlapping": file_of({"bias": entry(), "b": entry()}),
    "beyond the end": file_of({"bias": entry(shape=[4], data_offsets=[0, 16])}),
    "before the beginning": file_of({"bias": entry(data_offsets=[-8, 0])}),
    "a hole": file_of({"bias": entry(shape=[1], data_offsets=[4, 8])}),
    "more data": file_of({"bias": entry()}, bytes(9)),
    "less data": file_of({"bias": entry()}, bytes(7)),
    "another size": file_of({"bias": entry(shape=[3])}),
    "an overflow": file_of({"bias": entry(shape=[2**40, 2**40])}),
    "a negative size": file_of({"bias": entry(shape=[-2])}),
    "an unknown dtype": file_of({"bias": entry(dtype="F128")}),
    "numbers of 4 bits": file_of({"bias": entry(dtype="F4", shape=[16])}),
    "no booleans": file_of({"bias": entry(dtype="BOOL", shape=[8])}, b"\2" * 8),
    "metadata that is no string": file_of({"__metadata__": {"a": 1}, "bias": entry()}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    (tmp_path / "b").write_bytes(HOSTILE[name])
    model = nn.Linear(2, 2)
    before = values_of(model)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"b is not a safetensors file, or is damaged: "):
            st.load(tmp_path / "b", model, strict)
    assert_same(values_of(model), before)


def test_names_are_no_paths(tmp_path):
    (tmp_path / "b").write_bytes(file_of({"../../etc/x": entry()}))
    assert list(st.read(tmp_path / "b")[0]) == ["../../etc/x"] and os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("rounds", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_file_changed_anywhere_is_refused_or_read(tmp_path, rounds):
    """The format has no digest, so what is changed in the numbers is read as it is; never anything but a ValueError."""
    st.save(tmp_path / "a", ours(), {"x": "y"})
    whole, rng, refusals, model = (tmp_path / "a").read_bytes(), np.random.default_rng(0), 0, ours()
    for number in range(rounds):
        data = bytearray(whole[: int(rng.integers(len(whole))) if number % 4 == 0 else None])
        for place in rng.integers(0, max(len(data), 1), rng.integers(1, 4)):
            data[place : place + 1] = rng.integers(256, size=1, dtype=np.uint8).tobytes()
        (tmp_path / "b").write_bytes(data)
        before = values_of(model)
        try:
            st.load(tmp_path / "b", model)
        except ValueError:
            refusals += 1
            assert_same(values_of(model), before)
        else:
            assert [a.dtype for a in before.values()] == [a.dtype for a in model.state_dict().values()]
    assert rounds / 2 < refusals < rounds


# -- in several files --------------------------------------------------------------------------------------------------


def sharded(folder, weight_map=None, **changes):
    """A model in two files, and its index."""
    arrays = {"weight": jnp.full((2, 3), 2.0), "bias": jnp.full(2, 3.0)}
    st.save(folder / "m-1.safetensors", {"weight": arrays["weight"]}, {"part": "1"})
    st.save(folder / "m-2.safetensors", {"bias": arrays["bias"]}, {"part": "2", "more": "x"})
    places = {"weight": "m-1.safetensors", "bias": "m-2.safetensors"} if weight_map is None else weight_map
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": places} | changes))
    return index


def test_a_model_in_several_files(tmp_path):
    index = sharded(tmp_path)
    arrays, metadata = st.read(str(index))
    assert list(arrays) == ["weight", "bias"] and metadata == {"format": "pt", "part": "1", "more": "x"}
    model = nn.Linear(3, 2)
    st.load(index, model)
    assert float(model.weight[0, 0]) == 2 and float(model.bias[0]) == 3


@pytest.mark.parametrize(
    "file", ["../m-1.safetensors", "/etc/passwd", "..", "", "a/../m-1.safetensors", "c:\\m", "m\0"]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, file):
    (tmp_path / "in").mkdir()
    st.save(tmp_path / "m-1.safetensors", {"weight": jnp.ones((2, 3))})
    index = sharded(tmp_path / "in", {"weight": file, "bias": "m-2.safetensors"})
    with pytest.raises(ValueError, match="names files outside its own folder, so nothing was read"):
        st.read(index)


def test_an_index_and_files_that_differ(tmp_path):
    index = sharded(tmp_path, {"weight": "m-2.safetensors", "other": "m-2.safetensors"})
    lines = [
        r"m.safetensors.index.json and its files differ:",
        "other: the index places it in m-2",
        "weight: the index places it in m-2",
        "bias: m-2.safetensors has it",
    ]
    with pytest.raises(ValueError, match="(?s)" + ".*".join(lines)):
        st.read(index)
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        st.read(sharded(tmp_path, {"weight": "gone.safetensors"}))
    (tmp_path / "m-1.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(ValueError, match=r"m-1\.safetensors is not a safetensors file"):
        st.read(sharded_index_only(tmp_path))


def sharded_index_only(folder):
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "m-1.safetensors"}}))
    return index


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[1]",
        "{}",
        '{"weight_map": [1]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 10**5,
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match=r"m\.json is not an index of safetensors files"):
        st.read(tmp_path / "m.json")


def test_permissions_and_what_is_brought_to_the_disk(tmp_path, monkeypatch):
    """safetensors writes a file of its own, which only its owner may read, in the place of the one it is given."""
    path, synced, fsync = tmp_path / "a", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd)), fsync(fd)))
    before = os.umask(0o022)
    try:
        st.save(path, {"a": np.ones(1)})
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o664)
        st.save(path, {"a": np.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert path.stat().st_ino in [found.st_ino for found in synced]


def test_a_format_is_no_tie(tmp_path):
    st.save(tmp_path / "a", {"pt": np.ones(2)})
    arrays, metadata = st.read(tmp_path / "a")
    assert list(arrays) == ["pt"] and metadata == {"format": "pt"}


def test_lazy_layers_take_their_sizes_from_a_file(tmp_path):
    full, lazy = (nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()) for _ in range(2))
    full(jnp.ones((4, 3)))
    st.save(tmp_path / "net.safetensors", full)
    st.load(tmp_path / "net.safetensors", lazy)
    assert repr(lazy) == repr(full) and bool((lazy[0].weight == full[0].weight).all())
