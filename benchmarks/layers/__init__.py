"""Each layer and loss, forward with backward, beside torch, flax and plain JAX."""
