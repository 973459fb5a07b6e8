"""Learning rates that follow the step count: pass one as `lr`.

Each is a function of the 0-based step `t`, and a value: two that were made with the same numbers are equal, hash alike
and share compiled programs, and the repr is the call that makes one. A Python int gives a Python float computed in float64,
a NumPy array an array of float64, a JAX array (traced or not) one of JAX's default float, so float32 unless x64 is on.
Counts end where int32 does, at 2147483647.
"""

from typing import TYPE_CHECKING

from .composed import join as join
from .composed import warmup as warmup
from .cosines import cosine as cosine
from .cosines import cosine_restarts as cosine_restarts
from .cosines import one_cycle as one_cycle
from .decays import exponential as exponential
from .decays import inverse_sqrt as inverse_sqrt
from .decays import linear as linear
from .decays import polynomial as polynomial
from .stepped import constant as constant
from .stepped import multistep as multistep
from .stepped import piecewise as piecewise
from .stepped import step as step

# pickle finds them here, wherever they are written
for _schedule in (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    inverse_sqrt,
    join,
    linear,
    multistep,
    one_cycle,
    piecewise,
    polynomial,
    step,
    warmup,
):
    _schedule.__module__ = __name__
del _schedule

if not TYPE_CHECKING:
    from ...module import torch_names as _torch_names

    __getattr__, __dir__ = _torch_names.hooks(globals(), "optim.schedules")
