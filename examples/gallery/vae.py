# %% [markdown]
# # A map of the digits: a variational autoencoder
#
# An autoencoder squeezes each image through a narrow gap, here two numbers, and learns to draw the image again from
# them. A *variational* one puts each image not on a point of this plane but on a small cloud, and asks the clouds
# together to look like one normal distribution. So near points stand for similar images, and every point of the plane
# stands for some. We can then look at the whole plane: a map of what the network knows of handwritten digits.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F

SHORT = "--short" in sys.argv  # a short run, to see that it works
EPOCHS, BATCH = (30 if SHORT else 200), 64
mt.seed(0)
pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)  # (1797, 64), from 0 to 1
train_x, test_x, train_y, test_y = train_test_split(pixels, labels, test_size=360, random_state=0, stratify=labels)

# %% [markdown]
# ## The model
#
# The encoder returns four numbers for an image: where its cloud lies in the plane, and the logarithm of the variance,
# in both directions. The decoder gets one point of the cloud. Computing that point as `mean + width * noise` is the
# *reparametrization trick*: the gradient reaches `mean` and `width` through it. `mt.next_key()` draws from the stream
# that `mt.seed` has set, and each call, compiled or not, draws new noise.


# %%
class VAE(mt.Module):
    def __init__(self) -> None:
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 64))

    def encode(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(self.encoder(x), 2, axis=-1)

    def decode(self, z: jax.Array) -> jax.Array:
        return F.sigmoid(self.decoder(z))

    def forward(self, x: jax.Array) -> tuple[jax.Array, ...]:
        mean, log_var = self.encode(x)
        z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(mt.next_key(), mean.shape)
        return self.decoder(z), mean, log_var


# %% [markdown]
# ## The loss
#
# The loss is the negative *evidence lower bound* (ELBO), in nats for each image. Its first part asks the decoder to
# draw the image. Its second part, the divergence of the cloud from the normal distribution, is what the two numbers
# cost.


# %%
def negative_elbo(model: VAE, x: jax.Array) -> jax.Array:
    logits, mean, log_var = model(x)
    drawing = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    cloud = -0.5 * jnp.sum(1 + log_var - mean**2 - jnp.exp(log_var))
    return (drawing + cloud) / len(x)


model = VAE()
steps_per_epoch = len(train_x) // BATCH
rate = optim.schedules.warmup(optim.schedules.cosine(2e-3, EPOCHS * steps_per_epoch - 50), 50)
opt = optim.Adam([model], lr=rate)


def train_step(x: jax.Array) -> jax.Array:
    opt.zero_grad()
    loss = mt.backward(negative_elbo, model, x)
    mt.clip_grad_norm(model, 20.0)
    opt.step()
    return loss


# %% [markdown]
# ## Training
#
# A step of so small a model takes less time than starting a program does. `mt.scan` therefore runs a whole epoch in one
# call. It gets all batches of the epoch in one array, `(steps, batch, 64)`.

# %%
evaluate = mt.jit(negative_elbo)
rng = np.random.default_rng(0)
train_loss, test_loss = [], [evaluate(model, test_x)]
for _ in tqdm(range(EPOCHS), disable=None):  # a progress bar, where there is a terminal
    chosen = rng.permutation(len(train_x))[: steps_per_epoch * BATCH].reshape(steps_per_epoch, BATCH)
    train_loss.append(mt.scan(train_step, train_x[chosen]).mean())
    test_loss.append(evaluate(model, test_x))
print(f"negative ELBO of the test digits: {test_loss[0]:.2f} nats before, {test_loss[-1]:.2f} after")

# %% [markdown]
# Is that good? A decoder that does not look at its two numbers can do no better than draw the mean image each time.
# Then the clouds cost nothing, and the bound is the cross-entropy of the mean image. Our curve passes that line within
# a few epochs, so the two numbers are worth more than they cost.

# %%
mean_image = train_x.mean(axis=0).clip(1e-6, 1 - 1e-6)
mean_loss = -(test_x * np.log(mean_image) + (1 - test_x) * np.log(1 - mean_image)).sum(axis=1).mean()

fig, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(range(1, EPOCHS + 1), train_loss, label="training digits")
axes.plot(range(EPOCHS + 1), test_loss, label="test digits")
axes.axhline(mean_loss, color="0.5", linestyle=":", label="the mean image each time")
axes.set(xlabel="epoch", ylabel="negative ELBO (nats)", ylim=(22, 32))
axes.legend()
fig.savefig("vae_loss.png")

# %% [markdown]
# ## The map
#
# On the left, each test digit stands where the encoder puts the middle of its cloud. It has never seen these images,
# nor any label: the colours are ours. On the right, the decoder draws a grid of points of the same plane. Compare the
# two: where the zeros lie on the left, zeros are drawn on the right, and between two regions one digit turns into the
# other.

# %%
EDGE, COUNT = 2.5, 16

model.eval()
means, _ = model.encode(test_x)
middles = EDGE * (2 * jnp.arange(COUNT) + 1 - COUNT) / COUNT  # of the drawings in a row
plane = jnp.stack(jnp.meshgrid(middles, middles[::-1]), axis=-1).reshape(-1, 2)
drawn = model.decode(plane).reshape(COUNT, COUNT, 8, 8)
drawn = jnp.pad(drawn, ((0, 0), (0, 0), (1, 1), (1, 1)))  # a margin for each
sheet = drawn.transpose(0, 2, 1, 3).reshape(10 * COUNT, 10 * COUNT)

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 5.4), layout="constrained", sharex=True, sharey=True)
for digit in range(10):
    left.scatter(*means[test_y == digit].T, marker=f"${digit}$", s=45, color=plt.cm.tab10(digit))
