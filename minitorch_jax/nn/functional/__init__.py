"""The stateless forms of layers and losses, as in torch.nn.functional."""

from .activation import gelu as gelu
from .activation import log_softmax as log_softmax
from .activation import relu as relu
from .activation import sigmoid as sigmoid
from .activation import softmax as softmax
from .activation import tanh as tanh
from .dropout import dropout as dropout
from .linear import bilinear as bilinear
from .linear import linear as linear
from .loss import cross_entropy as cross_entropy
from .loss import mse_loss as mse_loss
