"""`mt.save` and `mt.load`: exact resumption, everything or nothing, and files that are damaged, foreign or hostile."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from training import everything

import minitorch_jax as mt
from minitorch_jax import checkpoint, nn, optim

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


@pytest.mark.parametrize("compiled", [False, True])
def test_training_goes_on_in_a_new_process_bit_by_bit(tmp_path, compiled):
    path = tmp_path / "run.npz"
    mt.seed(3)
    model, opt = make()  # noqa: F821
    train(model, opt, 0, 10, compiled)  # noqa: F821
    mt.save(path, model=model, opt=opt, step=10)
    train(model, opt, 10, 20, compiled)  # noqa: F821
    code = f"""{SCRIPT}
import json
mt.seed(99)
model, opt = make()
step = mt.load({str(path)!r}, model=model, opt=opt)["step"]
train(model, opt, step, 20, {compiled})
print(json.dumps(digest(model, opt)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(digest(model, opt)))  # noqa: F821


def line(value=0.0):
    layer = nn.Linear(3, 2, key=jax.random.key(0))
    layer.bias = jnp.full(2, value)
    return layer


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
}


def test_values_come_back_as_they_were(tmp_path):
    path = tmp_path / "values"
    mt.save(path, **VALUES)
    got = mt.load(path)
    assert got.keys() == VALUES.keys() and not path.with_suffix(".npz").exists()
    for name, value in VALUES.items():
        if isinstance(value, np.ndarray | np.generic):
            assert got[name].dtype == value.dtype and got[name].shape == value.shape
            np.testing.assert_array_equal(got[name], value)
        else:
            assert got[name] == value and type(got[name]) is type(value)


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


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_all_that_differs_is_said_at_once_and_nothing_changes(tmp_path):
    path = tmp_path / "run"
    model = line(1.0)
    mt.save(path, model=model, opt=optim.SGD([model], lr=0.1, momentum=0.9), ema=line(), epoch=3)
    with pytest.raises(
        ValueError, match=r"(?s)ema, a Linear, is in the file.*epoch was saved as a value.*other: not in"
    ):
        mt.load(path, model=model, opt=None, epoch=4, other=line())
    with pytest.raises(ValueError, match="model: a list has no state to bring back a Linear's"):
        mt.load(path, model=[], opt=None, ema=None)
    mine, large = line(5.0), nn.Linear(4, 2)
    opt = optim.SGD([mine], lr=0.7)
    stream = np.array(mt.random.current().cell.value)
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*ema: .*weight.*\(2, 3\).*opt: .*fields"):
        mt.load(path, model=mine, ema=large, opt=opt)
    assert float(mine.bias[0]) == 5.0 and opt.lr == 0.7
    np.testing.assert_array_equal(mt.random.current().cell.value, stream)
    assert mt.load(path, model=mine, opt=None, ema=None) == {"epoch": 3}
    assert float(mine.bias[0]) == 1.0


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
        ({1: 2}, r"x is a dict with keys that are no strings: \[1\]"),
        (np.array([object()]), "x is an array of object"),
        (nn.Linear, "x is a type"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(tmp_path, value, shown):
    mt.save(tmp_path / "a", x=1)
    with pytest.raises(TypeError, match=shown):
        mt.save(tmp_path / "a", x=value)
    assert mt.load(tmp_path / "a") == {"x": 1} and os.listdir(tmp_path) == ["a"]


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    mt.save(tmp_path / "a", x=1)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="no space left"):
        mt.save(tmp_path / "a", x=np.ones(3))
    assert mt.load(tmp_path / "a") == {"x": 1} and os.listdir(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError):
        mt.save(tmp_path / "no folder" / "a", x=1)
    with pytest.raises(FileNotFoundError):
        mt.load(tmp_path / "nothing")


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
        archive.comment = checkpoint._MAGIC + b"0" * 64
        for name, data in entries:
            archive.writestr(name, data)
    digest = checkpoint._digest(file)
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
    whole = {"version": 1, "objects": {"model": entry}, "stream": {"impl": "fry", "data": [0, 1]}}
    return json.dumps(whole | changes)


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
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    refused(tmp_path / "b", forged(HOSTILE[name]), "no file that mt.save has written")


def test_a_bomb_is_not_unpacked(tmp_path):
    data = forged([("description.json", described()), ("b.npy", bytes(10**8))], zipfile.ZIP_DEFLATED)
    assert len(data) < 10**6
    refused(tmp_path / "b", data, "its entries are compressed")


def test_two_entries_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = forged([("description.json", described()), ("description.json", described())])
    refused(tmp_path / "b", data, "have the same name")


# -- a process that is killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path, kills):
    """At random instants, over an existing file: what is there afterwards is the file of one save, complete."""
    path = tmp_path / "run"
    code = f"""
import numpy as np, minitorch_jax as mt
mt.save({str(path)!r}, number=-1, array=np.full(200_000, -1.0))
print("ready", flush=True)
number = 0
while True:
    mt.save({str(path)!r}, number=number, array=np.full(200_000, float(number)))
    number += 1
"""
    rng, seen, left = np.random.default_rng(0), set(), kills
    while left:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        for _ in range(min(left, 20)):  # frozen, looked at, and let go on: as good as killed, to whoever reads
            time.sleep(float(rng.uniform(0, 0.02)))
            process.send_signal(signal.SIGSTOP)
            seen.add(check(path))
            left -= 1
            process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        seen.add(check(path))
        assert len(os.listdir(tmp_path)) <= 2  # the file, and what the killed process was writing
        for scratch in set(tmp_path.iterdir()) - {path}:
            scratch.unlink()
    assert len(seen) > 5


def check(path: Path) -> int:
    got = mt.load(path)
    assert (got["array"] == got["number"]).all() and got["array"].shape == (200_000,)
    return got["number"]
