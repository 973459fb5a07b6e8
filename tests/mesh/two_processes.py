"""One of two processes with one device each, which train one model together: `python two_processes.py PORT NUMBER`."""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import minitorch_jax as mt
from minitorch_jax import nn, optim

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
MESH = jax.make_mesh((2, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)


def on(*spec):
    return NamedSharding(MESH, PartitionSpec(*spec))


def mean_square(model, x):
    return (model(x) ** 2).mean()


def step(model, opt, x):
    opt.zero_grad()
    loss = mt.backward(mean_square, model, x)
    mt.clip_grad_norm(model, 1.0)
    opt.step()
    return loss


def trained(run, *specs):
    """The loss of each step, while the user holds the arrays, so that each call has to copy them."""
    model = nn.Sequential(nn.Linear(8, 16, key=jax.random.key(0)), nn.Linear(16, 8, key=jax.random.key(1)))
    opt = optim.AdamW([model], lr=0.01)
    x = X
    if specs:
        model[0].weight = jax.device_put(model[0].weight, on(*specs))
        model[1].weight = jax.device_put(np.asarray(model[1].weight), on(*specs[::-1]))
        x = jax.device_put(X, on("data"))
    losses = []
    for _ in range(3):
        held = [*model.parameters(), opt.state_dict()]
        losses.append(float(run(model, opt, x)))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(held) if isinstance(leaf, jax.Array))
    if specs:
        model[0].weight = np.ones((16, 8), np.float32)
        model.load_state_dict({name: np.ones(value.shape, np.float32) for name, value in model.state_dict().items()})
        assert model[0].weight.sharding == on(*specs)
        assert not model[0].weight.is_fully_addressable
    return losses


def scanned(model, opt, x):
    return mt.scan(lambda: step(model, opt, x), length=2)[-1]


assert jax.device_count() == 2 and jax.process_count() == 2
for run in (step, mt.jit(step), scanned):
    np.testing.assert_allclose(trained(run, "model", "data"), trained(run), rtol=1e-5)
print("as on one device")
