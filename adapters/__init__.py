"""Adapters to other libraries, one module each. Import them explicitly: `from minitorch_jax.adapters import numpy`."""
