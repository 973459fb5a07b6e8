"""A diffusion model (DDPM, Ho et al., 2020): a denoiser that is told the time, and samples by an average of its weights."""

import math

import torch
from ports.data import batches, digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

T = 20
BETAS = torch.linspace(1e-4, 0.2, T)
ALPHAS_BAR = torch.cumprod(1 - BETAS, dim=0)


class TimeEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        half = self.dim // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half) / half)
        args = t[:, None].float() * freqs[None]
        return self.mlp(torch.cat([args.cos(), args.sin()], dim=-1))


class ResBlock(nn.Module):
    def __init__(self, channels, dim, dropout=0.1):
        super().__init__()
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
        super().__init__()
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
    noise = torch.randn_like(x0)
    a = ALPHAS_BAR[t][:, None, None, None]
    return F.mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t), noise)


@torch.no_grad()
def sample(model, shape):
    model.eval()
    x = torch.randn(shape)
    for t in reversed(range(T)):
        eps = model(x, torch.full((shape[0],), t))
        x = (x - BETAS[t] / (1 - ALPHAS_BAR[t]).sqrt() * eps) / (1 - BETAS[t]).sqrt()
        if t > 0:
            x = x + BETAS[t].sqrt() * torch.randn(shape)
    return x


def build():
    return (Denoiser(),)


def train(model):
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, (step + 1) / 5))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    losses = []
    for epoch in range(4):
        model.train()
        for (x0,) in batches(2 * digits(160)[0] - 1, size=32, epoch=epoch):
            x0 = torch.from_numpy(x0)
            t = torch.randint(0, T, (len(x0),))
            opt.zero_grad()
            loss = p_losses(model, x0, t)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            ema.update_parameters(model)
            losses.append(loss.item())
    return losses, sample(ema, (4, 1, 8, 8)).numpy()


if __name__ == "__main__":
    print(*train(*build()))
