"""`mt.save` and `mt.load`: exact resumption, everything or nothing, and files that are damaged, foreign or hostile."""

import copy
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from training import everything, line

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.saving import archive as files
from minitorch_jax.saving import as_json

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
import minitorch_jax as mt
from minitorch_jax import nn, optim

class Net(mt.Module):
    def __init__(self):
        self.embed = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(4, 6)
        self.out.tie("weight", self.embed, "weight")
    def forward(self, x):
        h = self.drop(self.norm(self.embed(x)))
        return h @ self.out.weight + self.out.bias[None, :4]

def make():
    model = Net()
    return model, optim.Adam([model], lr=optim.schedules.cosine(0.05, 40))

def loss_fn(model, x):
    return ((model(x) - x) ** 2).mean()

def train(model, opt, start, stop, compiled):
    def step(x):
        opt.zero_grad()
        loss = mt.backward(loss_fn, model, x)
        opt.step()
        return loss
    step = mt.jit(step) if compiled else step
    for i in range(start, stop):
        step(jnp.asarray(np.random.default_rng(i).standard_normal((8, 4)), jnp.float32))

def digest(model, opt):
    state = opt.state_dict()["state"]
    found = {n: np.asarray(v).tobytes().hex() for n, v in model.state_dict().items()}
    found |= {f"{p}.{f}": np.asarray(v).tobytes().hex() for p, s in state.items() for f, v in s.items()}
    return found, np.asarray(jax.random.key_data(mt.next_key())).tolist()
"""
exec(SCRIPT)


def test_training_goes_on_in_a_new_process_bit_by_bit(tmp_path):
    """Eager and compiled; the new process does both."""
    want = []
    for compiled in (False, True):
        mt.seed(3)
        model, opt = make()  # noqa: F821
        train(model, opt, 0, 10, compiled)  # noqa: F821
        mt.save(tmp_path / str(compiled), model=model, opt=opt, step=10)
        train(model, opt, 10, 20, compiled)  # noqa: F821
        want.append(json.loads(json.dumps(digest(model, opt))))  # noqa: F821
    code = f"""{SCRIPT}
import json
for compiled in (False, True):
    mt.seed(99)
    model, opt = make()
    step = mt.load({str(tmp_path)!r} + f"/{{compiled}}", model=model, opt=opt)["step"]
    train(model, opt, step, 20, compiled)
    print(json.dumps(digest(model, opt)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for compiled, printed, (values, stream) in zip((False, True), done.stdout.splitlines(), want, strict=True):
        got, got_stream = json.loads(printed)
        assert got.keys() == values.keys() and got_stream == stream, compiled
        differing = {name: (got[name], values[name]) for name in values if got[name] != values[name]}
        assert not differing, ("compiled" if compiled else "eager", differing)


VALUES = {
    "nothing": None,
    "flag": True,
    "count": 10**20,
    "loss": 0.1,
    "odd": float("inf"),
    "text": "naïve ✓",
    "list": [1, (2.0, "x"), {"a": [None]}],
    "array": np.arange(6).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.float32(1.5),
    "complex": np.array([1 + 2j]),
    "flags": np.array([True, False]),
    "big-endian": np.arange(3, dtype=">f4"),
    "date": np.array("2024-02-29", "M8[D]"),
    "int keys": {0: {"step": 3}, 1: {"step": 4}, -2: 1, "0": 5},
    "other keys": {None: 1, True: 2, 1.5: 3, (1, "a", (2,)): 4},
    "zero byte": {"a\0b": np.ones(2), "ab": np.zeros(1)},
    "paths": {"../x": np.ones(1), "/etc/x": np.zeros(2), "": np.ones(3), "a.b": np.ones(4), "a": {"b": np.ones(5)}},
}


def same(got, value):
    if isinstance(value, np.ndarray | np.generic):
        assert got.dtype == value.dtype.newbyteorder("=") and got.shape == value.shape
        np.testing.assert_array_equal(got, value)
    elif isinstance(value, dict):
        assert list(got) == list(value) and [type(key) for key in got] == [type(key) for key in value]
        for key in value:
            same(got[key], value[key])
    else:
        assert got == value and type(got) is type(value)


def test_values_come_back_as_they_were(tmp_path):
    path = tmp_path / "values"
    mt.save(path, **VALUES)
    got = mt.load(path)
    assert got.keys() == VALUES.keys() and not path.with_suffix(".npz").exists()
    for name, value in VALUES.items():
        same(got[name], value)


NARROW = [jnp.bfloat16, jnp.float16, *(getattr(jnp, n) for n in dir(jnp) if n.startswith("float8"))]


@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: jnp.dtype(dtype).name)
def test_narrow_dtypes_are_kept_exactly(tmp_path, dtype):
    bits = np.arange(256, dtype=np.uint8)
    array = jnp.asarray((bits if jnp.dtype(dtype).itemsize == 1 else bits.astype(np.uint16) << 7).view(dtype))
    key = jax.random.key(5)
    mt.save(tmp_path / "a", array=array, key=key)
    got = mt.load(tmp_path / "a")
    assert got["array"].dtype == array.dtype == ml_dtypes.finfo(dtype).dtype
    assert got["array"].tobytes() == np.asarray(array).tobytes()
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(key)).all()


