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


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of the result table, by side."""
    found = (re.split(r"\s*│\s*", line.strip("│ \n")) for line in text.splitlines() if line.startswith("│"))
    return {side: cells for side, *cells in found}


def check_output(text: str, sides: list[str]) -> None:
    """All sides ended alike, and the table has all the columns."""
    for heading in ("side", "final", "train", "loss", "test", "accuracy", "largest", "weight", "difference"):
        assert heading in text
    for heading in ("first", "median", "step", "(ms)", "epoch", "(s)"):
        assert heading in text
    rows = rows_of(text)
    assert list(rows) == sides
    loss, accuracy, difference, *times = rows["NumPy"]
    assert difference == "–" and all(float(time) > 0 for time in times)
    for side in sides[1:]:
        assert len(rows[side]) == 6 and all(float(time) > 0 for time in rows[side][3:])
        assert float(rows[side][0]) == pytest.approx(float(loss), abs=1e-4)
        assert float(rows[side][1]) == pytest.approx(float(accuracy), abs=0.01)
        assert float(rows[side][2]) < 1e-3
        assert f"{side} ended within 0.001 of NumPy's weights" in text
    assert "mt.scan runs an epoch in one call" in text


def check_png(path: Path) -> None:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    assert width > 2 * height > 1000


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "compare_numpy.py"), "--epochs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, SIDES[:-1])
    assert "100%" in done.stdout  # the progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["compare_numpy.png"]
    check_png(tmp_path / "compare_numpy.png")


@pytest.mark.slow
def test_with_the_functional_loop(compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figure.png"
    assert compare_numpy.main(["--epochs", "2", "--functional", "--batch-size", "50", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    check_output(text, SIDES)
    assert "full batches of 50 an epoch: 28; images left over and dropped: 37" in text
    assert str(output) in text
    check_png(output)


def test_defaults_train_well(compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_numpy.main(["--output", str(tmp_path / "figure.png")]) == 0
    text = capsys.readouterr().out
    check_output(text, SIDES[:-1])
    assert all(float(cells[1]) > 0.95 for cells in rows_of(text).values())


@pytest.mark.slow
def test_a_single_step_and_a_diverging_one(
    compare_numpy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "figure.png")
    assert compare_numpy.main(["--epochs", "1", "--batch-size", "1437", "--output", output]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [cells[4:] for cells in rows.values()] == [["–", "–"]] * 4  # no step without compilation
    assert compare_numpy.main(["--epochs", "2", "--lr", "1e30", "--output", output]) == 0
    text = capsys.readouterr().out
    assert "The training diverged" in text
    assert all(f"{side} ended NOT within 0.001" in text for side in SIDES[1:-1])


def test_each_side_trains_as_its_name_says(compare_numpy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, calls = compare_numpy.mt.backward, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return backward(*args)

    monkeypatch.setattr(compare_numpy.mt, "backward", counted)
    sides = compare_numpy.make_sides(64, 8, 0.1, True, np.random.default_rng(0))
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
        (["--seed", "-1"], r"argument --seed: must be a whole number from 0 to \d+; got -1"),
        (["--lr", "nan"], r"argument --lr: must be a number above 0, at most .*; got nan"),
        (["--lr", "fast"], r"argument --lr: must be a number above 0, at most .*; got fast"),
        (["--lr", "0"], r"argument --lr: must be a number above 0, at most .*; got 0"),
        (["--batch-size", "1438"], r"argument --batch-size: there are only 1437 training images; got 1438"),
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
    with pytest.raises(SystemExit) as stopped:
        compare_numpy.main(options)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    *usage, last = printed.err.splitlines()
    assert usage[0].startswith("usage: ") and re.search(message + "$", last)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_help(compare_numpy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare_numpy.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--epochs", "--batch-size", "--hidden", "--lr", "--seed", "--output", "--functional"):
        assert option in text
    assert "default: compare_numpy.png" in " ".join(text.split())


def test_times_leave_out_the_first_step(compare_numpy: Any) -> None:
    record = compare_numpy.Record(None, losses=[[1.0, 1.0]] * 3, seconds=[60.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    assert (record.first_step, record.median_step, record.epoch) == (60.0, 1.0, 2.0)


def test_times_of_whole_epochs_are_divided_by_their_steps(compare_numpy: Any) -> None:
    record = compare_numpy.Record(None, losses=[[1.0] * 4] * 4, seconds=[60.0, 8.0, 2.0, 4.0])
    assert (record.first_step, record.warm, record.median_step, record.epoch) == (60.0, [2.0, 0.5, 1.0], 1.0, 4.0)


@pytest.mark.slow
def test_where_the_sides_are_measured(compare_numpy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(compare_numpy, "draw", lambda records, output: drawn.extend(records))
    monkeypatch.setattr(compare_numpy, "MEASUREMENTS", 4)
    args = ["--epochs", "2", "--batch-size", "143", "--functional", "--output", str(tmp_path / "figure.png")]
    assert compare_numpy.main(args) == 0
    for record in drawn:
        scan = record.side.name == "mt.scan"
        assert list(record.differences) == ([10, 20] if scan else [1, 7, 10, 14, 20])
        assert len(record.seconds) == (2 if scan else 20)
        assert (max(record.differences.values()) > 0) == (record is not drawn[0])


def test_batches_are_full_and_disjoint(compare_numpy: Any) -> None:
    batches = compare_numpy.shuffled_batches(23, 5, np.random.default_rng(0))
    assert batches.shape == (4, 5) and len(set(batches.ravel())) == 20 and batches.max() < 23
