"""`adapters.orbax`: checkpoints in the background, on several devices, the best kept, as strict as `mt.load`."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from training import everything, line

import minitorch_jax as mt
from minitorch_jax import nn, optim

orbax, ocp = Lazily("minitorch_jax.adapters.orbax"), Lazily("orbax.checkpoint")


def wide(value=0.0, size=1 << 22):
    """A module whose parameter takes a while to write."""

    class Wide(mt.Module):
        def __init__(self):
            self.weight = mt.Parameter(jnp.full(size, value))

    return Wide()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def manager(folder):
    with orbax.Manager(folder, keep=None) as made:
        yield made


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_goes_on_as_if_it_had_not_stopped(folder, compiled):
    def loss_fn(model, x):
        return ((model(x) - x) ** 2).mean()

    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 4))
        model[3].tie("weight", model[0], "weight")
        opt = optim.SGD([model], lr=optim.schedules.cosine(0.05, 40), momentum=0.9)

        def step(x):
            opt.zero_grad()
            mt.backward(loss_fn, model, x)
            opt.step()

        return model, opt, mt.jit(step) if compiled else step

    batches = jax.random.normal(jax.random.key(1), (12, 8, 4))
    mt.seed(3)
    model, opt, step = make()
    with orbax.Manager(folder) as manager:
        for i, batch in enumerate(batches):
            if i == 6:
                manager.save(i, model=model, opt=opt, position={"batch": i})
            step(batch)
    mt.seed(99)
    other, theirs, step = make()
    with orbax.Manager(folder) as manager:
        assert manager.restore(model=other, opt=theirs) == {"position": {"batch": 6}}
    for batch in batches[6:]:
        step(batch)
    want, got = everything(model, opt), everything(other, theirs)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


VALUES = {
    "nothing": None,
    "flag": True,
    "count": 10**20,
    "odd": float("-inf"),
    "text": "naïve ✓",
    "nested": [1, (2.0, "x"), {"a": [None], "b": {}}],
    "keys": {0: 1, (1, "a"): np.arange(2)},
    "array": np.arange(6).reshape(2, 3),
    "jax": jnp.arange(3),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.float64(1.5),
    "complex": np.array([1 + 2j]),
    "flags": np.array([True, False]),
    "big-endian": np.arange(3, dtype=">f4"),
    "a/../b": np.ones(2),
    "..": jnp.ones(1),
    "": np.ones(3),
}


def same(got, value):
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        assert isinstance(got, np.ndarray) and got.shape == value.shape
        assert got.dtype == value.dtype.newbyteorder("=")
        np.testing.assert_array_equal(got, value)
    elif isinstance(value, dict):
        assert list(got) == list(value)
        for key in value:
            same(got[key], value[key])
    else:
        assert got == value and type(got) is type(value)


def test_values_come_back_as_they_were(manager, folder):
    manager.save(0, **VALUES)
    same(manager.restore(), VALUES)
    manager.save(1, note="no arrays")
    assert manager.restore(1) == {"note": "no arrays"}
    manager.save(2)
    assert manager.restore() == {} and sorted(os.listdir(folder)) == ["0", "1", "2"]


DTYPES = ["bfloat16", "float16", *(name for name in dir(jnp) if name.startswith("float8")), "int4", "uint8", "bool"]


@pytest.mark.slow
def test_every_bit_of_narrow_dtypes(manager):
    """In a module too, on one device and on two; float8_e4m3, which orbax cannot write, as its bits."""
    bits = np.arange(256, dtype=np.uint8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    arrays = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        whole = bits & 1 if name == "bool" else bits.astype(np.int8) % 8 if name == "int4" else bits
        arrays[name] = whole.astype(dtype) if name == "int4" else whole.repeat(dtype.itemsize).view(dtype)
    assert "float8_e4m3" in arrays
    on_two = {f"{name} on two": jax.device_put(array, spread) for name, array in arrays.items() if name != "int4"}

    class Holder(mt.Module):
        def __init__(self, arrays):
            for name, array in arrays.items():
                setattr(self, name, mt.Buffer(array))

    held = {f"of {name}": array for name, array in (arrays | on_two).items()}  # `bfloat16` is a method of modules
    manager.save(0, holder=Holder(held), key=jax.random.key(5), **arrays)
    other = Holder({name: jnp.zeros_like(array) for name, array in held.items()})
    got = manager.restore(holder=other)
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
    for name, array in held.items():
        mine = getattr(other, name)
        assert mine.dtype == array.dtype and np.asarray(mine).tobytes() == np.asarray(array).tobytes(), name
    for name, array in on_two.items():
        assert getattr(other, f"of {name}").sharding == array.sharding
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(jax.random.key(5))).all()


def test_arrays_stay_spread_as_the_object_has_them(manager):
    here, there = jax.devices()
    mesh = jax.sharding.Mesh(np.array([here, there]), "x")
    rows, columns = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (("x",), (None, "x"))
    )

    def make(seed):
        mt.seed(seed)
        model = nn.Linear(4, 2, bias=False)
        return model, optim.SGD([model], lr=0.1, momentum=0.9)

    model, opt = make(1)
    model.to(rows)
    model.accumulate([jnp.ones((2, 4))])
    opt.step()
    want = np.asarray(model.weight)
    manager.save(0, model=model, opt=opt)
    for place in (columns, rows, there, None):
        other, theirs = make(2)
        if place is not None:
            other.to(place)
        manager.restore(model=other, opt=theirs)
        np.testing.assert_array_equal(other.weight, want)
        assert other.weight.committed is (place is not None)
        if isinstance(place, jax.sharding.Sharding):
            assert other.weight.sharding == place
        else:
            assert other.weight.devices() == {place or here}


# -- in the background -------------------------------------------------------------------------------------------------


@pytest.mark.one_in(9)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_being_saved_is_what_was_there(manager, packed):
    """Steps that follow at once, in place, change nothing of it: the arrays' buffers, and NumPy arrays, are not shared."""
    model = wide(1.0)
    opt = optim.SGD([model], lr=1.0, momentum=0.5)
    if packed:
        mt.pack(model)

    @mt.jit
    def step():
        opt.zero_grad()
        mt.backward(lambda model: model.weight.sum(), model)
        opt.step()

    step()
    mine, theirs = np.zeros(1 << 20), jnp.zeros(1 << 20)
    for number in range(3):
        before = float(model.weight[0]), float(opt.state_dict()["state"]["0.weight"]["momentum_buffer"][0])
        mine[:] = number
        theirs = theirs.at[:].set(number)
        manager.save(number, model=model, opt=opt, before=before, mine=mine, theirs=theirs)
        for _ in range(3):
            step()
        mine[:] = -1
        theirs = jax.jit(lambda x: x - 7, donate_argnums=0)(theirs)
    for number in range(3):
        saved = manager.restore(number, model=model, opt=opt)
        weight, momentum = saved["before"]
        assert (np.asarray(model.weight) == weight).all()
        assert (np.asarray(opt.state_dict()["state"]["0.weight"]["momentum_buffer"]) == momentum).all()
        assert (saved["mine"] == number).all() and (saved["theirs"] == number).all()