def test_numpy_opens_the_file(tmp_path):
    mt.save(tmp_path / "run.npz", model=line(2.0), epoch=1)
    with np.load(tmp_path / "run.npz", allow_pickle=False) as archive:
        assert {"model.weight", "model.bias"} <= set(archive)
        np.testing.assert_array_equal(archive["model.bias"], [2.0, 2.0])


def test_everything_with_a_state_can_be_saved(tmp_path):
    model = line()
    opt = optim.SGD([{"modules": [model], "lr": 0.2}], lr=0.1, momentum=0.9)
    averaged, scaler, plateau = optim.AveragedModel(model), mt.LossScaler(), optim.ReduceOnPlateau(opt)
    plateau.step(3.0)
    averaged.update(model)
    objects = {"opt": opt, "model": model, "averaged": averaged, "scaler": scaler, "plateau": plateau}
    mt.save(tmp_path / "all", **objects)
    before = everything(model, opt, averaged)
    plateau.step(9.0)
    model.weight = model.weight + 1
    opt.groups[0].lr = 0.7
    assert mt.load(tmp_path / "all", **objects) == {}
    after = everything(model, opt, averaged)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert plateau.best == 3.0 and opt.groups[0].lr == 0.2


def test_the_random_stream_is_brought_back(tmp_path):
    mt.seed(7)
    mt.save(tmp_path / "a", x=1)
    first = jax.random.key_data(mt.next_key())
    mt.load(tmp_path / "a")
    assert (jax.random.key_data(mt.next_key()) == first).all()


def test_schedules_stay_those_of_the_object(tmp_path):
    model = line()
    cosine, other = optim.schedules.cosine(0.1, 10), optim.schedules.cosine(0.1, 11)
    mt.save(tmp_path / "a", opt=optim.SGD([model], lr=cosine))
    opt = optim.SGD([model], lr=optim.schedules.cosine(0.1, 10))
    mt.load(tmp_path / "a", opt=opt)
    for lr in (other, 0.1):
        with pytest.raises(ValueError, match=r"a schedule was saved here \(cosine\("):
            mt.load(tmp_path / "a", opt=optim.SGD([model], lr=lr))
    mt.save(tmp_path / "b", opt=optim.SGD([model], lr=lambda t: 0.1 / (1 + t)))
    mt.load(tmp_path / "b", opt=opt)  # of a function nothing can be said
    mt.save(tmp_path / "c", opt=optim.SGD([model], lr=0.1))
    with pytest.raises(
        ValueError, match=r"opt\.hyperparameters\.lr: a number was saved here \(0\.1\), and there is cosine\("
    ):
        mt.load(tmp_path / "c", opt=opt)


def test_a_schedule_around_a_function_is_known_in_another_process(tmp_path):
    """Another process has the function elsewhere in memory, as each call of `make` here."""
    schedules = optim.schedules

    def make(steps):
        return schedules.join([schedules.warmup(lambda t: 0.1, 10), schedules.constant(0.01), abs], [5, steps])

    model = line()
    mt.save(tmp_path / "a", opt=optim.SGD([model], lr=make(20)))
    mt.load(tmp_path / "a", opt=optim.SGD([model], lr=make(20)))
    with pytest.raises(ValueError, match=r"a schedule was saved here \(join\(.*warmup\(.*a function.*constant.*20\)"):
        mt.load(tmp_path / "a", opt=optim.SGD([model], lr=make(21)))


