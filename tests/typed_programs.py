"""What type checkers are to say of a user's program: `test_types.py` has mypy (strict) and pyright read it. It is never run.

Each line that ends in the comment `# refused` must be an error for both, and no other line may be one.
"""

from __future__ import annotations

from functools import partial
from typing import Any, assert_type

import jax
import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import numpy as mini
from minitorch_jax.adapters import optax as optax_adapter


class Net(mt.Module):
    """Parameters, a buffer, submodules, and a `forward` of several results."""

    def __init__(self, width: int, bias: bool = True) -> None:
        self.scale = mt.Parameter(jnp.ones(width))
        self.frozen = mt.Parameter([1.0, 2.0], trainable=False)
        self.count = mt.Buffer(0)
        self.shift = mt.Parameter(jnp.zeros(width)) if bias else None
        self.hidden = nn.Linear(width, width)
        self.blocks = [nn.Linear(width, width) for _ in range(2)]

    def forward(self, x: jax.Array, times: int = 1) -> tuple[jax.Array, int]:
        assert_type(self.scale, jax.Array)
        assert_type(self.shift, jax.Array | None)
        assert_type(self.scale * 2, jax.Array)
        assert_type(self.scale.mean(), jax.Array)
        assert_type(self.hidden(x), jax.Array)
        assert_type(self.hidden.weight.T, jax.Array)
        assert_type(self.blocks[0](x), jax.Array)
        self.count = self.count + 1
        self.scale = 0.9 * self.scale
        self.count.nothing()  # refused
        if self.shift is not None:
            x = x + self.shift
        return self.hidden(x) * self.scale, times

    def loss(self, x: jax.Array, y: jax.Array) -> jax.Array:
        assert_type(self(x), tuple[jax.Array, int])
        return ((self(x)[0] - y) ** 2).mean()


class Declared(mt.Module):
    """Attributes with annotations. (Without one, pyright takes all that the class assigns for the attribute's type.)"""

    weight: jax.Array
    offset: jax.Array | None

    def __init__(self) -> None:
        self.weight = mt.Parameter(jnp.ones(2))
        self.offset = None
        self.offset = mt.Buffer(jnp.ones(2))
        self.weight = "wide"  # refused
        self.weight = nn.Linear(2, 2)  # refused
        self.offset = 2  # refused


mt.Parameter()  # refused
mt.Parameter(jnp.ones(2), requires_grad=True)  # refused
x, y = jnp.ones((4, 2)), jnp.zeros((4, 2))
net = Net(2)
net.scale = jnp.ones(2)
net.scale = "wide"  # refused
assert_type(net.count, jax.Array)

# -- calls of modules ---------------------------------------------------------------------------------------------------

assert_type(net(x), tuple[jax.Array, int])
assert_type(net(x, times=3), tuple[jax.Array, int])
assert_type(net.eval()(x), tuple[jax.Array, int])
net("text")  # refused
net()  # refused
net(x, 1, 2)  # refused
net(x, times="twice")  # refused
net(x, time=3)  # refused
net(x).mean()  # refused
assert_type(nn.Linear(2, 1)(x), jax.Array)
assert_type(nn.MSELoss()(x, y), jax.Array)
nn.Linear(2, 1)("text")  # refused
nn.MSELoss()(x)  # refused


class Untyped(mt.Module):
    """Without annotations, anything may be passed."""

    def forward(self, x, y=None):  # type: ignore[no-untyped-def]
        return x


class Outer(mt.Module):
    """A module that is given another."""

    def __init__(self, inner: mt.Module, net: Net) -> None:
        self.inner, self.net = inner, net

    def forward(self, x: jax.Array) -> jax.Array:
        assert_type(self.inner(x, 1, anything="goes"), Any)
        assert_type(self.net(x)[1], int)
        return self.net(x)  # refused


Untyped()(x, 2)

# -- hooks --------------------------------------------------------------------------------------------------------------


def hook(module: nn.Linear, args: tuple[Any, ...], output: jax.Array) -> None: ...


with net.hidden.register_forward_hook(hook) as handle:
    handle.remove()
