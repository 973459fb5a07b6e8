# mypy: disallow-subclassing-any=False
"""The networks of layers by torch's names, which are ours too. Imports neither library: it is given `nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .networks import Net


def make_class(nn: Any) -> type:
    """A class of networks, of `torch.nn` or of `minitorch_jax.nn`."""
    F = nn.functional

    class Network(nn.Module):
        """A function of this builder, as a module. Its layers are made in its first call."""

        def __init__(self, define: Net) -> None:
            super().__init__()
            self.define = define
            self.layers = nn.ModuleDict()

        def forward(self, *inputs: Any) -> Any:
            return self.define(self, *inputs)

        def layer(self, name: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if name not in self.layers:
                self.layers[name] = make(*args, **options)
            return self.layers[name]

        def conv(
            self, name: str, x: Any, out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1
        ) -> Any:
            return self.layer(name, nn.Conv2d, x.shape[1], out, kernel, stride, padding, groups=groups)(x)

        def conv_transpose(self, name: str, x: Any, out: int, kernel: int, stride: int, padding: int) -> Any:
            return self.layer(name, nn.ConvTranspose2d, x.shape[1], out, kernel, stride, padding)(x)

        def linear(self, name: str, x: Any, out: int) -> Any:
            return self.layer(name, nn.Linear, x.shape[-1], out)(x)

        def batch_norm(self, name: str, x: Any) -> Any:
            return self.layer(name, nn.BatchNorm2d, x.shape[1])(x)

        def group_norm(self, name: str, x: Any, groups: int) -> Any:
            return self.layer(name, nn.GroupNorm, groups, x.shape[1])(x)

        def layer_norm(self, name: str, x: Any) -> Any:
            return self.layer(name, nn.LayerNorm, x.shape[-1])(x)

        def embedding(self, name: str, ids: Any, number: int, size: int) -> Any:
            return self.layer(name, nn.Embedding, number, size)(ids)

        def lstm(self, name: str, x: Any, hidden: int) -> Any:
            return self.layer(name, nn.LSTM, x.shape[-1], hidden, bias=False, batch_first=True)(x)[0]

        def causal_attention(self, q: Any, k: Any, v: Any) -> Any:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def max_pool(self, x: Any) -> Any:
            return F.max_pool2d(x, 2)

        def average(self, x: Any) -> Any:
            return F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]

        def upsample(self, x: Any) -> Any:
            return F.interpolate(x, scale_factor=2, mode="nearest")

        def concatenate(self, *images: Any) -> Any:
            raise NotImplementedError  # of the array's library

        def per_channel(self, x: Any) -> Any:
            return x[:, :, None, None]

        def flat(self, x: Any) -> Any:
            return x.reshape(x.shape[0], -1)

        def relu(self, x: Any) -> Any:
            return F.relu(x)

        def leaky_relu(self, x: Any) -> Any:
            return F.leaky_relu(x, 0.2)

        def gelu(self, x: Any) -> Any:
            return F.gelu(x)

        def silu(self, x: Any) -> Any:
            return F.silu(x)

        def tanh(self, x: Any) -> Any:
            return F.tanh(x)

    return Network
