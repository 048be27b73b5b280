"""Paged attention by FlexAttention: the block table *is* the block mask.

FlexAttention computes attention block by block and is told, for each block of queries, which blocks of keys to read. It
means sparse masks by that. A block table says the same thing: read these blocks of the pool, in this order. So nothing
is gathered and no mask of the context's size exists; `torch.compile` makes one kernel of it, for any GPU Triton knows.

    block table of a sequence of 50 tokens, P = 16:   [7, 2, 9, 4]
    full blocks, no mask needed:                      [7, 2, 9]
    partial block, the mask looks at every slot:      [4], slots 0 and 1 of which are in use

The pool is one long sequence of N * P keys to FlexAttention, whose order nobody minds: attention does not depend on the
order of keys. What does depend on a key's place in its sequence (windows, causality, ALiBi) asks for the block's
logical index.

A decode has one query token and is bound by how fast K and V come from memory. Its query heads of one group are rows of
one tile, so that every key is read once; and where there are few sequences, each context is split into parts that run
beside each other and are merged by their log-sum-exp: a split is nothing but a shorter block table.

Eager FlexAttention ignores the lists of blocks and looks at the whole pool, which is wrong here, not just slow. So it
is only ever called compiled, and refuses otherwise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paged.attention.flex_kernel import (
    COMPILE_OPTIONS,
    MERGE_OPTIONS,
    SMALLEST,
    attend_blocks,
    mark_sizes,
    pace_of,
    run_compiled,
    with_pool_columns,
)
from paged.attention.flex_plan import CHUNK_TILE, DecodePlan, num_splits_for, place_blocks, plan_chunks, plan_decode
from paged.attention.merge import apply_sinks, merge_outs, merge_parts
from paged.attention.scores import check_arguments, nothing_seen

# FlexAttention's kernels index with 32 bits; past it they read elsewhere, in silence.
MOST_ELEMENTS = 2**31


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
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of packed query tokens over K and V that lie in blocks.

    Arguments and results are those of `paged.attention.gathered.paged_attention`, with these differences:

    - P is a power of two, at least 16; head dims are at least 16; numbers are float32, float16 or bfloat16.
    - A block that occurs in several tables has the same index in each of them, as shared prefixes have.
    - Unused slots of a block in use must be finite: a weight of 0 does not silence a NaN in a matrix product.
    - A CPU has no log-sum-exp of FlexAttention: lse is None there, and sinks and splits are refused.

    Args:
        num_splits: parts into which the context of a decode is split; None chooses by `num_splits_for`.

    Raises:
        ValueError: what the other forms refuse, and what this one cannot do.
    """
    check_arguments(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, window)
    check_limits(query, key_cache, value_cache, k_scale, v_scale, sinks, num_splits)
    num_tokens, num_heads, _ = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_blocks = block_tables.shape[1]
    if num_tokens == 0 or num_blocks == 0:
        return nothing_seen(query, value_cache.shape[3], torch.float32)
    if max_query_len is None:
        max_query_len = int(query_start_loc.diff().max())
    slopes = None if alibi_slopes is None else alibi_slopes.float()
    logical_index = None
    if slopes is not None or max_query_len > 1:
        logical_index = place_blocks(block_tables, seq_lens, key_cache.shape[0], block_size)

    # Queries side by side, each sequence padded to the longest; places behind the last token stand for padding.
    query_lens = query_start_loc.diff()
    padded_len = 1 if max_query_len <= 1 else -(-max_query_len // CHUNK_TILE) * CHUNK_TILE
    offsets = torch.arange(padded_len, device=query.device)
    is_query = offsets < query_lens[:, None]  # [B, Q]
    places = torch.where(is_query, query_start_loc[:-1, None] + offsets, num_tokens).flatten().long()
    q = query.index_select(0, places.clamp(max=num_tokens - 1)).reshape(*is_query.shape, num_heads, -1)  # [B, Q, Hq, D]
    if padded_len == 1:
        if num_splits is None:
            num_splits = splits_here(len(q), num_kv_heads, num_blocks, query.device)
        seen = torch.where(is_query[:, 0], seq_lens, 0)
        plan = plan_decode(block_tables, seen, block_size=block_size, window=window, num_splits=num_splits)
        grouped = None if slopes is None else slopes.reshape(num_kv_heads, -1)
        decodes = q[:, 0], key_cache, value_cache, plan
        wishes: dict[str, Any] = {"alibi_slopes": grouped, "logical_index": logical_index}
        out, lse = attend_decode(*decodes, scale=scale, window=window, softcap=softcap, **wishes)
    else:
        assert logical_index is not None, "made above"
        positions = torch.where(is_query, (seq_lens - query_lens)[:, None] + offsets, -1).int()
        chunks = q, key_cache, value_cache, block_tables, positions, logical_index
        out, lse = attend_chunks(*chunks, scale=scale, window=window, softcap=softcap, alibi_slopes=slopes)

    # Back to packed tokens.
    out = _packed(out.flatten(0, -3), places, num_tokens, 0.0)
    if lse is None:
        return out, None
    lse = _packed(lse.flatten(0, -2), places, num_tokens, -torch.inf)
    lse[query_start_loc[-1] :] = -torch.inf
    return (out if sinks is None else apply_sinks(out, lse, sinks)), lse


def _packed(padded: Tensor, places: Tensor, num_tokens: int, nothing: float) -> Tensor:
    """Rows of sequences side by side at their tokens' places, [T, ...]; padding's place is one behind the last."""
    packed = padded.new_full((num_tokens + 1, *padded.shape[1:]), nothing)
    return packed.index_copy_(0, places, padded)[:-1]


def attend_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    logical_index: Tensor | None = None,
    needs_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query token for each sequence, as planned. No sinks: they come after any merge.

    Args:
        query: [B, Hq, D].
        key_cache, value_cache: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        plan: of R = B * S rows, made for the same window.
        scale, window, softcap: as everywhere.
        alibi_slopes: [Hkv, G], or None.
        logical_index: [N] int32, a block's index in the tables that name it; needed for ALiBi alone.
        needs_lse: whether the log-sum-exp is wanted, which takes a kernel more if there are parts.

    Returns:
        out [B, Hq, Dv], lse [B, Hq] float32; lse is None on a CPU, and may be if nobody needs it.
    """
    batch, num_heads, head_dim = query.shape
    num_rows, num_kv_heads, value_dim = len(plan.seq_lens), key_cache.shape[2], value_cache.shape[3]
    num_splits = num_rows // batch
    # The heads of a group are the queries of a tile, so each key is read once for all of them.
    rows = query.reshape(batch, 1, num_kv_heads, -1, head_dim)
    rows = rows.expand(-1, num_splits, -1, -1, -1).reshape(num_rows, num_kv_heads, -1, head_dim).contiguous()
    if query.device.type == "cpu":
        full, partial = (
            with_pool_columns(blocks, len(key_cache)) for blocks in (plan.full_blocks, plan.partial_blocks)
        )
        plan = plan._replace(full_blocks=full, partial_blocks=partial)
    else:
        mark_sizes((rows, key_cache, value_cache, *plan[4:]), (0,))
        mark_sizes(plan[:4], (0, 3))
    pace = pace_of(num_rows * num_kv_heads, num_splits)
    out, lse = run_compiled(
        _compiled_decode, rows, key_cache, value_cache, plan, scale, window, softcap, alibi_slopes, logical_index, pace
    )
    if lse is None:
        return out.reshape(batch, num_heads, value_dim), None
    if num_splits == 1:
        return out.reshape(batch, num_heads, value_dim), lse.reshape(batch, num_heads)
    outs, lses = out.reshape(batch, num_splits, num_heads, value_dim), lse.reshape(batch, num_splits, num_heads)
    # The number of parts is part of the kernel: going through them in a loop took 15 us more for 64 of them.
    mark_sizes((outs, lses), (0,))
    if not needs_lse:
        return run_compiled(_compiled_merge_outs, outs, lses), None
    merged: tuple[Tensor, Tensor] = run_compiled(_compiled_merge, outs, lses)
    return merged


def attend_chunks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    logical_index: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of several query tokens for each sequence, in tiles of CHUNK_TILE of them. No sinks.

    Args:
        query: [B, Q, Hq, D], Q a multiple of CHUNK_TILE, sequences padded behind their last token.
        key_cache, value_cache: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        block_tables: [B, M].
        positions: [B, Q] int32, -1 for padding, which comes last.
        logical_index: [N] int32, a block's index in the tables that name it.
        scale, window, softcap: as everywhere.
        alibi_slopes: [Hq], or None.

    Returns:
        out [B, Q, Hq, Dv], lse [B, Q, Hq] float32; on a CPU lse is None.
    """
    counts_and_blocks = plan_chunks(block_tables, positions, block_size=key_cache.shape[1], window=window)
    if query.device.type == "cpu":
        full_counts, full, partial_counts, partial = counts_and_blocks
        full, partial = (with_pool_columns(blocks, len(key_cache)) for blocks in (full, partial))
        counts_and_blocks = full_counts, full, partial_counts, partial
    else:
        mark_sizes((key_cache, value_cache, logical_index), (0,))
        mark_sizes((query, positions), (0, 1))
        mark_sizes(counts_and_blocks, (0, 2, 3))
    wishes = scale, window, softcap, alibi_slopes
    result: tuple[Tensor, Tensor | None] = run_compiled(
        _compiled_chunks, query, key_cache, value_cache, counts_and_blocks, positions, logical_index, *wishes
    )
    return result


def unfit(block_size: int, widths: Sequence[int]) -> str | None:
    """Why blocks and heads of these sizes cannot be served; None if they can.

    Args:
        block_size: P.
        widths: of keys and values.

    Example:
        >>> unfit(48, [128, 128])
        'blocks have to be a power of two, 16 tokens or more, and hold 48'
    """
    if block_size < SMALLEST or block_size & (block_size - 1):
        return f"blocks have to be a power of two, {SMALLEST} tokens or more, and hold {block_size}"
    if min(widths) < SMALLEST:
        return f"heads have to be {SMALLEST} wide or more, and one is {min(widths)}"
    return None


def check_limits(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
) -> None:
    """Refuse what this form cannot do.

    Raises:
        ValueError: with the reason and what to use instead.
    """
    reason = unfit(key_cache.shape[1], [key_cache.shape[3], value_cache.shape[3]])
    if reason is not None:
        raise ValueError(f"the flex form cannot be used here: {reason}; use the gathered or fused form")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.numel() >= MOST_ELEMENTS:
            most = (MOST_ELEMENTS - 1) // cache[0].numel()
            raise ValueError(
                f"{name} has {cache.numel():,} elements and FlexAttention indexes with 32 bits, so it would read "
                f"elsewhere in silence; give the pool at most {most:,} blocks (num_gpu_blocks_override)"
            )
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the flex form computes in float32, float16 or bfloat16, not in {query.dtype}; use another")
    if k_scale is not None or v_scale is not None or key_cache.dtype != query.dtype:
        raise ValueError("the flex form reads no quantised cache; use the gathered or fused form")
    if query.device.type == "cpu" and (sinks is not None or (num_splits or 1) > 1):
        raise ValueError(
            "on a CPU FlexAttention gives no log-sum-exp, so there are no sinks and no splits in the flex form; use "
            "the gathered or fused form"
        )


def splits_here(batch: int, num_kv_heads: int, num_blocks: int, device: torch.device) -> int:
    """`num_splits_for` a device's multiprocessors; 1 on a CPU."""
    if device.type == "cpu":
        return 1  # there is no log-sum-exp to merge by
    num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return num_splits_for(batch, num_kv_heads, num_blocks, num_multiprocessors)


def _decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: DecodePlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    logical_index: Tensor | None,
    pace: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """Rows of a plan: query [R, Hkv, G, D] -> out [R, Hkv, G, Dv], lse [R, Hkv, G]."""
    block_size, group = key_cache.shape[1], query.shape[2]

    def mask(row: Tensor, _head: Tensor, _query: Tensor, slot: Tensor) -> Tensor:
        # Only the first and the last block that are seen get here, and which of them it is tells the slot's position.
        index = torch.where(slot // block_size == plan.last_block[row], plan.last_index[row], plan.first_index[row])
        position = index * block_size + slot % block_size
        return (position >= plan.first_position[row]) & (position < plan.seq_lens[row])

    def short_mask(row: Tensor, _head: Tensor, _query: Tensor, slot: Tensor) -> Tensor:
        return slot % block_size <= (plan.seq_lens[row] - 1) % block_size

    def score(score: Tensor, row: Tensor, head: Tensor, member: Tensor, slot: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if alibi_slopes is not None:
            assert logical_index is not None, "ALiBi needs positions"
            position = logical_index[slot // block_size] * block_size + slot % block_size
            score = score + alibi_slopes[head, member] * (position - plan.seq_lens[row] + 1)
        return score

    return attend_blocks(
        query,
        key_cache,
        value_cache,
        (plan.full_counts, plan.full_blocks, plan.partial_counts, plan.partial_blocks),
        short_mask if window is None else mask,
        score if softcap is not None or alibi_slopes is not None else None,
        scale,
        max(SMALLEST, 1 << (group - 1).bit_length()),
        pace,
    )


def _chunks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counts_and_blocks: tuple[Tensor, Tensor, Tensor, Tensor],
    positions: Tensor,
    logical_index: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    block_size = key_cache.shape[1]

    def key_position(slot: Tensor) -> Tensor:
        return logical_index[slot // block_size] * block_size + slot % block_size

    def mask(row: Tensor, _head: Tensor, member: Tensor, slot: Tensor) -> Tensor:
        distance = positions[row, member] - key_position(slot)
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def score(score: Tensor, row: Tensor, head: Tensor, member: Tensor, slot: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if alibi_slopes is not None:
            score = score + alibi_slopes[head] * (key_position(slot) - positions[row, member])
        return score

    out, lse = attend_blocks(
        query.transpose(1, 2),
        key_cache,
        value_cache,
        counts_and_blocks,
        mask,
        score if softcap is not None or alibi_slopes is not None else None,
        scale,
        CHUNK_TILE,
        (4, 3),
    )
    return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


_compiled_decode = torch.compile(_decode, fullgraph=True, options=COMPILE_OPTIONS)
_compiled_merge = torch.compile(merge_parts, fullgraph=True, options=MERGE_OPTIONS)
_compiled_merge_outs = torch.compile(merge_outs, fullgraph=True, options=MERGE_OPTIONS)
_compiled_chunks = torch.compile(_chunks, fullgraph=True, options=COMPILE_OPTIONS)
