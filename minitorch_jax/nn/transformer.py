"""Transformers: stacks of encoder or decoder layers, and an encoder with a decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from . import init
from .container import ModuleList
from .normalization import LayerNorm
from .transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer


class _Stack(Module):
    """Base of the stacks: copies of a layer, applied one after another, then an optional normalisation."""

    def _declare(self, layer: Module, num_layers: int, norm: Module | None) -> None:
        self.layers = ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm

    def _run(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return x if self.norm is None else self.norm(x)


class TransformerEncoder(_Stack):
    """`num_layers` copies of an encoder layer, applied one after another.

    The copies start with equal parameters, but each is trained separately.

    Args:
        encoder_layer: the layer to copy.
        num_layers: the number of copies.
        norm: a module applied to the last output, or None.
        enable_nested_tensor, mask_check: accepted as in torch; they have no effect. In torch they select a path with
            nested tensors in `eval()` mode.

    Shapes: as the layer's; `mask` is its `src_mask`. `is_causal=True` says that the mask is causal. With None the layer
    reads the mask; the output is the same.

    Source: torch.nn.TransformerEncoder. Differs from PyTorch: in `eval()` mode, torch may return zeros at padded
    positions; this layer does not.

    Example:
        >>> layer = TransformerEncoderLayer(8, 2, dim_feedforward=16, key=jax.random.key(0))
        >>> TransformerEncoder(layer, 2).eval()(jnp.ones((5, 3, 8))).shape
        (5, 3, 8)
    """

    def __init__(
        self,
        encoder_layer: Module,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        self._declare(encoder_layer, num_layers, norm)
        self.enable_nested_tensor, self.mask_check = enable_nested_tensor, mask_check

    def forward(
        self,
        src: jax.Array,
        mask: jax.Array | None = None,
        src_key_padding_mask: jax.Array | None = None,
        is_causal: bool | None = None,
    ) -> jax.Array:
        return self._run(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))


class TransformerDecoder(_Stack):
    """`num_layers` copies of a decoder layer, applied one after another. All of them attend to the same memory.

    The copies start with equal parameters, but each is trained separately.

    Args:
        decoder_layer: the layer to copy.
        num_layers: the number of copies.
        norm: a module applied to the last output, or None.

    Shapes: as the layer's. `tgt_is_causal=True` says that `tgt_mask` is causal. With None the layer reads the mask; the
    output is the same.

    Source: torch.nn.TransformerDecoder.

    Example:
        >>> layer = TransformerDecoderLayer(8, 2, dim_feedforward=16, key=jax.random.key(0))
        >>> TransformerDecoder(layer, 2).eval()(jnp.ones((5, 3, 8)), jnp.ones((7, 3, 8))).shape
        (5, 3, 8)
    """

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        self._declare(decoder_layer, num_layers, norm)

    def forward(
        self,
        tgt: jax.Array,
        memory: jax.Array,
        tgt_mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        tgt_key_padding_mask: jax.Array | None = None,
        memory_key_padding_mask: jax.Array | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        return self._run(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=bool(tgt_is_causal),
            memory_is_causal=memory_is_causal,
        )


class Transformer(Module):
    """An encoder of `src`, and a decoder of `tgt` that attends to the encoder's output.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, dtype, key: as
            in `TransformerEncoderLayer`.
        num_encoder_layers, num_decoder_layers: the numbers of layers.
        custom_encoder: a module that replaces the encoder; it is called as a `TransformerEncoder` is.
        custom_decoder: a module that replaces the decoder; it is called as a `TransformerDecoder` is.

    Shapes: `src` is `(S, N, E)` or `(S, E)`, `tgt` is `(T, N, E)` or `(T, E)`. The output has the shape of `tgt`. Masks are
    those of `TransformerEncoder` and `TransformerDecoder`. Every trainable matrix, those of custom modules too, is drawn
    from Xavier's uniform distribution.

    Raises:
        ValueError: if a size is out of its range, or an input or a mask does not fit.

    Source: torch.nn.Transformer; Vaswani et al., "Attention is all you need", 2017.

    Example:
        >>> net = Transformer(8, 2, 1, 1, dim_feedforward=16, key=jax.random.key(0))
        >>> mask = Transformer.generate_square_subsequent_mask(5)
        >>> net.eval()(jnp.ones((7, 3, 8)), jnp.ones((5, 3, 8)), tgt_mask=mask, tgt_is_causal=True).shape
        (5, 3, 8)
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[jax.Array], jax.Array] = F.relu,
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        encoder_key, decoder_key, key = jax.random.split(next_key(key), 3)
        settings: Any = (dropout, activation, layer_norm_eps, batch_first, norm_first, bias)

        def norm() -> LayerNorm:
            return LayerNorm(d_model, eps=layer_norm_eps, bias=bias, dtype=dtype)

        self.encoder = custom_encoder
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(
                d_model, nhead, dim_feedforward, *settings, dtype=dtype, key=encoder_key
            )
            self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        self.decoder = custom_decoder
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(
                d_model, nhead, dim_feedforward, *settings, dtype=dtype, key=decoder_key
            )
            self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first
        parameters = self.parameters()
        for i, k in enumerate(jax.random.split(key, len(parameters))):
            shape, kind = parameters[i].shape, parameters[i].dtype
            if len(shape) > 1:
                parameters[i] = init.xavier_uniform(k, shape, dtype=kind)

    def forward(
        self,
        src: jax.Array,
        tgt: jax.Array,
        src_mask: jax.Array | None = None,
        tgt_mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        src_key_padding_mask: jax.Array | None = None,
        tgt_key_padding_mask: jax.Array | None = None,
        memory_key_padding_mask: jax.Array | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        batch = 0 if self.batch_first else 1
        one_batch = src.ndim == tgt.ndim and (src.ndim == 2 or src.shape[batch] == tgt.shape[batch])
        if not one_batch or src.shape[-1] != self.d_model or tgt.shape[-1] != self.d_model:
            shapes = "(N, S, {0}) and (N, T, {0})" if self.batch_first else "(S, N, {0}) and (T, N, {0})"
            raise ValueError(
                f"this Transformer takes src and tgt of shapes {shapes.format(self.d_model)}, or both without N; got"
                f" {tuple(src.shape)} and {tuple(tgt.shape)}"
            )
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
        out: jax.Array = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return out

    @staticmethod
    def generate_square_subsequent_mask(sz: int, *, dtype: Any = jnp.float32) -> jax.Array:
        """The causal mask `(sz, sz)`, which is added to the logits: 0 where a key takes part, -inf after the diagonal.

        Example:
            >>> Transformer.generate_square_subsequent_mask(2)
            Array([[  0., -inf],
                   [  0.,   0.]], dtype=float32)
        """
        return jnp.triu(jnp.full((sz, sz), -jnp.inf, dtype), 1)
