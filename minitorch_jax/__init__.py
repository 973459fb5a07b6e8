"""Mini-torch's imperative training loop, at the speed of one compiled XLA program."""

from . import nn as nn
from . import optim as optim
from .autograd import backward as backward
from .autograd import grad as grad
from .autograd import value_and_grad as value_and_grad
from .cell import DroppedUpdateWarning as DroppedUpdateWarning
from .cell import TraceError as TraceError
from .checkpoint import load as load
from .checkpoint import save as save
from .clip import clip_grad_norm as clip_grad_norm
from .clip import clip_grad_value as clip_grad_value
from .clip import scale_grads as scale_grads
from .compile import jit as jit
from .compile import scan as scan
from .module import Module as Module
from .optim import Optimizer as Optimizer
from .pack import pack as pack
from .pack import unpack as unpack
from .parameter import Buffer as Buffer
from .parameter import Parameter as Parameter
from .random import next_key as next_key
from .random import rng as rng
from .random import seed as seed
from .recompiles import RecompileWarning as RecompileWarning
from .recompiles import TracedOnceWarning as TracedOnceWarning
from .scaling import LossScaler as LossScaler
from .summary import summary as summary

__version__ = "0.1.0"
