"""Multi-head attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import fresh_parameter
from ..module.parametrized import like
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from ..state.static_values import describe
from . import init
from .functional.attention import attention, check_mask_dtype
from .functional.autocast import lower_dtype
from .functional.dropout import probability
from .functional.dtypes import of_one_dtype
from .linear import Linear


class MultiheadAttention(Module):
    """Multi-head attention. Each head computes softmax(q k^T / sqrt(D)) v; a linear map of all heads is the output.

    Each head has its own projections q, k and v of the query, the key and the value.

    Args:
        embed_dim: E, the size of the queries and of the output. Each head has the size D = E / `num_heads`.
        num_heads: H, the number of heads.
        dropout: in training, the probability of dropping an attention weight.
        bias: True adds a bias to each projection.
        add_bias_kv: True adds one trainable key and value after the projections.
        add_zero_attn: True adds one key and value of zeros.
        kdim: E_k, the size of the keys; E by default.
        vdim: E_v, the size of the values; E by default.
        batch_first: True if batches are `(N, L, E)`.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: `query` `(L, N, E)` or `(L, E)`, `key` `(S, N, E_k)` or `(S, E_k)`, `value` `(S, N, E_v)` or `(S, E_v)`. A call
    takes these three and:
        key_padding_mask: `(N, S)` or `(S,)`. Booleans are True where a key takes no part; floats are added to the logits.
        need_weights: True also returns the attention weights. False is faster.
        attn_mask: `(L, S)` or `(N H, L, S)`. Booleans are True where a key takes no part; floats are added to the logits.
        average_attn_weights: True returns weights averaged over the heads, `(N, L, S)`; False returns `(N, H, L, S)`.
        is_causal: True says that `attn_mask` is causal (`Transformer.generate_square_subsequent_mask`). The layer then
            need not read the mask. It still does with `key_padding_mask`, `need_weights` or added keys.
    The layer returns `(output, weights)`. The output has the query's shape; the weights are None without `need_weights`.
    For a query whose keys are all masked, the output is NaN with `need_weights`. Without, its attention is 0, as in torch.

    To divide the layer over the axis "model" of a mesh, cut `in_proj_weight` along its inputs, `P(None, "model")`, and
    `out_proj.weight` by `P("model")`. The outputs of `in_proj_weight` are q, k and v in turn, as in torch: a cut along them
    crosses the three, which costs 2 collective-permutes and 4 all-to-alls a step.

    Raises:
        ValueError: if sizes do not fit, or `is_causal` is True without an `attn_mask`.
        TypeError: if a mask is neither boolean nor floating.

    Source: torch.nn.MultiheadAttention; Vaswani et al., "Attention is all you need", 2017. Differs from PyTorch:
    `is_causal` with `add_bias_kv` or `add_zero_attn` reads the mask too (torch then hides the added keys).

    Example:
        >>> layer = MultiheadAttention(8, 2, batch_first=True, key=jax.random.key(0))
        >>> x = jnp.ones((3, 5, 8))
        >>> output, weights = layer(x, x, x)
        >>> output.shape, weights.shape
        ((3, 5, 8), (3, 5, 5))
    """

    in_proj_weight: jax.Array | Any
    q_proj_weight: jax.Array | Any
    k_proj_weight: jax.Array | Any
    v_proj_weight: jax.Array | Any
    in_proj_bias: jax.Array | Any
    bias_k: jax.Array | Any
    bias_v: jax.Array | Any

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                "MultiheadAttention needs sizes > 0 and an embed_dim that is a multiple of num_heads; got"
                f" embed_dim={embed_dim}, num_heads={num_heads}"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = probability(dropout), batch_first, add_zero_attn
        keys = jax.random.split(next_key(key), 6)
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = fresh_parameter(init.xavier_uniform(keys[0], (3 * embed_dim, embed_dim), dtype=dtype))
            self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        else:
            self.in_proj_weight = None
            for name, size, k in zip("qkv", (embed_dim, self.kdim, self.vdim), keys, strict=False):
                weight = init.xavier_uniform(k, (embed_dim, size), dtype=dtype)
                setattr(self, f"{name}_proj_weight", fresh_parameter(weight))
        self.in_proj_bias = fresh_parameter(init.zeros((3 * embed_dim,), dtype)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, dtype=dtype, key=keys[3])
        if bias:
            self.out_proj.bias = init.zeros((embed_dim,), dtype)
        for name, k in (("bias_k", keys[4]), ("bias_v", keys[5])):
            row = fresh_parameter(init.xavier_normal(k, (1, 1, embed_dim), dtype=dtype)) if add_bias_kv else None
            setattr(self, name, row)

    def forward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        key_padding_mask: jax.Array | None = None,
        need_weights: bool = True,
        attn_mask: jax.Array | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True says that attn_mask is causal, and needs an attn_mask; got None. Pass"
                " `attn_mask=nn.Transformer.generate_square_subsequent_mask(L)`"
            )
        self._check_inputs(query, key, value)
        time = 1 if query.ndim == 3 and self.batch_first else 0
        length, source = query.shape[time], key.shape[time]
        batch = () if query.ndim == 2 else (query.shape[1 - time],)
        added = (self.bias_k is not None) + self.add_zero_attn
        masks = []
        if key_padding_mask is not None:
            _check_mask(key_padding_mask, "key_padding_mask", [(*batch, source)])
            masks.append(key_padding_mask.reshape(*batch, 1, 1, source))
        only_hint = is_causal and key_padding_mask is None and not need_weights and not added
        if attn_mask is not None:
            per_head = (self.num_heads * (batch[0] if batch else 1), length, source)
            _check_mask(attn_mask, "attn_mask", [(length, source), per_head])
            lead = (1,) * len(batch) + (1,) if attn_mask.ndim == 2 else (*batch, self.num_heads)
            if not only_hint:
                masks.append(attn_mask.reshape(*lead, length, source))
        q, k, v = (self._heads(x, time) for x in self._project(query, key, value))
        out, weights = attention(
            q,
            self._extended(k, self.bias_k),
            self._extended(v, self.bias_v),
            tuple(_taking_part(mask, added) for mask in masks),
            is_causal=only_hint,
            dropout_p=self.dropout if self.training else 0.0,
            empty_rows=not need_weights,
            need_weights=need_weights,
        )
        out = self.out_proj(jnp.moveaxis(out, -2, time).reshape(query.shape))
        if weights is None:
            return out, None
        return out, weights.mean(axis=-3) if average_attn_weights else weights

    def _check_inputs(self, query: jax.Array, key: jax.Array, value: jax.Array) -> None:
        ranks = {query.ndim, key.ndim, value.ndim}
        sizes = (self.embed_dim, self.kdim, self.vdim)
        time = 1 if query.ndim == 3 and self.batch_first else 0
        fits = ranks in ({2}, {3}) and (query.shape[-1], key.shape[-1], value.shape[-1]) == sizes
        fits = fits and key.shape[:-1] == value.shape[:-1]
        if not fits or (query.ndim == 3 and query.shape[1 - time] != key.shape[1 - time]):
            wanted = "(N, L, {}), (N, S, {}), (N, S, {})" if self.batch_first else "(L, N, {}), (S, N, {}), (S, N, {})"
            got = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise ValueError(
                f"MultiheadAttention({self.embed_dim}, {self.num_heads}) takes query, key and value of shapes"
                f" {wanted.format(*sizes)}, or without N; got {got}"
            )
        if lower_dtype() is not None:
            return
        weight = like(self, "in_proj_weight")
        weight = like(self, "q_proj_weight") if weight is None else weight
        of_one_dtype("MultiheadAttention", query=query, key=key, value=value, in_proj_weight=weight)

    def _project(self, query: jax.Array, key: jax.Array, value: jax.Array) -> list[jax.Array]:
        """The projected queries, keys and values. Those of one array are computed by one matrix product."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif query is key is value:
            return jnp.split(F.linear(query, weight, bias), 3, axis=-1)
        elif key is value:
            cut = self.embed_dim
            b_q, b_kv = (None, None) if bias is None else (bias[:cut], bias[cut:])
            q = F.linear(query, weight[:cut], b_q)
            return [q, *jnp.split(F.linear(key, weight[cut:], b_kv), 2, axis=-1)]
        else:
            weights = jnp.split(weight, 3)
        biases = [None] * 3 if bias is None else jnp.split(bias, 3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _heads(self, x: jax.Array, time: int) -> jax.Array:
        """`x` divided into heads: `(N, H, L, D)` or `(H, L, D)`."""
        return jnp.moveaxis(x.reshape(*x.shape[:-1], self.num_heads, self.head_dim), time, -2)

    def _extended(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The keys or values, followed by those that `add_bias_kv` and `add_zero_attn` add."""
        shape = (*x.shape[:-2], 1, self.head_dim)
        rows = [x]
        if bias is not None:
            bias = bias.reshape(*(1,) * (x.ndim - 3), self.num_heads, 1, self.head_dim)
            rows.append(jnp.broadcast_to(bias.astype(x.dtype), shape))
        if self.add_zero_attn:
            rows.append(jnp.zeros(shape, x.dtype))
        return jnp.concatenate(rows, axis=-2) if len(rows) > 1 else x


def _check_mask(mask: jax.Array, name: str, shapes: list[tuple[int, ...]]) -> None:
    check_mask_dtype(mask, name)
    if mask.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))} here; got {describe(mask)}")


def _taking_part(mask: jax.Array, added: int) -> jax.Array:
    """The mask that `attention` takes (True where a key takes part) from torch's (True where not), with added keys."""
    mask = ~mask if mask.dtype == bool else mask
    return jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, added)], constant_values=mask.dtype == bool)
