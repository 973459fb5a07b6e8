# %% [markdown]
# # An ensemble that knows what it does not know
#
# A network answers every question, also one that is far from all that it has seen, and sounds just as sure. Sixteen networks
# that start from different weights agree where there is data, and disagree where there is none. Their mean is the answer.
# Their spread says how far to trust it (Lakshminarayanan, Pritzel and Blundell, "Deep Ensembles", 2017).
#
# The page shows how a model and its optimizer go through `jax.vmap`, so that one program trains all sixteen at once.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

import minitorch_jax as mt
from minitorch_jax import nn, optim

SHORT = "--short" in sys.argv  # a short run, to see that it works
NETWORKS, STEPS = 16, (500 if SHORT else 2000)

# %% [markdown]
# ## The data
#
# Eighty points of a curve, with noise, lie in two groups. There are none between the groups, and none outside of them.


# %%
def truth(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sin(2 * x) + 0.3 * x


rng = np.random.default_rng(0)
x = np.concatenate([rng.uniform(-4, -1.5, 40), rng.uniform(1, 3, 40)]).astype(np.float32)[:, None]
y = truth(x) + rng.normal(scale=0.1, size=x.shape).astype(np.float32)

# %% [markdown]
# ## One network
#
# First, everything is written for one network. `make` returns an optimizer, and the network is in it: `opt.modules`. All that
# is random comes from a key. `train` runs all steps by `jax.lax.scan`, which takes the optimizer as its state and returns it:
# modules and optimizers are pytrees, as arrays, lists and dicts are.
#
# Each network draws its own sample of the data, with some points twice and some not at all (a bootstrap sample). That makes
# the networks differ a little more.


# %%
def make(key: jax.Array) -> optim.Adam:
    with mt.rng(key):  # initial weights are drawn from this key
        net = nn.Sequential(nn.Linear(1, 50), nn.SiLU(), nn.Linear(50, 50), nn.SiLU(), nn.Linear(50, 1))
    return optim.Adam([net], lr=optim.schedules.cosine(1e-2, STEPS))


def loss_fn(net: nn.Sequential, x: jax.Array, y: jax.Array) -> jax.Array:
    return ((net(x) - y) ** 2).mean()


def train(opt: optim.Adam, key: jax.Array) -> tuple[optim.Adam, jax.Array]:
    drawn = jax.random.randint(key, (len(x),), 0, len(x))
    own_x, own_y = jnp.asarray(x)[drawn], jnp.asarray(y)[drawn]

    def step(opt: optim.Adam, _: None) -> tuple[optim.Adam, jax.Array]:
        opt.zero_grad()
        loss = mt.backward(loss_fn, opt.modules[0], own_x, own_y)
        opt.step()
        return opt, loss

    return jax.lax.scan(step, opt, length=STEPS)


# %% [markdown]
# ## Sixteen networks
#
# `jax.vmap` makes sixteen of what was written for one. The parameters get a new first axis of 16, and so do the optimizer's
# averages. Each step is then one product of stacked matrices, not sixteen small ones.

# %%
opts = jax.vmap(make)(jax.random.split(jax.random.key(0), NETWORKS))
opts, losses = jax.jit(jax.vmap(train))(opts, jax.random.split(jax.random.key(1), NETWORKS))
nets = opts.modules[0]
print(f"the first layer's weights: {nets[0].weight.shape}")
print(f"loss {losses[:, 0].mean():.3f} at first, {losses[:, -1].mean():.4f} at the end; the noise alone is 0.01")

# %% [markdown]
# ## Where they agree
#
# On the left, the answers of all networks, their mean, and a band of two standard deviations. The band is narrow around the
# points and opens where there are none. On the right, the true error of the mean beside the spread: the spread is known
# without the truth, and is large where the error is.

# %%
grid = np.linspace(-6.5, 5.5, 400, dtype=np.float32)
answers = np.asarray(jax.vmap(lambda net: net(grid[:, None])[:, 0])(nets))
mean, std = answers.mean(0), answers.std(0)
error = np.abs(mean - truth(grid))

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[1.5, 1], layout="constrained")
left.plot(grid, answers.T, color="tab:blue", lw=0.5, alpha=0.5)
left.fill_between(grid, mean - 2 * std, mean + 2 * std, color="tab:blue", alpha=0.2, label="mean ± 2 std")
left.plot(grid, mean, color="tab:blue", lw=2, label="mean of 16 networks")
left.plot(grid, truth(grid), "k--", label="truth")
left.plot(x, y, ".", color="tab:orange", label="data")
left.set(xlabel="x", ylabel="y", ylim=(-5, 5), xlim=(grid[0], grid[-1]))
left.legend(loc="lower right")
right.semilogy(grid, std, color="tab:blue", label="spread of the networks")
right.semilogy(grid, error, "k--", lw=1, label="error of the mean")
right.axvspan(-4, -1.5, color="tab:orange", alpha=0.2, label="data")
right.axvspan(1, 3, color="tab:orange", alpha=0.2)
right.set(xlabel="x", ylim=(1e-3, 100), xlim=(grid[0], grid[-1]))
right.legend(loc="upper center")
fig.savefig("ensemble.png")

# %%
inside = ((grid > -4) & (grid < -1.5)) | ((grid > 1) & (grid < 3))
print(f"inside the data:  error {error[inside].mean():.3f}, spread {std[inside].mean():.3f}")
print(f"outside the data: error {error[~inside].mean():.3f}, spread {std[~inside].mean():.3f}")
print(f"the truth is in the band of two standard deviations for {(error < 2 * std).mean():.0%} of the grid")

# %% [markdown]
# ## What to try
#
# - Use `nn.Tanh` for `nn.SiLU`. The networks are then flat outside of the data, and agree with each other too much.
# - Let all networks train on all points. The band gets narrower.
# - Train one network of 16 times the width instead. It has an answer everywhere, and no spread.

# %%
assert error[inside].mean() < (0.2 if SHORT else 0.05), error[inside].mean()
assert std[~inside].mean() > 5 * std[inside].mean(), (std[inside].mean(), std[~inside].mean())
