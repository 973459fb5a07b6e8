"""What a first call of a training step takes: `python -m benchmarks.programs.first MODULE PROGRAM TINY CACHE FOLDER`.

Each runs in new processes, the second of which finds the programs in JAX's persistent cache. A process prints JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from ..timing import Times

AGAIN = ", second start"
EQUATION = re.compile(r"^\s+\S.*:\S+.* = \w", re.MULTILINE)  # a line of a jaxpr's text
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
COUNTED = "traces", "programs", "equations", "trace", "lower", "compile", "later"


def measure(names: Sequence[str], modules: Mapping[str, str], program: str, tiny: bool) -> Times:
    """Seconds of both starts of each side that is named, and under longer names what happened in the first."""
    found: Times = {}
    for side, module in modules.items():
        if not any(name.removesuffix(AGAIN) == side for name in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            first, again = (_run(module, program, tiny, folder) for _ in range(2))
            first["equations"] = _equations(module, program, tiny, folder)
        found |= {side: [first["seconds"]], side + AGAIN: [again["seconds"]]}
        found |= {f"{side}, {name}": [first[name]] for name in COUNTED}
        found[f"{side}, compiled again"] = [again["misses"]]
    return found


def _equations(module: str, program: str, tiny: bool, folder: str) -> int:
    """Lines of the largest jaxpr, by one more process that writes them down, which takes time."""
    dump = Path(folder, "jaxprs")
    _run(module, program, tiny, folder, {"JAX_DUMP_IR_TO": str(dump), "JAX_DUMP_IR_MODES": "jaxpr"})
    return max(len(EQUATION.findall(file.read_text(encoding="utf-8"))) for file in dump.iterdir())


def _run(
    module: str, program: str, tiny: bool, folder: str, settings: Mapping[str, str] = MappingProxyType({})
) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.programs.first", module, program, str(int(tiny)), folder]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | settings)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(module: str, program: str, tiny: str, folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    side = importlib.import_module(module).side(program, tiny == "1")
    seconds, counts = dict.fromkeys(EVENTS.values(), 0.0), dict.fromkeys((*EVENTS.values(), "misses"), 0)

    def duration(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event in EVENTS:
            seconds[EVENTS[event]] += duration_secs
            counts[EVENTS[event]] += 1

    def happened(event: str, **kwargs: Any) -> None:
        counts["misses"] += event == "/jax/compilation_cache/cache_misses"

    jax.monitoring.register_event_duration_secs_listener(duration)
    jax.monitoring.register_event_listener(happened)
    start = time.perf_counter()
    jax.block_until_ready(side.run(1))
    found: dict[str, float] = {"seconds": time.perf_counter() - start, **seconds}
    found |= {"traces": counts["trace"], "programs": counts["compile"], "misses": counts["misses"]}
    jax.block_until_ready(side.run(2))
    found["later"] = counts["compile"] - found["programs"]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
