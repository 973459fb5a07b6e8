"""MAML on sine waves (Finn et al., 2017): gradients through an update that is itself made from gradients."""

import jax
from ports.data import sines

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        self.layers = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))

    def forward(self, x):
        return self.layers(x)


def adapt(model, x, y, inner_lr=0.05):
    grads = jax.grad(lambda model: F.mse_loss(model(x), y))(model)
    return jax.tree.map(lambda p, g: p - inner_lr * g, model, grads)


def task_loss(model, x_support, y_support, x_query, y_query, steps=2):
    for _ in range(steps):
        model = adapt(model, x_support, y_support)
    return F.mse_loss(model(x_query), y_query)


def meta_loss(model, *tasks):
    return jax.vmap(lambda *task: task_loss(model, *task))(*tasks).mean()


def build():
    return (Net(),)


@mt.jit
def train_step(model, meta_opt, *tasks):
    meta_opt.zero_grad()
    loss = mt.backward(meta_loss, model, *tasks)
    meta_opt.step()
    return loss


def train(model):
    meta_opt = optim.Adam([model], lr=1e-2)
    losses = []
    for step in range(20):
        losses.append(train_step(model, meta_opt, *sines(8, seed=step)))
    return losses, mt.jit(meta_loss)(model, *sines(20, seed=99))


if __name__ == "__main__":
    print(*train(*build()))
