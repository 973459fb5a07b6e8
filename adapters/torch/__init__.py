"""PyTorch: exchange weights, optimizer state and arrays, in both directions.

`load_from_torch` and `load_optimizer_from_torch` load a torch module's weights and a torch optimizer's state.
`copy_to_torch` and `copy_optimizer_to_torch` copy them to torch. All work in place and change everything or nothing, and
training continues with the same trajectory. `from_torch` and `to_torch` convert single arrays, without a copy if possible.

    load_from_torch(model, torch_model)
    load_optimizer_from_torch(opt, torch_opt, [torch_model])  # `opt.modules` is [model]

Where names or layouts differ, `load_from_torch` takes `names`, a dict of torch's names and ours, with `*`, and `transposed`.
"""

from __future__ import annotations

from .._extra import missing
from .._names import transposed

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise missing("torch", error) from error

from .arrays import from_torch, to_torch
from .optimizers import copy_optimizer_to_torch, load_optimizer_from_torch
from .weights import copy_to_torch, load_from_torch

__all__ = [
    "copy_optimizer_to_torch",
    "copy_to_torch",
    "from_torch",
    "load_from_torch",
    "load_optimizer_from_torch",
    "to_torch",
    "transposed",
]
