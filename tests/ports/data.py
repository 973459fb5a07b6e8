"""The data of the programs, in NumPy: what a `DataLoader` or an environment gives to both sides of a pair."""

from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

TEXT = """We begin our study of the sea with the shore. The shore is where the land ends and the water begins, and the line
between the two is never still. The tide comes in and the tide goes out. The wind turns the sand and the water takes the
stones. Those who walk along the shore see the work of the wind and the water, and those who stay see it change."""


def digits(number: int, skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits: float32[number, 1, 8, 8] in [0, 1], and int64[number]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return images[skip : skip + number], labels[skip : skip + number].astype(np.int64)


def batches(*arrays: np.ndarray, size: int, epoch: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
    """The arrays in an order of the epoch's own, `size` rows at a time, without a smaller last batch."""
    order = np.random.default_rng(epoch).permutation(len(arrays[0]))
    for chosen in order[: len(order) // size * size].reshape(-1, size):
        yield tuple([array[chosen] for array in arrays])


def pairs(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of digits, and 1.0 where both are the same digit, else 0.0; half are."""
    images, labels = digits(400)
    rng = np.random.default_rng(0)
    left = rng.integers(len(images), size=number)
    same = np.arange(number) % 2 == 0
    fits = (labels[left][:, None] == labels) == same[:, None]
    right = np.array([rng.choice(np.flatnonzero(row)) for row in fits])
    return images[left], images[right], same.astype(np.float32)


def discs(number: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images of two discs, float32[number, 1, size, size], and the class of each pixel: 0, or 1 and 2 for the discs."""
    rng = np.random.default_rng(0)
    place = np.arange(size)
    masks = np.zeros((number, size, size), np.int64)
    for mask in masks:
        for kind in (1, 2):
            y, x, radius = rng.uniform(3, size - 3, size=3) * (1, 1, 0.25)
            mask[(place[:, None] - y) ** 2 + (place - x) ** 2 < (radius + 1) ** 2] = kind
    images = masks + 0.3 * rng.standard_normal(masks.shape)
    return images[:, None].astype(np.float32), masks


def sines(tasks: int, shots: int = 5, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Points of different sine waves: x and y to adapt by, x and y to judge by, float32[tasks, shots, 1]."""
    rng = np.random.default_rng(seed)
    amplitude, phase = rng.uniform(0.1, 5.0, (tasks, 1, 1)), rng.uniform(0, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5.0, 5.0, (tasks, 2 * shots, 1))
    x, y = x.astype(np.float32), (amplitude * np.sin(x + phase)).astype(np.float32)
    return x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]


class CartPole:
    """A pole on a cart that is pushed left (0) or right (1), as in gym's CartPole-v1 (Barto, Sutton and Anderson, 1983)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        self.state = self.rng.uniform(-0.05, 0.05, 4)
        return self.state.astype(np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """The next state, the reward, and whether the pole has fallen."""
        x, speed, angle, turning = self.state
        force = 10.0 if action == 1 else -10.0
        cos, sin = np.cos(angle), np.sin(angle)
        pushed = (force + 0.05 * turning**2 * sin) / 1.1
        turned = (9.8 * sin - cos * pushed) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        moved = pushed - 0.05 * turned * cos / 1.1
        self.state = np.array([x + 0.02 * speed, speed + 0.02 * moved, angle + 0.02 * turning, turning + 0.02 * turned])
        fallen = bool(abs(self.state[0]) > 2.4 or abs(self.state[2]) > 12 * np.pi / 180)
        return self.state.astype(np.float32), 1.0, fallen
