"""What minitorch_jax costs beside its peers, on the same machine in the same run: `python -m benchmarks --help`."""

import os

# What XLA's thread pool goes by. Everybody gets as many threads; set here, before any library reads it.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(CORES))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's process needs a GPU's memory too
