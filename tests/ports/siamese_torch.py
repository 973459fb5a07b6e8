"""A siamese network: one encoder for both images of a pair, and the contrastive loss of Hadsell et al., 2006."""

import torch
from ports.data import batches, pairs
from torch import nn
from torch.nn import functional as F


class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.convnet = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.PReLU(), nn.MaxPool2d(2, stride=2), nn.Conv2d(8, 16, 2), nn.PReLU()
        )
        self.fc = nn.Sequential(nn.Linear(16 * 2 * 2, 32), nn.PReLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, x):
        output = self.convnet(x)
        output = output.view(output.size()[0], -1)
        return self.fc(output)


class SiameseNet(nn.Module):
    def __init__(self, embedding_net):
        super().__init__()
        self.embedding_net = embedding_net

    def forward(self, x1, x2):
        return self.embedding_net(x1), self.embedding_net(x2)


class ContrastiveLoss(nn.Module):
    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, output1, output2, target):
        distances = F.pairwise_distance(output1, output2)
        losses = target * distances.pow(2) + (1 - target) * F.relu(self.margin - distances).pow(2)
        return 0.5 * losses.mean()


def build():
    return (SiameseNet(EmbeddingNet()),)


def train(model):
    loss_fn = ContrastiveLoss(margin=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    losses = []
    for epoch in range(4):
        model.train()
        for batch in batches(*pairs(160), size=32, epoch=epoch):
            x1, x2, target = map(torch.from_numpy, batch)
            optimizer.zero_grad()
            outputs = model(x1, x2)
            loss = loss_fn(*outputs, target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    return losses, test(model)


@torch.no_grad()
def test(model):
    model.eval()
    x1, x2, target = map(torch.from_numpy, pairs(100))
    distances = F.pairwise_distance(*model(x1, x2))
    return [distances.mean().item(), ((distances < 0.5) == (target == 1)).float().mean().item()]


if __name__ == "__main__":
    print(*train(*build()))
