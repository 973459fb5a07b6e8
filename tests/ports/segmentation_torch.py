"""Segmentation by a U-Net, as in milesial/Pytorch-UNet: skip connections, cross-entropy and Dice, ReduceLROnPlateau."""

import torch
from ports.data import batches, discs
from torch import nn
from torch.nn import functional as F


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
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(c_in, c_out)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        diff_y, diff_x = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self, n_channels=1, n_classes=3, width=8):
        super().__init__()
        self.inc = DoubleConv(n_channels, width)
        self.down = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, width * 2))
        self.up = Up(width * 2, width)
        self.outc = nn.Conv2d(width, n_classes, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down(x1)
        return self.outc(self.up(x2, x1))


def dice_loss(input, target, epsilon=1e-6):
    inter = 2 * (input * target).sum(dim=(-1, -2))
    sets_sum = input.sum(dim=(-1, -2)) + target.sum(dim=(-1, -2))
    dice = (inter + epsilon) / (sets_sum + epsilon)
    return 1 - dice.mean()


def criterion(masks_pred, true_masks):
    one_hot = F.one_hot(true_masks, 3).permute(0, 3, 1, 2).float()
    return F.cross_entropy(masks_pred, true_masks) + dice_loss(F.softmax(masks_pred, dim=1), one_hot)


def build():
    return (UNet(),)


def train(model):
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, weight_decay=1e-8, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0)
    images, masks = discs(48, size=17)
    losses, scores = [], []
    for epoch in range(5):
        model.train()
        for x, y in batches(images[:32], masks[:32], size=8, epoch=epoch):
            x, y = torch.from_numpy(x), torch.from_numpy(y)
            loss = criterion(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        scores.append(evaluate(model, torch.from_numpy(images[32:]), torch.from_numpy(masks[32:])))
        scheduler.step(scores[-1])
    return losses, [*scores, optimizer.param_groups[0]["lr"]]


@torch.inference_mode()
def evaluate(model, x, y):
    model.eval()
    predicted = F.one_hot(model(x).argmax(dim=1), 3).permute(0, 3, 1, 2).float()
    one_hot = F.one_hot(y, 3).permute(0, 3, 1, 2).float()
    return 1 - dice_loss(predicted[:, 1:], one_hot[:, 1:]).item()


if __name__ == "__main__":
    print(*train(*build()))
