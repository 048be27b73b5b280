"""Paged attention, fused: written so that torch.compile never makes the gathered K and V exist.

A matrix product is a call into a library, and a library reads its inputs from memory: written with `matmul` or
`einsum`, K and V are first gathered into dense copies. Written as a multiplication and a sum, the gather is one more
pointwise operation, and the compiler does all three in one loop over the pool:

    scores[t, h, k] = sum_d query[t, h, d] * key_cache[block_tables[t, k // P], k % P, h, d]

What is allocated is the scores, their sums and the output. tests/test_compile.py reads the generated code and holds it
to that.

Every query token is a row of its own, with its sequence's block table: then a decode is the only case there is, a
prompt is many of them, and nothing is padded. Run eagerly this is correct and slow, because then the products do exist.
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

    Arguments and results are those of `paged.attention.gathered.paged_attention`; `max_query_len` is not needed here.
    """
    check_arguments(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, window)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    dtype = compute_dtype(query)
    if block_tables.shape[1] == 0:
        return nothing_seen(query, value_cache.shape[3], dtype)
    tokens = place_tokens(num_tokens, seq_lens, query_start_loc)
    tables = block_tables[tokens.sequence]  # [T, M]

    # Keys and values by token, with axes for the query group and, for keys, the head dim that is summed over.
    key = dequantised(key_cache[tables], k_scale, tables, dtype)  # [T, M, P, Hkv, D]
    value = dequantised(value_cache[tables], v_scale, tables, dtype)  # [T, M, P, Hkv, Dv]
    key = key.flatten(1, 2).transpose(1, 2).unsqueeze(2)  # [T, Hkv, 1, K, D]
    value = value.flatten(1, 2).transpose(1, 2).unsqueeze(2)  # [T, Hkv, 1, K, Dv]
    q = query.to(dtype).reshape(num_tokens, num_kv_heads, group, 1, head_dim)  # [T, Hkv, G, 1, D]

    heads = (num_kv_heads, group)
    visible = visible_keys(tokens.position, key.shape[3], window) & tokens.real[:, None]  # [T, K]
    scores = (q * key).sum(dim=-1) * scale  # [T, Hkv, G, K]
    scores = cap_and_bias(scores, tokens.position[:, None, None], softcap, by_head(alibi_slopes, heads, dtype))
    scores = torch.where(visible[:, None, None], scores, -torch.inf)
    weights, lse = softmax_with_sink(scores, by_head(sinks, heads, dtype))
    # A weight of 0 does not silence what lies in an unused slot: 0 * NaN is NaN. So it is taken out of V as well.
    value = torch.where(visible[:, None, None, :, None], value, 0.0)
    out = (weights[..., None] * value).sum(dim=3)  # [T, Hkv, G, Dv]
    out = torch.where(lse[..., None] == -torch.inf, 0.0, out)  # and NaN stays NaN
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)
