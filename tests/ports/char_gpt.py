"""A GPT over characters, as in nanoGPT: causal attention, tied weights, AdamW in two groups, warm-up and cosine, samples."""

import math

import jax.numpy as jnp
import numpy as np
from ports.data import TEXT

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F

BLOCK, VOCAB = 16, sorted(set(TEXT))
TOKENS = np.array([VOCAB.index(c) for c in TEXT])


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, dropout):
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head = n_head
        self.register_buffer("bias", jnp.tril(jnp.ones((BLOCK, BLOCK))).reshape(1, 1, BLOCK, BLOCK))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = jnp.split(self.c_attn(x), 3, axis=2)
        q = q.reshape(B, T, self.n_head, C // self.n_head).swapaxes(1, 2)  # (B, heads, T, C / heads)
        k = k.reshape(B, T, self.n_head, C // self.n_head).swapaxes(1, 2)
        v = v.reshape(B, T, self.n_head, C // self.n_head).swapaxes(1, 2)
        att = (q @ k.swapaxes(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        att = jnp.where(self.bias[:, :, :T, :T] == 0, -jnp.inf, att)
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.swapaxes(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, dropout):
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, n_layer=1, n_head=2, n_embd=32, dropout=0.1):
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(len(VOCAB), n_embd),
                wpe=nn.Embedding(BLOCK, n_embd),
                drop=nn.Dropout(dropout),
                h=nn.ModuleList([Block(n_embd, n_head, dropout) for _ in range(n_layer)]),
                ln_f=nn.LayerNorm(n_embd),
            )
        )
        self.lm_head = nn.Linear(n_embd, len(VOCAB), bias=False)
        self.transformer.wte.tie("weight", self.lm_head, "weight")
        self.apply(self._init_weights)
        for name, _ in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(self, name, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module, "weight", mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module, "bias")

    def forward(self, idx, targets=None):
        pos = jnp.arange(idx.shape[1])
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -BLOCK:])
            idx = np.concatenate((idx, logits[:, -1].argmax(axis=-1, keepdims=True)), axis=1)
        return idx

    def configure_optimizers(self, weight_decay, learning_rate, betas):
        return optim.AdamW([self], lr=learning_rate, betas=betas, weight_decay=weight_decay, decay_matrices_only=True)


def get_batch(rng, batch_size=8):
    ix = rng.integers(len(TOKENS) - BLOCK, size=batch_size)
    x = np.stack([TOKENS[i : i + BLOCK] for i in ix])
    y = np.stack([TOKENS[i + 1 : i + 1 + BLOCK] for i in ix])
    return x, y


def build():
    return (GPT(),)


@mt.jit
def train_step(model, opt, x, y):
    opt.zero_grad()
    loss = mt.backward(lambda model, x, y: model(x, y)[1], model, x, y)
    nn.utils.clip_grad_norm_(model, 1.0)
    opt.step()
    return loss


def train(model):
    cosine = optim.schedules.cosine(1e-2, 15, eta_min=1e-3)
    schedule = optim.schedules.warmup(cosine, 5, start_factor=0.2)
    opt = model.configure_optimizers(weight_decay=0.1, learning_rate=schedule, betas=(0.9, 0.95))
    rng, losses = np.random.default_rng(0), []
    model.train()
    for _ in range(20):
        x, y = get_batch(rng)
        losses.append(train_step(model, opt, x, y))
    model.eval()
    model.compile()
    return losses, model.generate(TOKENS[None, :BLOCK], 12)[0].tolist()


if __name__ == "__main__":
    losses, tokens = train(*build())
    print(losses, "".join(VOCAB[token] for token in tokens))
