"""Mini-torch's imperative training loop, at the speed of one compiled XLA program."""

from . import nn as nn
from . import optim as optim
from .autograd import backward as backward
from .autograd import grad as grad
from .autograd import value_and_grad as value_and_grad
from .engine.recompiles import RecompileWarning as RecompileWarning
from .engine.recompiles import TracedOnceWarning as TracedOnceWarning
from .jit import jit as jit
from .module.module import Module as Module
from .module.parameter import Buffer as Buffer
from .module.parameter import Parameter as Parameter
from .module.random import next_key as next_key
from .module.random import rng as rng
from .module.random import seed as seed
from .optim import Optimizer as Optimizer
from .optim.clip import clip_grad_norm as clip_grad_norm
from .optim.clip import clip_grad_value as clip_grad_value
from .optim.clip import scale_grads as scale_grads
from .optim.loss_scaler import LossScaler as LossScaler
from .pack import pack as pack
from .pack import unpack as unpack
from .saving.checkpoint import load as load
from .saving.checkpoint import save as save
from .scan import scan as scan
from .state.errors import DroppedUpdateWarning as DroppedUpdateWarning
from .state.errors import TraceError as TraceError
from .summary import summary as summary

__version__ = "0.1.0"
