"""The layers of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from .attention import MultiheadAttention
from .dropout import Dropout
from .functional.dtypes import promoted
from .linear import Linear
from .normalization import LayerNorm

_ACTIVATIONS: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu}


class _Layer(Module):
    """Base of the two kinds of layer: blocks with residuals. The last block is W2 activation(W1 x + b1) + b2."""

    self_attn: Any
    multihead_attn: Any

    _attentions: tuple[str, ...]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[jax.Array], jax.Array] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be 'relu', 'gelu' or a function; got {activation!r}")
        *keys, key1, key2 = jax.random.split(next_key(key), len(self._attentions) + 2)
        for name, k in zip(self._attentions, keys, strict=True):
            attention = MultiheadAttention(
                d_model, nhead, dropout=dropout, bias=bias, batch_first=batch_first, dtype=dtype, key=k
            )
            setattr(self, name, attention)
        self.linear1 = Linear(d_model, dim_feedforward, bias=bias, dtype=dtype, key=key1)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias=bias, dtype=dtype, key=key2)
        self.norm_first = norm_first
        blocks = range(1, len(self._attentions) + 2)
        for i in blocks:
            setattr(self, f"norm{i}", LayerNorm(d_model, eps=layer_norm_eps, bias=bias, dtype=dtype))
        for i in blocks:
            setattr(self, f"dropout{i}", Dropout(dropout))
        self.activation: Any = _ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def _residual(self, i: int, x: jax.Array, block: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """x + block(x), with a normalisation before the block or after the sum."""
        norm, dropout = getattr(self, f"norm{i}"), getattr(self, f"dropout{i}")
        out: jax.Array
        x, out = promoted(x, dropout(block(norm(x) if self.norm_first else x)))  # they differ under `mt.autocast`
        out = x + out
        return out if self.norm_first else norm(out)

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        out: jax.Array = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return out


class TransformerEncoderLayer(_Layer):
    """Self-attention, then a feed-forward network at each position. Each block has a residual and a normalisation.

    Args:
        d_model: E, the size of the inputs and the output.
        nhead: the number of attention heads.
        dim_feedforward: the size of the hidden layer of the feed-forward network.
        dropout: in training, the probability of dropping attention weights, hidden units and outputs of blocks.
        activation: "relu", "gelu", or a function or module.
        layer_norm_eps: the `eps` of each `LayerNorm`.
        batch_first: True if batches are `(N, S, E)`.
        norm_first: True normalises the input of each block, False the sum after it.
        bias: True adds a bias to linear maps and normalisations.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: input and output `(S, N, E)` or `(S, E)`. `src_mask` is the `attn_mask` of `MultiheadAttention`,
    `src_key_padding_mask` is its `key_padding_mask`, and `is_causal` says that `src_mask` is causal.

    Raises:
        ValueError: if a size is out of its range, or an input or a mask does not fit.

    Source: torch.nn.TransformerEncoderLayer; Vaswani et al., "Attention is all you need", 2017. Differs from PyTorch: in
    `eval()` mode, torch may return zeros at masked positions; this layer does not.

    Example:
        >>> layer = TransformerEncoderLayer(8, 2, dim_feedforward=16, key=jax.random.key(0))
        >>> layer.eval()(jnp.ones((5, 3, 8))).shape
        (5, 3, 8)
    """

    _attentions = ("self_attn",)

    def forward(
        self,
        src: jax.Array,
        src_mask: jax.Array | None = None,
        src_key_padding_mask: jax.Array | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        masks = dict(attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        x = self._residual(1, src, lambda x: self.self_attn(x, x, x, need_weights=False, **masks)[0])
        return self._residual(2, x, self._feed_forward)


class TransformerDecoderLayer(_Layer):
    """Self-attention, attention to the memory, then a feed-forward network at each position.

    Each of these blocks has a residual and a normalisation.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, dtype, key: as
            in `TransformerEncoderLayer`.

    Shapes: `tgt` is `(T, N, E)` or `(T, E)`, `memory` is `(S, N, E)` or `(S, E)`. The output has the shape of `tgt`. Masks
    are those of `MultiheadAttention`: `tgt_mask` and `tgt_key_padding_mask` for the first attention, `memory_mask` and
    `memory_key_padding_mask` for the second. `tgt_is_causal` and `memory_is_causal` say that a mask is causal.

    Raises:
        ValueError: if a size is out of its range, or an input or a mask does not fit.

    Source: torch.nn.TransformerDecoderLayer.

    Example:
        >>> layer = TransformerDecoderLayer(8, 2, dim_feedforward=16, key=jax.random.key(0))
        >>> layer.eval()(jnp.ones((5, 3, 8)), jnp.ones((7, 3, 8))).shape
        (5, 3, 8)
    """

    _attentions = ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt: jax.Array,
        memory: jax.Array,
        tgt_mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        tgt_key_padding_mask: jax.Array | None = None,
        memory_key_padding_mask: jax.Array | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        own = dict(attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
        other = dict(attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal)
        x = self._residual(1, tgt, lambda x: self.self_attn(x, x, x, need_weights=False, **own)[0])
        x = self._residual(2, x, lambda x: self.multihead_attn(x, memory, memory, need_weights=False, **other)[0])
        return self._residual(3, x, self._feed_forward)