def test_a_save_that_fails_is_told_at_the_next_call(folder, monkeypatch):
    manager = orbax.Manager(folder, keep=None)
    manager.save(1, model=line(1.0))
    manager.wait()

    async def full(*_, **__):
        raise OSError("no space left")

    def fail(then):
        with monkeypatch.context() as patch:
            patch.setattr(ocp.type_handlers.NumpyHandler, "_background_serialize", full)
            manager.save((manager.latest_step or 0) + 1, x=np.ones(3))
            while manager._orbax.is_saving_in_progress():
                time.sleep(0.01)
            with pytest.raises(RuntimeError, match=f"step 2 could not be saved in {folder}: no space left"):
                then()

    model = line(5.0)
    fail(manager.wait)
    fail(lambda: manager.save(3, x=1))
    fail(lambda: manager.restore(model=model))
    fail(manager.all_steps)
    assert float(model.bias[0]) == 5.0 and manager.all_steps() == [1]
    manager.save(2, model=line(2.0))  # and it goes on
    manager.restore(model=model)
    assert float(model.bias[0]) == 2.0 and sorted(os.listdir(folder)) == ["1", "2"]
    manager.delete(2)
    fail(manager.close)
    with pytest.raises(RuntimeError, match="is closed"):
        manager.wait()


def test_a_closed_manager_says_so(folder):
    with orbax.Manager(folder) as manager:
        manager.save(0, x=1)
    manager.close()
    assert os.listdir(folder) == ["0"]
    calls = [manager.wait, manager.all_steps, manager.restore, lambda: manager.save(1, x=1), lambda: manager.delete(0)]
    for call in [*calls, lambda: manager.latest_step]:
        with pytest.raises(RuntimeError, match=f"this Manager of {folder} is closed: make a new one"):
            call()


