"""A siamese network: one encoder for both images of a pair, and the contrastive loss of Hadsell et al., 2006."""

from ports.data import batches, pairs

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F


class EmbeddingNet(nn.Module):
    def __init__(self):
        self.convnet = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.PReLU(), nn.MaxPool2d(2, stride=2), nn.Conv2d(8, 16, 2), nn.PReLU()
        )
        self.fc = nn.Sequential(nn.Linear(16 * 2 * 2, 32), nn.PReLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, x):
        output = self.convnet(x)
        output = output.reshape(output.shape[0], -1)
        return self.fc(output)


class SiameseNet(nn.Module):
    def __init__(self, embedding_net):
        self.embedding_net = embedding_net

    def forward(self, x1, x2):
        return self.embedding_net(x1), self.embedding_net(x2)


class ContrastiveLoss(nn.Module):
    def __init__(self, margin):
        self.margin = margin

    def forward(self, output1, output2, target):
        distances = F.pairwise_distance(output1, output2)
        losses = target * distances**2 + (1 - target) * F.relu(self.margin - distances) ** 2
        return 0.5 * losses.mean()


def build():
    return (SiameseNet(EmbeddingNet()),)


loss_fn = ContrastiveLoss(margin=1.0)


def contrast(model, x1, x2, target):
    return loss_fn(*model(x1, x2), target)


@mt.jit
def train_step(model, optimizer, x1, x2, target):
    optimizer.zero_grad()
    loss = mt.backward(contrast, model, x1, x2, target)
    optimizer.step()
    return loss


def rate(step):
    return optim.schedules.cosine(1e-2, 4)(step // 5)  # 5 batches are an epoch


def train(model):
    model.compile()  # one program for evaluation
    optimizer = optim.Adam([model], lr=rate)
    losses = []
    for epoch in range(4):
        model.train()
        for x1, x2, target in batches(*pairs(160), size=32, epoch=epoch):
            losses.append(train_step(model, optimizer, x1, x2, target))
    return losses, test(model)


def test(model):
    model.eval()
    x1, x2, target = pairs(100)
    distances = F.pairwise_distance(*model(x1, x2))
    return [distances.mean(), ((distances < 0.5) == (target == 1)).mean()]


if __name__ == "__main__":
    print(*train(*build()))
