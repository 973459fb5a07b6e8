# %% [markdown]
# # A Transformer that writes Python
#
# Python brings its own library along as source: a text of some hundred thousand characters. A small Transformer reads it,
# and learns to say which character comes next. Then it writes, character by character. After some minutes on two cores it has
# found out about indentation, brackets, keywords and `self`, though nobody told it what a word is.
#
# The page shows a language model of 620,000 parameters: the data, a learning rate with warm-up and cosine, gradients clipped,
# many steps in one call, and generation as one compiled program.

# %%
import ast
import sys
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from tqdm import tqdm

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F

SHORT = "--short" in sys.argv  # a short run, to see that it works
STEPS = 100 if SHORT else 2500
LAYERS, WIDTH, BATCH = (1, 64, 8) if SHORT else (3, 128, 16)
CONTEXT = 96  # the number of characters that the model sees
mt.seed(0)

# %% [markdown]
# ## The text
#
# Comments and docstrings are English, which is harder than Python. So each module is parsed and written again from its syntax
# tree, which drops the comments and uses one style for quotes and spaces. We drop the docstrings, too. A tab stands for
# the four spaces of an indentation, so that more code fits into the context.
#
# The module `tempfile` is for the test. The model never trains on it.

# %%
NAMES = """argparse bdb calendar cmd code configparser contextlib copy csv dataclasses difflib doctest enum fractions ftplib
functools gettext imaplib inspect mailbox optparse pdb pickle pprint queue random sched shelve shutil smtplib socketserver
statistics string subprocess tarfile textwrap threading tokenize traceback typing uuid weakref""".split()
CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))


def source(name: str) -> str:
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")  # some modules move between versions
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).replace("    ", "\t") + "\n\n\n"


def encode(text: str) -> NDArray[np.int32]:
    return np.array([CHARACTERS.index(character) for character in text if character in CHARACTERS], np.int32)


def decode(tokens: NDArray[np.int32]) -> str:
    return "".join(CHARACTERS[token] for token in tokens).replace("\t", "    ")


train_text, test_text = encode("".join(map(source, NAMES))), encode(source("tempfile"))
print(f"{len(train_text):,} characters to train with, {len(test_text):,} to test")


# %% [markdown]
# ## The model
#
# It is a GPT: each character and each position has a vector, layers of causal attention follow, and the last layer shares
# its weights with the table of characters (`tie`). With the causal mask, a place sees only what is before it. So one text of
# 96 characters is 96 questions, each with its answer.


# %%
class GPT(mt.Module):
    def __init__(self) -> None:
        self.token, self.position = nn.Embedding(len(CHARACTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for table in (self.token, self.position):
            nn.init.normal_(table, "weight", std=0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(CHARACTERS), bias=False)
        self.head.tie("weight", self.token, "weight")

    def forward(self, tokens: jax.Array) -> jax.Array:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        x = self.token(tokens) + self.position.weight
        return self.head(self.blocks(x, mask=mask, is_causal=True))


model = GPT()
print(f"{model.num_parameters():,} parameters")

# %% [markdown]
# ## Training
#
# The learning rate rises for 50 steps, since the first gradients of a Transformer are large and point anywhere. Then it falls
# along a cosine. Clipping bounds the length of the gradient, so that one strange batch cannot spoil the weights.
#
# The text lies on the device, and a step gets only the places where its 16 samples begin. `mt.scan` runs 50 steps in one
# call.

# %%
schedule = optim.schedules.warmup(optim.schedules.cosine(4e-3, STEPS), 50)
opt = optim.AdamW([model], lr=schedule, betas=(0.9, 0.95), weight_decay=0.1, decay_matrices_only=True)
text = jnp.asarray(train_text)


def loss_fn(model: GPT, batch: jax.Array) -> jax.Array:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.reshape(-1, len(CHARACTERS)), batch[:, 1:].reshape(-1))


def train_step(starts: jax.Array) -> jax.Array:
    batch = text[starts[:, None] + jnp.arange(CONTEXT + 1)]
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, batch)
    mt.clip_grad_norm(opt, 1.0)
    opt.step()
    return loss


@mt.jit
def test_loss(model: GPT, batch: jax.Array) -> jax.Array:
    return loss_fn(model, batch)