@pytest.mark.parametrize(
    "schedule",
    [
        optim.schedules.cosine(0.1, 10),
        optim.schedules.join([optim.schedules.constant(0.1), optim.schedules.warmup(0.1, 3)], [5]),
    ],
)
def test_the_text_of_a_schedule_is_its_repr(schedule):
    assert as_json.text_of(schedule) == repr(schedule)


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_all_that_differs_is_said_at_once_and_nothing_changes(tmp_path):
    path = tmp_path / "run"
    model = line(1.0)
    mt.save(path, model=model, opt=optim.SGD([model], lr=0.1, momentum=0.9), ema=line(), epoch=3)
    with pytest.raises(
        ValueError,
        match=r"(?s)ema, a Linear, was saved: pass.*epoch was saved as a value.*other: nothing was saved by that name",
    ):
        mt.load(path, model=model, opt=None, epoch=4, other=line())
    with pytest.raises(ValueError, match="model: a list has no state, and the state of a Linear was saved"):
        mt.load(path, model=[], opt=None, ema=None)
    mine, large = line(5.0), nn.Linear(4, 2)
    opt = optim.SGD([mine], lr=0.7)
    stream = np.array(mt.module.random.current().cell.value)
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*ema: .*weight.*\(2, 3\).*opt: .*fields"):
        mt.load(path, model=mine, ema=large, opt=opt)
    assert float(mine.bias[0]) == 5.0 and opt.lr == 0.7
    np.testing.assert_array_equal(mt.module.random.current().cell.value, stream)
    with pytest.raises(ValueError, match=r"(?s)ema, a Linear, was saved.*  model: .*\(2, 3\).*  opt: .*fields"):
        mt.load(path, model=large, opt=opt)
    assert mt.load(path, model=mine, opt=None, ema=None) == {"epoch": 3}
    assert float(mine.bias[0]) == 1.0


def test_what_an_optimizer_lacks_is_said_beside_its_schedule(tmp_path):
    model = line()
    mt.save(tmp_path / "a", opt=optim.Adam([model], lr=optim.schedules.cosine(0.1, 10)))
    message = (
        r"(?s)opt\.hyperparameters\.lr: a schedule was saved here.*weight: fields.*missing: hyperparameter momentum"
    )
    with pytest.raises(ValueError, match=message):
        mt.load(tmp_path / "a", opt=optim.SGD([model], lr=0.1))
    model.freeze()
    with pytest.raises(
        ValueError, match=r"weight: fields .* were given for \['step'\]; it is frozen here: load it unfrozen"
    ):
        mt.load(tmp_path / "a", opt=optim.Adam([model], lr=optim.schedules.cosine(0.1, 10)))


def tied():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].tie("weight", net[0], "weight")
    return net


def test_tied_parameters_with_nan_are_loaded_and_given_back(tmp_path):
    net, other, layer = tied(), tied(), nn.Linear(2, 2)
    net[0].weight = net[0].weight.at[0, 0].set(jnp.nan)
    mt.save(tmp_path / "a", net=net)
    mt.load(tmp_path / "a", net=other)
    np.testing.assert_array_equal(other[1].weight, net[0].weight)
    mt.save(tmp_path / "b", net=tied(), layer=layer, opt=optim.SGD([layer]))
    mine = nn.Linear(2, 2)
    before = np.array(mine.weight)
    with pytest.raises(ValueError, match=r"nothing was loaded:\n  opt: "):
        mt.load(tmp_path / "b", net=net, layer=mine, opt=optim.Adam([mine]))
    np.testing.assert_array_equal(mine.weight, before)
    assert jnp.isnan(net[0].weight[0, 0])


def test_what_cannot_be_given_back_is_said_and_the_rest_is(tmp_path):
    class Once:
        loaded = 0

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            self.loaded += 1
            if self.loaded == 2:
                raise RuntimeError("no more")

    mt.save(tmp_path / "a", a=Once(), b=line(1.0), c=line())
    mine = line(5.0)
    with pytest.raises(ValueError, match="  c: ") as raised:
        mt.load(tmp_path / "a", a=Once(), b=mine, c=nn.Linear(4, 4))
    assert raised.value.__notes__ == ["the earlier state of a could not be restored: no more"]
    assert float(mine.bias[0]) == 5.0