@pytest.mark.slow
def test_the_end_of_the_program_waits_for_what_is_being_saved(folder):
    code = f"""
import numpy as np
from minitorch_jax.adapters import orbax
manager = orbax.Manager({str(folder)!r})
manager.save(3, x=np.full(1 << 22, 2.0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    with orbax.Manager(folder) as manager:
        assert (manager.restore()["x"] == 2.0).all()


SAVES = """
import sys, numpy as np, jax.numpy as jnp
import minitorch_jax as mt
from minitorch_jax.adapters import orbax
class Wide(mt.Module):
    def __init__(self):
        self.weight = mt.Parameter(np.zeros(1 << 21, np.float32))
model = Wide()
manager = orbax.Manager(sys.argv[1], keep=2)
step = manager.latest_step or 0
while True:
    step += 1
    model.weight = jnp.full(1 << 21, float(step))
    manager.save(step, model=model, number=step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_leaves_the_earlier_checkpoints(folder, kills):
    rng, model, unfinished = np.random.default_rng(0), wide(size=1 << 21), 0
    for _ in range(kills):
        run = [sys.executable, "-c", SAVES, str(folder)]
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for _ in range(3):
                begun = int(process.stdout.readline())
            time.sleep(float(rng.uniform(0, 0.1)))
            process.send_signal(signal.SIGKILL)
            process.wait()
        unfinished += any(name.count("tmp") for name in os.listdir(folder))
        with orbax.Manager(folder, keep=2) as manager:
            assert manager.latest_step >= begun - 1  # when a save begins, the one before it is on the disk
            number = manager.restore(model=model)["number"]
            assert number == manager.latest_step and (np.asarray(model.weight) == number).all()
    with orbax.Manager(folder, keep=1) as manager:
        manager.save(10**6, number=1)
    assert os.listdir(folder) == ["1000000"]  # what was left unfinished is gone
    assert kills < 10 or unfinished > kills / 4
    print(f"{unfinished} of {kills} were killed with an unfinished checkpoint")


# -- which are kept ----------------------------------------------------------------------------------------------------


def test_the_latest_are_kept(folder):
    with orbax.Manager(folder, keep=2) as manager:
        for step in (1, 5, 6, 9):
            assert manager.save(step, {"loss": step}, x=step)
        assert manager.all_steps() == [6, 9] and manager.latest_step == 9 and manager.metrics(6) == {"loss": 6.0}
        assert manager.restore() == manager.restore(9) == {"x": 9} and manager.restore(6) == {"x": 6}
        with pytest.raises(ValueError, match=r"was made without `best`: pass a metric, such as best=\(.loss., .min.\)"):
            manager.restore("best")
    with orbax.Manager(str(folder), keep=1) as manager:
        manager.save(10, x=10)
        assert manager.all_steps() == [10] and manager.metrics(10) == {}


@pytest.mark.parametrize("direction, kept, best", [("min", [2, 4, 7], 4), ("max", [3, 5, 7], 5)])
def test_the_best_and_the_latest_are_kept(folder, direction, kept, best):
    losses = {1: 0.5, 2: 0.2, 3: 0.9, 4: 0.2, 5: 0.9, 6: float("nan"), 7: 0.6}
    with orbax.Manager(folder, keep=2, best=("loss", direction)) as manager:
        for step, loss in losses.items():
            manager.save(step, {"loss": jnp.float32(loss), "other": 1}, x=step)
        assert manager.all_steps() == kept and manager.best_step == best and manager.latest_step == 7
        assert manager.restore("best") == {"x": best} and manager.restore("latest") == {"x": 7}
    with orbax.Manager(folder, keep=2, best=("loss", direction)) as manager:  # as the files say
        assert manager.best_step == best
        manager.save(8, {"loss": float("nan")}, x=8)
        assert manager.all_steps() == [*kept[:2], 8]
    with orbax.Manager(folder, best=("accuracy", "max")) as manager:
        assert manager.best_step is None
        with pytest.raises(ValueError, match=r"no step in .*run is the best: accuracy is NaN or missing in all of \["):
            manager.restore("best")


def test_a_metric_may_be_infinite(folder):
    with orbax.Manager(folder, best=("accuracy", "max")) as manager:
        manager.save(1, {"accuracy": -float("inf")}, x=1)
        assert manager.best_step == 1


def test_an_error_is_not_hidden_by_that_of_the_last_save(folder, monkeypatch):
    async def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "_background_serialize", full)
    with pytest.raises(KeyError, match="mine") as raised, orbax.Manager(folder) as manager:
        manager.save(1, x=np.ones(3))
        raise KeyError("mine")
    assert "step 1 could not be saved" in raised.value.__notes__[0]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Manager needs a folder for checkpoints; .*file is a file"):
        orbax.Manager(tmp_path / "file")


