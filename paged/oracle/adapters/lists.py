"""Adapters for kernels that are told in their own way where a sequence's keys lie.

    "flashinfer", "flashinfer_hnd"      lists of pages and how full the last one is
    "flash_attention"                   the contract's tables under other names; lse [Hq, T]
    "jax_ragged"                        K and V at alternating heads; room for more sequences than there are

Queries are packed, [T, Hq, D], everywhere. What an argument may be is said once: floats in `Capabilities.dtypes`, the
caches in `kv_dtypes`, lists of blocks in `table_dtypes`, lengths and starts in int32. Arguments that stand for a
feature are passed only where it is declared. Kernels return out [T, Hq, Dv] in query's dtype, or (out, lse) with lse
[T, Hq] in float32 (float64 for float64 queries), unless it says otherwise.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from paged.oracle import layouts, metadata
from paged.oracle.adapters.foreign import (
    NO_ARGUMENT,
    NO_PADDING,
    ONE_NUMBER,
    ONE_SHAPE,
    Arguments,
    Foreign,
    one_number,
    spaced,
    window_left,
)
from paged.oracle.declarations import Capabilities
from paged.oracle.inputs import Inputs


class FlashInfer(Foreign):
    """FlashInfer's `BatchPrefillWithPagedKVCacheWrapper`, plan and run in one.

        kernel(q, paged_kv_cache, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *,
               sm_scale, window_left=-1, logits_soft_cap=0.0, sinks=None, k_scale=1.0, v_scale=1.0)

    with paged_kv_cache [N, 2, P, Hkv, D] ("HND": [N, 2, Hkv, P, D]), qo_indptr and paged_kv_indptr [B + 1],
    paged_kv_indices [pages in use], paged_kv_last_page_len [B]; causal. window_left is how many keys a query sees
    before itself, -1 all; logits_soft_cap 0 is none. FlashInfer's lse is in base 2: declare Capabilities(lse="2").

    Args:
        name: by which `verify` knows it.
        kv_layout: "NHD" or "HND".
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "alibi": "FlashInfer computes the slopes itself",
        "value_dims": ONE_SHAPE,
        "negative_padding": NO_PADDING,
        "kv_scales='head'": ONE_NUMBER,
        "kv_scales='token'": ONE_NUMBER,
    }

    def __init__(self, name: str = "flashinfer", kv_layout: str = "NHD") -> None:
        self.name, self.kv_layout = name, kv_layout

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """One cache, and lists."""
        cache = layouts.to_by_block(inputs.key_cache, inputs.value_cache)
        if self.kv_layout == "HND":
            cache = cache.transpose(2, 3).contiguous()
        pages = metadata.to_pages(inputs.block_tables, inputs.seq_lens, inputs.case.block_size)
        named: dict[str, Any] = {"sm_scale": inputs.scale}
        if capabilities.window:
            named["window_left"] = window_left(inputs)
        if capabilities.softcap:
            named["logits_soft_cap"] = inputs.softcap or 0.0
        if capabilities.sinks:
            named["sinks"] = inputs.sinks
        if capabilities.kv_scales is not None:
            named["k_scale"], named["v_scale"] = one_number(inputs.k_scale), one_number(inputs.v_scale)
        return (inputs.query, spaced(cache, inputs.case), inputs.query_start_loc, *pages), named


class FlashAttention(Foreign):
    """FlashAttention 3's `flash_attn_with_kvcache` with packed queries.

        kernel(q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal,
               window_size=(-1, -1), softcap=0.0, alibi_slopes=None, k_descale=None, v_descale=None,
               return_softmax_lse) -> out | (out, lse)

    with k_cache [N, P, Hkv, D], v_cache [N, P, Hkv, Dv], cache_seqlens [B], page_table [B, M], cu_seqlens_q [B + 1],
    max_seqlen_q an int, causal True, window_size (keys seen before the query, 0), k_descale and v_descale [B, Hkv].
    lse is [Hq, T], natural. For rows that see no key FlashAttention 2 gives +inf there: declare
    Conventions(empty_lse="+inf"). Source: hopper/flash_attn_interface.py; alibi_slopes [Hq] are version 2's.
    """

    name = "flash_attention"
    cannot: ClassVar[Mapping[str, str]] = {"sinks": NO_ARGUMENT, "kv_scales='token'": "its scales are [B, Hkv]"}

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """The contract's tensors under other names."""
        named: dict[str, Any] = {
            "cache_seqlens": inputs.seq_lens,
            "page_table": inputs.block_tables,
            "cu_seqlens_q": inputs.query_start_loc,
            "max_seqlen_q": max(query_len for query_len, _ in inputs.case.sequences),
            "softmax_scale": inputs.scale,
            "causal": True,
            "return_softmax_lse": capabilities.lse is not None,
        }
        if capabilities.window:
            left = window_left(inputs)
            named["window_size"] = (left, -1 if left == -1 else 0)
        if capabilities.softcap:
            named["softcap"] = inputs.softcap or 0.0
        if capabilities.alibi:
            named["alibi_slopes"] = inputs.alibi_slopes
        if capabilities.kv_scales is not None:
            shape = (len(inputs.seq_lens), inputs.case.num_kv_heads)
            for key, scale in (("k_descale", inputs.k_scale), ("v_descale", inputs.v_scale)):
                given = torch.ones(()) if scale is None else torch.as_tensor(scale)
                named[key] = given.to(inputs.query.device).expand(shape).contiguous()
        return (inputs.query, inputs.key_cache, inputs.value_cache), named

    def results(self, returned: Any) -> tuple[Any, Any]:
        """`out`, or `(out, lse)` with lse [Hq, T]."""
        out, lse = super().results(returned)
        return out, lse.T if isinstance(lse, Tensor) and lse.dim() == 2 else lse


class JaxRagged(Foreign):
    """JAX's `ragged_paged_attention` for TPUs, in torch tensors.

        kernel(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *,
               sm_scale, sliding_window=None, soft_cap=None, k_scale=None, v_scale=None)

    with kv_pages [N, P, 2 * Hkv, D], keys at even heads, kv_lens [S], page_indices [S, M], cu_q_lens [S + 1] and
    num_seqs [1], all int32; S is two more than there are sequences. A sliding_window counts the query itself. The
    original returns out alone; here (out, lse) may be declared too. Source: jax/experimental/pallas/ops/tpu/
    ragged_paged_attention/kernel.py.
    """

    name = "jax_ragged"
    cannot: ClassVar[Mapping[str, str]] = {
        "alibi": NO_ARGUMENT,
        "sinks": NO_ARGUMENT,
        "value_dims": ONE_SHAPE,
        "kv_scales='head'": ONE_NUMBER,
        "kv_scales='token'": ONE_NUMBER,
        "int64": "page_indices are int32",
    }
    room = 2  # sequences that are not there

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """One cache, and padded tables."""
        cache = spaced(layouts.to_alternating(inputs.key_cache, inputs.value_cache), inputs.case)
        tables = (inputs.block_tables, inputs.seq_lens, inputs.query_start_loc)
        ragged = metadata.to_ragged(*tables, max_num_seqs=len(inputs.seq_lens) + self.room)
        named: dict[str, Any] = {"sm_scale": inputs.scale}
        if capabilities.window:
            named["sliding_window"] = inputs.window
        if capabilities.softcap:
            named["soft_cap"] = inputs.softcap
        if capabilities.kv_scales is not None:
            named["k_scale"], named["v_scale"] = one_number(inputs.k_scale), one_number(inputs.v_scale)
        return (inputs.query, cache, *ragged), named
