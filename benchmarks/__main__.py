"""Runs every benchmark, prints a table, and with --output writes benchmarks.json, benchmarks.md and benchmarks.png.

All sides of a comparison run in one process (torch in one of its own, in turn with the others), round by round, in
alternating order; a ratio is the median of the rounds' ratios, given with its quartiles. Before anything is timed, all
sides must have computed the same. Nothing is asserted about times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPTIONAL = ("equinox", "flax", "matplotlib", "optax", "rich", "torch")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that everything runs")
    parser.add_argument("--rows", type=pattern, metavar="REGEX", help="only rows where it is in `work: ours / peer`")
    parser.add_argument("--rounds", type=positive, metavar="N", help="rounds of each comparison (31; with --quick 3)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write benchmarks.json, .md and .png there")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 31)
    return args


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on; got {text}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'the benchmarks need {", ".join(missing)} too: pip install -e ".[bench]"')
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    run(args)


def run(args: argparse.Namespace) -> None:
    """Measure and report; the libraries are imported here, where it is known that they exist."""
    import jax
    from rich.console import Console

    from . import chart, report
    from .comparison import Effort
    from .peers import torch
    from .rows import catalogue

    jax.config.update("jax_enable_compilation_cache", False)  # the first calls are to compile
    if jax.default_backend() != "cpu":  # where JAX would round to TF32 or less, and torch and NumPy would not
        jax.config.update("jax_default_matmul_precision", "highest")
    console, progress = Console(highlight=False), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    effort = Effort(args.rounds, 0.005 if args.quick else 0.04)
    found: dict[str, Any] = {"environment": report.environment(args.quick, args.rounds), "rows": [], "sides": {}}
    groups, found["notes"] = catalogue(args.quick)
    try:
        for group in groups:
            rows = [
                row
                for row in group.rows
                if not args.rows or args.rows.search(f"{group.title}: {row.ours} / {row.peer}")
            ]
            if not rows:
                continue
            progress.print(f"measuring: {group.title}")
            times = group.measure([name for row in rows for name in (row.ours, row.peer)], effort)
            found["sides"][group.key] = report.sides(times)
            found["rows"] += [report.row_values(group, row, times, judge=not args.quick) for row in rows]
    finally:
        torch.worker.close()
    if not found["rows"]:
        sys.exit(f"no row matches --rows {args.rows.pattern!r}")
    report.show(console, found)
    if args.output:
        (args.output / "benchmarks.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        (args.output / "benchmarks.md").write_text(report.markdown(found), encoding="utf-8")
        chart.draw(found, args.output / "benchmarks.png")
        console.print(f"Written: {args.output / 'benchmarks'}.json, .md, .png", soft_wrap=True)


if __name__ == "__main__":
    main()
