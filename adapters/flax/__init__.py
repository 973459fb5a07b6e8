"""Flax: train its modules in our loop, and use our modules as nnx modules.

`NNX(module)` is a Module around an nnx module. `Linen(module, variables)` is one around a linen module and its variables.
Use both like any Module: in an optimizer's `modules`, in `mt.backward`, `mt.jit` and `mt.scan`. The Variables of the nnx
module share their values with the Module's parameters and buffers, so the nnx module always has the current values. The
other way, `to_flax(module)` returns an nnx module that computes what our module computes.

While an nnx module is wrapped, the attribute `_raw_value` of the class `flax.nnx.Variable` is a property, for the whole
process: see `NNX`.
"""

from __future__ import annotations

from .._extra import missing

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise missing("flax", error) from error

from .export import to_flax as to_flax
from .linen_module import Linen as Linen
from .nnx_module import NNX as NNX
