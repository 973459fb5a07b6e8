"""The examples run, write what they say, and answer bad options in one line."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazily import needs

needs("sklearn", "matplotlib", "rich")

EXAMPLES = Path(__file__).parents[1] / "examples"
SIDES = ["NumPy", "eager loop", "mt.jit", "mt.scan", "functional JAX"]


@pytest.fixture
def compare_numpy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("compare_numpy")


@pytest.fixture
def comparison(compare_numpy: Any) -> Any:
    """Its file that trains, measures and shows."""
    return importlib.import_module("comparison")


NETWORK = """
import numpy as np


class Dense:
    def __init__(self, n_in, n_out):
        self.W, self.b = np.random.standard_normal((n_in, n_out)) / 8, np.zeros(n_out)
        self.dW, self.db = None, None

    def forward(self, x):
        self.input = x
        return x @ self.W + self.b

    def backward(self, dout):
        self.dW, self.db = self.input.T @ dout, dout.sum(0)
        return dout @ self.W.T


def make():
    return [Dense(64, 10)]
"""


def tables_of(text: str) -> dict[str, dict[str, list[str]]]:
    """The cells of the result table, by network and side."""
    found: dict[str, dict[str, list[str]]] = {}
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("│"):
            network, side, *cells = (cell.strip() for cell in line.strip().strip("│").split("│"))
            rows = found.setdefault(network, {}) if network else rows
            rows[side] = cells
    return found


def check_output(text: str, sides: list[str], networks: tuple[str, ...] = ("64-64-10",)) -> None:
    """All sides ended alike, and the table has all the columns."""
    for heading in ("network", "side", "final", "train", "loss", "test", "accuracy", "largest", "weight", "difference"):
        assert heading in text
    for heading in ("first", "median", "step", "(ms)", "epoch", "(s)"):
        assert heading in text
    tables = tables_of(text)
    assert tuple(tables) == networks
    for network, rows in tables.items():
        assert list(rows) == sides
        loss, accuracy, difference, *times = rows["NumPy"]
        assert difference == "–" and all(float(time) > 0 for time in times)
        for side in sides[1:]:
            assert len(rows[side]) == 6 and all(float(time) > 0 for time in rows[side][3:])
            assert float(rows[side][0]) == pytest.approx(float(loss), abs=1e-4)
            assert float(rows[side][1]) == pytest.approx(float(accuracy), abs=0.01)
            assert float(rows[side][2]) < 1e-3
            assert f"{network}: {side} ended within 0.001 of NumPy's weights" in text
    assert ("mt.scan runs an epoch in one call" in text) == ("mt.scan" in sides)


def check_png(path: Path, networks: int = 1) -> None:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    assert width > 1000 and 1.9 < width * networks / height < 2.7


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "compare_numpy.py"), "--epochs", "2"]  # networks by default
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, SIDES[:-1], ("64-64-10", "64-1024-1024-10"))
    assert "100%" in done.stdout  # the progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["compare_numpy.png"]
    check_png(tmp_path / "compare_numpy.png", networks=2)


@pytest.mark.slow
def test_with_the_functional_loop(compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figure.png"
    args = ["--epochs", "2", "--functional", "--batch-size", "50", "--hidden", "64", "8,16", "--output", str(output)]
    assert compare_numpy.main(args) == 0
    text = capsys.readouterr().out
    check_output(text, SIDES, ("64-64-10", "64-8-16-10"))
    assert "full batches of 50 an epoch: 28; images left over and dropped: 37" in text
    assert str(output) in text
    check_png(output, networks=2)


@pytest.mark.slow
def test_the_small_network_trains_well(compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_numpy.main(["--hidden", "64", "--output", str(tmp_path / "figure.png")]) == 0
    text = capsys.readouterr().out
    check_output(text, SIDES[:-1])
    assert all(float(cells[1]) > 0.95 for cells in tables_of(text)["64-64-10"].values())


@pytest.mark.slow
def test_a_single_step_and_a_diverging_one(
    compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "figure.png")
    small = ["--hidden", "64", "--output", output]
    assert compare_numpy.main(["--epochs", "1", "--batch-size", "1437", *small]) == 0
    rows = tables_of(capsys.readouterr().out)["64-64-10"]
    assert [cells[4:] for cells in rows.values()] == [["–", "–"]] * 4  # no step without compilation
    assert compare_numpy.main(["--epochs", "2", "--lr", "1e38", *small]) == 0
    text = capsys.readouterr().out
    assert "64-64-10: the training diverged" in text
    assert all(f"{side} ended NOT within 0.001" in text for side in SIDES[1:-1])


def test_each_side_trains_as_its_name_says(compare_numpy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, calls = compare_numpy.mt.backward, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return backward(*args)

    monkeypatch.setattr(compare_numpy.mt, "backward", counted)
    sides = compare_numpy.make_sides((64, 8, 10), 0.1, True, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    xs, ys = rng.random((5, 4, 64), np.float32), rng.integers(0, 10, (5, 4), np.int32)
    losses, python_calls = {}, {}
    for side in sides:
        first = side.run(xs, ys)  # compiles
        calls.clear()
        losses[side.name] = first + side.run(xs, ys)
        python_calls[side.name] = len(calls)
    for found in losses.values():
        np.testing.assert_allclose(found, losses["NumPy"], rtol=1e-5)
    assert python_calls == dict(zip(SIDES, [0, 5, 0, 0, 0], strict=True))
    assert [side.name for side in sides if side.whole_epochs] == ["mt.scan"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "-3"], r"argument --epochs: must be a whole number from 1 to \d+; got -3"),
        (["--epochs", "two"], r"argument --epochs: must be a whole number from 1 to \d+; got two"),
        (["--hidden", "0"], r"argument --hidden: must be a whole number from 1 to \d+; got 0"),
        (["--hidden", "64", "8,x"], r"argument --hidden: must be a whole number from 1 to \d+; got x"),
        (["--seed", "-1"], r"argument --seed: must be a whole number from 0 to \d+; got -1"),
        (["--lr", "nan"], r"argument --lr: must be a number above 0, at most .*; got nan"),
        (["--lr", "fast"], r"argument --lr: must be a number above 0, at most .*; got fast"),
        (["--lr", "0"], r"argument --lr: must be a number above 0, at most .*; got 0"),
        (["--batch-size", "1438"], r"argument --batch-size: there are only 1437 training images; got 1438"),
        (["--network", "net.py:make", "--hidden", "8"], r"argument --hidden: not allowed with argument --network"),
        (["--network", "net.py:make", "--functional"], r"argument --functional: not allowed with argument --network"),
        (["--output", "missing/a.png"], r"argument --output: cannot write 'missing/a.png': No such file or directory"),
        (["--output", "folder.png"], r"argument --output: cannot write 'folder.png': .*directory"),
        (["--output", "a.jpg"], r"argument --output: must be the name of a \.png file; got 'a\.jpg'"),
    ],
)
def test_wrong_options(
    compare_numpy: Any,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "net.py").write_text(NETWORK)
    with pytest.raises(SystemExit) as stopped:
        compare_numpy.main(options)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    *usage, last = printed.err.splitlines()
    assert usage[0].startswith("usage: ") and re.search(message + "$", last)
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"folder.png", "net.py"}


def test_help(compare_numpy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare_numpy.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--epochs", "--batch-size", "--hidden", "--lr", "--seed", "--output", "--functional", "--network"):
        assert option in text
    assert "default: compare_numpy.png" in " ".join(text.split())
    assert "(default: 64 1024,1024)" in " ".join(text.split())


def test_times_leave_out_the_first_step(comparison: Any) -> None:
    record = comparison.Record(None, losses=[[1.0, 1.0]] * 3, seconds=[60.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    assert (record.first_step, record.median_step, record.epoch) == (60.0, 1.0, 2.0)


def test_times_of_whole_epochs_are_divided_by_their_steps(comparison: Any) -> None:
    record = comparison.Record(None, losses=[[1.0] * 4] * 4, seconds=[60.0, 8.0, 2.0, 4.0])
    assert (record.first_step, record.warm, record.median_step, record.epoch) == (60.0, [2.0, 0.5, 1.0], 1.0, 4.0)


def test_times_leave_out_the_steps_that_copy_weights(comparison: Any) -> None:
    record = comparison.Record(
        None, losses=[[1.0, 1.0]] * 3, seconds=[60.0, 1.0, 9.0, 2.0, 9.0, 9.0], copying={2, 4, 5}
    )
    assert (record.warm, record.median_step, record.epoch) == ([1.0, 2.0], 1.5, 3.0)
    whole_epochs = comparison.Record(None, losses=[[1.0, 1.0]] * 3, seconds=[60.0, 4.0, 8.0], copying={1, 2})
    assert (whole_epochs.warm, whole_epochs.epoch) == ([2.0, 4.0], 6.0)  # each copies, so all count


@pytest.mark.slow
def test_where_the_sides_are_measured(
    compare_numpy: Any, comparison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        compare_numpy, "draw", lambda comparisons, caption, output: drawn.extend(comparisons[0].records)
    )
    monkeypatch.setattr(comparison, "MEASUREMENTS", 4)
    args = ["--epochs", "2", "--batch-size", "143", "--functional", "--hidden", "64"]
    assert compare_numpy.main([*args, "--output", str(tmp_path / "figure.png")]) == 0
    for record in drawn:
        scan = record.side.name == "mt.scan"
        assert list(record.differences) == ([10, 20] if scan else [1, 7, 10, 14, 20])
        assert len(record.seconds) == (2 if scan else 20)
        assert record.copying == ({1, 2} if scan else {1, 7, 10, 14, 20})
        assert (max(record.differences.values()) > 0) == (record is not drawn[0])


def test_batches_are_full_and_disjoint(comparison: Any) -> None:
    batches = comparison.shuffled_batches(23, 5, np.random.default_rng(0))
    assert batches.shape == (4, 5) and len(set(batches.ravel())) == 20 and batches.max() < 23


# -- one's own network -------------------------------------------------------------------------------------------------


def run_own(compare_numpy: Any, network: str, folder: Path, *options: str) -> int:
    args = ["--network", network, "--epochs", "2", "--output", str(folder / "figure.png"), *options]
    result: int = compare_numpy.main(args)
    return result


def test_the_network_beside_the_example(compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_own(compare_numpy, f"{EXAMPLES / 'my_net.py'}:make_net", tmp_path) == 0
    text = capsys.readouterr().out
    check_output(text, ["NumPy", "wrap"], ("make_net",))
    assert "NumPy calls the network's own update(lr); wrap is mt.Optimizer([wrap(network)], lr)." in text
    assert float(tables_of(text)["make_net"]["wrap"][1]) > 0.8
    check_png(tmp_path / "figure.png")


def test_a_list_of_layers_that_differ_at_each_call(
    compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides begin from the same weights. Dropout draws the same in both, from the global stream or its own."""
    (tmp_path / "net.py").write_text(
        NETWORK.replace("[Dense(64, 10)]", "[Dense(64, 16), Dropout(), Dense(16, 10)]")
        + """

class Dropout:
    def __init__(self):
        self.rng = np.random.default_rng()

    def forward(self, x):
        self.mask = (np.random.random(x.shape) < 0.8) & (self.rng.random(x.shape) < 0.8)
        return x * self.mask

    def backward(self, dout):
        return dout * self.mask
"""
    )
    assert run_own(compare_numpy, f"{tmp_path / 'net.py'}:make", tmp_path) == 0
    text = capsys.readouterr().out
    assert "the network has no update(lr)" in text and "make: wrap ended within 0.001 of NumPy's weights" in text


