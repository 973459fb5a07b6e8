"""Whole training steps of known programs, beside torch, flax nnx and plain JAX."""
