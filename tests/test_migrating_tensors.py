"""The page on tensor methods: each row runs in torch and here, with the same values, and the results are compared."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from oracle import torch
from training import as_jax_comes

PAGE = (Path(__file__).parents[1] / "docs" / "migrating" / "tensors.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M))
(DATA,) = re.findall(r"^```python\n(.*?)^```$", PAGE.partition("\n## ")[0], flags=re.S | re.M)


def rows(section: str) -> list[list[str]]:
    """The code in the cells of each row."""
    lines = re.findall(r"^\| `.*\|$", SECTIONS[section], flags=re.M)
    return [[cell.strip().strip("`") for cell in line.strip("| ").split(" | ")] for line in lines]


def ours() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(DATA, names)
    return names


def theirs() -> dict[str, Any]:
    arrays = {name: torch.tensor(np.array(value)) for name, value in ours().items() if isinstance(value, jax.Array)}
    return {**arrays, "torch": torch, "F": torch.nn.functional, "np": np}


def run(code: str, names: dict[str, Any]) -> list[np.ndarray]:
    """Run a row. Its result is the value of its last line, or x if that is a statement."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, code, "exec"), names)
    result = names["x"] if last is None else eval(compile(ast.Expression(last.value), code, "eval"), names)
    parts = result if isinstance(result, tuple | list) else [result]
    return [np.asarray(part) for part in parts]


def same(one: list[np.ndarray], two: list[np.ndarray], values: bool = True) -> bool:
    """True for the same shapes and kinds of dtypes, and the same values to float32's rounding."""
    return len(one) == len(two) and all(
        a.shape == b.shape and a.dtype.kind == b.dtype.kind and (not values or np.allclose(a, b, rtol=1e-5, atol=1e-6))
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.one_in(6)
@pytest.mark.parametrize("row", rows("Silent traps"), ids=lambda row: row[0])
@pytest.mark.filterwarnings("ignore")
def test_a_trap_is_silent_and_what_to_write_is_torchs(row: list[str]) -> None:
    expected = run(row[0], theirs())
    with as_jax_comes():
        assert not same(run(row[1], ours()), expected)
        assert same(run(row[2], ours()), expected)


@pytest.mark.parametrize("row", rows("Methods"), ids=lambda row: row[0])
def test_a_method_does_what_torchs_does(row: list[str]) -> None:
    expected = run(row[0], theirs())
    with as_jax_comes():
        assert same(run(row[1], ours()), expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("row", rows("Random numbers"), ids=lambda row: row[0])
def test_random_numbers_have_torchs_shapes_and_types(row: list[str]) -> None:
    expected = run(row[0], theirs())
    with as_jax_comes():
        assert same(run(row[1], ours()), expected, values=False)


def test_what_the_list_says() -> None:
    with as_jax_comes():
        names = ours()
        assert np.array_equal(names["x"][99], names["x"][-1])
        assert np.array_equal(names["x"].at[99].set(0), names["x"])
        assert str(names["jnp"].arange(3).dtype) == "int32" and str(names["jnp"].asarray(np.ones(2)).dtype) == "float32"
    with pytest.raises(IndexError):
        theirs()["x"][99]
    assert len(rows("Methods")) > 70 and len(rows("Silent traps")) > 15


@pytest.mark.slow
def test_a_loop_over_time_is_unrolled_and_a_scan_is_not() -> None:
    names = ours()
    (loop,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS["A loop over time"], flags=re.S | re.M)
    with as_jax_comes():
        exec(loop, names)
        lines = {}
        for steps in (3, 9):
            for kind in ("unrolled", "scanned"):
                program = jax.make_jaxpr(names[kind])(names["cell"], names["jnp"].ones((steps, 2, 4)))
                lines[kind, steps] = len(program.eqns)
    assert lines["unrolled", 9] > 2 * lines["unrolled", 3] and lines["scanned", 9] == lines["scanned", 3]
