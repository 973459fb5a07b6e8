"""A GAN: the DCGAN of pytorch/examples, with its two optimizers, its initial weights and its three backward passes."""

import torch
from ports.data import batches, digits
from torch import nn


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self, nz=16, ngf=8):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 2, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self, ndf=8):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, 1, 2, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


def build():
    netG, netD = Generator(), Discriminator()
    netG.apply(weights_init)
    netD.apply(weights_init)
    return netG, netD


def train(netG, netD):
    criterion = nn.BCELoss()
    optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
    fixed_noise = torch.randn(4, 16, 1, 1)
    losses = []
    for epoch in range(4):
        for (real,) in batches(2 * digits(160)[0] - 1, size=32, epoch=epoch):
            real = torch.from_numpy(real)
            # the discriminator: maximize log(D(x)) + log(1 - D(G(z)))
            netD.zero_grad()
            errD_real = criterion(netD(real), torch.full((32,), 1.0))
            errD_real.backward()
            fake = netG(torch.randn(32, 16, 1, 1))
            errD_fake = criterion(netD(fake.detach()), torch.full((32,), 0.0))
            errD_fake.backward()
            optimizerD.step()
            # the generator: maximize log(D(G(z)))
            netG.zero_grad()
            errG = criterion(netD(fake), torch.full((32,), 1.0))
            errG.backward()
            optimizerG.step()
            losses.append([errD_real.item() + errD_fake.item(), errG.item()])
    with torch.no_grad():
        return losses, netG(fixed_noise).numpy()


if __name__ == "__main__":
    print(*train(*build()))
