"""Paged attention, gathered: copy the blocks of each sequence together, then attend as if there were no blocks.

This is the definition of paged attention, and what the other forms are compared with:

    block_tables [B, M] --gather--> K [B, M * P, ...], V --> scores --> mask --> softmax --> weighted sum

Its price is the copy: K and V of the whole context, dense and padded to the longest sequence, once in every layer.
"""

import torch
from torch import Tensor

from paged.attention.scores import (
    by_head,
    cap_and_bias,
    check_arguments,
    compute_dtype,
    dequantised,
    nothing_seen,
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
        max_query_len: most query tokens of one sequence, or more, a host integer; fewer would leave some out. None
            reads it from query_start_loc, for which the host has to wait for the device.

    Unused slots may hold anything. What is in use must be finite, here more than in the fused form: a NaN in V reaches
    every query of its sequence, since a weight of 0 does not silence it in a matrix product.

    Raises:
        ValueError: shapes that do not belong together, or a window below 1.

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
    check_arguments(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, window)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    dtype = compute_dtype(query)
    if num_tokens == 0 or block_tables.shape[1] == 0:
        return nothing_seen(query, value_cache.shape[3], dtype)
    if max_query_len is None:
        max_query_len = int(query_start_loc.diff().max())
    max_query_len = max(1, max_query_len)

    # Sequences side by side, each padded to the longest number of query tokens. The padding's place is behind the last
    # token, where nothing is read in earnest and whatever is written is cut off.
    query_lens = query_start_loc.diff()  # [B]
    offsets = torch.arange(max_query_len, device=query.device)  # [Q]
    is_query = offsets < query_lens[:, None]  # [B, Q]
    places = torch.where(is_query, query_start_loc[:-1, None] + offsets, num_tokens).flatten().long()  # [B * Q]
    positions = (seq_lens - query_lens)[:, None] + offsets  # [B, Q]
    q = query.index_select(0, places.clamp(max=num_tokens - 1)).to(dtype)  # [B * Q, Hq, D]
    q = q.reshape(*is_query.shape, num_kv_heads, group, head_dim)  # [B, Q, Hkv, G, D]
    q = q.permute(0, 2, 4, 3, 1).flatten(3)  # [B, Hkv, D, G * Q]

    # The gather: blocks become a context of K = M * P keys, and nothing is left of the blocks.
    key = gather(key_cache, block_tables, k_scale, dtype)  # [B, K, Hkv, D]
    value = gather(value_cache, block_tables, v_scale, dtype)  # [B, K, Hkv, Dv]
    clear_unused(value, seq_lens, block_size=key_cache.shape[1])

    visible = visible_keys(positions, key.shape[1], window) & is_query[..., None]  # [B, Q, K]
    scores = (key.transpose(1, 2) @ q).transpose(2, 3) * scale  # [B, Hkv, G * Q, K]
    heads = (num_kv_heads, group, 1)
    scores = scores.reshape(len(seq_lens), num_kv_heads, group, max_query_len, -1)  # [B, Hkv, G, Q, K]
    scores = cap_and_bias(scores, positions[:, None, None], softcap, by_head(alibi_slopes, heads, dtype))
    scores = torch.where(visible[:, None, None], scores, -torch.inf)
    weights, lse = softmax_with_sink(scores, by_head(sinks, heads, dtype))
    out = weights.flatten(2, 3) @ value.transpose(1, 2)  # [B, Hkv, G * Q, Dv]
    out = out.reshape(*scores.shape[:4], -1)  # [B, Hkv, G, Q, Dv]
    # Only where nothing was seen: a NaN among the keys makes lse NaN, and the output must not become 0 then.
    out = torch.where(lse[..., None] == -torch.inf, 0.0, out)

    # Back to packed tokens, one behind them for the padding; rows that nobody writes see nothing.
    packed_out = query.new_zeros(num_tokens + 1, num_heads, out.shape[-1])
    packed_lse = torch.full((num_tokens + 1, num_heads), -torch.inf, dtype=dtype, device=query.device)
    packed_out.index_copy_(0, places, out.permute(0, 3, 1, 2, 4).reshape(-1, *packed_out.shape[1:]).to(query.dtype))
    packed_lse.index_copy_(0, places, lse.permute(0, 3, 1, 2).reshape(-1, num_heads))
    return packed_out[:-1], packed_lse[:-1]


def gather(cache: Tensor, block_tables: Tensor, scale: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """Copy the blocks of each sequence together.

    Args:
        cache: [N, P, Hkv, D].
        block_tables: [B, M].
        scale: a number, [Hkv], [N, P, Hkv], or None; stored value times scale is the value.
        dtype: of the copy.

    Returns:
        [B, M * P, Hkv, D].
    """
    # cache[block_tables], but several times quicker on a CPU: it copies whole blocks.
    stored = cache.index_select(0, block_tables.flatten())  # [B * M, P, Hkv, D]
    stored = stored.reshape(*block_tables.shape, *cache.shape[1:])  # [B, M, P, Hkv, D]
    return dequantised(stored, scale, block_tables, dtype).flatten(1, 2)


def clear_unused(value: Tensor, seq_lens: Tensor, *, block_size: int) -> None:
    """Zero the unused slots of each sequence's last block, in place: a weight of 0 does not silence a NaN in V.

    No other slot needs it: blocks before the last one are full, and padding entries name the null block, which is zero.

    Args:
        value: [B, K, Hkv, Dv], gathered.
        seq_lens: [B].
        block_size: P.
    """
    num_blocks = value.shape[1] // block_size  # M
    blocks = value.view(-1, block_size, *value.shape[2:])  # [B * M, P, Hkv, Dv]
    last = (seq_lens - 1).clamp(min=0) // block_size  # [B]
    place = (last + torch.arange(len(seq_lens), device=value.device) * num_blocks).long()  # [B] among all blocks
    used = torch.arange(block_size, device=value.device) < (seq_lens - last * block_size)[:, None]  # [B, P]
    blocks.index_copy_(0, place, torch.where(used[..., None, None], blocks.index_select(0, place), 0.0))
