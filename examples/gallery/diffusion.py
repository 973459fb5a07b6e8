# %% [markdown]
# # A diffusion model
#
# Add a little noise to an image a hundred times, and nothing of it is left. A *diffusion model* learns to go back: from
# a noisy image to a slightly less noisy one. So it can start with pure noise, go back a hundred times, and arrive at an
# image that nobody has drawn.
#
# This one is told which digit to draw. A classifier that knows only real digits then checks whether it did.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC
from tqdm import tqdm

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F

SHORT = "--short" in sys.argv  # a short run, to see that it works
EPOCHS, BATCH, TIMES = (30 if SHORT else 300), 64, 100
mt.seed(0)

images, labels = load_digits(return_X_y=True)
images = (images / 8 - 1).astype(np.float32)  # (1797, 64), from -1 to 1

# %% [markdown]
# ## Into the noise
#
# Step $t$ keeps a share $1 - \beta_t$ of the image's variance and fills up with noise. After $t$ steps the share
# $\bar\alpha_t$ is left, the product of them all. So training can jump to any $t$ at once:
#
# $$ x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \varepsilon, \qquad \varepsilon \sim N(0, 1). $$

# %%
beta = jnp.linspace(0.001, 0.2, TIMES)
kept = jnp.cumprod(1 - beta)
print(
    f"{kept[9]:.0%} of the image's variance is left after 10 steps, {kept[49]:.1%} after 50, {kept[99]:.3%} after 100"
)

# %% [markdown]
# ## The network
#
# It sees $x_t$, the time $t$ and the digit, and says what noise is in $x_t$. The time comes as sines and cosines of
# many frequencies, as positions come in a Transformer. Time and digit become one vector, which is added before each
# block. Images of 64 pixels need no convolutions.


# %%
def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))


class Denoiser(mt.Module):
    def __init__(self, width: int = 256, depth: int = 3) -> None:
        self.frequencies = mt.Buffer(jnp.geomspace(1.0, 1e-3, width // 2))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.digit = nn.Embedding(10, width)
        self.enter = nn.Linear(64, width)
        self.blocks = [block(width) for _ in range(depth)]
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))

    def forward(self, x: jax.Array, t: jax.Array, digit: jax.Array) -> jax.Array:
        angles = t[:, None] * self.frequencies
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        told = self.time(waves) + self.digit(digit)
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x + told)
        return self.leave(x)


model = Denoiser()
print(f"{model.num_parameters():,} parameters")

# %% [markdown]
# ## Training
#
# The loss is simple: add noise, guess it, and square the difference. Images, times and noise are drawn anew in each
# step.
#
# The gradients are noisy, since each image is seen at one time only. Clipping limits what one bad batch can do. And the
# weights never come to rest: each step moves them by some of that noise. So we draw with their average over the last
# 200 steps or so, which `ema.update(model)` keeps.

# %%
opt = optim.AdamW([model], lr=optim.schedules.warmup(2e-3, 100), decay_matrices_only=True)
ema = optim.AveragedModel(model, decay=0.995)


def loss_fn(model: Denoiser, x: jax.Array, digit: jax.Array) -> jax.Array:
    t = jax.random.randint(mt.next_key(), (len(x),), 0, TIMES)
    noise = jax.random.normal(mt.next_key(), x.shape)
    share = kept[t][:, None]
    return F.mse_loss(model(jnp.sqrt(share) * x + jnp.sqrt(1 - share) * noise, t, digit), noise)


def train_step(x: jax.Array, digit: jax.Array) -> jax.Array:
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, x, digit)
    mt.clip_grad_norm(model, 1.0)
    opt.step()
    ema.update(model)
    return loss


rng = np.random.default_rng(0)
steps = len(images) // BATCH
losses = []
for _ in tqdm(range(EPOCHS), disable=None):  # a progress bar, where there is a terminal
    chosen = rng.permutation(len(images))[: steps * BATCH].reshape(steps, BATCH)
    losses.append(mt.scan(train_step, images[chosen], labels[chosen]).mean())  # an epoch in one call
print(f"loss: {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last (guessing no noise: 1)")

