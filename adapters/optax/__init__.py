"""optax: use any transformation as an optimizer, and any of our rules as a transformation.

`OptaxOptimizer(modules, tx)` passes the parameters to the transformation as a dict by path, as in `state_dict()`:
`{"0.weight": ..., "0.bias": ...}` for the first module of the list. Masks and labels are dicts with these paths, or
functions of such a dict.
"""

from .optimizer import OptaxOptimizer as OptaxOptimizer
from .rule import RuleState as RuleState
from .rule import as_optax as as_optax
