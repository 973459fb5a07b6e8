"""Tests in this folder run on 8 devices, in a process of their own; `tests/test_mesh.py` starts it."""

import jax
import pytest

DEVICES = 8
FLAG = f"--xla_force_host_platform_device_count={DEVICES}"


def pytest_configure(config: pytest.Config) -> None:
    if jax.device_count() != DEVICES:
        raise pytest.UsageError(
            f"tests/mesh needs {DEVICES} devices, and JAX has {jax.device_count()}: run `pytest tests/test_mesh.py`, or"
            f" `XLA_FLAGS={FLAG} pytest -n 0 tests/mesh`"
        )
