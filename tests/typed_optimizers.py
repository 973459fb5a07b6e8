"""What type checkers are to say of optimizers: `test_types.py` has mypy and pyright read this file, which is never run.

Each line that ends in a comment `# refused: ...` must be an error, of mypy's with these words, and no other line may be one.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax import nn, optim

model = nn.Linear(2, 1)
opt = optim.SGD([model], 0.1, 0.9)
optim.SGD([model], 0.1, 0.9, 0, 1e-4, True, maximize=True, skip_nonfinite=True)
optim.SGD([{"modules": [model], "lr": 0.1}], lr=lambda t: 0.1 / (t + 1))
optim.AdamW([model, {"names": "bias", "weight_decay": 0.0}], 1e-3).add_param_group({"names": "weight", "lr": 0.1})
optim.Muon([model, {"rule": optim.AdamW, "lr": 3e-4}], 0.02).param_groups[1]["lr"] = 1e-3
optim.AdamW([model], optim.schedules.cosine(1e-3, 100), (0.9, 0.99), decay_matrices_only=True)
optim.Muon([model, {"rule": optim.AdamW, "state_dtype": None}], 0.02, state_dtype=jnp.bfloat16)
optim.AdamW([model], state_dtype="bfloat16").state_dtype = jnp.float32
optim.SGD()  # refused: Missing positional argument "modules"
optim.SGD([model], lr="x")  # refused: Argument "lr" to "SGD" has incompatible type "str"
optim.SGD([model], momentun=0.9)  # refused: Unexpected keyword argument "momentun"
optim.SGD([model], 0.1, 0.9, 0, 0, True, True)  # refused: Too many positional arguments
optim.SGD([model], nesterov="yes")  # refused: Argument "nesterov" to "SGD" has incompatible type "str"
optim.AdamW([model], decoupled_weight_decay=False)  # refused: Unexpected keyword argument "decoupled_weight_decay"
optim.AdamW([model], state_dtype=16)  # refused: Argument "state_dtype" to "AdamW" has incompatible type "int"
optim.LBFGS([model], state_dtype=jnp.bfloat16)  # refused: Unexpected keyword argument "state_dtype"
optim.LBFGS([model], skip_nonfinite=True)  # refused: Unexpected keyword argument "skip_nonfinite"
mt.Optimizer([model], lr="x")  # refused: Argument "lr" to "Optimizer" has incompatible type "str"

opt.lr = 0.5
opt.lr *= 0.5
opt.lr = optim.schedules.cosine(0.1, 10)
opt.momentum = 0.5
opt.lr = "x"  # refused: Incompatible types in assignment
opt.momentum = "x"  # refused: Incompatible types in assignment


class Signum(optim.Optimizer):
    """A rule of the user's own."""

    lr: optim.Rate = optim.setting(default=1e-3)
    momentum: float = 0.9
    share: float = optim.setting(default=0.0, within=(0, 1), doc="σ")
    centered: bool = False


Signum([model], 0.1, 0.5, share=0.3, centered=True, master_weights=True)
Signum([model], 0.1, "x")  # refused: Argument 3 to "Signum" has incompatible type "str"
Signum([model], a=1)  # refused: Unexpected keyword argument "a"


class ByHand(mt.Optimizer):
    """As rules were written before: a constructor that passes hyperparameters on by keyword."""

    def __init__(self, modules: Any, lr: Any = 0.01, rho: float = 0.9, **options: Any) -> None:
        super().__init__(modules, lr, rho=rho, **options)


class OfOurs(optim.SGD):
    """A subclass of a rule of ours, with a constructor of its own."""

    def __init__(self, modules: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(modules, lr, momentum=0.8, **options)


ByHand([model], 0.1, 0.3, skip_nonfinite=True)
ByHand([model], 0.1, "x")  # refused: Argument 3 to "ByHand" has incompatible type "str"
OfOurs([model], skip_nonfinite=True)
