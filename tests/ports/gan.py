"""A GAN: the DCGAN of pytorch/examples, with its two optimizers, its initial weights and its three backward passes."""

import jax
import jax.numpy as jnp
from ports.data import batches, digits

import minitorch_jax as mt
from minitorch_jax import nn, optim


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m, "weight", 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m, "weight", 1.0, 0.02)
        nn.init.zeros_(m, "bias")


class Generator(nn.Module):
    def __init__(self, nz=16, ngf=8):
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
        return self.main(input).reshape(-1)


def build():
    netG, netD = Generator(), Discriminator()
    netG.apply(weights_init)
    netD.apply(weights_init)
    return netG, netD


criterion = nn.BCELoss()


def error(netD, images, label):
    return criterion(netD(images), jnp.full(len(images), label))


@mt.jit
def train_step(netG, netD, optimizerG, optimizerD, real):
    # the discriminator: maximize log(D(x)) + log(1 - D(G(z)))
    netD.zero_grad()
    errD_real = mt.backward(error, netD, real, 1.0)
    z = jax.random.normal(mt.next_key(), (32, 16, 1, 1))
    errD_fake = mt.backward(error, netD, netG(z), 0.0)
    optimizerD.step()
    # the generator: maximize log(D(G(z)))
    netG.zero_grad()
    errG = mt.backward(lambda netG, netD: error(netD, netG(z), 1.0), netG, netD)
    optimizerG.step()
    return jnp.stack([errD_real + errD_fake, errG])


def train(netG, netD):
    optimizerD = optim.Adam([netD], lr=2e-4, betas=(0.5, 0.999))
    optimizerG = optim.Adam([netG], lr=2e-4, betas=(0.5, 0.999))
    netG.compile()  # one program where it is called by itself
    fixed_noise = jax.random.normal(mt.next_key(), (4, 16, 1, 1))
    losses = []
    for epoch in range(4):
        for (real,) in batches(2 * digits(160)[0] - 1, size=32, epoch=epoch):
            losses.append(train_step(netG, netD, optimizerG, optimizerD, real))
    return losses, netG(fixed_noise)


if __name__ == "__main__":
    print(*train(*build()))