# %% [markdown]
# ## Out of the noise
#
# One step back takes out the share of the noise that step $t$ has put in, and adds a little new noise, but for the last
# step:
#
# $$ x_{t-1} = \frac{1}{\sqrt{1 - \beta_t}}
# \Bigl(x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}}\, \hat\varepsilon(x_t, t)\Bigr) + \sqrt{\beta_t}\, z. $$
#
# Here an image is carried from step to step, and no state changes. That is a plain `jax.lax.scan`, and a Module can be
# used in it. With `mt.jit` around it, drawing is one program.


# %%
@mt.jit
def draw(model: mt.Module, digit: jax.Array) -> jax.Array:
    """All steps from noise to images: (TIMES + 1, len(digit), 64)."""

    def step_back(x: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, key = step
        noise = model(x, jnp.full(len(x), t), digit)
        x = (x - beta[t] / jnp.sqrt(1 - kept[t]) * noise) / jnp.sqrt(1 - beta[t])
        x = x + jnp.where(t > 0, jnp.sqrt(beta[t]), 0.0) * jax.random.normal(key, x.shape)
        return x, x

    start = jax.random.normal(mt.next_key(), (len(digit), 64))
    times = jnp.arange(TIMES - 1, -1, -1)
    _, path = jax.lax.scan(step_back, start, (times, jax.random.split(mt.next_key(), TIMES)))
    return jnp.concatenate([start[None], path])


told = jnp.arange(10).repeat(50)
path = np.asarray(draw(ema, told))

# %% [markdown]
# Left: ten drawings of each digit. Right: how the first one of each row came about; the number says how many steps are
# still to go. The form appears between 40 and 10 steps before the end. The last steps only clean it.

# %%
fig = plt.figure(figsize=(10, 5.2), layout="constrained")
left, right = fig.subfigures(1, 2, squeeze=False)[0]
left.suptitle("drawings")
right.suptitle("from noise to a drawing")
to_go = [100, 70, 50, 40, 30, 20, 10, 5, 2, 0]
by_digit = path.reshape(TIMES + 1, 10, 50, 8, 8)
for digit, (row, stages) in enumerate(zip(left.subplots(10, 10), right.subplots(10, 10), strict=True)):
    for axes, image in zip(row, by_digit[-1, digit], strict=False):
        axes.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
        axes.set_axis_off()
    for axes, left_over in zip(stages, to_go, strict=True):
        axes.imshow(by_digit[TIMES - left_over, digit, 0], cmap="gray_r", vmin=-1, vmax=1)
        axes.set_axis_off()
        if digit == 0:
            axes.set_title(left_over, fontsize=9)
fig.savefig("diffusion.png")

# %% [markdown]
# ## Are they good, and are they new?
#
# A support vector machine that knows only the real digits reads the drawings. And if the model merely returned images
# that it has seen, each drawing would lie on a real digit. So we also measure how far the nearest real digit is, and
# compare that with the distance from a real digit to the nearest other one.
#
# The same numbers for the weights of the last step show what the average is good for: their drawings are noisier, and
# so further away from all real digits.

# %%
reader = SVC().fit(images, labels)
accuracies = []
for name, drawn in [("the average", path[-1]), ("the last weights", np.asarray(draw(model, told)[-1]))]:
    accuracies.append(float((reader.predict(drawn) == told).mean()))
    nearest = pairwise_distances(drawn, images).min(axis=1).mean()
    print(f"{name}: {accuracies[-1]:.1%} read as the digit asked for; the nearest real digit is {nearest:.2f} away")
others = pairwise_distances(images)
np.fill_diagonal(others, np.inf)
print(f"a real digit: the nearest other one is {others.min(axis=1).mean():.2f} away")

# %% [markdown]
# ## What to try
#
# - A learning rate that falls to 0, of `optim.schedules`: `warmup(cosine(2e-3, EPOCHS * steps), 100)`. Is the average
#   still better?
# - Train for 1,000 epochs. When the drawings are closer to the real digits than these are to each other, the model has
#   begun to copy.
# - Guidance (Ho and Salimans, 2022): leave the digit out in one of ten training images. When drawing, compute the noise
#   with and without the digit, and go a bit further in the direction of the difference.
# - Fewer steps back: DDIM (Song and others, 2020) takes ten.
#
# The method is that of Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", 2020.

# %%
assert losses[-1] < losses[0] / 2, (losses[0], losses[-1])
assert accuracies[0] > (0.7 if SHORT else 0.95), accuracies