STORING = """
class Dense(Dense):
    def forward(self, inputs):
        self.output = super().forward(inputs)

    def backward(self, dvalues):
        self.dinputs = super().backward(dvalues)


class ReLU:
    def __call__(self, x):
        return np.maximum(x, 0)

    def backward(self, x, grad):
        return grad * (x > 0)


def make():
    from minitorch_jax.adapters.numpy import wrap

    layers = [Dense(64, 8), ReLU(), Dense(8, 10)]
    layers[0].running_mean = np.zeros(64)
    return wrap(layers, frozen="*.running_mean")
"""


def test_conventions_of_calls_and_options_of_wrap(
    compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NETWORK + STORING)
    assert run_own(compare_numpy, f"{tmp_path / 'net.py'}:make", tmp_path) == 0
    text = capsys.readouterr().out
    assert "make: wrap ended within 0.001 of NumPy's weights" in text
    assert float(tables_of(text)["make"]["wrap"][0]) < 2.2


@pytest.mark.parametrize(
    ("network", "code", "message"),
    [
        ("net.py", "", r"must be a file and a function in it, as in my_net.py:make_net; got 'net.py'"),
        ("none.py:make", "", r"there is no file 'none.py'"),
        ("net.txt:make", "", r"'net.txt' is no Python file: its name must end in .py"),
        ("net.py:build", "", r"'net.py' has no function 'build'; it has Dense, make"),
        ("net.py:make", "def make(:", r"net.py raised SyntaxError: invalid syntax .*"),
        (
            "net.py:make",
            "import nothing_of_this_name",
            r"net.py raised ModuleNotFoundError: .* \(line \d+ of .*net.py\)",
        ),
        ("net.py:make", "def make(n): ...", r"make\(\) raised TypeError: .*'n'.*"),
        ("net.py:make", "def make(): 1 / 0", r"make\(\) raised ZeroDivisionError: .* \(line \d+ of .*net.py\)"),
        (
            "net.py:make",
            "def make(): ...",
            r"make\(\) must return an object with forward and backward, .*; it returned NoneType",
        ),
        (
            "net.py:make",
            "def make(): return []",
            r"make\(\) must return .* a list of such layers; it returned a list of nothing",
        ),
        (
            "net.py:make",
            "def make(): return Dense",
            r"make\(\) must return an object with forward and backward, .*; it returned type",
        ),
        (
            "net.py:make",
            "def make(): return [np.ones(3)]",
            r"make\(\) must return .*; it returned a list of float64\[3\]",
        ),
        (
            "net.py:make",
            "def make(): return Dense(32, 10)",
            r"forward of images of shape \(2, 64\) raised ValueError: .*",
        ),
        (
            "net.py:make",
            "def make(): return Dense(64, 9)",
            r"forward must return scores of shape \(N, 10\) .* returned float64\[2, 9\]",
        ),
        (
            "net.py:make",
            "Dense.backward = lambda self, d: d",
            r"backward must set the gradients .*; after it, all are zero",
        ),
        (
            "net.py:make",
            "Dense.backward = lambda self, d: d @ d",
            r"backward raised ValueError: .* \(line \d+ of .*net.py\)",
        ),
        (
            "net.py:make",
            "Dense.update = lambda self, lr: lr.x; make = lambda: Dense(64, 10)",
            r"update\(lr\) raised AttributeError: .*",
        ),
    ],
)
def test_networks_that_cannot_be_compared(
    compare_numpy: Any,
    network: str,
    code: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("net.py", "net.txt"):
        (tmp_path / name).write_text(f"{NETWORK.strip()}\n\n\n\n\n{code}\n")
    with pytest.raises(SystemExit) as stopped:
        compare_numpy.main(["--network", network])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert re.search(f"error: argument --network: {message}$", printed.err.strip(), flags=re.S)


def test_a_network_that_wrap_does_not_understand(
    compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(
        NETWORK.replace("    def forward", "        self.mean = np.zeros(3)\n\n    def forward")
    )
    with pytest.raises(SystemExit):
        compare_numpy.main(["--network", f"{tmp_path / 'net.py'}:make"])
    told = capsys.readouterr().err
    assert "wrap refuses what make() returned (if it needs options, return wrap(network, ...) instead)" in told
    assert "0.mean" in told
