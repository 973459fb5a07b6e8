"""Segmentation by a U-Net, as in milesial/Pytorch-UNet: skip connections, cross-entropy and Dice, ReduceLROnPlateau."""

import jax.numpy as jnp
from ports.data import batches, discs

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F


class DoubleConv(nn.Sequential):
    def __init__(self, c_in, c_out):
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    def __init__(self, c_in, c_out):
        self.up = nn.ConvTranspose2d(c_in, c_in // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(c_in, c_out)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        diff_y, diff_x = x2.shape[2] - x1.shape[2], x2.shape[3] - x1.shape[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return self.conv(jnp.concatenate([x2, x1], axis=1))


class UNet(nn.Module):
    def __init__(self, n_channels=1, n_classes=3, width=8):
        self.inc = DoubleConv(n_channels, width)
        self.down = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, width * 2))
        self.up = Up(width * 2, width)
        self.outc = nn.Conv2d(width, n_classes, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down(x1)
        return self.outc(self.up(x2, x1))


def dice_loss(input, target, epsilon=1e-6):
    inter = 2 * (input * target).sum(axis=(-1, -2))
    sets_sum = input.sum(axis=(-1, -2)) + target.sum(axis=(-1, -2))
    dice = (inter + epsilon) / (sets_sum + epsilon)
    return 1 - dice.mean()


def criterion(masks_pred, true_masks):
    one_hot = F.one_hot(true_masks, 3).transpose(0, 3, 1, 2).astype(float)
    return F.cross_entropy(masks_pred, true_masks) + dice_loss(F.softmax(masks_pred, dim=1), one_hot)


def build():
    return (UNet(),)


@mt.jit
def train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = mt.backward(lambda model, x, y: criterion(model(x), y), model, x, y)
    nn.utils.clip_grad_norm_(model, 1.0)
    optimizer.step()
    return loss


def train(model):
    optimizer = optim.RMSprop([model], lr=1e-3, weight_decay=1e-8, momentum=0.9)
    scheduler = optim.ReduceOnPlateau(optimizer, "max", patience=0)
    images, masks = discs(48, size=17)
    model.compile()  # one program for evaluation
    losses, scores = [], []
    for epoch in range(5):
        model.train()
        for x, y in batches(images[:32], masks[:32], size=8, epoch=epoch):
            losses.append(train_step(model, optimizer, x, y))
        scores.append(evaluate(model, images[32:], masks[32:]))
        scheduler.step(scores[-1])
    return losses, [*scores, optimizer.lr]


def evaluate(model, x, y):
    model.eval()
    predicted = F.one_hot(model(x).argmax(axis=1), 3).transpose(0, 3, 1, 2).astype(float)
    one_hot = F.one_hot(y, 3).transpose(0, 3, 1, 2).astype(float)
    return 1 - float(dice_loss(predicted[:, 1:], one_hot[:, 1:]))


if __name__ == "__main__":
    print(*train(*build()))