rng = np.random.default_rng(0)
test_starts = np.linspace(0, len(test_text) - CONTEXT - 1, 64, dtype=int)
test_batch = jnp.asarray(test_text[test_starts[:, None] + np.arange(CONTEXT + 1)])
losses: list[Any] = []
test_losses: list[float] = []
for _ in tqdm(range(STEPS // 50), disable=None):  # a progress bar, where there is a terminal
    losses.append(mt.scan(train_step, jnp.asarray(rng.integers(0, len(text) - CONTEXT, (50, BATCH)))))
    test_losses.append(float(test_loss(model, test_batch)))
curve = np.concatenate(losses)
print(f"training loss {curve[0]:.2f} at first, {curve[-50:].mean():.2f} at the end, in the test {test_losses[-1]:.2f}")

# %% [markdown]
# A model that knows nothing has a loss of log(97) = 4.57. One that knows only how often each character occurs has the entropy
# of the characters, and one that sees the character before it that of pairs.

# %%
counts = np.zeros((len(CHARACTERS), len(CHARACTERS)))
np.add.at(counts, (train_text[:-1], train_text[1:]), 1)
pairs = counts / counts.sum()
singles = pairs.sum(0)
entropy_of_singles = -(singles[singles > 0] * np.log(singles[singles > 0])).sum()
entropy_of_pairs = -(pairs[pairs > 0] * np.log(pairs[pairs > 0])).sum() - entropy_of_singles
print(f"single characters {entropy_of_singles:.2f}, pairs {entropy_of_pairs:.2f}")

# %% [markdown]
# ## Writing
#
# The model reads the last 96 characters and returns a score for each character that may follow. One is drawn, and the window
# moves on by one. The window always has the same shape, so `jax.lax.scan` makes the whole text one program, which is compiled
# once. A low temperature prefers the likely characters: at 0 it would always take the best one.
#
# The model continues the start of the test's module, which it has never seen, with a class that is not there.


# %%
@mt.jit
def write(model: GPT, start: jax.Array, keys: jax.Array, temperature: float) -> jax.Array:
    def step(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = jax.random.categorical(key, model(window)[:, -1] / temperature)
        return jnp.concatenate([window[:, 1:], chosen[:, None]], axis=1), chosen

    return jax.lax.scan(step, start, keys)[1].T


model.eval()
start = np.concatenate([test_text[:500], encode("\n\nclass Reader")])[-CONTEXT:]
keys = jax.random.split(mt.next_key(), 50 if SHORT else 500)
texts = [decode(tokens) for tokens in np.asarray(write(model, jnp.tile(start, (8, 1)), keys, 0.6))]
for written in texts[:2]:
    print("class Reader" + written + "\n" + "-" * 80)

# %% [markdown]
# How good is it? Python itself can say which lines are Python, taken one by one. Not all lines of a true module are: some are
# the middle of a longer statement, or begin with `else`.


# %%
def valid(line: str) -> bool:
    try:
        ast.parse(line.strip() + (" pass" if line.endswith(":") else ""))
    except (SyntaxError, ValueError):
        return False
    return True


lines = [line for written in texts for line in written.split("\n")[1:-1] if line.strip()]
true_lines = [line for line in decode(test_text).split("\n") if line.strip()]
share, true_share = (sum(map(valid, each)) / max(len(each), 1) for each in (lines, true_lines))
print(f"{share:.0%} of the lines that it wrote are valid, and {true_share:.0%} of those of tempfile")

# %% [markdown]
# ## What it knows
#
# On the left, the losses, with the two entropies from above. On the right, a piece of the test's module. The redder a
# character, the less the model expected it. It is surprised where something begins, such as a name, and is sure of the
# middle of a word, of indentation, and of brackets and colons that must follow.

# %%
begin = "".join(CHARACTERS[token] for token in test_text).index("def _get_candidate_names")
places = np.arange(begin, begin + 570)
windows = test_text[places[:, None] + np.arange(-CONTEXT, 0)]
log_probabilities = jax.jit(lambda model, windows: F.log_softmax(model(windows)[:, -1], dim=1))(model, windows)
surprise = -np.asarray(log_probabilities)[np.arange(len(places)), test_text[places]]

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1, 1.8], layout="constrained")
left.plot(curve, lw=0.5, alpha=0.6, label="training")
left.plot(np.arange(1, len(test_losses) + 1) * 50, test_losses, label="test")
left.axhline(entropy_of_singles, color="black", ls=":", label="single characters")
left.axhline(entropy_of_pairs, color="black", ls="--", label="pairs of characters")
left.set(xlabel="step", ylabel="loss for a character", ylim=(0.8, 4.6))
left.legend()
row = column = 0
for token, height in zip(test_text[places], surprise, strict=True):
    character = CHARACTERS[token]
    width = 4 if character == "\t" else 1
    right.add_patch(Rectangle((column, row), width, 1, color=plt.colormaps["Reds"](min(height / 10, 0.7))))
    right.text(column + 0.5, row + 0.55, character.strip(), ha="center", va="center", family="monospace", fontsize=8)
    row, column = (row + 1, 0) if character == "\n" else (row, column + width)
right.set(xlim=(0, 62), ylim=(row + 1, 0), title="the redder, the less expected")
right.set_axis_off()
fig.savefig("char_transformer.png")

# %% [markdown]
# ## What to try
#
# - Train for longer, or with `WIDTH = 256` and `CONTEXT = 256` on a GPU. How many lines are valid then?
# - Set the temperature to 0.2, and to 1.2. What gets better, and what is lost?
# - Let it read another text: only `source` and `CHARACTERS` know about Python.

# %%
assert test_losses[-1] < (entropy_of_singles if SHORT else 1.75), test_losses[-1]