left.set(title="where the encoder puts the test digits", xlabel="first number", ylabel="second number", aspect="equal")
right.imshow(sheet, cmap="gray_r", interpolation="nearest", extent=(-EDGE, EDGE, -EDGE, EDGE))
right.set(title="what the decoder draws there", xlabel="first number")
fig.savefig("vae.png")

# %% [markdown]
# ## What is left of an image in two numbers
#
# Above, test digits; below, what the decoder draws from the middle of their clouds. Style is lost first, then what the
# map shows as neighbours. Where two digits share a region, the drawing is a blur of both.

# %%
shown = [int(np.flatnonzero(test_y == digit)[i]) for digit in range(10) for i in range(2)]
again = model.decode(means)
fig, grid = plt.subplots(2, len(shown), figsize=(10, 1.3), layout="constrained")
for (above, below), i in zip(grid.T, shown, strict=True):
    above.imshow(test_x[i].reshape(8, 8), cmap="gray_r")
    below.imshow(again[i].reshape(8, 8), cmap="gray_r")
for axes in grid.flat:
    axes.axis("off")
fig.savefig("vae_drawings.png")

# %% [markdown]
# ## What it has learnt
#
# A number for the map: take the ten training digits that lie nearest to a test digit in the plane. How often is their
# most frequent label its own? Guessing is right once in ten times.

# %%
train_means, _ = model.encode(train_x)
accuracy = KNeighborsClassifier(10).fit(train_means, train_y).score(means, test_y)
print(f"the neighbours in the plane are right about {accuracy:.0%} of the test digits")


# %% [markdown]
# ## What to try
#
# - Eight numbers instead of two: `nn.Linear(128, 16)` and `nn.Linear(8, 128)`. The bound gets better, and there is no
#   plane to look at.
# - `0.1 * cloud` in the loss: the clouds may shrink. What becomes of the map (Higgins and others, 2017)?
# - Walk from one digit to another: decode points of the line between two codes.
#
# The method is of Kingma and Welling, "Auto-Encoding Variational Bayes", 2014.

# %%
assert test_loss[-1] < mean_loss - (1.0 if SHORT else 2.0), test_loss[-1]
assert accuracy > (0.5 if SHORT else 0.7), accuracy
