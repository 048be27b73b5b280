"""Paged attention, gathered: copy the blocks of each sequence together, then attend as if there were no blocks.

This is the definition of paged attention, and what the other forms are compared with:

    block_tables [B, M] --gather--> K [B, M * P, ...], V --> scores --> mask --> softmax --> weighted sum

Its price is the copy: K and V of the whole context, dense and padded to the longest sequence, once in every layer.
"""

import torch
from torch import Tensor

from paged.attention.scores import (
    cap_and_bias,
    compute_dtype,
    dequantised,
    per_kv_head,
    place_tokens,
    softmax_with_sink,
    visible_keys,
)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    max_query_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed query tokens over K and V that lie in blocks.

    Args:
        query: [T, Hq, D], the query tokens of all sequences one after another, padded rows behind them.
        key_cache: [N, P, Hkv, D]; Hq is a multiple of Hkv.
        value_cache: [N, P, Hkv, Dv].
        block_tables: [B, M] integers; entries past a sequence's end name the null block.
        seq_lens: [B] tokens visible to each sequence's last query token, itself included.
        query_start_loc: [B + 1] where each sequence's query tokens begin.
        scale: of the scores; 1 / sqrt(D) as a rule, never assumed.
        window: a query sees itself and `window - 1` tokens before it; None: all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        alibi_slopes: [Hq], adds `slope * (key position - query position)`.
        sinks: [Hq], one more logit in each head's denominator.
        k_scale, v_scale: a number, [Hkv] or [N, P, Hkv]; stored value times scale is the value.
        max_query_len: most query tokens of one sequence, a host integer. None reads it from query_start_loc, for
            which the host has to wait for the device.

    Returns:
        out [T, Hq, Dv] in query's dtype, lse [T, Hq] (natural log over the keys alone) in float32, or float64 for
        float64 queries. A row that sees no key, and a padded row, gives 0 and -inf.

    Example: one sequence of three tokens in blocks 2 and 1 of two slots; equal scores, so the values' mean.
        >>> keys, values = torch.zeros(4, 2, 1, 1), torch.zeros(4, 2, 1, 1)
        >>> values[2, 0], values[2, 1], values[1, 0] = 1.0, 2.0, 6.0
        >>> tables, seq_lens, starts = torch.tensor([[2, 1]]), torch.tensor([3]), torch.tensor([0, 1])
        >>> out, lse = paged_attention(torch.ones(1, 1, 1), keys, values, tables, seq_lens, starts, scale=1.0)
        >>> round(out.item(), 5), round(lse.exp().item(), 5)
        (3.0, 3.0)
    """
    num_tokens, _, head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    dtype = compute_dtype(query)
    if max_query_len is None:
        max_query_len = int(query_start_loc.diff().max()) if len(seq_lens) else 0

    # Sequences side by side, each padded to the longest number of query tokens.
    query_lens = query_start_loc.diff()  # [B]
    offsets = torch.arange(max_query_len, device=query.device)  # [Q]
    rows = (query_start_loc[:-1, None] + offsets).clamp(max=num_tokens - 1)  # [B, Q]
    positions = (seq_lens - query_lens)[:, None] + offsets  # [B, Q]
    q = query[rows].to(dtype).reshape(*rows.shape, num_kv_heads, -1, head_dim)  # [B, Q, Hkv, G, D]

    # The gather: blocks become a context of M * P keys.
    key = dequantised(key_cache[block_tables], k_scale, block_tables, dtype).flatten(1, 2)  # [B, K, Hkv, D]
    value = dequantised(value_cache[block_tables], v_scale, block_tables, dtype).flatten(1, 2)  # [B, K, Hkv, Dv]
    num_keys = key.shape[1]

    visible = visible_keys(positions, num_keys, window) & (offsets < query_lens[:, None])[..., None]  # [B, Q, K]
    # A weight of 0 does not silence what lies in an unused slot: 0 * NaN is NaN. So it is taken out of V as well.
    value = torch.where(visible.any(dim=1)[:, :, None, None], value, 0.0)

    scores = torch.einsum("bqhgd,bkhd->bqhgk", q, key) * scale  # [B, Q, Hkv, G, K]
    scores = cap_and_bias(scores, positions[:, :, None, None], softcap, per_kv_head(alibi_slopes, num_kv_heads, dtype))
    scores = torch.where(visible[:, :, None, None], scores, -torch.inf)
    weights, lse = softmax_with_sink(scores, per_kv_head(sinks, num_kv_heads, dtype))
    out = torch.einsum("bqhgk,bkhd->bqhgd", weights, value)  # [B, Q, Hkv, G, Dv]

    # Back to packed tokens.
    tokens = place_tokens(num_tokens, seq_lens, query_start_loc)
    real = tokens.real[:, None]
    place = (tokens.sequence, tokens.offset.clamp(max=max_query_len - 1))
    out = torch.where(real[..., None], out.flatten(2, 3)[place], 0.0)  # [T, Hq, Dv]
    lse = torch.where(real, lse.flatten(2, 3)[place], -torch.inf)  # [T, Hq]
    return out.to(query.dtype), lse
