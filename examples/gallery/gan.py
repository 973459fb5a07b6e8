# %% [markdown]
# # A GAN that draws digits
#
# Two networks play against each other. The *generator* makes images out of noise. The *discriminator* tells them from
# real ones. Each learns from the other: the discriminator learns to see a difference, and the generator to leave none.
#
# Each has its own optimizer, and a step of both is one compiled program. The real images are scikit-learn's 1,797
# handwritten digits of 8 x 8 pixels.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from tqdm import tqdm

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F

SHORT = "--short" in sys.argv  # a short run, to see that it works
EPOCHS, BATCH, NOISE = (6 if SHORT else 100), 64, 32
mt.seed(0)

images = (load_digits().images[:, None] / 8 - 1).astype(np.float32)  # (1797, 1, 8, 8), from -1 to 1

# %% [markdown]
# ## Two networks
#
# The generator is a small DCGAN: a linear layer makes 64 images of 4 x 4 pixels, and convolutions make one of 8 x 8 of
# them. The discriminator goes the other way, down to one number: high for a real image, low for a generated one. Its
# dropout keeps it from learning the real images by heart.

# %%
generator = nn.Sequential(
    nn.Linear(NOISE, 64 * 4 * 4, bias=False),
    nn.Unflatten(1, (64, 4, 4)),
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 1, 3, padding=1),
    nn.Tanh(),
)
discriminator = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.LeakyReLU(0.2),
    nn.Conv2d(32, 64, 4, stride=2, padding=1),
    nn.LeakyReLU(0.2),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Linear(64 * 4 * 4, 1),
)
opt_g = optim.Adam([generator], lr=5e-4, betas=(0.5, 0.999))
opt_d = optim.Adam([discriminator], lr=5e-4, betas=(0.5, 0.999))
print(f"{generator.num_parameters():,} parameters make images, {discriminator.num_parameters():,} judge them")

# %% [markdown]
# ## One step of both
#
# Both losses are about the same generated images, so the generator should run once. `mt.vjp` runs it, and also returns
# `pull`. That function takes a gradient by the *images* back to the generator's *weights*, when we have one.
#
# 1. The discriminator takes a step. To it, `fake` is data like `real`.
# 2. The new discriminator judges the same images once more. `mt.value_and_grad(..., argnums=0)` returns the gradient of
#    the generator's loss by them, and computes none for the discriminator.
# 3. `pull` adds the generator's gradients, and the generator takes a step.
#
# The target of real images is 0.9 instead of 1, so that the discriminator does not become too sure of itself.


# %%
def judged_as(target: float, image: jax.Array) -> jax.Array:
    scores = discriminator(image)
    return F.binary_cross_entropy_with_logits(scores, jnp.full_like(scores, target))


def loss_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    return judged_as(0.9, real) + judged_as(0.0, fake)


def loss_g(fake: jax.Array) -> jax.Array:
    return judged_as(1.0, fake)


@mt.jit
def train_step(real: jax.Array) -> None:
    noise = jax.random.normal(mt.next_key(), (BATCH, NOISE))
    fake, pull = mt.vjp(generator, noise)

    opt_d.zero_grad()
    mt.backward(loss_d, real, fake)
    opt_d.step()

    opt_g.zero_grad()
    _, gradient = mt.value_and_grad(loss_g, argnums=0)(fake)
    pull(gradient)
    opt_g.step()


# %% [markdown]
# ## Does it learn?
#
# The losses do not tell: each depends on an opponent who also learns. So we compare images. The *Fréchet distance* of
# two sets of images is 0 if their pixels have the same means and the same covariances:
#
# $$ \lVert \mu_1 - \mu_2 \rVert^2 + \operatorname{tr}\bigl(C_1 + C_2 - 2 (C_1 C_2)^{1/2}\bigr). $$
#
# Two halves of the real digits show how small it can be.


# %%
def frechet_distance(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    first, second = first.reshape(-1, 64), second.reshape(-1, 64)
    cov_1, cov_2 = np.cov(first.T), np.cov(second.T)
    of_means = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    of_root = np.sum(np.sqrt(np.linalg.eigvals(cov_1 @ cov_2).real.clip(min=0)))  # the trace of the root
    return float(of_means + np.trace(cov_1 + cov_2) - 2 * of_root)


@mt.jit
def generate(noise: ArrayLike) -> jax.Array:
    generator.eval()  # BatchNorm's running statistics: an image does not depend on the others
    made = generator(noise)
    generator.train()
    return made


# %% [markdown]
# ## Training
#
# After each epoch, we keep what the generator makes of the same noise.
#
# `mt.scan` would run a whole epoch in one call. But XLA's convolutions on a CPU are many times slower in such a loop,
# so each step is a call here.

# %%
rng = np.random.default_rng(0)
same_noise = rng.standard_normal((1000, NOISE), np.float32)
made = [np.asarray(generate(same_noise))]
for _ in tqdm(range(EPOCHS), disable=None):  # a progress bar, where there is a terminal
    order = rng.permutation(len(images))
    for chosen in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
        train_step(images[chosen])
    made.append(np.asarray(generate(same_noise)))

order = rng.permutation(len(images))
smallest = frechet_distance(images[order[::2]], images[order[1::2]])
distances = [frechet_distance(images, each) for each in made]
reached = np.median(distances[-EPOCHS // 5 :])
print(f"Fréchet distance to the real digits: {distances[0]:.1f} at first, {reached:.2f} in the last fifth of training")
print(f"between two halves of the real digits: {smallest:.2f}")

# %% [markdown]
# On the left, one column for each noise: what the generator makes of it before training, and after more and more
# epochs. Some columns change their digit on the way, since only the *set* of images is compared with the real ones. On
# the right, the distance on a logarithmic scale. It falls fast, then slowly and in jumps: the two networks never come
# to rest.

# %%
epochs = [epoch for epoch in (0, 1, 2, 5, 10, 30, 100) if epoch < EPOCHS] + [EPOCHS]
fig = plt.figure(figsize=(10, 3.7), layout="constrained")
left, right = fig.subfigures(1, 2, squeeze=False, width_ratios=(1.8, 1))[0]
for row, epoch in zip(left.subplots(len(epochs), 14), epochs, strict=True):
    for axes, image in zip(row, made[epoch], strict=False):
        axes.imshow(image[0], cmap="gray_r", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(epoch, rotation=0, ha="right", va="center")
left.supylabel("epoch")
axes = right.subplots()
axes.semilogy(distances, label="generated and real")
axes.axhline(smallest, color="0.5", ls=":", label="two halves of the real")
axes.set(xlabel="epoch", ylabel="Fréchet distance")
axes.legend()
fig.savefig("gan.png")

# %% [markdown]
# ## What to try
#
# - An average of the generator's weights makes better images than the last weights, and hardly jumps: write `ema =
#   optim.AveragedModel(generator, decay=0.99)` before training, `ema.update(generator)` at the end of `train_step`, and
#   `ema` instead of `generator` in `generate`.
# - Leave out `nn.Dropout`, or let real images be judged as 1.0: who of the two wins then?
# - Let each network know the digit: give both the output of an `nn.Embedding(10, ...)`.
#
# The game is of Goodfellow and others (2014), the form of the networks of Radford, Metz and Chintala (2016).

# %%
assert reached < (0.5 * distances[0] if SHORT else 2.5), reached
