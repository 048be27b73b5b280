"""Other people's paged attention, called as the oracle's adapters call a kernel.

- transformers' continuous batching: a layer calls its attention function with this step's query [1, Hq, T, D], key and
  value [1, Hkv, T, D], a mask [1, 1, T, K] that adds 0 or the lowest number, and a cache. The function asks that cache
  to `update`: write key and value to `write_index`, then read `read_index`. What is run here is theirs from there on
  down, mask included: `eager_paged_attention_forward` and, with SDPA, `sdpa_attention_forward` (or its paged twin in
  older versions, where the cache has another form inside, too). The cache is made without a model, over the pools
  of the adapter "transformers".
- torch's scaled_dot_product_attention, one sequence at a time over its gathered K and V.
- FlashInfer and vLLM, where they are installed.
"""

import math
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.utils import build_attention_mask
from transformers.integrations.eager_paged import eager_paged_attention_forward

ALLOCATORS = "transformers.generation.continuous_batching.cache_allocators"


def eager_paged(*tensors: Tensor, **wishes: object) -> Tensor:
    """transformers' attention in plain torch operations."""
    return by_transformers(eager_paged_attention_forward, *tensors, **wishes)


def sdpa_paged(*tensors: Tensor, **wishes: object) -> Tensor:
    """transformers' attention with SDPA; where the plain function does not know a paged cache yet, the paged one."""
    plain = import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    if "cache" not in signature(plain).parameters:
        plain = import_module("transformers.integrations.sdpa_paged").sdpa_attention_paged_forward
    return by_transformers(plain, *tensors, **wishes)


def by_transformers(
    attention, query, key, value, key_cache, value_cache, read_index, write_index, cu_seq_lens_q, cu_seq_lens_k, *,
    scaling, sliding_window=None, sinks=None,
) -> Tensor:  # fmt: skip
    """One of their functions behind the arguments of the adapter "transformers"."""
    mask = torch.full((1, 1, len(query), len(read_index)), torch.finfo(query.dtype).min, dtype=query.dtype)
    build_attention_mask(mask, cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist(), sliding_window or 1)
    layer = SimpleNamespace(layer_idx=0, num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    if sinks is not None:
        layer.sinks = sinks
    packed = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]  # [1, H, T, D]
    out, _ = attention(
        layer, *packed, mask, scaling=scaling, cache=paged_cache(key_cache, value_cache),
        read_index=[read_index], write_index=[write_index],
        cu_seq_lens_k={"full_attention": cu_seq_lens_k}, max_length_k={"full_attention": len(read_index)},
    )  # fmt: skip
    return out[0]


def paged_cache(key_cache: Tensor, value_cache: Tensor) -> PagedAttentionCache:
    """Their cache of one layer over pools [slots, Hkv, D], without what allocates and without a model."""
    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    if find_spec(ALLOCATORS) is None:
        cache.key_cache, cache.value_cache = [key_cache], [value_cache]
        cache.layer_index_to_group_indices, cache.sliding_windows = {0: (0, 0)}, {0: 1}
        return cache
    kind = import_module(f"{ALLOCATORS}.full_attention").FullAttentionCacheAllocator
    allocator = kind.__new__(kind)
    allocator.index, allocator._kv_token_views = 0, {0: (key_cache, value_cache)}
    cache.layer_to_allocator = {0: allocator}
    return cache


def sdpa_gathered(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, *, scale, window=None
) -> Tensor:
    """torch's SDPA behind the contract's arguments, one sequence after another."""
    bounds, outs = query_start_loc.tolist(), []
    for i, length in enumerate(seq_lens.tolist()):
        q = query[bounds[i] : bounds[i + 1]]
        key, value = (cache[block_tables[i].long()].flatten(0, 1)[:length] for cache in (key_cache, value_cache))
        distance = torch.arange(length) - (length - len(q) + torch.arange(len(q)))[:, None]
        mask = (distance <= 0) & (distance > -(window or math.inf))
        packed = [tensor.transpose(0, 1)[None] for tensor in (q, key, value)]
        out = scaled_dot_product_attention(*packed, attn_mask=mask, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def flashinfer_paged(
    q, paged_kv_cache, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *, sm_scale,
    window_left=-1, logits_soft_cap=0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashInfer's wrapper, planned and run, behind the arguments of the adapter "flashinfer"."""
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    _, _, page_size, num_kv_heads, head_dim = paged_kv_cache.shape
    wrapper.plan(
        qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, q.shape[1], num_kv_heads, head_dim,
        page_size, causal=True, sm_scale=sm_scale, window_left=window_left, logits_soft_cap=logits_soft_cap,
        q_data_type=q.dtype, kv_data_type=paged_kv_cache.dtype,
    )  # fmt: skip
    return wrapper.run(q, paged_kv_cache, return_lse=True)


def vllm_unified(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, *, scale, window=None, softcap=None,
    sinks=None,
) -> Tensor:  # fmt: skip
    """vLLM's Triton kernel `unified_attention` behind the contract's arguments."""
    out = torch.empty_like(query)
    import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention(
        q=query, k=key_cache, v=value_cache, out=out, cu_seqlens_q=query_start_loc,
        max_seqlen_q=int(query_start_loc.diff().max()), seqused_k=seq_lens, max_seqlen_k=int(seq_lens.max()),
        softmax_scale=scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
        block_table=block_tables, softcap=softcap or 0.0, q_descale=None, k_descale=None, v_descale=None, sinks=sinks,
    )  # fmt: skip
    return out
