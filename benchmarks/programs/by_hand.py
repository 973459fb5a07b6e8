"""The programs by plain JAX: pure functions of a dict of arrays, gradients and optax's update in one donated program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..layers.by_hand import attention, lstm
from ..timing import Side
from .jax_library import JaxLibrary
from .networks import PROGRAMS, Net, draw

Params = dict[str, jax.Array]


class Apply:
    """A network called on parameters. While it is being made, what it does not find is drawn and added."""

    def __init__(self, define: Net, params: Params, stats: Params, making: bool = False) -> None:
        self.define, self.params, self.stats, self.making = define, params, stats, making

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        return self.define(self, *inputs)

    def param(self, layer: str, name: str, *shape: int) -> jax.Array:
        path = f"layers.{layer}.{name}"
        if self.making and path not in self.params:
            with jax.ensure_compile_time_eval():
                self.params[path] = jnp.asarray(draw(path, shape))
        return self.params[path]

    def conv(self, name: str, x: Any, out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Any:
        weight = self.param(name, "weight", out, x.shape[1] // groups, kernel, kernel)
        names = "NCHW", "OIHW", "NCHW"
        pads = [(padding, padding)] * 2
        x = lax.conv_general_dilated(
            x, weight, (stride, stride), pads, dimension_numbers=names, feature_group_count=groups
        )
        return x + self.param(name, "bias", out)[:, None, None]

    def conv_transpose(self, name: str, x: Any, out: int, kernel: int, stride: int, padding: int) -> Any:
        weight = self.param(name, "weight", x.shape[1], out, kernel, kernel)
        names = "NCHW", "OIHW", "NCHW"
        pads = [(kernel - 1 - padding,) * 2] * 2
        x = lax.conv_transpose(x, weight, (stride, stride), pads, dimension_numbers=names, transpose_kernel=True)
        return x + self.param(name, "bias", out)[:, None, None]

    def linear(self, name: str, x: Any, out: int) -> Any:
        return x @ self.param(name, "weight", out, x.shape[-1]).T + self.param(name, "bias", out)

    def batch_norm(self, name: str, x: Any) -> Any:
        size = x.shape[1]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        if self.making:
            self.stats |= {f"{name}.mean": jnp.zeros(size), f"{name}.var": jnp.zeros(size)}
        for key, value in (("mean", mean), ("var", var)):
            old = self.stats[f"{name}.{key}"]
            self.stats[f"{name}.{key}"] = 0.9 * old + 0.1 * lax.stop_gradient(value)
        x = (x - mean[:, None, None]) * lax.rsqrt(var + 1e-5)[:, None, None]
        return x * self.param(name, "weight", size)[:, None, None] + self.param(name, "bias", size)[:, None, None]

    def group_norm(self, name: str, x: Any, groups: int) -> Any:
        size = x.shape[1]
        y = _standardized(x.reshape(len(x), groups, -1)).reshape(x.shape)
        return y * self.param(name, "weight", size)[:, None, None] + self.param(name, "bias", size)[:, None, None]

    def layer_norm(self, name: str, x: Any) -> Any:
        size = x.shape[-1]
        return _standardized(x) * self.param(name, "weight", size) + self.param(name, "bias", size)

    def embedding(self, name: str, ids: Any, number: int, size: int) -> Any:
        return self.param(name, "weight", number, size)[ids]

    def lstm(self, name: str, x: Any, hidden: int) -> Any:
        weight_ih = self.param(name, "weight_ih_l0", 4 * hidden, x.shape[-1])
        weight_hh = self.param(name, "weight_hh_l0", 4 * hidden, hidden)
        return lstm(x.swapaxes(0, 1), weight_ih, weight_hh).swapaxes(0, 1)

    def causal_attention(self, q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, causal=True)

    def max_pool(self, x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def average(self, x: Any) -> Any:
        return x.mean((2, 3))

    def upsample(self, x: Any) -> Any:
        return x.repeat(2, 2).repeat(2, 3)

    def concatenate(self, *images: Any) -> Any:
        return jnp.concatenate(images, 1)

    def per_channel(self, x: Any) -> Any:
        return x[:, :, None, None]

    def flat(self, x: Any) -> Any:
        return x.reshape(len(x), -1)

    relu = staticmethod(jax.nn.relu)
    silu = staticmethod(jax.nn.silu)
    tanh = staticmethod(jnp.tanh)
    leaky_relu = staticmethod(partial(jax.nn.leaky_relu, negative_slope=0.2))
    gelu = staticmethod(partial(jax.nn.gelu, approximate=False))


def _standardized(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


class Library(JaxLibrary):
    @staticmethod
    def functional(net: Apply) -> tuple[Any, Callable[[Any, Any], Any]]:
        return net.params, lambda params, x: Apply(net.define, params, {})(x)


def make_optimizer(rule: str, lr: float) -> optax.GradientTransformation:
    return optax.adam(lr) if rule == "adam" else optax.sgd(lr, momentum=0.9)


def side(name: str, tiny: bool = False) -> Side:
    program, lib = PROGRAMS[name], Library()
    batch = [jnp.asarray(array) for array in program.data(*(program.tiny if tiny else program.size))]
    params: dict[str, Params] = {key: {} for key in program.nets}
    stats: dict[str, Params] = {key: {} for key in program.nets}
    for key, inputs in program.inputs(batch).items():
        jax.eval_shape(Apply(program.nets[key], params[key], stats[key], making=True), *inputs)
    optimizer = make_optimizer(program.rule, program.lr)
    states = {key: optimizer.init(params[key]) for key, _ in program.phases}
    stats = {key: {path: jnp.zeros(value.shape) for path, value in found.items()} for key, found in stats.items()}

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(params: Any, stats: Any, states: Any, *batch: jax.Array) -> Any:
        params, stats, states = dict(params), dict(stats), dict(states)
        for key, loss in program.phases:

            def of(own: Params, key: str = key, loss: Any = loss, stats: Any = stats) -> Any:
                new = {name: dict(old) for name, old in stats.items()}
                given = {**params, key: own}
                nets = {name: Apply(define, given[name], new[name]) for name, define in program.nets.items()}
                return loss(lib, nets, batch), new

            (value, stats), grads = jax.value_and_grad(of, has_aux=True)(params[key])
            updates, states[key] = optimizer.update(grads, states[key], params[key])
            params[key] = optax.apply_updates(params[key], updates)
        return params, stats, states, value

    def run(calls: int) -> jax.Array:
        nonlocal params, stats, states
        for _ in range(calls):
            params, stats, states, loss = train_step(params, stats, states, *batch)
        return loss

    return Side(run)
