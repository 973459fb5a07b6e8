"""The results: as rows of plain values, as a table, as a file."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import statistics
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from . import CORES
from .comparison import Comparison, Row
from .timing import Times, ratio, summary

WIDE = ("layers", "updates", "programs")  # groups with a table of their own, which have the processor's time too
PACKAGES = ("minitorch_jax", "jax", "jaxlib", "numpy", "optax", "equinox", "flax", "torch")


def environment(quick: bool, rounds: int) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": CORES,
        "machine": platform.machine(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)},
        "quick": quick,
        "rounds": rounds,
    }


def sides(times: Times) -> dict[str, Any]:
    """Each side's figures by itself."""
    return {name: summary(values)._asdict() for name, values in times.items()}


def row_values(group: Comparison, row: Row, times: Times, judge: bool) -> dict[str, Any]:
    """One row. Whether the aim is reached is judged by the two decimals (three below a half) that are shown."""
    judge = judge and row.aim is not None
    mine, theirs, paired = summary(times[row.ours]), summary(times[row.peer]), ratio(times, row.ours, row.peer)
    values = {
        "work": group.title,
        "ours": row.ours,
        "peer": row.peer,
        "unit": group.unit,
        "ours_median": mine.median,
        "peer_median": theirs.median,
        "ratio": paired.median,
        "ratio_low": paired.low,
        "ratio_high": paired.high,
        "aim": row.aim,
        "reached": float(number(paired.median)) <= float(number(row.aim or 0)) if judge else None,
    }
    if row.per_array is not None:
        values["more_per_packed_array"] = (mine.median - theirs.median) / row.per_array
    return values


def number(value: float) -> str:
    """A ratio as text."""
    return f"{value:.2f}" if value >= 0.5 else f"{value:.3f}"


def amount(value: float, unit: str) -> str:
    """A time or a size as text."""
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    for factor, name in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e6:.1f} µs" if value < 1e-4 else f"{value * 1e6:.0f} µs"


WIDTHS = {"ours": 24, "peer": 31, "ours ": 8, "peer ": 8, "ratio": 5, "quartiles": 11, "aim": 7, "reached": 7}


def table(heading: bool) -> Table:
    """An empty table; all of them have the same columns."""
    made = Table(show_header=heading, box=None, header_style="dim", padding=(0, 2, 0, 0))
    for i, (name, width) in enumerate(WIDTHS.items()):
        made.add_column(name.strip(), width=width, justify="left" if i < 2 else "right", overflow="fold")
    return made


