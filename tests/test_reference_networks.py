"""Networks as they are written in torch, built from either library: torch's weights load by name, and training agrees."""

import copy
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import actual as torch

import minitorch_jax as mt
from minitorch_jax import nn, optim


def networks(nn, base):
    """The networks of a library: of `torch.nn` and `torch.nn.Module`, or of ours."""

    class Block(base):
        def __init__(self, channels_in, channels, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.downsample = None
            if stride != 1 or channels_in != channels:
                self.downsample = nn.Sequential(
                    nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
                )

        def forward(self, x):
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet18(base):
        """As torchvision's, with its names, but narrower."""

        def __init__(self, width=4, classes=10):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            for i in range(4):
                before, channels = width * 2 ** max(i - 1, 0), width * 2**i
                blocks = Block(before, channels, 1 + (i > 0)), Block(channels, channels, 1)
                setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(8 * width, classes)

        def forward(self, x):
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(self.avgpool(x).reshape(len(x), -1))

    class Tagger(base):
        """A two-layer bidirectional LSTM over embedded words, whose last output is classified."""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 6, padding_idx=0)
            self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
            self.fc = nn.Linear(10, 4)

        def forward(self, words):
            return self.fc(self.lstm(self.embedding(words))[0][:, -1])

    class Encoder(base):
        """A four-layer Transformer over embedded words, without dropout, so that both libraries compute one thing."""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(8)
            self.fc = nn.Linear(8, 4)

        def forward(self, words):
            return self.fc(self.norm(self.encoder(self.embedding(words))[:, 0]))

    def mlp():
        return nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)
        )

    return {"mlp": mlp, "resnet18": ResNet18, "lstm": Tagger, "transformer": Encoder}


RNG = np.random.default_rng(0)
OURS = networks(nn, mt.Module)
IMAGES = RNG.standard_normal((20, 8, 3, 64, 64)).astype(np.float32)
WORDS = RNG.integers(0, 20, (20, 8, 7)).astype(np.int32)
# where four images end as one pixel each, and with momentum, torch's own float32 and float64 are 30 % apart after 20 steps:
# BatchNorm of few numbers makes much of a rounding
MOMENTUM = {"resnet18": 0.0}
DATA = {
    "mlp": (RNG.standard_normal((20, 8, 3, 4)).astype(np.float32), 4),
    "resnet18": (IMAGES, 10),
    "lstm": (WORDS, 4),
    "transformer": (WORDS, 4),
}


def pair(name):
    """Both networks with torch's weights."""
    torch.manual_seed(0)
    theirs, ours = networks(torch.nn, torch.nn.Module)[name](), OURS[name]()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tensor(x):
    return torch.from_numpy(x).long() if x.dtype == np.int32 else torch.from_numpy(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "resnet18")) for n in OURS])
def test_torchs_weights_give_torchs_outputs(name):
    ours, theirs = pair(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours.eval()).count("\n") == repr(theirs.eval()).count("\n") or name == "transformer"
    torch.backends.mha.set_fastpath_enabled(False)
    x = DATA[name][0][0]
    with torch.no_grad():
        expected = theirs(tensor(x)).numpy()
    predict = mt.jit(lambda x: ours(x))
    np.testing.assert_allclose(predict(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "resnet18" else ()) for name in OURS]
)
def test_twenty_steps_of_training_stay_together(name):
    """Losses, and parameters and buffers at the end, against torch's in float64; its float32 says how far rounding goes.

    The ResNet is trained in float64 here, too: it crosses kinks from which float32 goes elsewhere, by 2 % in torch itself.
    """
    with jax.enable_x64(True) if name == "resnet18" else nullcontext():
        train_twenty_steps(name, jnp.float64 if name == "resnet18" else jnp.float32)


def train_twenty_steps(name, dtype):
    ours, theirs = pair(name)
    ours.astype(dtype)
    start = {path: np.array(value) for path, value in ours.state_dict().items()}
    xs, classes = DATA[name]
    ys = np.random.default_rng(1).integers(0, classes, xs.shape[:2]).astype(np.int32)
    momentum = MOMENTUM.get(name, 0.9)
    opt = optim.SGD([ours], lr=0.01, momentum=momentum)

    @mt.jit
    def train_step(x, y):
        opt.zero_grad()
        loss = mt.backward(lambda x, y: nn.functional.cross_entropy(ours(x), y), x, y)
        opt.step()
        return loss

    def trained(model, dtype):
        model.to(dtype)
        their_opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
        found = []
        for x, y in zip(xs, ys, strict=True):
            their_opt.zero_grad()
            x = tensor(x)
            x = x.to(dtype) if x.is_floating_point() else x
            loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(y).long())
            loss.backward()
            their_opt.step()
            found.append(loss.item())
        return found, {path: value.double().numpy() for path, value in model.state_dict().items()}

    exact_losses, exact = trained(copy.deepcopy(theirs), torch.float64)
    their_losses, their_state = trained(theirs, torch.float32)
    inputs = [jnp.asarray(x, x.dtype if x.dtype == np.int32 else dtype) for x in xs]
    losses = [float(train_step(x, jnp.asarray(y))) for x, y in zip(inputs, ys, strict=True)]
    np.testing.assert_allclose(losses, exact_losses, rtol=1e-4 if dtype == jnp.float32 else 1e-9)
    for path, value in ours.state_dict().items():
        moved = np.abs(exact[path] - start[path]).max()
        drift = np.abs(their_state[path] - exact[path]).max() if dtype == jnp.float32 else 0
        assert np.abs(np.float64(value) - exact[path]).max() <= 1e-4 * moved + 4 * drift + 1e-7, path
    assert train_step.num_compiles == 1