net.register_forward_hook(lambda module, args, output: None, prepend=True, always_call=True)
net.register_forward_hook(lambda module, args, kwargs, output: output, with_kwargs=True)
net.register_forward_pre_hook(lambda module, args: (args[0], 2))
net.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
net.register_forward_hook(lambda module, args: None)  # refused
net.register_forward_hook(lambda module, args, output: None, with_kwargs=True)  # refused
net.register_forward_pre_hook(hook)  # refused
net.register_forward_pre_hook(lambda module, args: None, True)  # refused

# -- gradients ----------------------------------------------------------------------------------------------------------


def loss_fn(net: Net, x: jax.Array, y: jax.Array, *, weight: float = 1.0) -> jax.Array:
    return weight * ((net(x)[0] - y) ** 2).mean()


def with_aux(net: Net, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    out, _ = net(x)
    return out.mean(), {"out": out}


assert_type(mt.backward(loss_fn, net, x, y), jax.Array)
assert_type(mt.backward(loss_fn, net, x, y, weight=0.5), jax.Array)
assert_type(mt.backward(net.loss, x, y), jax.Array)
assert_type(mt.backward(nn.MSELoss(), x, y), jax.Array)
assert_type(mt.backward(with_aux, net, x, has_aux=True), tuple[jax.Array, dict[str, jax.Array]])
assert_type(mt.backward(partial(loss_fn, net), x, y), jax.Array)
assert_type(mt.backward(lambda: loss_fn(net, x, y)), jax.Array)
mt.backward(lambda net, x: net(x)[0].mean(), net, x)
mt.backward(loss_fn, net, "text", y)  # refused
mt.backward(loss_fn, net, x)  # refused
mt.backward(loss_fn, net, x, y, wait=0.5)  # refused
mt.backward(net.loss, x)  # refused
mt.backward(loss_fn(net, x, y))  # refused
mt.backward(loss_fn, net, x, y, has_aux=True)  # refused

gradients = mt.grad(loss_fn)
gradients(net, x, y, weight=2.0)
gradients(net, x)  # refused
mt.grad(loss_fn)(net, x, "text")  # refused
mt.grad(with_aux, has_aux=True)(net, x)[1]["out"]
mt.grad(loss_fn, has_aux=True)  # refused
assert_type(mt.value_and_grad(loss_fn)(net, x, y), tuple[jax.Array, Any])
assert_type(mt.value_and_grad(with_aux, has_aux=True)(net, x)[0], tuple[jax.Array, dict[str, jax.Array]])
mt.value_and_grad(loss_fn)(x, y)  # refused
assert_type(mt.value_and_grad(loss_fn, argnums=1)(net, x, y), tuple[jax.Array, Any])
assert_type(mt.value_and_grad(loss_fn, (1, 2))(net, x, y, weight=0.5)[0], jax.Array)
mt.grad(loss_fn, argnums=-1)(net, x, y)
mt.grad(with_aux, argnums=[1], has_aux=True)(net, x)[1]["out"]
mt.grad(loss_fn, argnums=1)(net, "text", y)  # refused
mt.grad(loss_fn, argnums="x")  # refused
mt.value_and_grad(loss_fn, argnums=1.0)  # refused
out, pull = mt.vjp(net, x)
assert_type(out, tuple[jax.Array, int])
value, pull_value = mt.vjp(loss_fn, net, x, y, weight=0.5)
assert_type(value, jax.Array)
pull_value(jnp.ones(()))
pull_value("text")  # refused
mt.vjp(loss_fn, x, y)  # refused
mt.vjp(loss_fn, net, x, y, wait=1)  # refused
assert_type(mt.vjp(loss_fn, net, x, y, argnums=1)[0], jax.Array)
assert_type(mt.vjp(loss_fn, net, x, y, argnums=1)[1](value), Any)
assert_type(mt.export(net, x), jax.export.Exported)
assert_type(mt.export(loss_fn, net, x, y, with_state=True)[1], dict[str, jax.Array])
mt.export()  # refused
mt.export(net, x, platforms=3)  # refused
mt.value_and_grad(loss_fn)(net, x, y, wait=1)  # refused
net.accumulate(gradients(net, x, y))

# -- compiled loops -----------------------------------------------------------------------------------------------------

opt = optim.AdamW([net], lr=1e-3)
assert_type(opt.summary(net).not_held, tuple[str, ...])
assert_type(opt.summary().rows[0].state_bytes, int)
opt.summary(x)  # refused


@mt.jit
def train_step(x: jax.Array, y: jax.Array) -> jax.Array:
    opt.zero_grad()
    loss = mt.backward(loss_fn, net, x, y)
    opt.step()
    return loss


@mt.jit(keep_grads=True, static_argnames="n")
def many(opt: optim.AdamW, x: jax.Array, n: int = 2) -> dict[str, jax.Array]:
    return {"loss": net(x, n)[0]}


assert_type(train_step(x, y), jax.Array)
assert_type(train_step(y=y, x=x), jax.Array)
assert_type(train_step.num_compiles, int)
assert_type(train_step.lower(x, y).as_text(), str)
assert_type(many(opt, x, n=3), dict[str, jax.Array])
net.compile()
assert_type(net(x), tuple[jax.Array, int])
net.compile(mode="max-autotune")  # refused
mt.jit(net).eval()  # refused
assert_type(mt.jit(net)(x), tuple[jax.Array, int])
assert_type(mt.jit(net.loss, donate_argnums=0)(x, y), jax.Array)
assert_type(mt.jit()(loss_fn)(net, x, y, weight=1.0), jax.Array)
assert_type(mt.backward(train_step, x, y), jax.Array)
train_step("text", y)  # refused
train_step(x)  # refused
train_step(x, y, 1)  # refused
train_step.lower("text", y)  # refused
train_step.nothing  # refused
many(net, x)  # refused
many(opt, x, m=3)  # refused
mt.jit(net)("text")  # refused
mt.jit(x)  # refused
mt.jit(loss_fn, static_argnums="x")  # refused
mt.jit(loss_fn, static_args=0)  # refused
mt.jit(loss_fn, compiler_options=["xla_x"])  # refused
mt.jit(loss_fn, compiler_options={"xla_x": True})
net.compile(compiler_options={"xla_x": 3})


class Trainer:
    """Compiled methods, of a plain object."""

    def __init__(self, net: Net) -> None:
        self.net = net

    @mt.jit
    def step(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return mt.backward(self.net.loss, x, y)

    @mt.jit(keep_grads=True)
    def evaluate(self, x: jax.Array) -> int:
        return self.net(x)[1]


trainer = Trainer(net)
assert_type(trainer.step(x, y), jax.Array)
assert_type(trainer.evaluate(x), int)
assert_type(trainer.step.num_compiles, int)
assert_type(Trainer.step(trainer, x, y), jax.Array)
trainer.step(x)  # refused
trainer.step("text", y)  # refused
trainer.evaluate(x, y)  # refused


def plain_step(x: jax.Array, y: jax.Array, scale: float = 1.0) -> jax.Array:
    return scale * mt.backward(loss_fn, net, x, y)


xs, ys = jnp.ones((5, 4, 2)), jnp.ones((5, 4, 2))
assert_type(mt.scan(plain_step, xs, ys), jax.Array)
assert_type(mt.scan(train_step, xs, ys, unroll=2), jax.Array)
assert_type(mt.scan(trainer.step, xs, ys, keep_grads=True), jax.Array)
assert_type(mt.scan(with_aux, net, xs), tuple[jax.Array, dict[str, jax.Array]])
assert_type(mt.scan(lambda: plain_step(x, y), length=3), jax.Array)
mt.scan(plain_step, xs)  # refused
mt.scan(plain_step, xs, "text")  # refused
mt.scan(train_step, "text", ys)  # refused
mt.scan(plain_step, xs, ys, lenght=3)  # refused
mt.scan(xs, plain_step)  # refused

# -- what the package has -----------------------------------------------------------------------------------------------

assert_type(mini.to_jax(mini.Linear(2, 1))(x), Any)
optax_adapter.OptaxOptimizer
mt.nothing  # refused
nn.Nothing  # refused
optim.Nothing  # refused
mini.Nothing  # refused
