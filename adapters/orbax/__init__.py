"""Checkpoints with orbax: written in the background, spread over devices and processes, with the best or latest kept.

`Manager` saves what `mt.save` saves, in a folder with one checkpoint for each step. `restore` is as strict as `mt.load`: it
compares names, structure, shapes and dtypes, and one error lists all differences. In that case nothing has changed.

In each step's folder orbax writes two items that it can also read without this library. `arrays` holds all arrays by their
path (`model.0.weight`). `description` is JSON: it says what the arrays belong to, and holds all other values.
"""

from __future__ import annotations

from .._extra import missing

try:
    import orbax.checkpoint as _orbax  # noqa: F401
except ImportError as error:
    raise missing("orbax", error) from error

from .manager import Manager as Manager
