"""Mini-torch's imperative training loop, at the speed of one compiled XLA program."""

from typing import TYPE_CHECKING

from . import nn as nn
from . import optim as optim
from .autograd import backward as backward
from .autograd import grad as grad
from .autograd import value_and_grad as value_and_grad
from .clipping import clip_grad_norm as clip_grad_norm
from .clipping import clip_grad_value as clip_grad_value
from .clipping import scale_grads as scale_grads
from .engine.recompiles import RecompileWarning as RecompileWarning
from .engine.recompiles import TracedOnceWarning as TracedOnceWarning
from .export import export as export
from .jit import jit as jit
from .module.anomaly import detect_anomaly as detect_anomaly
from .module.module import Module as Module
from .module.parameter import Buffer as Buffer
from .module.parameter import Parameter as Parameter
from .module.random import next_key as next_key
from .module.random import rng as rng
from .module.random import seed as seed
from .nn.functional.autocast import autocast as autocast
from .optim import Optimizer as Optimizer
from .optim.loss_scaler import LossScaler as LossScaler
from .pack import pack as pack
from .pack import unpack as unpack
from .saving.checkpoint import load as load
from .saving.checkpoint import save as save
from .scan import scan as scan
from .shard import shard as shard
from .state.errors import DroppedUpdateWarning as DroppedUpdateWarning
from .state.errors import TraceError as TraceError
from .state.errors import UndeclaredArrayError as UndeclaredArrayError
from .state.errors import UninitializedError as UninitializedError
from .summary import summary as summary
from .vjp import vjp as vjp

__version__ = "0.1.0"

if not TYPE_CHECKING:  # for type checkers, a name that is not here is an error
    from .module import torch_names as _torch_names

    __getattr__, __dir__ = _torch_names.hooks(
        globals(), "mt", ("nn", "optim", "adapters"), {"nn": nn, "nn.functional": nn.functional, "optim": optim}
    )
