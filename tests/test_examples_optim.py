"""The examples on optimizers run, write what they say, and answer bad options in one line."""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazily import needs
from test_sides import discovered

needs("sklearn", "matplotlib", "rich", "torch", "optax")

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = {cls.__name__ for cls in discovered()}


@pytest.fixture
def trajectories(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("trajectories")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("compare_optimizers")


def rows_of(text: str) -> list[list[str]]:
    """The cells of the tables that were printed."""
    return [re.split(r"\s*│\s*", line.strip("│ \n")) for line in text.splitlines() if line.startswith("│")]


# -- trajectories -----------------------------------------------------------------------------------------------------


def some_families(trajectories: Any) -> dict[str, Any]:
    rules = [family[:1] for family in trajectories.FAMILIES.values()]
    return dict(zip(trajectories.FAMILIES, [*rules[:2], *([rules[0]] * (len(rules) - 2))], strict=True))


def test_trajectories_are_drawn(
    trajectories: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trajectories, "FAMILIES", some_families(trajectories))
    monkeypatch.setattr(trajectories, "RATES", [1e-6, 1e-3])
    monkeypatch.setattr(trajectories, "SURFACES", trajectories.SURFACES[1:])
    output = tmp_path / "paths.png"
    assert trajectories.main(["--steps", "5", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "Beale: (1.5 − x + xy)²" in text and str(output) in text
    assert [row[:2] for row in rows_of(text)[:2]] == [["SGD", "0.001"], ["Adam", "0.001"]]
    header = output.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n") and int.from_bytes(header[16:20], "big") > 1000


def test_a_path_is_that_of_its_rule(trajectories: Any) -> None:
    surface, rule = trajectories.SURFACES[0], trajectories.FAMILIES["gradient descent"][0]
    walk = trajectories.Explorer(surface, rule).walk(1e-3, 3)
    x, y = np.float64(surface.start)
    for found, value in zip(walk.points, walk.values, strict=True):
        np.testing.assert_allclose(found, (x, y), rtol=1e-5)
        np.testing.assert_allclose(value, (1 - x) ** 2 + 100 * (y - x**2) ** 2, rtol=1e-4)
        slope = 200 * (y - x**2)
        x, y = x + 1e-3 * (2 * (1 - x) + 2 * x * slope), y - 1e-3 * slope
    assert walk.longest_step == pytest.approx(np.linalg.norm(walk.points[1] - walk.points[0]))


def test_the_rate_with_the_lowest_end_is_taken(trajectories: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "RATES", [1e-6, 1e-3, 1e6])  # too small, good, out of the picture
    explorer = trajectories.Explorer(trajectories.SURFACES[0], trajectories.FAMILIES["gradient descent"][0])
    assert explorer.best_walk(5).lr == 1e-3


def test_minima_are_minima(trajectories: Any) -> None:
    for surface in trajectories.SURFACES:
        assert surface.function(*surface.minimum) == 0 and surface.holds(np.array([surface.minimum, surface.start]))


# -- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_beside_optax(
    compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [rule for rule in compare.RULES if rule.name in ("Lion", "ScheduleFreeAdamW")]
    monkeypatch.setattr(compare, "RULES", chosen)
    output = tmp_path / "table.md"
    assert compare.main(["--steps", "5", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert [row[0] for row in rows] == ["Lion", "ScheduleFreeAdamW"] and [row[2] for row in rows] == ["optax"] * 2
    for row in rows:
        assert float(row[3]) == pytest.approx(float(row[4]), abs=1e-4) and row[5] == row[6] and float(row[7]) < 1e-2
    written = [line.strip("| ").split(" | ") for line in output.read_text().splitlines()]
    assert written[0] == list(compare.HEADINGS) and written[2:] == rows


def test_every_optimizer_of_the_table_is_compared(compare: Any, trajectories: Any) -> None:
    compared = {rule.cls.__name__ for rule in compare.RULES}
    assert compared == {*CLASSES, "LBFGS"} - {"Optimizer"}
    drawn = {rule.cls.__name__ for family in trajectories.FAMILIES.values() for rule in family}
    assert drawn == compared - {"AdamW", "LBFGS"}  # without decay it is Adam; without a closure there is no LBFGS


def test_batches(compare: Any) -> None:
    which = compare.batches(100, 7, np.random.default_rng(0))
    assert which.shape == (7, 32) and len(set(which[:3].ravel())) == 96


def test_the_rate_with_the_lowest_loss_is_found(
    compare: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "RULES", compare.RULES[:1])
    monkeypatch.setattr(compare, "RATES", [1e-5, 0.3, 1e30])
    assert compare.main(["--steps", "5", "--search"]) == 0
    assert re.search(r"SGD: lr 0\.3, training loss [\d.]+\n", capsys.readouterr().out)


@pytest.mark.slow
def test_in_float64_the_rules_are_the_same(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--steps", "40", "--x64"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == len(compare.RULES)
    for name, *cells in rows:
        assert name == "Muon" or float(cells[-1]) < 1e-6, name


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example, options, message",
    [
        ("trajectories", ["--steps", "0"], "argument --steps: must be a whole number from 1 to 100000; got 0"),
        ("trajectories", ["--output", "a.jpg"], r"argument --output: must be the name of a \.png file; got 'a\.jpg'"),
        ("trajectories", ["--output", "none/a.png"], "argument --output: cannot write 'none/a.png'"),
        ("compare", ["--steps", "-3"], "argument --steps: must be a whole number from 1 to 100000; got -3"),
        ("compare", ["--seed", "x"], r"argument --seed: must be a whole number from 0 to \d+; got x"),
        ("compare", ["--output", "a.txt"], r"argument --output: must be the name of a \.md file; got 'a\.txt'"),
    ],
)
def test_wrong_options(
    example: str,
    options: list[str],
    message: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        request.getfixturevalue(example).main(options)
    assert stopped.value.code == 2
    assert re.search(message + "$", capsys.readouterr().err.strip())
