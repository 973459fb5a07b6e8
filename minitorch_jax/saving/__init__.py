"""Saving and loading: checkpoints, the archive they are kept in."""
