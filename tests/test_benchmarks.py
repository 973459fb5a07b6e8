"""The benchmarks' tables and picture say what was measured; at tiny sizes, all sides of a layer compute the same."""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lazily import Lazily, needs

from benchmarks import __main__ as command
from benchmarks.layers import kinds

needs("equinox", "flax", "matplotlib", "optax", "rich")
crossover_chart, ratio_chart, report, rows = (
    Lazily(f"benchmarks.{name}") for name in ("crossover_chart", "ratio_chart", "report", "rows")
)
by_hand, flax, ours = (Lazily(f"benchmarks.layers.{name}") for name in ("by_hand", "flax", "ours"))
CPU = ", CPU"


def row(work: str, peer: str, ratio: float, group: str = "layers") -> dict[str, Any]:
    end = CPU if peer.endswith(CPU) else ""
    return {"group": group, "work": work, "ours": f"mt.jit{end}", "peer": peer, "ours_median": 0.25, "ratio": ratio} | {
        "unit": "s"
    }


ROWS = [
    row("GELU, 64 x 256", "torch", 0.5),
    row("GELU, 64 x 256", f"torch{CPU}", 2.0),
    row("GELU, 64 x 512", "torch", 2.0),
    row("GELU, 64 x 512", f"torch{CPU}", 8.0),
    row("Conv2d 1x1, 2 x 3, weight 4 x 3", f"torch{CPU}", 4.0),
]
ENVIRONMENT = {"device": "cpu", "cores": 2, "versions": {"jax": "1"}, "rounds": 1, "quick": False}


def test_a_wide_table_has_a_line_for_each_work_and_geometric_means() -> None:
    columns, lines = report.wide(ROWS)
    assert columns == ["work", "ours", "torch", "torch, CPU"]
    assert lines[0] == ["GELU, 64 x 256", "250 ms", "0.50", "2.00"]
    assert lines[2] == ["Conv2d 1x1, 2 x 3, weight 4 x 3", "250 ms", "", "4.00"]
    assert lines[-1] == ["geometric mean", "", "1.00", "4.00"]


def test_first_calls_have_a_line_for_each_side() -> None:
    counts = {"traces": 1234, "programs": 2, "equations": 5, "trace": 0.5, "lower": 0.25, "compile": 2, "later": 0}
    values = {f"mt.jit, {name}": value for name, value in (counts | {"compiled again": 1}).items()}
    values |= {"mt.jit": 3.0, "mt.jit, second start": 1.5}
    sides = {"first/lenet": {name: {"median": value} for name, value in values.items()}, "step/4": {}}
    _, lines = report.first_calls({"sides": sides})
    assert lines == [["lenet", "mt.jit", "1,234", "2", "5", "500 ms", "250 ms", "2 s", "3 s", "1.5 s", "1", "0"]]


def test_the_picture_joins_the_sizes_of_a_kind(tmp_path: Path) -> None:
    lines = ratio_chart.by_line([row for row in ROWS if row["peer"].endswith(CPU)])
    assert lines == {"GELU": {"torch": [2.0, 8.0]}, "Conv2d 1x1": {"torch": [4.0]}}
    found = [*ROWS, row("a GPT of 2 layers, 8 x 128 characters", f"nnx.jit{CPU}", 0.5, "programs")]
    ratio_chart.draw({"rows": found, "environment": ENVIRONMENT}, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_every_group_is_known_to_the_catalogue() -> None:
    assert list(rows.CATALOGUES) == list(command.GROUPS)
    for name, catalogue in rows.CATALOGUES.items():
        for quick in (True, False):
            keys = [comparison.key for comparison in catalogue(quick)[0]]
            assert keys, name
            assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("text", ["0", "x", "9999"])
def test_threads_are_a_number_of_cores(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1 on|there are [0-9]+ cores"):
        command.threads(text)


def test_peers_know_no_kind_that_is_not_measured() -> None:
    assert not {*by_hand.CALLS, *flax.LAYERS} - {*kinds.KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("name", kinds.KINDS)
def test_all_sides_of_a_layer_compute_the_same(name: str) -> None:
    modules = [by_hand] * (name in by_hand.CALLS) + [flax] * (name in flax.LAYERS)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        sides = [module.side(name, kinds.KINDS[name].tiny) for module in (ours, *modules)]
        first, *others = [side.value(side.run(1)) for side in sides]
    assert np.isfinite(first).all()
    for other in others:
        np.testing.assert_allclose(first, other, rtol=1e-4)


def test_the_place_where_lines_cross() -> None:
    assert crossover_chart.crossings([1, 2, 4], [1, 1, 1], [2, 3, 4]) == []  # below from the start
    assert crossover_chart.crossings([1, 2, 4], [1, 2, 4], [0.5, 1, 2]) == []  # above to the end
    ((size, time),) = crossover_chart.crossings([1, 2, 8], [4, 4, 4], [1, 2, 8])
    assert size == pytest.approx(4) and time == pytest.approx(4)