def wide(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Rows of comparisons that also tell the processor's time, as one table: a line for each work, its ratios side by side.

    The last line has the geometric means of the columns.
    """
    columns = list(dict.fromkeys(row["peer"] for row in rows))
    lines: list[list[str]] = []
    logs: dict[str, list[float]] = {name: [] for name in columns}
    for work, group in itertools.groupby(rows, lambda row: row["work"]):
        found = {row["peer"]: row for row in group}
        for name, row in found.items():
            logs[name].append(math.log(row["ratio"]))
        medians = {row["ours"]: amount(row["ours_median"], row["unit"]) for row in found.values()}
        ratios = [number(found[name]["ratio"]) if name in found else "" for name in columns]
        lines.append([work, next(iter(medians.values())), *ratios])
    means = [number(math.exp(statistics.fmean(logs[name]))) for name in columns]
    return ["work", "ours", *columns], [*lines, ["geometric mean", "", *means]]


FIRST = "first/"  # how the keys of first calls begin
COUNTS = "traces", "programs", "equations", "trace", "lower", "compile"


def first_calls(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What the first calls of whole steps did: a line for each step and side."""
    lines = []
    for key, sides in found["sides"].items():
        if not key.startswith(FIRST):
            continue
        for side in (name for name in sides if f"{name}, traces" in sides):
            median = {name: sides[f"{side}, {name}"]["median"] for name in (*COUNTS, "later", "compiled again")}
            cells = [f"{median[name]:,.0f}" for name in COUNTS[:3]] + [amount(median[name], "s") for name in COUNTS[3:]]
            starts = [amount(sides[name]["median"], "s") for name in (side, f"{side}, second start")]
            later = [f"{median[name]:,.0f}" for name in ("compiled again", "later")]
            lines.append([key.removeprefix(FIRST), side, *cells, starts[0], starts[1], *later])
    names = [*COUNTS, "first call", "second start", "compiled then", "compiled by the next calls"]
    return ["step", "side", *names], lines


def filled(columns: list[str], lines: list[list[str]], title: str) -> Table:
    made = Table(*columns, box=None, header_style="dim", title=f"[bold]{title}[/bold]", title_justify="left")
    for line in lines:
        made.add_row(*line)
    return made


def tables(rows: list[dict[str, Any]]) -> Iterator[str | Table]:
    """The rows, under titles that say what work they compare; of groups with the processor's time, one table each."""
    long = [row for row in rows if row["group"] not in WIDE]
    for name in WIDE:
        chosen = [row for row in rows if row["group"] == name]
        if chosen:
            yield filled(*wide(chosen), f"{name}: ours / the others")
    if long:
        yield table(heading=True)
    for work, group in itertools.groupby(long, lambda row: row["work"]):
        yield f"[bold]{work}[/bold]"
        shown = table(heading=False)
        for row in group:
            shown.add_row(
                row["ours"],
                row["peer"],
                amount(row["ours_median"], row["unit"]),
                amount(row["peer_median"], row["unit"]),
                number(row["ratio"]),
                f"{number(row['ratio_low'])}–{number(row['ratio_high'])}",
                "" if row["aim"] is None else f"≤ {number(row['aim'])}",
                {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[row["reached"]],
            )
        yield shown


def show(console: Console, found: dict[str, Any]) -> None:
    """Table, notes, and what was measured on."""
    for part in tables(found["rows"]):
        console.print(part)
    columns, lines = first_calls(found)
    if lines:
        console.print(filled(columns, lines, "first calls"))
    console.print()
    for row in found["rows"]:
        if "more_per_packed_array" in row:
            more = row["more_per_packed_array"] * 1e3
            console.print(f"{row['work']}: packing adds {more:.1f} ms per packed array", soft_wrap=True)
    for note in found["notes"]:
        console.print(note, soft_wrap=True)
    judged = [row["reached"] for row in found["rows"] if row["reached"] is not None]
    if judged:
        console.print(f"aims reached: {sum(judged)} of {len(judged)}")
    env = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    console.print(
        f"{env['device']} ({env['platform']}), {env['cores']} cores, Python {env['python']}; {versions}", soft_wrap=True
    )
    if env["quick"]:
        console.print("A quick run, with small sizes and few rounds: its times mean nothing, and no aim is judged.")


def markdown(found: dict[str, Any]) -> str:
    """All rows as tables of Markdown."""
    found_by_group = {name: [row for row in found["rows"] if row["group"] == name] for name in WIDE}
    parts = [*(wide(rows) for rows in found_by_group.values() if rows), first_calls(found)]
    texts = [
        "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines]) + "\n"
        for columns, lines in parts
        if lines
    ]
    long = [row for row in found["rows"] if row["group"] not in WIDE]
    return "\n".join([*texts, *([_long(long)] if long else [])])


def _long(rows: list[dict[str, Any]]) -> str:
    lines = ["| work | ours | peer | ours | peer | ratio | quartiles | aim |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        times = [amount(row[key], row["unit"]) for key in ("ours_median", "peer_median")]
        aim = "" if row["aim"] is None else f"≤ {number(row['aim'])}{' ✗' if row['reached'] is False else ''}"
        quartiles = f"{number(row['ratio_low'])}–{number(row['ratio_high'])}"
        cells = [row["work"], row["ours"], row["peer"], *times, number(row["ratio"]), quartiles, aim]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
