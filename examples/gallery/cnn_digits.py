# %% [markdown]
# # Digits by a small convolutional network
#
# A network of three convolutions learns to read handwritten digits of 8 x 8 pixels, which come with scikit-learn. It trains
# for seconds on 449 images, reads about 99 of 100 new ones correctly, and at the end we look at those that it gets wrong.
#
# The page shows a class with layers, a training step that is one compiled program, random changes of the images inside that
# program, and evaluation.

# %%
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F

SHORT = "--short" in sys.argv  # a short run, to see that it works
EPOCHS, BATCH = (10 if SHORT else 60), 64
mt.seed(0)

# %% [markdown]
# ## The data
#
# There are 1,797 images. The network trains on a quarter of them. It never sees the others before the test. As in PyTorch,
# images have the shape (batch, channels, height, width).

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.75, stratify=labels, random_state=0)
print(f"{len(x_train)} images to train with, {len(x_test)} to test")


# %% [markdown]
# ## The network
#
# Each block is a convolution, a BatchNorm that keeps its outputs in a good range, and a ReLU. `MaxPool2d` halves the height
# and the width. The mean over all places then leaves 64 numbers for an image, from which the last layer computes a score for
# each digit.


# %%
def block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Net(mt.Module):
    def __init__(self) -> None:
        self.blocks = nn.Sequential(block(1, 32), block(32, 64), nn.MaxPool2d(2), block(64, 64))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.head(self.dropout(self.blocks(x).mean((2, 3))))


model = Net()
print(f"{model.num_parameters():,} parameters")

# %% [markdown]
# ## Training
#
# More images would help, and a digit stays the same digit when it moves to the side. There is room for that: these digits
# fill the height of their image, but not the width. So each step moves each image by -1, 0 or 1 pixels. The moves are new
# each time: `mt.next_key()` draws from the random stream of `mt.seed`.
#
# `train_step` is the usual loop of three lines. `mt.jit` makes it one compiled program, with the random moves in it.

# %%
opt = optim.AdamW([model], lr=optim.schedules.cosine(3e-3, EPOCHS * (len(x_train) // BATCH)), weight_decay=1e-2)


def shifted(images: jax.Array) -> jax.Array:
    moves = jax.random.randint(mt.next_key(), (len(images),), -1, 2)
    return jax.vmap(lambda image, move: jnp.roll(image, move, axis=-1))(images, moves)


def loss_fn(model: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return F.cross_entropy(model(shifted(x)), y)


@mt.jit
def train_step(x: jax.Array, y: jax.Array) -> jax.Array:
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, x, y)
    opt.step()
    return loss


rng = np.random.default_rng(0)
losses: list[Any] = []
for _ in tqdm(range(EPOCHS), disable=None):  # a progress bar, where there is a terminal
    order = rng.permutation(len(x_train))
    for chosen in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
        losses.append(train_step(x_train[chosen], y_train[chosen]))
curve = np.array(losses)
print(f"loss {curve[:5].mean():.3f} in the first 5 steps, {curve[-5:].mean():.3f} in the last 5, of {len(losses)}")

# %% [markdown]
# ## The test
#
# `eval()` turns dropout off and lets BatchNorm use its running statistics. `compile()` makes each call of the model one
# compiled program.

# %%
model.eval()
model.compile()
probabilities = np.asarray(F.softmax(model(x_test), dim=1))
predictions = probabilities.argmax(1)
accuracy = (predictions == y_test).mean()
print(f"test accuracy {accuracy:.1%}: {(predictions != y_test).sum()} of {len(y_test)} are wrong")

# %% [markdown]
# On the left, the loss of each step. On the right, the eight test images whose true digit gets the lowest probability. Wrong
# answers are red. Most of these eight would make a person think twice, too.

# %%
worst = np.argsort(probabilities[np.arange(len(y_test)), y_test])[:8]

fig, axes = plt.subplot_mosaic("LL0123;LL4567", figsize=(9, 3.6), layout="constrained")
axes["L"].semilogy(curve, lw=0.8)
axes["L"].set(xlabel="step", ylabel="training loss")
for place, i in enumerate(worst):
    image, color = axes[str(place)], "black" if predictions[i] == y_test[i] else "tab:red"
    image.imshow(x_test[i, 0], cmap="gray_r")
    image.set_title(f"{y_test[i]}, read as {predictions[i]}\n({probabilities[i].max():.0%})", fontsize=9, color=color)
    image.set_axis_off()
fig.savefig("cnn_digits.png")

# %% [markdown]
# ## What to try
#
# - Leave out `shifted`. Summed over three seeds, there were then 59 wrong answers instead of 51.
# - Stack the batches of an epoch and run it in one call, `mt.scan(train_step, x, y)`. This is quicker for small networks of
#   matrix products. A convolution on a CPU is several times slower in such a loop, so this page does not use it.
# - Add `with mt.autocast(jnp.bfloat16):` around the call of the model, as you would on a GPU.

# %%
assert accuracy > (0.90 if SHORT else 0.98), accuracy
