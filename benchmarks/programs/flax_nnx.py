"""The programs by flax nnx: its modules and `nnx.Optimizer` under `nnx.jit`, images with channels last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..timing import Side
from .by_hand import make_optimizer
from .jax_library import JaxLibrary
from .networks import PROGRAMS, Net, draw


class Network(nnx.Module):
    """A function of this builder. `makers` says how to make the layers that it meets while it is being made."""

    def __init__(self, define: Net, layers: dict[str, Any], makers: Any = None) -> None:
        self.define, self.layers, self.makers = define, nnx.Dict(layers), makers

    def __call__(self, *inputs: Any) -> Any:
        return self.define(self, *inputs)

    def layer(self, name: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.makers is None:
            return self.layers[name]
        self.makers[name] = lambda: make(*args, **options, rngs=nnx.Rngs(0))
        return self.makers[name]()

    def conv(self, name: str, x: Any, out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Any:
        pads = [(padding, padding)] * 2
        sizes = (kernel, kernel), (stride, stride)
        return self.layer(name, nnx.Conv, x.shape[-1], out, *sizes, padding=pads, feature_group_count=groups)(x)

    def conv_transpose(self, name: str, x: Any, out: int, kernel: int, stride: int, padding: int) -> Any:
        pads, sizes = [(kernel - 1 - padding,) * 2] * 2, ((kernel, kernel), (stride, stride))
        return self.layer(name, nnx.ConvTranspose, x.shape[-1], out, *sizes, padding=pads, transpose_kernel=True)(x)

    def linear(self, name: str, x: Any, out: int) -> Any:
        return self.layer(name, nnx.Linear, x.shape[-1], out)(x)

    def batch_norm(self, name: str, x: Any) -> Any:
        return self.layer(name, nnx.BatchNorm, x.shape[-1], momentum=0.9)(x)

    def group_norm(self, name: str, x: Any, groups: int) -> Any:
        return self.layer(name, nnx.GroupNorm, x.shape[-1], groups, epsilon=1e-5)(x)

    def layer_norm(self, name: str, x: Any) -> Any:
        return self.layer(name, nnx.LayerNorm, x.shape[-1], epsilon=1e-5)(x)

    def embedding(self, name: str, ids: Any, number: int, size: int) -> Any:
        return self.layer(name, nnx.Embed, number, size)(ids)

    def lstm(self, name: str, x: Any, hidden: int) -> Any:
        def make(*args: Any, rngs: nnx.Rngs) -> nnx.RNN:
            cell = nnx.OptimizedLSTMCell(*args, rngs=rngs)
            cell.dense_h = nnx.Linear(hidden, 4 * hidden, use_bias=False, rngs=rngs)
            return nnx.RNN(cell)

        return self.layer(name, make, x.shape[-1], hidden)(x)

    def causal_attention(self, q: Any, k: Any, v: Any) -> Any:
        q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
        mask = nnx.make_causal_mask(jnp.ones(q.shape[:2]))
        return nnx.dot_product_attention(q, k, v, mask=mask).swapaxes(1, 2)

    def max_pool(self, x: Any) -> Any:
        return nnx.max_pool(x, (2, 2), (2, 2))

    def average(self, x: Any) -> Any:
        return x.mean((1, 2))

    def upsample(self, x: Any) -> Any:
        return x.repeat(2, 1).repeat(2, 2)

    def concatenate(self, *images: Any) -> Any:
        return jnp.concatenate(images, -1)

    def per_channel(self, x: Any) -> Any:
        return x[:, None, None, :]

    def flat(self, x: Any) -> Any:
        return x.transpose(0, 3, 1, 2).reshape(len(x), -1)

    def relu(self, x: Any) -> Any:
        return nnx.relu(x)

    def leaky_relu(self, x: Any) -> Any:
        return nnx.leaky_relu(x, 0.2)

    def gelu(self, x: Any) -> Any:
        return nnx.gelu(x, approximate=False)

    def silu(self, x: Any) -> Any:
        return nnx.silu(x)

    def tanh(self, x: Any) -> Any:
        return nnx.tanh(x)


def load(layer: Any, name: str) -> Any:
    """Give an abstract layer the values that all sides have."""

    def drawn(part: str, shape: Any) -> Any:
        return jnp.asarray(draw(f"layers.{name}.{part}", shape))

    match layer:
        case nnx.Conv():
            height, width, i, o = layer.kernel.shape
            layer.kernel = nnx.Param(drawn("weight", (o, i, height, width)).transpose(2, 3, 1, 0))
        case nnx.ConvTranspose():
            height, width, o, i = layer.kernel.shape
            layer.kernel = nnx.Param(drawn("weight", (i, o, height, width)).transpose(2, 3, 1, 0))
        case nnx.Linear():
            layer.kernel = nnx.Param(drawn("weight", layer.kernel.shape[::-1]).T)
        case nnx.Embed():
            layer.embedding = nnx.Param(drawn("weight", layer.embedding.shape))
        case nnx.RNN():
            cell: Any = layer.cell
            for part, dense in (("weight_ih_l0", cell.dense_i), ("weight_hh_l0", cell.dense_h)):
                dense.kernel = nnx.Param(drawn(part, dense.kernel.shape[::-1]).T)
        case nnx.BatchNorm():
            layer.mean, layer.var = (nnx.BatchStat(jnp.zeros(layer.mean.shape)) for _ in range(2))
    for part, ours in (("scale", "weight"), ("bias", "bias")):  # norms, and what has a bias
        if getattr(layer, part, None) is not None:
            setattr(layer, part, nnx.Param(drawn(ours, getattr(layer, part).shape)))
    return layer


def _layer(make: Callable[[], Any]) -> Any:
    layer = nnx.eval_shape(make)
    return make() if isinstance(layer, nnx.RNN) else layer  # an RNN has random state of its own, which must be real


def make(define: Net, inputs: Any) -> Network:
    makers: dict[str, Callable[[], Any]] = {}
    jax.eval_shape(lambda *inputs: Network(define, {}, nnx.static(makers))(*inputs), *inputs)
    return Network(define, {name: load(_layer(make), name) for name, make in makers.items()})


class Library(JaxLibrary):
    @staticmethod
    def functional(net: Network) -> tuple[Any, Callable[[Any, Any], Any]]:
        parts: Any = nnx.split(net, nnx.Param, ...)
        graph, params, rest = parts
        return params, lambda params, x: nnx.merge(graph, params, rest)(x)


def side(name: str, tiny: bool = False) -> Side:
    program, lib = PROGRAMS[name], Library()
    arrays = program.data(*(program.tiny if tiny else program.size))
    batch = [jnp.asarray(a.transpose(0, 2, 3, 1) if a.ndim == 4 else a) for a in arrays]
    nets = nnx.Dict({key: make(define, program.inputs(batch)[key]) for key, define in program.nets.items()})
    rule = make_optimizer(program.rule, program.lr)
    optimizers = nnx.Dict({key: nnx.Optimizer(nets[key], rule, wrt=nnx.Param) for key, _ in program.phases})

    @nnx.jit
    def train_step(nets: Any, optimizers: Any, *batch: jax.Array) -> jax.Array:
        for key, loss in program.phases:

            def of(own: Any, others: Any, key: str = key, loss: Any = loss) -> Any:
                return loss(lib, {**others, key: own}, batch)

            others = {other: nets[other] for other in nets if other != key}
            value, grads = nnx.value_and_grad(of)(nets[key], others)
            optimizers[key].update(nets[key], grads)
        return value

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            loss = train_step(nets, optimizers, *batch)
        return loss

    return Side(run)
