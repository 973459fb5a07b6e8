"""Saving and loading: checkpoints, and the archive in which they are stored."""
