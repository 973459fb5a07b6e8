"""A variational autoencoder, as in pytorch/examples."""

import jax
import jax.numpy as jnp
from ports.data import batches, digits

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F


class VAE(nn.Module):
    def __init__(self):
        self.fc1 = nn.Linear(64, 48)
        self.fc21 = nn.Linear(48, 8)
        self.fc22 = nn.Linear(48, 8)
        self.fc3 = nn.Linear(8, 48)
        self.fc4 = nn.Linear(48, 64)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = jnp.exp(0.5 * logvar)
        eps = jax.random.normal(mt.next_key(), std.shape)
        return mu + eps * std

    def decode(self, z):
        h3 = F.relu(self.fc3(z))
        return F.sigmoid(self.fc4(h3))

    def forward(self, x):
        mu, logvar = self.encode(x.reshape(-1, 64))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    BCE = F.binary_cross_entropy(recon_x, x.reshape(-1, 64), reduction="sum")
    KLD = -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar))
    return BCE + KLD


def build():
    return (VAE(),)


@mt.jit
def train_step(model, optimizer, data):
    optimizer.zero_grad()
    loss = mt.backward(elbo, model, data)
    optimizer.step()
    return loss


def elbo(model, data):
    recon_batch, mu, logvar = model(data)
    return loss_function(recon_batch, data, mu, logvar)


def train(model):
    optimizer = optim.Adam([model], lr=1e-3)
    losses = []
    for epoch in range(1, 5):
        model.train()
        for (data,) in batches(digits(160)[0], size=32, epoch=epoch):
            losses.append(train_step(model, optimizer, data))
    return losses, test(model, digits(100, skip=1000)[0])


def test(model, data):
    model.eval()
    loss = elbo(model, data) / len(data)
    sample = model.decode(jax.random.normal(mt.next_key(), (4, 8))).reshape(4, 1, 8, 8)
    return [loss, sample]


if __name__ == "__main__":
    print(*train(*build()))