def test_a_dtype_that_jax_would_cut_is_seen(tmp_path):
    """Arrays of 64 bits, which JAX makes arrays of 32 bits without saying so, where it is not asked for more."""
    with jax.enable_x64(True):
        wide = nn.Linear(3, 2, dtype=jnp.float64, key=jax.random.key(0))
        wide.count = mt.Buffer(jnp.asarray(3, jnp.int64))
        mt.save(tmp_path / "a", model=wide)
        same_kind = nn.Linear(3, 2, dtype=jnp.float64, key=jax.random.key(1))
        same_kind.count = mt.Buffer(jnp.asarray(1, jnp.int64))
        mt.load(tmp_path / "a", model=same_kind)
        np.testing.assert_array_equal(same_kind.weight, wide.weight)
    model = line(5.0)
    model.count = mt.Buffer(jnp.asarray(1, jnp.int32))
    message = r"(?s)weight is .*float64 for float32.*bias is .*float64 for float32.*count is .*int64 for int32"
    with pytest.raises(ValueError, match=message):
        mt.load(tmp_path / "a", model=model)
    assert float(model.bias[0]) == 5.0


def test_arrays_stay_on_their_devices(tmp_path):
    here, there = jax.devices()
    mesh = jax.sharding.Mesh(np.array([here, there]), "x")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    first, second, third = line(1.0).to(there), nn.Linear(3, 2).to(spread), line(3.0)
    opt = optim.SGD([first], lr=0.1, momentum=0.9)
    mt.save(tmp_path / "a", first=first, second=second, third=third, opt=opt)
    want = np.asarray(second.weight)
    targets = line(7.0).to(there), nn.Linear(3, 2).to(spread), line(7.0)
    other = optim.SGD([targets[0]], lr=0.1, momentum=0.9)
    mt.load(tmp_path / "a", first=targets[0], second=targets[1], third=targets[2], opt=other)
    for layer, value in zip(targets, (1.0, None, 3.0), strict=True):
        assert value is None or (np.asarray(layer.bias) == value).all()
    np.testing.assert_array_equal(targets[1].weight, want)
    assert targets[0].bias.devices() == {there} and targets[0].bias.committed
    assert targets[1].weight.sharding == spread
    assert not targets[2].bias.committed
    keyed = [mt.Module() for _ in range(2)]
    for i, module in enumerate(keyed):
        module.key = mt.Buffer(jax.random.key(i))
        module.to(there)
    mt.save(tmp_path / "b", keyed=keyed[0])
    mt.load(tmp_path / "b", keyed=keyed[1])
    assert keyed[1].key.devices() == {there} and keyed[1].key == keyed[0].key
    [momentum, _] = [fields["momentum_buffer"] for fields in other.state_dict()["state"].values()]
    assert momentum.devices() == {there}


def test_what_was_loaded_may_be_trained_in_place(tmp_path, mlp, batch, mse):
    """The arrays are those that were read from the file, without a copy; the steps that follow are the same ones."""
    opt = optim.SGD([mlp], lr=0.1, momentum=0.9)
    mt.save(tmp_path / "a", mlp=mlp, opt=opt)

    @mt.jit
    def step(x, y):
        opt.zero_grad()
        mt.backward(mse, mlp, x, y)
        opt.step()

    runs = []
    for _ in range(2):
        mt.load(tmp_path / "a", mlp=mlp, opt=opt)
        before = mlp.state_dict()
        copies = {name: np.array(array) for name, array in before.items()}
        for _ in range(3):
            step(*batch)
        runs.append({name: np.array(array) for name, array in mlp.state_dict().items()})
        for name, array in before.items():
            np.testing.assert_array_equal(array, copies[name])
    for name, array in runs[0].items():
        np.testing.assert_array_equal(array, runs[1][name])
        assert not np.array_equal(array, copies[name])


def test_a_random_stream_of_another_kind_is_refused(tmp_path):
    with mt.rng(jax.random.key(0, impl="rbg")):
        mt.save(tmp_path / "a", model=line(1.0))
    model = line(5.0)
    with pytest.raises(ValueError, match="the random stream is of rbg keys; here JAX makes threefry2x32 keys"):
        mt.load(tmp_path / "a", model=model)
    assert float(model.bias[0]) == 5.0
    strange = json.loads(described(objects={}, stream={"impl": "threefry2x32", "data": [1]}))
    (tmp_path / "b").write_bytes(forged([("description.json", json.dumps(strange))]))
    with pytest.raises(ValueError, match="Its random stream is no threefry2x32 key"):
        mt.load(tmp_path / "b")


