"""A diffusion model (DDPM, Ho et al., 2020): a denoiser that is told the time, and samples by an average of its weights."""

import math

import jax
import jax.numpy as jnp
from ports.data import batches, digits

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F

T = 20
BETAS = jnp.linspace(1e-4, 0.2, T)
ALPHAS_BAR = jnp.cumprod(1 - BETAS)


class TimeEmbedding(nn.Module):
    def __init__(self, dim):
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        half = self.dim // 2
        freqs = jnp.exp(-math.log(10000) * jnp.arange(half) / half)
        args = t[:, None].astype(float) * freqs[None]
        return self.mlp(jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1))


class ResBlock(nn.Module):
    def __init__(self, channels, dim, dropout=0.1):
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(dim, channels)
        self.norm2, self.conv2 = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        return x + self.conv2(self.drop(F.silu(self.norm2(h))))


class Denoiser(nn.Module):
    def __init__(self, channels=16, dim=16, depth=1):
        self.time = TimeEmbedding(dim)
        self.inp = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList([ResBlock(channels, dim) for _ in range(depth)])
        self.out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x, t):
        emb, x = self.time(t), self.inp(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.out(x)


def p_losses(model, x0, t):
    noise = jax.random.normal(mt.next_key(), x0.shape)
    a = ALPHAS_BAR[t][:, None, None, None]
    return F.mse_loss(model(jnp.sqrt(a) * x0 + jnp.sqrt(1 - a) * noise, t), noise)


def sample(model, shape):
    model.eval()
    model.compile()
    x = jax.random.normal(mt.next_key(), shape)
    for t in reversed(range(T)):
        eps = model(x, jnp.full(shape[0], t))
        x = (x - BETAS[t] / jnp.sqrt(1 - ALPHAS_BAR[t]) * eps) / jnp.sqrt(1 - BETAS[t])
        if t > 0:
            x = x + jnp.sqrt(BETAS[t]) * jax.random.normal(mt.next_key(), shape)
    return x


def build():
    return (Denoiser(),)


@mt.jit
def train_step(model, opt, ema, x0):
    t = jax.random.randint(mt.next_key(), (len(x0),), 0, T)
    opt.zero_grad()
    loss = mt.backward(p_losses, model, x0, t)
    nn.utils.clip_grad_norm_(model, 1.0)
    opt.step()
    ema.update(model)
    return loss


def warmup(step):
    return 2e-3 * jnp.minimum(1.0, (step + 1) / 5)


def train(model):
    opt = optim.AdamW([model], lr=warmup)
    ema = optim.AveragedModel(model, decay=0.9)
    losses = []
    for epoch in range(4):
        model.train()
        for (x0,) in batches(2 * digits(160)[0] - 1, size=32, epoch=epoch):
            losses.append(train_step(model, opt, ema, x0))
    return losses, sample(ema, (4, 1, 8, 8))


if __name__ == "__main__":
    print(*train(*build()))
