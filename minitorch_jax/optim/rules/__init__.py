"""The update rules of optimizers, one family to a file."""
