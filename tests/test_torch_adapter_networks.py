"""Training that goes from torch to here and back, and the other way: a ResNet with BatchNorm, a Transformer with a tie.

What is compared is a run of torch in float64 that was never moved; how far torch's own float32 run is from it says how far
rounding goes.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from oracle import actual as torch

import minitorch_jax as mt
from minitorch_jax import nn, optim

adapter = Lazily("minitorch_jax.adapters.torch")


def networks(nn: Any, base: Any) -> dict[str, Any]:
    """The networks of a library: of `torch.nn` and `torch.nn.Module`, or of ours."""

    class Block(base):
        def __init__(self, channels_in: int, channels: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU()
            self.downsample = None
            if stride != 1:
                shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
                self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet(base):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.layers = nn.Sequential(*[Block(8, 8, 1), Block(8, 16, 2)][:depth])
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(8 * depth, 4)

        def forward(self, x: Any) -> Any:
            return self.fc(self.pool(self.layers(self.stem(x))).reshape(len(x), -1))

    class Transformer(base):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(12, 8)
            layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 12)
            if base is torch.nn.Module:
                self.out.weight = self.embedding.weight
            else:
                self.out.tie("weight", self.embedding, "weight")

        def forward(self, words: Any) -> Any:
            return self.out(self.norm(self.encoder(self.embedding(words)))).reshape(-1, 12)

    return {"resnet": ResNet, "transformer": Transformer}


OURS = networks(nn, mt.Module)
RNG = np.random.default_rng(0)
DATA = {
    "resnet": (
        RNG.standard_normal((30, 16, 3, 8, 8)).astype(np.float32),
        RNG.integers(0, 4, (30, 16)).astype(np.int32),
    ),
    "transformer": (RNG.integers(0, 12, (30, 8, 6)).astype(np.int32), RNG.integers(0, 12, (30, 48)).astype(np.int32)),
}
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


LEG = 10


@mt.jit
def train_step(model: Any, opt: Any, x: Any, y: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(lambda model, x, y: nn.functional.cross_entropy(model(x), y), model, x, y)
    opt.step()
    return loss


class Run:
    """One network and its AdamW on both sides, trained on either."""

    def __init__(self, name: str, depth: int) -> None:
        self.xs, self.ys = DATA[name]
        torch.manual_seed(0)
        self.theirs, self.ours = networks(torch.nn, torch.nn.Module)[name](depth), OURS[name](depth)
        self.their_opt, self.opt = torch.optim.AdamW(self.theirs.parameters(), **SETTINGS), optim.AdamW([self.ours])
        self.start = {path: value.double().numpy() for path, value in self.theirs.state_dict().items()}
        self.losses: list[float] = []

    def step_theirs(self, steps: range) -> None:
        dtype = next(self.theirs.parameters()).dtype
        for t in steps:
            x = torch.from_numpy(self.xs[t])
            x = x.to(dtype) if x.is_floating_point() else x.long()
            self.their_opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.theirs(x), torch.from_numpy(self.ys[t]).long())
            loss.backward()
            self.their_opt.step()
            self.losses.append(loss.item())

    def step_ours(self, steps: range) -> None:
        batches = [(jnp.asarray(self.xs[t]), jnp.asarray(self.ys[t])) for t in steps]
        self.losses += [float(train_step(self.ours, self.opt, x, y)) for x, y in batches]

    def load(self) -> None:
        adapter.load_from_torch(self.ours, self.theirs)
        adapter.load_optimizer_from_torch(self.opt, self.their_opt, self.theirs)

    def copy(self) -> None:
        """To a torch module and optimizer that know nothing of what was before."""
        for tensor in self.theirs.state_dict().values():
            tensor.fill_(77)
        self.their_opt = torch.optim.AdamW(self.theirs.parameters(), lr=1.0)
        adapter.copy_to_torch(self.ours, self.theirs)
        adapter.copy_optimizer_to_torch(self.opt, self.their_opt, self.theirs)

    def end(self) -> dict[str, np.ndarray]:
        """What torch has at the end: parameters, statistics, counts, and the optimizer's state."""
        found = {path: value.double().numpy().copy() for path, value in self.theirs.state_dict().items()}
        for path, tensor in self.theirs.named_parameters():
            found |= {f"{path}.{name}": v.double().numpy().copy() for name, v in self.their_opt.state[tensor].items()}
        return found


def uninterrupted(name: str, depth: int, dtype: Any, steps: int) -> Run:
    run = Run(name, depth)
    run.theirs.to(dtype)
    run.step_theirs(range(steps))
    return run


def assert_within_drift(run: Run, single: Run, double: Run) -> None:
    """As tests/test_reference_networks.py has it."""
    np.testing.assert_allclose(run.losses, double.losses, rtol=1e-3)
    found, drifted, exact = run.end(), single.end(), double.end()
    assert list(found) == list(exact)
    for path, value in exact.items():
        moved = np.abs(value - run.start.get(path, 0)).max()
        drift = np.abs(drifted[path] - value).max()
        assert np.abs(found[path] - value).max() <= 1e-4 * moved + 4 * drift + 1e-7, path
        if path.endswith(("num_batches_tracked", "step")):
            assert found[path] == value == len(run.losses)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        pytest.param(name, depth, marks=pytest.mark.slow if (name, depth) != ("resnet", 1) else ())
        for name in OURS
        for depth in (1, 2)
    ],
)
def test_there_and_back_again(name: str, depth: int) -> None:
    """torch, here, torch; and here, torch, here: ten steps each, against thirty in torch alone."""
    single, double = (uninterrupted(name, depth, dtype, 3 * LEG) for dtype in (torch.float32, torch.float64))
    first, second, third = range(LEG), range(LEG, 2 * LEG), range(2 * LEG, 3 * LEG)
    run = Run(name, depth)
    run.step_theirs(first)
    run.load()
    run.step_ours(second)
    run.copy()
    run.step_theirs(third)
    assert_within_drift(run, single, double)
    if name == "transformer":
        assert run.theirs.out.weight is run.theirs.embedding.weight
        assert len(run.opt.state_dict()["state"]) == len(list(run.theirs.parameters()))
    compiled = train_step.num_compiles
    other = Run(name, depth)
    other.load()  # only the start: torch has taken no step
    other.step_ours(first)
    other.copy()
    other.step_theirs(second)
    other.load()
    other.step_ours(third)
    other.copy()
    assert_within_drift(other, single, double)
    assert train_step.num_compiles == compiled


@pytest.mark.parametrize("mistake", ["no optimizer state", "no running statistics", "a weight that is off by 1e-4"])
def test_the_comparison_can_fail(mistake: str) -> None:
    single, double = (uninterrupted("resnet", 1, dtype, 6) for dtype in (torch.float32, torch.float64))
    run = Run("resnet", 1)
    run.step_theirs(range(3))
    if mistake == "no optimizer state":
        run.their_opt = torch.optim.AdamW(run.theirs.parameters(), **SETTINGS)
    elif mistake == "no running statistics":
        run.theirs.stem[1].reset_running_stats()
    else:
        run.theirs.state_dict()["fc.bias"].add_(1e-4)
    run.step_theirs(range(3, 6))
    with pytest.raises(AssertionError):
        assert_within_drift(run, single, double)