def test_whatever_is_raised_while_objects_are_loaded_nothing_changes(tmp_path):
    class Broken:
        def state_dict(self):
            return {"x": 1}

        def load_state_dict(self, state):
            if state["x"] != 1:
                raise MemoryError("none left")

        def step(self):
            """Loaded after modules, as an optimizer is."""

    other = Broken()
    other.state_dict = lambda: {"x": 2}
    mt.save(tmp_path / "a", model=line(1.0), other=other)
    model = line(5.0)
    with pytest.raises(MemoryError, match="none left"):
        mt.load(tmp_path / "a", model=model, other=Broken())
    assert float(model.bias[0]) == 5.0


@pytest.mark.parametrize(
    "value, shown",
    [
        (object(), "x is a object, which cannot be saved"),
        ({"a": {1, 2}}, r"x\.a is a set"),
        ({b"k": 2}, r"x is a dict with keys that cannot be saved: \[b'k'\]"),
        ({"a": {(1, np.float32(2)): 0}}, r"x\.a is a dict with keys that cannot be saved"),
        (np.array([object()]), "x is an array of object"),
        ({"names": np.array(["a", "bc"])}, r"x\.names is an array of <U2, .*Save strings as a list"),
        (np.zeros(2, "V3"), r"x is an array of \|V3"),
        (np.zeros(2, [("a", "f4")]), r"x is an array of \[\('a', '<f4'\)\]"),
        (nn.Linear, "x is a type"),
        ([nn.Linear(1, 1)], r"x\.0 is a Linear, .*Pass modules and optimizers .*each under a name of its own"),
        ({"lr": optim.schedules.cosine(0.1, 10)}, r"x\.lr is a cosine"),
        (nn.Linear(1, 1).state_dict, "x is a method"),
        (jax.nn.relu, "x is a "),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "x is a MaskedArray"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(tmp_path, value, shown):
    mt.save(tmp_path / "a", x=1)
    with pytest.raises(TypeError, match=shown):
        mt.save(tmp_path / "a", x=value)
    assert mt.load(tmp_path / "a") == {"x": 1} and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("torchs_order", [False, True])
@pytest.mark.parametrize("name", ["save", "load"])
def test_objects_without_names_are_refused(tmp_path, mlp, name, torchs_order):
    path, state = tmp_path / "run.npz", mlp.state_dict()
    args, given = ((state, path), "dict, .*Path") if torchs_order else ((path, mlp), rf"\w*Path, {type(mlp).__name__}")
    with pytest.raises(TypeError, match=rf"`mt.{name}\(path, model=model, opt=opt\)`; got {given}"):
        getattr(mt, name)(*args)
    assert not path.exists()


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    mt.save(tmp_path / "a", x=1)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(files.np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="no space left"):
        mt.save(tmp_path / "a", x=np.ones(3))
    assert mt.load(tmp_path / "a") == {"x": 1} and os.listdir(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError, match=r"no folder/a'$"):
        mt.save(tmp_path / "no folder" / "a", x=1)
    with pytest.raises(FileNotFoundError):
        mt.load(tmp_path / "nothing")


def test_a_link_stays_and_permissions_too(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "run", tmp_path / "run"
    link.symlink_to(real)
    mt.save(link, x=1)  # which points to nothing yet
    real.chmod(0o640)
    mt.save(link, x=2)
    assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640
    assert mt.load(str(link)) == mt.load(real) == {"x": 2}
    assert os.listdir(tmp_path / "there") == ["run"]
    with pytest.raises(IsADirectoryError, match="there"):
        mt.save(tmp_path / "there", x=1)


@pytest.mark.parametrize("name", ["n" * 250, "é" * 120], ids=["ascii", "accents"])
def test_long_names(tmp_path, name):
    """Of files and in them, and names that no file can have."""
    value = {"k" * 70_000: np.ones(2), "\udc80": np.zeros(1)}
    mt.save(tmp_path / name, x=value)
    found = mt.load(tmp_path / name)["x"]
    assert found.keys() == value.keys() and found["k" * 70_000].tolist() == [1, 1] and found["\udc80"] == 0


def test_what_may_not_be_written_is_not(tmp_path, monkeypatch):
    mt.save(tmp_path / "a", x=1)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))  # root may write all
    with pytest.raises(PermissionError, match=r"Permission denied: '.*a'"):
        mt.save(tmp_path / "a", x=2)
    assert mt.load(tmp_path / "a") == {"x": 1} and os.listdir(tmp_path) == ["a"]


@pytest.mark.slow
def test_memory_is_not_a_multiple_of_the_file(tmp_path):
    """Of a model of 256 MB: saving needs next to nothing besides, loading once the arrays that take the old ones' place."""
    code = f"""
import resource, sys, numpy as np
import minitorch_jax as mt
class Wide(mt.Module):
    def __init__(self):
        self.many = [Layer() for _ in range(8)]
class Layer(mt.Module):
    def __init__(self):
        self.weight = mt.Parameter(np.ones(8 << 20, np.float32))
model = Wide()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
mt.save({str(tmp_path / "small")!r}, x=1)  # what JAX itself needs
start = peak()
mt.save({str(tmp_path / "a")!r}, model=model)
saved = peak()
mt.load({str(tmp_path / "a")!r}, model=model)
print(saved - start, peak() - saved)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saving, loading = map(float, done.stdout.split())
    assert saving < 64 and loading < 320, (saving, loading)


# -- damaged, foreign, hostile -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a"
    mt.save(path, model=line(1.0), note="x")
    return path.read_bytes()


def refused(path, data, match="no file of mt.save|damaged|no file that mt.save has written"):
    path.write_bytes(data)
    model = line(5.0)
    with pytest.raises(ValueError, match=match):
        mt.load(path, model=model)
    assert float(model.bias[0]) == 5.0


def test_a_file_cut_off_anywhere_is_refused(tmp_path, whole):
    for length in [0, 1, 50, *range(100, len(whole), 37), len(whole) - 1]:
        refused(tmp_path / "b", whole[:length])


def test_any_flipped_bit_is_found(tmp_path, whole):
    rng = np.random.default_rng(0)
    for place in {0, len(whole) - 1, *rng.integers(0, len(whole), 300).tolist()}:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        refused(tmp_path / "b", bytes(data))


def test_foreign_files_are_refused(tmp_path, whole):
    other = io.BytesIO()
    np.savez(other, a=np.ones(3))
    for data in (other.getvalue(), b"PK" + bytes(300), whole + b"more", b"x" * 1000):
        refused(tmp_path / "b", data)


def forged(entries, compression=zipfile.ZIP_STORED):
    """An archive with a right digest around whatever entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.comment = files._MAGIC + b"0" * 64
        for name, data in entries:
            archive.writestr(name, data)
    digest = files._digest(file)
    return file.getvalue()[:-64] + digest


def npy(array=None, header=None, **kwargs):
    file = io.BytesIO()
    if header is not None:
        np.lib.format.write_array_header_1_0(file, header)
    else:
        np.lib.format.write_array(file, array, **kwargs)
    return file.getvalue()


def described(**changes):
    entry = {
        "stateful": True,
        "type": "Linear",
        "value": {"dict": {"bias": {"array": "b", "dtype": "float32", "shape": [2]}}},
    }
    whole = {"version": 1, "objects": {"model": entry}, "stream": {"impl": "threefry2x32", "data": [0, 1]}}
    return json.dumps(whole | changes)


def whole_of(value):
    return described(objects={"x": {"stateful": False, "type": "dict", "value": value}})


HUGE = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
HOSTILE = {
    "a pickle": [("description.json", described()), ("b.npy", npy(np.array([print], object), allow_pickle=True))],
    "a shape that is not there": [("description.json", described()), ("b.npy", npy(header=HUGE))],
    "another shape": [("description.json", described()), ("b.npy", npy(np.ones(7, np.float32)))],
    "another dtype": [("description.json", described()), ("b.npy", npy(np.ones(2, np.float64)))],
    "no array": [("description.json", described())],
    "no description": [("b.npy", npy(np.ones(2, np.float32)))],
    "another version": [("description.json", described(version=2))],
    "no stream": [("description.json", described(stream={})), ("b.npy", npy(np.ones(2, np.float32)))],
    "nonsense": [("description.json", "[1, 2]")],
    "no JSON": [("description.json", "{")],
    "deep JSON": [("description.json", "[" * 10**5)],
    "a path": [("description.json", described()), ("../../b.npy", npy(np.ones(2, np.float32)))],
    "no header": [("description.json", described()), ("b.npy", b"x")],
    "no list of objects": [("description.json", described(objects=[1]))],
    "no values": [("description.json", described(objects={"model": {"stateful": True, "type": "Linear"}}))],
    "a key that is a list": [("description.json", whole_of({"pairs": [[{"list": []}, 1]]}))],
    "another kind of key": [("description.json", whole_of({"key": "none", "data": 1}))],
    "an index out of range": [("description.json", whole_of({"pairs": [[1]]}))],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    refused(tmp_path / "b", forged(HOSTILE[name]), "no file that mt.save has written")


@pytest.mark.parametrize("rounds", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_file_changed_anywhere_with_a_right_digest_is_refused_or_read(tmp_path, rounds):
    """Whatever its bytes say: a ValueError and nothing changed, or values that came from the file."""
    mt.save(
        tmp_path / "a", model=line(1.0), note=["x", 2.0], array=np.arange(3, dtype=jnp.bfloat16), key=jax.random.key(1)
    )
    whole, rng, refusals = (tmp_path / "a").read_bytes(), np.random.default_rng(0), 0
    model = line(5.0)
    for _ in range(rounds):
        data = bytearray(whole[:-64])
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        data += files._digest(io.BytesIO(bytes(data) + b"0" * 64))
        (tmp_path / "b").write_bytes(data)
        before = {name: np.asarray(array) for name, array in model.state_dict().items()}
        try:
            mt.load(tmp_path / "b", model=model)
        except ValueError:
            refusals += 1
            for name, array in model.state_dict().items():
                np.testing.assert_array_equal(array, before[name])
    assert rounds / 5 < refusals < rounds


def test_an_encrypted_entry_is_refused(tmp_path, whole):
    data = bytearray(whole)
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = data.find(signature)
        data[place + offset] |= 1
    data[-64:] = files._digest(io.BytesIO(bytes(data)))
    refused(tmp_path / "b", bytes(data), "no file that mt.save has written: .*encrypted")


def test_a_bomb_is_not_unpacked(tmp_path):
    data = forged([("description.json", described()), ("b.npy", bytes(10**8))], zipfile.ZIP_DEFLATED)
    assert len(data) < 10**6
    refused(tmp_path / "b", data, "its entries are compressed")


def test_two_entries_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = forged([("description.json", described()), ("description.json", described())])
    refused(tmp_path / "b", data, "have the same name")


# -- a process that is killed ------------------------------------------------------------------------------------------

# A process that has imported everything, and started no device, makes a new one for each line that it reads. That one
# saves two models with their optimizers in turn, over and over; all the arrays of one are the same number.
SAVER = """
import os, sys
import numpy as np
import minitorch_jax as mt
from minitorch_jax import optim

class Wide(mt.Module):
    def __init__(self, number):
        self.weight = mt.Parameter(np.full((1000, 500), number, np.float32))
        self.bias = mt.Parameter(np.full(1000, number, np.float32))

def numbered(number):
    model = Wide(number)
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    state = {f"0.{n}": {"step": number, "momentum_buffer": -np.asarray(a)} for n, a in model.state_dict().items()}
    opt.load_state_dict(opt.state_dict() | {"num_steps": number, "state": state})
    return {"model": model, "opt": opt}
"""
FORKS = """
for line in sys.stdin:
    path, number = line.rsplit(maxsplit=1)
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        both = [(n, numbered(n)) for n in (int(number) + 1, int(number) + 2)]
        while True:
            for n, objects in both:
                mt.save(path, number=n, **objects)
                os.write(1, b"saved\\n")  # in one piece, or not at all
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path, kills):
    """At random instants, over an existing file: what is there afterwards is the file of one save, complete."""
    path, scope = tmp_path / "run", {}
    exec(SAVER, scope)
    mine = scope["numbered"](0)
    mt.save(path, number=0, **mine)
    rng, number, unfinished = np.random.default_rng(0), 0, 0
    cache = {"DIR": tmp_path.parent, "MIN_COMPILE_TIME_SECS": 0, "MIN_ENTRY_SIZE_BYTES": -1}
    env = {f"JAX_{'COMPILATION_CACHE' if k == 'DIR' else 'PERSISTENT_CACHE'}_{k}": str(v) for k, v in cache.items()}
    run = [sys.executable, "-c", SAVER + FORKS]
    with subprocess.Popen(run, stdin=-1, stdout=-1, text=True, bufsize=1, env=os.environ | env) as parent:
        for _ in range(kills):
            parent.stdin.write(f"{path} {number}\n")
            child = int(parent.stdout.readline())
            assert parent.stdout.readline() == "saved\n"
            time.sleep(float(rng.uniform(0, 0.1)))
            os.kill(child, signal.SIGKILL)
            while (line := parent.stdout.readline()) != "dead\n":
                assert line == "saved\n"
            before, number = number, mt.load(path, **mine)["number"]
            assert before < number <= before + 2  # one that was written by this child
            state = mine["opt"].state_dict()
            assert state["num_steps"] == number
            for name, array in mine["model"].state_dict().items():
                assert (np.asarray(array) == number).all()
                assert (np.asarray(state["state"][f"0.{name}"]["momentum_buffer"]) == -number).all()
            left = set(tmp_path.iterdir()) - {path}
            assert len(left) <= 1  # what the killed process was writing
            unfinished += len(left)
            for scratch in left:
                scratch.unlink()
        parent.stdin.close()
    assert kills < 100 or unfinished > kills / 5  # so many of these instants were ones of writing
    print(f"{unfinished} of {kills} were killed with an unfinished file")


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="this is no regular file"):
        mt.save(tmp_path / "pipe", x=1)
    assert os.listdir(tmp_path) == ["pipe"]


# -- malformed states of optimizers ------------------------------------------------------------------------------------

STRANGE = [
    None,
    3,
    -1,
    1.5,
    True,
    "x",
    b"x",
    [1],
    (1, 2),
    {},
    {1: 2},
    2**31,
    10**30,
    float("nan"),
    np.ones(3),
    object(),
]


def entries(value, path=()):
    """The places of a state dict, the whole of it first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from entries(item, (*path, key))


def put(state, path, value):
    """A copy of a state dict with another value at a place."""
    if not path:
        return value
    new = copy.copy(state)
    new[path[0]] = put(state[path[0]], path[1:], value)
    return new


def test_every_malformed_entry_of_an_optimizer_is_a_value_error_that_names_it():
    layer = nn.Linear(1, 1)
    opt = optim.Adam([{"modules": [layer], "lr": 0.1}])
    layer.accumulate(layer.grads())
    opt.step()
    good, taken = opt.state_dict(), []
    for path in entries(good):
        for value in STRANGE:
            try:
                opt.load_state_dict(put(good, path, value))
            except ValueError as error:
                assert not path or str(path[-1]).rstrip("s") in str(error), (path, value, error)
            else:
                taken.append((*path, value))
                opt.load_state_dict(good)
    assert ("num_steps", 3) in taken and ("state", "0.weight", "step", 3) in taken
    assert all(value == 3 for first, *_, value in taken if first in ("num_steps", "skipped", "state"))


def test_a_malformed_optimizer_in_a_file_is_named_and_changes_nothing(tmp_path):
    layer = nn.Linear(1, 1)
    opt = optim.Adam([layer])

    class Malformed:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            raise NotImplementedError

    good = opt.state_dict()
    for path in (("state",), ("hyperparameters",), ("num_steps",), ("state", "0.weight", "step"), ("fingerprints",)):
        for value in (None, 2**40, "x", [1.0]):
            mt.save(tmp_path / "a", opt=Malformed(put(good, path, value)))
            with pytest.raises(ValueError, match=rf"(?s)nothing was loaded.*{path[-1]}"):
                mt.load(tmp_path / "a", opt=opt)
    assert opt.num_steps == 0 and opt.lr == 1e-3


@pytest.mark.parametrize("error", [AttributeError, OverflowError, KeyError, IndexError, TypeError, ZeroDivisionError])
def test_what_any_object_raises_when_it_loads_is_named(tmp_path, error):
    class Strange:
        fails = False

        def state_dict(self):
            return {"a": 1}

        def load_state_dict(self, state):
            if self.fails:
                self.fails = False
                raise error("broken")

    strange = Strange()
    mt.save(tmp_path / "a", strange=strange)
    strange.fails = True
    with pytest.raises(ValueError, match="(?s)nothing was loaded.*strange: .*broken"):
        mt.load(tmp_path / "a", strange=strange)


@pytest.mark.slow
def test_a_path_of_bytes(tmp_path):
    layer = nn.Linear(1, 1)
    path = os.fsencode(tmp_path / "a\udcff.npz")  # a name that is no text
    mt.save(path, layer=layer, n=3)
    assert os.listdir(os.fsencode(tmp_path)) == [os.path.basename(path)]
    assert mt.load(path, layer=layer) == {"n": 3}
    with pytest.raises(TypeError, match="int"):
        mt.save(3, layer=layer)
