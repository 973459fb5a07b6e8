"""A variational autoencoder, as in pytorch/examples."""

import torch
from ports.data import batches, digits
from torch import nn
from torch.nn import functional as F


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 48)
        self.fc21 = nn.Linear(48, 8)
        self.fc22 = nn.Linear(48, 8)
        self.fc3 = nn.Linear(8, 48)
        self.fc4 = nn.Linear(48, 64)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z):
        h3 = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h3))

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 64))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    BCE = F.binary_cross_entropy(recon_x, x.view(-1, 64), reduction="sum")
    KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return BCE + KLD


def build():
    return (VAE(),)


def train(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for epoch in range(1, 5):
        model.train()
        for (data,) in batches(digits(160)[0], size=32, epoch=epoch):
            data = torch.from_numpy(data)
            optimizer.zero_grad()
            recon_batch, mu, logvar = model(data)
            loss = loss_function(recon_batch, data, mu, logvar)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    return losses, test(model, torch.from_numpy(digits(100, skip=1000)[0]))


@torch.no_grad()
def test(model, data):
    model.eval()
    recon_batch, mu, logvar = model(data)
    loss = loss_function(recon_batch, data, mu, logvar).item() / len(data)
    sample = model.decode(torch.randn(4, 8)).view(4, 1, 8, 8)
    return [loss, sample.numpy()]


if __name__ == "__main__":
    print(*train(*build()))
