"""What minitorch_jax costs beside its peers, on the same machine in the same run: `python -m benchmarks --help`."""

import os

# What XLA's thread pool goes by. Everybody gets as many threads; set here, before any library reads it.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_POOLS = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"
for _name in _POOLS:
    os.environ.setdefault(_name, str(CORES))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's process needs a GPU's memory too


def use_cores(number: int) -> None:
    """Keep this process, and those that it starts, to some cores. Call it before a library is imported."""
    global CORES
    CORES = number
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])
    os.environ.update(dict.fromkeys(_POOLS, str(number)))