def test_every_so_many_steps(folder):
    with orbax.Manager(folder, every=10) as manager:
        assert [manager.save(step, x=step) for step in (0, 5, 10, 11)] == [True, False, True, False]
        assert manager.save(11, x=11, force=True) and manager.all_steps() == [0, 10, 11]


def test_steps_go_up(manager, folder):
    manager.save(3, x=3)
    for step in (3, 2):
        with pytest.raises(
            ValueError, match=rf"step {step} was not saved: it must be .* greater than 3, .*delete\(step\)"
        ):
            manager.save(step, x=0)
    manager.delete(3)
    assert manager.all_steps() == [] and manager.latest_step is None
    manager.save(2, x=2)
    assert manager.restore(2) == {"x": 2}
    with pytest.raises(ValueError, match=rf"{folder} has no step 3; it has \[2\]"):
        manager.restore(3)
    with pytest.raises(ValueError, match="has no step 3; it has"):
        manager.delete(3)


def test_another_process_has_saved(folder):
    with orbax.Manager(folder) as manager, orbax.Manager(folder) as watching:
        assert watching.latest_step is None
        manager.save(1, x=5)
        manager.wait()
        assert watching.latest_step == 1 and watching.restore() == {"x": 5}


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_all_that_differs_is_said_at_once_and_nothing_changes(manager, folder):
    model = line(1.0)
    manager.save(4, model=model, opt=optim.SGD([model], lr=0.1, momentum=0.9), ema=line(), epoch=3)
    names = (
        r"(?s)step 4 of .*run does not fit.*ema, a Linear, was saved.*epoch was saved as a value.*other: nothing was"
    )
    with pytest.raises(ValueError, match=names):
        manager.restore(model=model, opt=None, epoch=4, other=line())
    mine, large = line(5.0), nn.Linear(4, 2)
    opt = optim.SGD([mine], lr=0.7)
    stream = np.array(mt.module.random.current().cell.value)
    with pytest.raises(ValueError, match=r"(?s)step 4.*nothing was loaded.*ema: .*weight.*\(2, 3\).*opt: .*fields"):
        manager.restore(model=mine, ema=large, opt=opt)
    assert float(mine.bias[0]) == 5.0 and opt.lr == 0.7
    np.testing.assert_array_equal(mt.module.random.current().cell.value, stream)
    assert manager.restore(model=mine, opt=None, ema=None) == {"epoch": 3}
    assert float(mine.bias[0]) == 1.0


@pytest.mark.parametrize("mine, theirs", [(3, 5), (5, 3)])
def test_a_model_of_another_depth_is_never_restored_in_part(manager, mine, theirs):
    manager.save(0, model=nn.Sequential(*(nn.Linear(2, 2) for _ in range(theirs))))
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(mine)))
    before = [np.array(array) for array in model.parameters()]
    word = "missing" if mine > theirs else "unexpected"
    with pytest.raises(ValueError, match=rf"(?s){word}: 3\.weight.*{word}: 4\.bias"):
        manager.restore(model=model)
    for array, old in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_what_cannot_be_saved_is_refused(manager):
    for value, shown in [
        (object(), "x is a object, which cannot be saved"),
        (np.array(["a"]), "x is an array of <U1"),
        (jnp.ones(2, jnp.uint4), "x has dtype uint4, which orbax cannot write"),
        (np.array("2024-02-29", "M8[D]"), r"x has dtype datetime64\[D\], which orbax cannot write"),
    ]:
        with pytest.raises(TypeError, match=shown):
            manager.save(0, x=value)
    assert manager.all_steps() == []


class Interrupted:
    """Loaded after the modules, as an optimizer is, and interrupted then."""

    def __init__(self, how):
        self.how, self.value = how, 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]
        if self.value:
            self.how()

    def step(self):
        """What optimizers have."""


