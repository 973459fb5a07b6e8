"""Runs every benchmark and prints tables. With --output, writes benchmarks.json, benchmarks.md, and pictures.

All sides of a comparison run in one process (torch in one of its own, in turn with the others), round by round, in
alternating order; a ratio is the median of the rounds' ratios, given with its quartiles. Before anything is timed, all
sides must have computed the same. Nothing is asserted about times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import CORES, use_cores

NEEDED = ("equinox", "flax", "matplotlib", "optax", "rich")
GROUPS = {
    "calls": "what a call costs beside its computation: step(), training steps of MLPs, first calls, imports",
    "crossover": "training steps of small and large MLPs, beside NumPy and the other libraries",
    "layers": "each layer and loss, forward with backward",
    "updates": "step() of momentum and Adam on large arrays",
    "programs": "whole training steps of known networks",
    "first": "the first calls of these steps, and the second start with JAX's persistent cache",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that everything runs")
    texts = "; ".join(f"{name}: {text}" for name, text in GROUPS.items())
    parser.add_argument(
        "--group", action="append", choices=GROUPS, help=f"only this group of rows; can be given repeatedly. {texts}"
    )
    parser.add_argument("--rows", type=pattern, metavar="REGEX", help="only rows where it is in `work: ours / peer`")
    parser.add_argument("--rounds", type=positive, metavar="N", help="rounds of each comparison (31; with --quick 3)")
    parser.add_argument(
        "--threads", type=threads, metavar="N", help=f"keep everybody to N cores ({CORES}, which are all)"
    )
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


def threads(text: str) -> int:
    number = positive(text)
    if not hasattr(os, "sched_setaffinity"):
        raise argparse.ArgumentTypeError("this system cannot keep a process to some cores")
    if number > CORES:
        raise argparse.ArgumentTypeError(f"there are {CORES} cores; got {text}")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'the benchmarks need {", ".join(missing)} too: pip install -e ".[bench]"')
    if args.threads:
        use_cores(args.threads)
    if args.quick:  # to compile quickly, here and in processes that this one starts
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    run(args)


def run(args: argparse.Namespace) -> None:
    """Measure and report; the libraries are imported here, where it is known that they exist."""
    import jax
    from rich.console import Console

    from . import chart, crossover_chart, ratio_chart, report
    from .comparison import Effort
    from .peers import torch
    from .rows import CATALOGUES

    jax.config.update("jax_enable_compilation_cache", False)  # the first calls are to compile
    if jax.default_backend() != "cpu":  # where JAX would round to TF32 or less, and torch and NumPy would not
        jax.config.update("jax_default_matmul_precision", "highest")
    console, progress = Console(highlight=False), Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    effort = Effort(args.rounds, 0.005 if args.quick else 0.04)
    environment = report.environment(args.quick, args.rounds)
    found: dict[str, Any] = {"environment": environment, "rows": [], "sides": {}, "notes": []}
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        found["notes"].append("torch is not installed: its rows are left out")
    chosen = [name for name in GROUPS if not args.group or name in args.group]
    catalogues = {name: CATALOGUES[name](args.quick) for name in chosen}
    found["notes"] += [note for _, notes in catalogues.values() for note in notes]
    try:
        for group, comparison in ((name, one) for name, (many, _) in catalogues.items() for one in many):
            rows = [
                row
                for row in comparison.rows
                if (has_torch or not row.peer.startswith("torch"))
                and (not args.rows or args.rows.search(f"{comparison.title}: {row.ours} / {row.peer}"))
            ]
            if not rows:
                continue
            progress.print(f"measuring: {comparison.title}")
            times = comparison.measure([name for row in rows for name in (row.ours, row.peer)], effort)
            found["sides"][comparison.key] = report.sides(times)
            for row in rows:
                values = report.row_values(comparison, row, times, judge=not args.quick)
                found["rows"].append({"group": group, **values})
            if args.output:  # now, so that a run that is stopped loses nothing
                write(found, args.output)
    finally:
        torch.worker.close()
    if not found["rows"]:
        sys.exit(f"no row matches --rows {args.rows.pattern!r}")
    report.show(console, found)
    if args.output:
        (args.output / "benchmarks.md").write_text(report.markdown(found), encoding="utf-8")
        pictures: dict[str, tuple[Any, Sequence[str]]] = {
            "benchmarks.png": (chart, ("calls",)),
            "crossover.png": (crossover_chart, ("crossover",)),
            "layers.png": (ratio_chart, report.WIDE),
        }
        drawn = [name for name, (_, groups) in pictures.items() if {row["group"] for row in found["rows"]} & {*groups}]
        for name in drawn:
            pictures[name][0].draw(found, args.output / name)
        console.print(
            f"Written in {args.output}: {', '.join(['benchmarks.json, benchmarks.md', *drawn])}", soft_wrap=True
        )


def write(found: dict[str, Any], folder: Path) -> None:
    (folder / "benchmarks.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
