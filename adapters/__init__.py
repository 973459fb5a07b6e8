"""Bridges to other libraries: one module each, imported explicitly (`from minitorch_jax.adapters import numpy`)."""
