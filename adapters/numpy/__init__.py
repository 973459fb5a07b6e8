"""A mini-torch in NumPy, and tools that connect any other mini-torch to this library.

`Module`, `Linear`, …, `SoftmaxCrossEntropy`, `Optimizer` are a complete mini-torch with hand-written backward passes.
`to_jax` and `from_jax` convert its networks, and `copy_weights` copies weights in both directions. `wrap` lets our
optimizers train a network of layers that keep `W`, `b`, `dW`, `db`. `check_gradients` compares each layer's `backward`
with differences of its own `forward`, and names the layers that are wrong.
"""

from .bridge import copy_weights as copy_weights
from .bridge import from_jax as from_jax
from .bridge import to_jax as to_jax
from .check import check_gradients as check_gradients
from .layers import Flatten as Flatten
from .layers import Linear as Linear
from .layers import Module as Module
from .layers import ReLU as ReLU
from .layers import Sequential as Sequential
from .layers import Sigmoid as Sigmoid
from .layers import Tanh as Tanh
from .losses import MeanSquaredError as MeanSquaredError
from .losses import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from .optimizer import Optimizer as Optimizer
from .report import GradientComparison as GradientComparison
from .report import GradientError as GradientError
from .report import GradientReport as GradientReport
from .report import LayerReport as LayerReport
from .wrapped import WrappedNetwork as WrappedNetwork
from .wrapped import wrap as wrap
