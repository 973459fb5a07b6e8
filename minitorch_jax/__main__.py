"""What a bug report needs: `python -m minitorch_jax` prints it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from . import __version__
from .runtime import xla_faults

REQUIRED = ("jax", "jaxlib", "numpy")
OPTIONAL = (  # the packages of the extras, but for those of examples and tests
    *("equinox", "flax", "optax", "orbax-checkpoint", "safetensors", "huggingface_hub", "torch", "flatbuffers"),
)
SETTINGS = (  # of JAX, that change what is computed or compiled
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion"),
    *("jax_default_prng_impl", "jax_disable_jit", "jax_debug_nans", "jax_enable_checks", "jax_compilation_cache_dir"),
)
PREFIXES = ("JAX_", "XLA_", "CUDA_VISIBLE_", "LD_LIBRARY_PATH", "OMP_NUM_")


def _versions(names: tuple[str, ...]) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _devices() -> str:
    """The devices by kind. Where JAX cannot start one, its error."""
    try:
        kinds = [f"{device.platform} ({device.device_kind})" for device in jax.devices()]
    except RuntimeError as error:
        return f"none: {error}"
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def report() -> Iterator[str]:
    """Return the lines: versions, the machine, devices, settings, and the faults of the installed jaxlib."""
    yield f"minitorch_jax: {__version__}, in {Path(__file__).parent}"
    yield f"Python: {platform.python_version()} ({platform.python_implementation()})"
    yield f"machine: {platform.platform()}, {os.cpu_count()} CPUs"
    yield f"needed: {_versions(REQUIRED)}"
    yield f"optional: {_versions(OPTIONAL)}"
    yield f"devices: {_devices()}"
    values = {name.removeprefix("jax_"): getattr(jax.config, name) for name in SETTINGS}
    yield "settings: " + ", ".join(f"{name}={getattr(value, 'value', value)}" for name, value in values.items())
    variables = sorted(name for name in os.environ if name.startswith(PREFIXES))
    yield "environment: " + (", ".join(f"{name}={os.environ[name]!r}" for name in variables) or "none of JAX or XLA")
    faults = xla_faults.known(version("jaxlib"))
    yield f"known faults of jaxlib {version('jaxlib')} on CPUs, which minitorch_jax works around in what it compiles:"
    yield from (f"  - {fault}" for fault in faults or ("none",))


if __name__ == "__main__":
    print("\n".join(report()))
