"""What this folder's tests rest on."""

import jax


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8
    assert len({device.id for device in jax.devices()}) == 8
