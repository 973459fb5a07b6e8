# %% [markdown]
# # A network that solves a differential equation
#
# A *physics-informed* network sees no examples of the solution. Its loss says how far it is from satisfying the
# equation, and when that is small, the network is the solution. Here it solves Burgers' equation, in which a smooth
# wave steepens into a shock:
#
# $$ u_t + u\,u_x = \nu\,u_{xx}, \qquad u(0, x) = -\sin \pi x, \qquad u(t, -1) = u(t, 1) = 0, \qquad \nu = 0.02 / \pi. $$
#
# Its exact solution is known, so we can see how far off the network is.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import minitorch_jax as mt
from minitorch_jax import nn, optim

SHORT = "--short" in sys.argv  # a short run, to see that it works
WARM_UP, ROUNDS, POINTS = (300, 10, 1024) if SHORT else (500, 75, 4096)
NU = 0.02 / np.pi
mt.seed(0)

# %% [markdown]
# ## The network
#
# The conditions at the start and at the borders need no loss of their own. `forward` fulfils them whatever the layers
# return: what it adds to the sine is 0 at $t = 0$ and at $x = \pm 1$. It takes one point, since the derivatives below
# are those of a function of two numbers.


# %%
class Solution(mt.Module):
    def __init__(self, width: int = 24) -> None:
        sizes = [2, width, width, width, width]
        hidden = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, t: jax.Array, x: jax.Array) -> jax.Array:
        return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * self.layers(jnp.stack([t, x]))[0]


u = Solution()
print(f"{u.num_parameters():,} parameters")

# %% [markdown]
# ## The equation is the loss
#
# A module is a function like any other. So `jax.grad(u, 0)` is its derivative by $t$, `jax.grad(u, 1)` by $x$, and a
# `grad` of that is the second derivative. `jax.vmap` takes the function of one point to all points. `mt.backward` then
# differentiates the whole thing once more, by the weights.


# %%
def residual(u: Solution, t: jax.Array, x: jax.Array) -> jax.Array:
    u_t, u_x = jax.grad(u, (0, 1))(t, x)
    u_xx = jax.grad(jax.grad(u, 1), 1)(t, x)
    return u_t + u(t, x) * u_x - NU * u_xx


def loss_fn(u: Solution, t: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.vmap(residual, (None, 0, 0))(u, t, x) ** 2)


t = jax.random.uniform(mt.next_key(), (POINTS,))
x = jax.random.uniform(mt.next_key(), (POINTS,), minval=-1.0)

# %% [markdown]
# ## The exact solution
#
# Hopf and Cole found that a change of variables turns Burgers' equation into the heat equation, whose solution is an
# integral. Gauss and Hermite's quadrature computes it to many digits, in NumPy and float64.


# %%
def exact(t: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = x[..., None] - np.sqrt(4 * NU * t[..., None]) * nodes
    weights = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * NU))
    return -np.sum(weights * np.sin(np.pi * y), axis=-1) / np.sum(weights, axis=-1)


times, places = np.linspace(0, 1, 101), np.linspace(-1, 1, 201)
grid = jnp.meshgrid(times, places, indexing="ij")
truth = exact(*np.asarray(grid, np.float64))


@mt.jit
def on_grid(u: Solution, t: jax.Array, x: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(u))(t, x)


def relative_error() -> float:
    return float(np.linalg.norm(on_grid(u, *grid) - truth) / np.linalg.norm(truth))


# %% [markdown]
# ## Training
#
# Adam finds the rough form. `mt.scan` runs all of its steps in one call.
#
# Then LBFGS takes over. It estimates the curvature of the loss from the last gradients, and brings the loss down by a
# factor of a thousand, where Adam would crawl. It wants the same points in each step, and a function that it can call
# more than once a step, as in PyTorch.

# %%
adam = optim.Adam([u], lr=optim.schedules.cosine(5e-3, WARM_UP, eta_min=5e-4))


def adam_step() -> jax.Array:
    adam.zero_grad()
    loss = mt.backward(loss_fn, u, t, x)
    adam.step()
    return loss


losses = mt.scan(adam_step, length=WARM_UP)
print(f"after {WARM_UP} steps of Adam: loss {losses[0]:.2g} -> {losses[-1]:.2g}, relative error {relative_error():.2g}")

# %%
lbfgs = optim.LBFGS([u], max_iter=20, history_size=50, line_search_fn="strong_wolfe")


def closure() -> jax.Array:
    lbfgs.zero_grad()
    return mt.backward(loss_fn, u, t, x)


for _ in tqdm(range(ROUNDS), disable=None):  # a progress bar, where there is a terminal
    lbfgs.step(closure)
error = relative_error()
print(f"after {ROUNDS} rounds of LBFGS, 20 steps each: loss {closure():.2g}, relative error {error:.2g}")

# %% [markdown]
# ## The two solutions
#
# Above: time goes from left to right. The wave's two halves move towards each other and meet in a shock at $x = 0$. The
# error is largest there, where the solution falls by almost 2 within a few hundredths. Note the other scale of its
# colours.
#
# Below: the same at three times. The network's dashes lie on the exact line.

# %%
fig, (above, below) = plt.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
found = np.asarray(on_grid(u, *grid))
largest = np.abs(found - truth).max()
panels = [("exact", truth, 1.0), ("network", found, 1.0), ("network - exact", found - truth, largest)]
for axes, (title, values, limit) in zip(above, panels, strict=True):
    colors = axes.pcolormesh(times, places, values.T, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(title=title, xlabel="t", ylabel="x")
    fig.colorbar(colors, ax=axes)
for axes, i in zip(below, (25, 50, 75), strict=True):
    axes.plot(places, truth[i], color="0.7", lw=4, label="exact")
    axes.plot(places, found[i], "k--", lw=1.2, label="network")
    axes.set(title=f"t = {times[i]:.2f}", xlabel="x", ylabel="u", ylim=(-1.1, 1.1))
below[0].legend(loc="upper right", fontsize=8)
fig.savefig("pinn.png")

# %% [markdown]
# ## What to try
#
# - `NU = 0.01 / np.pi`, the usual benchmark. The shock is twice as thin, and few of the points lie in it: take 8192.
# - Points that are drawn anew in each step of Adam: write `jax.random.uniform(mt.next_key(), ...)` in `adam_step`.
# - Leave out LBFGS and give Adam the same time.
# - Another equation: change `residual`, and the first term in `forward`.
#
# The method is Raissi, Perdikaris and Karniadakis's (2019); the exact solution is that of Basdevant and others (1986).

# %%
assert error < (0.15 if SHORT else 0.005), error
