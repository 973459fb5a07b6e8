"""Attention as functions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...module.parameter import is_narrow, wide_dtype
from ...module.random import next_key
from ...runtime.platforms import on_cpu
from ...state.static_values import describe
from .autocast import in_lower_type
from .dropout import dropout, probability
from .spatial import floating


@jax.custom_jvp
def _logits(query: jax.Array, key: jax.Array) -> jax.Array:
    """q k^T, in float32 or wider."""
    return jnp.einsum("...le,...se->...ls", query, key, preferred_element_type=wide_dtype(query.dtype))


@_logits.defjvp
def _logits_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The backward pass multiplies in the inputs' own dtype. JAX's rule would multiply bfloat16 in float32."""
    (query, key), (d_query, d_key) = primals, tangents
    logits = _logits(query, key)
    d_logits = jnp.einsum("...le,...se->...ls", d_query, key) + jnp.einsum("...le,...se->...ls", query, d_key)
    return logits, d_logits.astype(logits.dtype)


# On CPUs, attention is computed by blocks of queries. Of a causal one, a block leaves out the keys after its end: 4 blocks
# compute 5/8 of the weights, but take longer to compile. Many weights are never held at once: the backward pass computes
# those of a block again.
_CAUSAL_BLOCKS = 4
_CAUSAL_LENGTH = 512  # from this length on. At 256, the gain of a sixth does not pay for compiling twice as long.
_WEIGHTS = 2**24  # how many weights are computed at once. Beyond, blocks have _BLOCK weights.
_BLOCK = 2**22
_FEWEST_ROWS = 16  # of a block


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: tuple[jax.Array, ...] = (),
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_key: Any = None,
    empty_rows: bool = False,
    need_weights: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """The attention of `scaled_dot_product_attention` and `MultiheadAttention`, and its weights after dropout.

    Args:
        query: `(..., L, E)`; key: `(..., S, E)`; value: `(..., S, E_v)`. The number of the query's heads (axis -3) may
            be a multiple of the number of the key's.
        masks: each of the rank of the weights and broadcastable to their shape `(..., L, S)`. Booleans are True where
            a key takes part; floats are added to the logits.
        empty_rows: True returns 0 for a query whose keys are all masked; False returns NaN.
        need_weights: False returns None for the weights.
    """
    settings: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "empty_rows": empty_rows,
    }
    if need_weights:
        return _whole(query, key, value, masks, dropout_key, **settings)
    length, source = query.shape[-2], key.shape[-2]
    lead = query.shape[:-2] if _is_grouped(query, key, value) else np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    rows = None  # of a block; None stands for few weights
    if math.prod(lead) * length * source > _WEIGHTS:
        rows = min(max(_BLOCK // (math.prod(lead) * source), _FEWEST_ROWS), length)
    blocks = _CAUSAL_BLOCKS if is_causal and length >= _CAUSAL_LENGTH else 1
    if rows is None and (blocks == 1 or dropout_p > 0.0):
        return _whole(query, key, value, masks, dropout_key, **settings)[0], None
    dropout_key = next_key(dropout_key) if 0.0 < dropout_p < 1.0 else None
    whole = partial(_output, **settings)
    in_blocks = partial(_in_blocks, blocks=blocks, rows=rows, **settings)
    return on_cpu(in_blocks, whole, query, key, value, masks, dropout_key), None


def _is_grouped(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """True if several heads of the query share a key and a value."""
    return query.shape[-3:-2] > key.shape[-3:-2] == value.shape[-3:-2] != ()


def _whole(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: tuple[jax.Array, ...],
    dropout_key: Any,
    first: Any = 0,
    *,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    empty_rows: bool,
) -> tuple[jax.Array, jax.Array]:
    """The outputs and the weights of queries of which the first has the number `first`."""
    length, heads = query.shape[-2], query.shape[-3:-2]
    grouped = _is_grouped(query, key, value)
    if grouped:  # heads that share a key become rows of one matrix product
        query = query.reshape(*query.shape[:-3], key.shape[-3], -1, query.shape[-1])
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    # Without a mask, XLA on CPUs writes the scale out as an array of the logits' size. A narrow query would be rounded.
    early = not (masks or is_causal or is_narrow(query))
    logits = _logits(query * scale if early else query, key)
    rows = logits.shape
    if grouped:
        logits = logits.reshape(*rows[:-3], *heads, length, rows[-1])
    logits = logits if early else logits * scale
    may_be_empty = bool(masks)
    if is_causal:  # every query sees the first key
        causal = jnp.expand_dims(first + jnp.arange(length), 1) >= jnp.expand_dims(jnp.arange(rows[-1]), 0)
        masks = (*masks, causal.reshape((1,) * (logits.ndim - 2) + causal.shape))
    for mask in masks:
        logits = jnp.where(mask, logits, -jnp.inf) if mask.dtype == bool else logits + mask.astype(logits.dtype)
    weights = jax.nn.softmax(logits, axis=-1, where=logits != -jnp.inf if may_be_empty and empty_rows else None)
    weights = dropout(weights.astype(value.dtype), dropout_p, key=dropout_key)
    out = jnp.einsum("...ls,...sv->...lv", weights.reshape(rows) if grouped else weights, value)
    return out.reshape(*out.shape[:-3], *heads, length, out.shape[-1]) if grouped else out, weights


def _output(*args: Any, **settings: Any) -> jax.Array:
    return _whole(*args, **settings)[0]


@partial(jax.jit, static_argnames=("is_causal", "blocks", "rows", "dropout_p", "empty_rows"))
def _in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    masks: tuple[jax.Array, ...],
    dropout_key: Any,
    *,
    is_causal: bool,
    blocks: int,
    rows: int | None,
    **settings: Any,
) -> jax.Array:
    """The outputs, by blocks of queries. With `rows`, these are cut further, and only the weights of one are held."""
    length, source = query.shape[-2], key.shape[-2]
    size = -(-length // blocks)
    if rows is not None:
        size = -(-size // rows) * rows
    outputs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = min(stop, source) if is_causal else source
        seen = tuple(mask[..., :keys] for mask in masks)

        def block(first: Any, query: Any, masks: Any, keys: int = keys) -> jax.Array:
            of_block = None if dropout_key is None else jax.random.fold_in(dropout_key, first)
            own = key[..., :keys, :], value[..., :keys, :]
            return _output(query, *own, masks, of_block, first, is_causal=is_causal, **settings)

        cut = [_rows(x, start, stop) for x in (query, *seen)]
        outputs.append(block(start, cut[0], tuple(cut[1:])) if rows is None else _one_by_one(block, rows, start, cut))
    return jnp.concatenate(outputs, axis=-2)


def _rows(x: jax.Array, start: int, stop: int) -> jax.Array:
    """These rows of queries or of a mask, which may have one row for all queries."""
    return x if x.shape[-2] == 1 else x[..., start:stop, :]


def _one_by_one(block: Any, rows: int, start: int, arrays: list[jax.Array]) -> jax.Array:
    """The outputs of `block` for all rows of the arrays, computed in a loop that keeps no weights for the backward pass."""
    block = jax.checkpoint(block)
    count, rest = divmod(arrays[0].shape[-2], rows)
    if count == 0:
        return block(start, arrays[0], tuple(arrays[1:]))
    whole = [_rows(x, 0, count * rows) for x in arrays]
    stacked = [None if x.shape[-2] == 1 else _stacked(x, count) for x in whole]

    def step(_: None, inputs: Any) -> tuple[None, jax.Array]:
        first, parts = inputs
        query, *masks = (x if part is None else part for x, part in zip(whole, parts, strict=True))
        return None, block(first, query, tuple(masks))

    _, out = jax.lax.scan(step, None, (start + rows * jnp.arange(count), stacked))
    out = jnp.moveaxis(out, 0, -3)
    out = out.reshape(*out.shape[:-3], count * rows, out.shape[-1])
    if not rest:
        return out
    query, *masks = (_rows(x, count * rows, count * rows + rest) for x in arrays)
    return jnp.concatenate([out, block(start + count * rows, query, tuple(masks))], axis=-2)


def _stacked(x: jax.Array, count: int) -> jax.Array:
    """The rows as `count` blocks along a new first axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, -1, x.shape[-1]), -3, 0)


@in_lower_type
def scaled_dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    dropout_key: Any = None,
) -> jax.Array:
    """softmax(q k^T scale + mask) v.

    Logits and softmax are computed in float32 or wider. The result is 0 for a query whose keys are all masked. On CPUs, more
    than 16 million weights are computed by blocks of queries: they are never held at once, nor for the backward pass.

    Args:
        query: `(N, ..., H, L, E)`, or only `(L, E)`.
        key: `(N, ..., H, S, E)`.
        value: `(N, ..., H, S, E_v)`.
        attn_mask: broadcastable to `(N, ..., H, L, S)`. Booleans are True where a key takes part; floats are added to
            the logits.
        dropout_p: the probability of dropping a weight. A function has no `eval()` mode: pass 0 for inference.
        is_causal: True lets query i see the keys 0 to i only.
        scale: 1 / sqrt(E) by default.
        enable_gqa: True allows key and value to have fewer heads than the query. Each of their heads then serves a
            group of the query's heads.
        dropout_key: a `jax.random` key for the dropout. By default, the next key of the current stream (`mt.seed`,
            `mt.rng`).

    Returns:
        `(N, ..., H, L, E_v)`.

    Raises:
        ValueError: if shapes or dtypes do not fit, or `dropout_p` is not in [0, 1].
        TypeError: if the mask is neither boolean nor floating, or the other arrays are not floating.

    Source: torch.nn.functional.scaled_dot_product_attention; Vaswani et al., "Attention is all you need", 2017.

    Example:
        >>> q, k = jnp.ones((2, 5, 4)), jnp.ones((2, 3, 4))
        >>> scaled_dot_product_attention(q, k, k).shape
        (2, 5, 4)
    """
    shapes = f"{describe(query)}, {describe(key)} and {describe(value)}"
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ValueError(f"query, key and value need the shapes (..., L, E), (..., S, E), (..., S, E_v); got {shapes}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(f"query and key must be equal in the last axis, key and value in the one before; got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must be of one dtype; got {shapes}")
    floating(query, "scaled_dot_product_attention")
    if enable_gqa:
        heads = [x.shape[-3] if x.ndim > 2 else 1 for x in (query, key, value)]
        if heads[0] % max(heads[1], 1) or heads[1] != heads[2]:
            raise ValueError(
                f"with enable_gqa, the query's heads must be a multiple of key's and value's; got {shapes}"
            )
        lead = query.shape[:-2]
    else:
        try:
            lead = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        except ValueError:
            raise ValueError(
                f"query, key and value do not fit before their last two axes: {shapes}. For fewer heads of key and value"
                " than of query, pass enable_gqa=True."
            ) from None
    masks: tuple[jax.Array, ...] = ()
    if attn_mask is not None:
        full = (*lead, query.shape[-2], key.shape[-2])
        masks = (_mask(attn_mask, full),)
    out, _ = attention(
        query,
        key,
        value,
        masks,
        is_causal=is_causal,
        scale=scale,
        dropout_p=probability(dropout_p),
        dropout_key=dropout_key,
        empty_rows=True,
        need_weights=False,
    )
    return out


def check_mask_dtype(mask: jax.Array, name: str) -> None:
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise TypeError(f"{name} must be boolean or floating; got {describe(mask)}. Convert it with `.astype(bool)`.")


def _mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A mask with the rank of the weights, which have this shape."""
    check_mask_dtype(mask, "attn_mask")
    fits = mask.ndim <= len(shape) and all(
        n in (1, size) for n, size in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask must be broadcastable to (..., L, S) = {shape}; got {describe(mask)}")
    return mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
