"""Adapters for kernels that know no blocks: a slot for every token.

    "sglang", "sglang_requests"         slots as a list, or as rows of a request pool
    "transformers"                      this step's K and V, where to write them, and what to read then

What arguments and results are, and which are passed, is as in `paged.oracle.adapters.lists`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from paged.oracle import layouts, metadata
from paged.oracle.adapters.foreign import (
    NO_ARGUMENT,
    NO_BLOCKS,
    NO_PADDING,
    ONE_NUMBER,
    Arguments,
    Foreign,
    call_unwritten,
    one_number,
    window_left,
)
from paged.oracle.declarations import Capabilities
from paged.oracle.guard import Mishap, bits
from paged.oracle.inputs import Inputs


class TokenSlots(Foreign):
    """SGLang's `extend_attention_fwd_unified`, without its scratch arguments.

        kernel(q, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, *,
               sm_scale, logit_cap=0.0, sliding_window_size=-1, sinks=None, k_scale=1.0, v_scale=1.0)

    with k_buffer [N * P, Hkv, D], v_buffer [N * P, Hkv, Dv], qo_indptr and kv_indptr [B + 1], kv_indices [tokens]
    int64; causal. sliding_window_size is how many keys a query sees before itself, -1 all. There is no block size: a
    kernel that needs one cannot be right. Source: srt/layers/attention/triton_ops/extend_attention.py.
    """

    name = "sglang"
    cannot: ClassVar[Mapping[str, str]] = {
        "alibi": NO_ARGUMENT,
        "negative_padding": NO_PADDING,
        "strided_caches": NO_BLOCKS,
        "kv_scales='head'": ONE_NUMBER,
        "kv_scales='token'": ONE_NUMBER,
        "int64": "kv_indices are int64 always, made of tables of either dtype",
    }

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """Two pools of slots, and lists."""
        where = metadata.to_slots(inputs.block_tables, inputs.seq_lens, inputs.case.block_size)
        return (*self._pools(inputs), inputs.query_start_loc, *where), self._named(inputs, capabilities)

    def _pools(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return inputs.query, layouts.to_flat(inputs.key_cache), layouts.to_flat(inputs.value_cache)

    def _named(self, inputs: Inputs, capabilities: Capabilities) -> dict[str, Any]:
        named: dict[str, Any] = {"sm_scale": inputs.scale}
        if capabilities.softcap:
            named["logit_cap"] = inputs.softcap or 0.0
        if capabilities.window:
            named["sliding_window_size"] = window_left(inputs)
        if capabilities.sinks:
            named["sinks"] = inputs.sinks
        if capabilities.kv_scales is not None:
            named["k_scale"], named["v_scale"] = one_number(inputs.k_scale), one_number(inputs.v_scale)
        return named


class RequestRows(TokenSlots):
    """A kernel over SGLang's request pool, as its `forward_extend` sees it.

        kernel(q, k_buffer, v_buffer, req_to_token, req_pool_indices, seq_lens, qo_indptr, *, sm_scale, ...)

    with req_to_token [R, C] int32, slots of each request's tokens, 0 behind them, req_pool_indices [B] int64, the
    batch's rows of it, seq_lens [B]; the rest as `TokenSlots`. Source: srt/mem_cache/memory_pool.py, `ReqToTokenPool`.
    """

    name = "sglang_requests"

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """Two pools of slots, and rows."""
        rows = metadata.to_requests(inputs.block_tables, inputs.seq_lens, inputs.case.block_size)
        tensors = (*self._pools(inputs), *rows, inputs.seq_lens, inputs.query_start_loc)
        return tensors, self._named(inputs, capabilities)


class FlatIndices(Foreign):
    """transformers' continuous batching: write this step's K and V, then read each sequence whole.

        kernel(query, key, value, key_cache, value_cache, read_index, write_index, cu_seq_lens_q, cu_seq_lens_k, *,
               scaling, sliding_window=None, softcap=None, sinks=None)

    with key [T, Hkv, D] and value [T, Hkv, Dv] of the query tokens, key_cache and value_cache [N * P + 1, Hkv, ...],
    read_index [tokens] and write_index [T] int64, cu_seq_lens_q and cu_seq_lens_k [B + 1]. The caches do not have this
    step's K and V yet (NaN is in their place): the kernel may write them to write_index, and nothing else anywhere. The
    last slot is trash, for query tokens that have no key. A sliding_window counts the query itself. Source:
    integrations/eager_paged.py and generation/continuous_batching/cache_allocators/full_attention.py, `update`.
    """

    name = "transformers"
    cannot: ClassVar[Mapping[str, str]] = {
        "alibi": NO_ARGUMENT,
        "negative_padding": NO_PADDING,
        "strided_caches": NO_BLOCKS,
        "kv_scales='tensor'": NO_ARGUMENT,
        "kv_scales='head'": NO_ARGUMENT,
        "kv_scales='token'": NO_ARGUMENT,
        "int64": "indices are int64 always, made of tables of either dtype",
    }

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """This step's K and V, pools without them, and flat indices."""
        pools = [layouts.to_flat(cache) for cache in (inputs.key_cache, inputs.value_cache)]
        pools = [torch.cat((pool, torch.full_like(pool[:1], torch.nan))) for pool in pools]
        trash = len(pools[0]) - 1
        tables = (inputs.block_tables, inputs.seq_lens, inputs.query_start_loc)
        read_index, write_index = metadata.to_read_write(*tables, inputs.case.block_size, trash)
        new = [pool[write_index] for pool in pools]
        for pool in pools:
            pool[write_index] = torch.nan
        starts = (inputs.query_start_loc, metadata.starts(inputs.seq_lens))
        named: dict[str, Any] = {"scaling": inputs.scale}
        if capabilities.window:
            named["sliding_window"] = inputs.window
        if capabilities.softcap:
            named["softcap"] = inputs.softcap
        if capabilities.sinks:
            named["sinks"] = inputs.sinks
        return (inputs.query, *new, *pools, read_index, write_index, *starts), named

    def call(self, kernel: Callable[..., Any], inputs: Inputs, capabilities: Capabilities) -> Any:
        """Call the kernel on caches of its own; what it returns, or a `Mishap` if it wrote what it should not have."""
        tensors, named = self.arguments(inputs, capabilities)
        query, key, value, key_cache, value_cache, read_index, write_index, *starts = tensors
        pools = {"key_cache": key_cache.clone(), "value_cache": value_cache.clone()}

        def over_pools(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, **wishes: Any) -> Any:
            return kernel(query, key, value, *pools.values(), *rest, **wishes)

        rest = (read_index, write_index, *starts)
        returned = call_unwritten(over_pools, (query, key, value, *rest), named)
        for (name, pool), was, new in zip(pools.items(), (key_cache, value_cache), (key, value), strict=True):
            right = was.clone()
            right[write_index] = new
            right, was, got = bits(right)[:-1], bits(was)[:-1], bits(pool)[:-1]  # the trash may hold anything
            if not (torch.equal(got, right) or torch.equal(got, was)):
                slots = ((got != right).flatten(1).any(1)).nonzero()[:, 0].tolist()[:4]
                return Mishap("writes", f"something else than this step's tokens was written to {name}: slots {slots}")
        return returned
