"""An image classifier: a small ResNet, trained by SGD with momentum, weight decay and a rate that falls by the epoch."""

from ports.data import batches, digits

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride=1):
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, width=8, num_classes=10):
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = Block(width, width)
        self.layer2 = Block(width, 2 * width, stride=2)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(2 * width, num_classes)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m, "weight", mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, 1).reshape(len(x), -1)
        return self.fc(self.dropout(x))


def build():
    return (ResNet(),)


criterion = nn.CrossEntropyLoss(label_smoothing=0.1)


@mt.jit
def train_step(model, opt, x, y):
    opt.zero_grad()
    loss = mt.backward(lambda model, x, y: criterion(model(x), y), model, x, y)
    nn.utils.clip_grad_norm_(model, max_norm=2.0)
    opt.step()
    return loss


def train(model):
    lr = optim.schedules.step(0.1, step_size=5, gamma=0.5)  # 5 batches are an epoch
    opt = optim.SGD([model], lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.compile()  # one program for evaluation
    losses, scores = [], []
    for epoch in range(4):
        model.train()
        for x, y in batches(*digits(160), size=32, epoch=epoch):
            losses.append(train_step(model, opt, x, y))
        scores.append(evaluate(model, *digits(100, skip=1000)))
    return losses, scores


def evaluate(model, x, y):
    model.eval()
    output = model(x)
    return F.cross_entropy(output, y), (output.argmax(axis=1) == y).mean()


if __name__ == "__main__":
    print(*train(*build()))
