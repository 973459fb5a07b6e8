"""What all tests share: JAX in its strictest mode, and one small network with data."""

import gc
import os
import signal
import sys
import time
import zlib
from importlib.metadata import version

# Nearly all the time of the tests goes into compiling small programs, so XLA leaves out what takes it long, as in JAX's
# own tests. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 programs are compiled as users have them.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and version("jaxlib").startswith("0.10."):
    # (later versions end the process at a flag that they do not know)
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")

import compiled_programs
import jax
import jax.numpy as jnp
import oracle
import oracle_plugin
import pytest

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.engine.kept_with_owner import Functions
from minitorch_jax.runtime.bounded_cache import Kept

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in a shell's background job: tests raise it, here and in children
    signal.signal(signal.SIGINT, signal.default_int_handler)

QUICKLY_COMPILED = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
PROGRAMS = compiled_programs.Programs()
STARTED = time.monotonic()
LONG = ("test_mesh", "test_processes", "test_ports", "test_random", "test_pack", "test_optimizer")  # files

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if "host_platform_device_count" not in os.environ.get(
    "XLA_FLAGS", ""
):  # which the option would overrule without a word
    jax.config.update("jax_num_cpu_devices", 2)  # a second device to move things to


collect_ignore_glob = [] if oracle_plugin.HAS_TORCH else [f"{name}*.py" for name in oracle_plugin.OF_TORCH]


def pytest_addoption(parser):
    parser.addoption("--record-torch", action="store_true", help="write what torch gives to `tests/torch_record/`")
    parser.addoption("--minutes", type=float, help="skip the tests that would begin after so many minutes")
    parser.addoption("--rotate", type=int, default=0, help="begin with another file")
    parser.addoption("--compilation-cache", metavar="DIR", help="keep compiled programs in a folder, for later runs")


def pytest_configure(config):
    if folder := config.getoption("--compilation-cache"):
        compiled_programs.keep_on_disk(folder)
    config.pluginmanager.register(oracle_plugin.Plugin(config), "oracle")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect the tests without the garbage collector, which would walk ever more of them; they all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(config, items):
    if shift := config.getoption("--rotate"):
        paths = list(dict.fromkeys(item.path for item in items))
        place = {path: (i - shift) % len(paths) for i, path in enumerate(paths)}
        items.sort(key=lambda item: place[item.path])
    else:  # what runs longest begins first, so that one worker does not end long after the others
        items.sort(key=lambda item: item.path.stem not in LONG)
    begun = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_first = test not in begun
        begun.add(test)
        mark = item.get_closest_marker("one_in")
        if mark and not is_first and zlib.crc32(item.nodeid.encode()) % mark.args[0]:
            item.add_marker(pytest.mark.slow)
    for item in items if QUICKLY_COMPILED else ():
        if item.get_closest_marker("rounding"):
            item.add_marker(pytest.mark.skip(reason="needs JAX_DISABLE_MOST_OPTIMIZATIONS=0"))


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip("no time is left for it (--minutes)")


@pytest.fixture(autouse=True)
def quick_collections():
    """Hide from the garbage collector what was there before a test (JAX's caches, mostly): many call it, and it walks all."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_programs_between_files():
    """Forget the compiled programs at the end of a file, whose programs are rarely another's."""
    yield
    PROGRAMS.forget_if_grown(2**30 * 3 // 4)


@pytest.fixture(autouse=True)
def few_programs():
    """Forget them within a file too, where it makes very many."""
    yield
    PROGRAMS.forget_if_grown(2**30 * 3 // 2)


@pytest.fixture(autouse=True)
def own_programs(monkeypatch):
    """A test counts what it compiles itself: local functions of the same code, made by tests before it, share programs."""
    autograd, scan, jit = (sys.modules[f"minitorch_jax.{name}"] for name in ("autograd", "scan", "jit"))
    for functions in (*autograd._backward, *autograd._gradients, autograd._by_arguments, scan._scans):
        monkeypatch.setattr(functions, "_by_code", Kept())
    monkeypatch.setattr(jit, "_functions", Functions(jit._functions._make))  # those of a test's module, too


@pytest.fixture(autouse=True)
def fixed_seed():
    """Layers made without a key are the same in every run, whatever ran before; torch's too, whose numbers are recorded."""
    mt.seed(0)
    if "torch" in sys.modules:
        oracle.set_up(sys.modules["torch"])


@pytest.fixture
def mlp():
    """A network with two layers of parameters: "0.weight" (4, 3), "0.bias" (4,), "2.weight" (2, 4), "2.bias" (2,)."""
    return nn.Sequential(nn.Linear(3, 4, key=jax.random.key(1)), nn.Tanh(), nn.Linear(4, 2, key=jax.random.key(2)))


@pytest.fixture
def batch():
    """Inputs (5, 3) and targets (5, 2) for `mlp`."""
    return jax.random.normal(jax.random.key(3), (5, 3)), jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)


@pytest.fixture
def mse():
    """A loss function of a model, inputs and targets."""

    def loss_fn(model, x, y):
        return nn.functional.mse_loss(model(x), y)

    return loss_fn
