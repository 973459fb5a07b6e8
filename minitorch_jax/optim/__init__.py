"""Optimizers, with torch.optim's names, arguments and numerics."""

from .optimizer import Optimizer as Optimizer
from .sgd import SGD as SGD
from .sgd import SGDState as SGDState
