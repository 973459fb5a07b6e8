"""optax both ways: any transformation as an optimizer of ours, and any rule of ours as a transformation.

`OptaxOptimizer(modules, tx)` gives the transformation the parameters as a dict by path, as in `state_dict()`:
`{"0.weight": ..., "0.bias": ...}` for the first module of the list. Masks and labels are dicts with those paths, or
functions of such a dict.
"""

from .optimizer import OptaxOptimizer as OptaxOptimizer
from .rule import RuleState as RuleState
from .rule import as_optax as as_optax