def test_ctrl_c_while_objects_are_loaded(manager):
    def interrupt():
        raise KeyboardInterrupt

    saved = Interrupted(None)
    saved.value = 1
    manager.save(0, model=line(1.0), other=saved)
    model, other = line(5.0), Interrupted(interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager.restore(model=model, other=other)
    assert float(model.bias[0]) == 5.0 and other.value == 0  # nothing
    other = Interrupted(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        manager.restore(model=model, other=other)
    assert float(model.bias[0]) == 1.0 and other.value == 1  # all of them: it was put off


# -- damaged, foreign --------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_refused_by_its_step(manager, folder):
    manager.save(6, model=line(1.0), x=np.arange(1000.0))
    manager.wait()
    shutil.copytree(folder / "6", folder.parent / "whole")
    model = line(5.0)

    def refused(shown):
        with pytest.raises(ValueError, match=rf"(?s)step 6 of {folder} cannot be read.*{shown}"):
            manager.restore(6, model=model)
        assert float(model.bias[0]) == 5.0
        shutil.rmtree(folder / "6")
        shutil.copytree(folder.parent / "whole", folder / "6")

    for item in ("description", "arrays"):
        shutil.rmtree(folder / "6" / item)
        refused("")
    for path in sorted((folder.parent / "whole").glob("description/metadata")) + [folder / "6/arrays/_METADATA"]:
        path = folder / "6" / path.relative_to(path.parents[1])
        path.write_bytes(path.read_bytes()[:-5])
        refused("")
    for path in [folder / "6/arrays/manifest.ocdbt", *(folder / "6/arrays/d").iterdir()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refused("")
    description = folder / "6/description/metadata"
    text = description.read_text()
    for old, new, shown in [
        ('"version": 1', '"version": 2', "another version of this library wrote it"),
        ('"shape": [1000]', '"shape": [999]', r"the array x should be float64\[999\], and orbax has another"),
        ('"float64"', '"float32"', r"the array x should be float32\[1000\], and orbax has another"),
        ('"array": "x"', '"array": "y"', "the array y should be .*, and orbax has another"),
        ('"objects"', '"things"', "KeyError"),
    ]:
        assert old in text
        description.write_text(text.replace(old, new))
        refused(shown)
    manager.restore(6, model=model)
    assert float(model.bias[0]) == 1.0


def test_a_checkpoint_of_another_program_is_refused(folder):
    with ocp.CheckpointManager(folder) as theirs:
        theirs.save(2, args=ocp.args.StandardSave({"weight": np.ones((2, 3))}))
    with orbax.Manager(folder) as manager:
        with pytest.raises(ValueError, match=f"step 2 of {folder} cannot be read, or Manager.save did not write it"):
            manager.restore(model=line())


# -- wrong arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, kind, shown",
    [
        ({"keep": 0}, ValueError, "needs keep >= 1, or keep=None to keep all checkpoints; got 0"),
        ({"keep": 1.5}, TypeError, "keep must be an integer; got 1.5"),
        ({"every": 0}, ValueError, "needs every >= 1; got 0"),
        ({"every": True}, TypeError, "every must be an integer; got True"),
        ({"best": "loss"}, ValueError, r"the name of a metric and \"min\" or \"max\".*got 'loss'"),
        ({"best": ("loss", "least")}, ValueError, r"got \('loss', 'least'\)"),
    ],
)
def test_wrong_arguments_of_managers(folder, wrong, kind, shown):
    with pytest.raises(kind, match=shown):
        orbax.Manager(folder, **wrong)
    assert not folder.exists()


def test_wrong_arguments_of_saves(folder):
    with orbax.Manager(folder, best=("loss", "min")) as manager:
        for step in ("1", 1.0, True, None):
            with pytest.raises(TypeError, match=rf"step must be an integer; got {step!r}"):
                manager.save(step, {"loss": 1.0}, x=1)
        for metrics in (None, {}, {"accuracy": 1}):
            with pytest.raises(ValueError, match="keeps the best checkpoints by 'loss', and needs this metric"):
                manager.save(1, metrics, x=1)
        for metrics in (3.0, {"loss": "low"}, {"loss": None}, {"loss": jnp.ones(2)}):
            with pytest.raises(TypeError, match="takes metrics as a dict of numbers by name; got"):
                manager.save(1, metrics, x=1)
        with pytest.raises(ValueError, match="step -1 was not saved: it must be >= 0"):
            manager.save(-1, {"loss": 1.0}, x=1)
        assert manager.all_steps() == []
    assert repr(manager) == f"Manager('{folder}', keep=3, best=('loss', 'min'), every=1)"
