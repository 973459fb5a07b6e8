"""MAML on sine waves (Finn et al., 2017): gradients through an update that is itself made from gradients."""

import torch
from ports.data import sines
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))

    def forward(self, x):
        return self.layers(x)


def adapt(model, params, x, y, inner_lr=0.05):
    loss = F.mse_loss(functional_call(model, params, (x,)), y)
    grads = torch.autograd.grad(loss, tuple(params.values()), create_graph=True)
    return {name: p - inner_lr * g for (name, p), g in zip(params.items(), grads, strict=True)}


def task_loss(model, x_support, y_support, x_query, y_query, steps=2):
    params = dict(model.named_parameters())
    for _ in range(steps):
        params = adapt(model, params, x_support, y_support)
    return F.mse_loss(functional_call(model, params, (x_query,)), y_query)


def meta_loss(model, *tasks):
    return torch.stack([task_loss(model, *task) for task in zip(*tasks, strict=True)]).mean()


def build():
    return (Net(),)


def train(model):
    meta_opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        tasks = map(torch.from_numpy, sines(8, seed=step))
        meta_opt.zero_grad()
        loss = meta_loss(model, *tasks)
        loss.backward()
        meta_opt.step()
        losses.append(loss.item())
    return losses, meta_loss(model, *map(torch.from_numpy, sines(20, seed=99))).item()


if __name__ == "__main__":
    print(*train(*build()))
