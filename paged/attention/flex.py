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

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from paged.attention.merge import apply_sinks, merge_parts
from paged.attention.scores import check_arguments, nothing_seen

# FlexAttention's kernels index with 32 bits; past it they read elsewhere, in silence.
MOST_ELEMENTS = 2**31
SMALLEST = 16  # a side of a matrix product in Triton
# Query tokens of one tile in a chunk.
CHUNK_TILE = 128
# Programs that should be under way on each multiprocessor: enough that memory never waits for arithmetic.
PROGRAMS_PER_MULTIPROCESSOR = 4
# Most bytes of K and V that are read at a time, and of the queries beside them.
BYTES_AHEAD = 32 * 1024
# A part shorter than this costs more to start and to merge than it saves.
FEWEST_BLOCKS_IN_A_SPLIT = 4


class DecodePlan(NamedTuple):
    """Which blocks each of R = B * S rows reads, S parts for each of B decodes. Tensors that can stay where they are.

    Attributes:
        full_counts, full_blocks: [R, 1, 1] and [R, 1, 1, W] int32: blocks of which every slot is seen.
        partial_counts, partial_blocks: the same of blocks of which some slots are seen.
        last_block: [R] int32, the block that holds the sequence's last token.
        last_index: [R] int32, its place in the sequence's table.
        first_index: [R] int32, the place of the first block that is seen.
        first_position: [R] int32, the first position that is seen.
        seq_lens: [R] int32.
    """

    full_counts: Tensor
    full_blocks: Tensor
    partial_counts: Tensor
    partial_blocks: Tensor
    last_block: Tensor
    last_index: Tensor
    first_index: Tensor
    first_position: Tensor
    seq_lens: Tensor


def num_splits_for(batch: int, num_kv_heads: int, num_blocks: int, num_multiprocessors: int) -> int:
    """Parts into which each context is split, so that all multiprocessors have work: a power of two.

    Args:
        batch: B sequences.
        num_kv_heads: Hkv; a sequence and a KV head are one program.
        num_blocks: M, blocks of the longest context.
        num_multiprocessors: of the GPU.

    Example: 64 sequences of 8 heads keep 132 multiprocessors busy; one sequence does not.
        >>> num_splits_for(64, 8, 128, 132), num_splits_for(1, 8, 512, 132)
        (1, 64)
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
    splits = 1
    while 2 * splits * batch * num_kv_heads <= wanted and 2 * splits * FEWEST_BLOCKS_IN_A_SPLIT <= num_blocks:
        splits *= 2
    return splits


def plan_decode(
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    block_size: int,
    window: int | None = None,
    num_splits: int = 1,
    first_blocks: Tensor | None = None,
) -> DecodePlan:
    """Turn block tables into lists of blocks to read, on the device: the host waits for nothing.

    Args:
        block_tables: [B, M] int32.
        seq_lens: [B] int32; 0 sees nothing.
        block_size: P.
        window: a query sees itself and `window - 1` tokens before it; None: all.
        num_splits: S.
        first_blocks: [B] integers, how many blocks at the beginning of each table are left out, because they are read
            elsewhere (paged/attention/cascade.py); full ones, so fewer than seq_len tokens. None: none.

    Returns:
        The plan, of R = B * S rows, those of a sequence beside each other.

    Example: 50 tokens in two parts; the last block is seen in part.
        >>> plan = plan_decode(torch.tensor([[7, 2, 9, 4]]), torch.tensor([50]), block_size=16, num_splits=2)
        >>> plan.full_counts.flatten().tolist(), plan.full_blocks[:, 0, 0, :2].tolist()
        ([2, 1], [[7, 2], [9, 4]])
        >>> plan.partial_counts.flatten().tolist(), plan.partial_blocks[1, 0, 0, 0].item()
        ([0, 1], 4)
    """
    num_blocks = block_tables.shape[1]  # M
    width = -(-num_blocks // num_splits)  # W
    seq_lens = seq_lens.int()
    first_position = torch.zeros_like(seq_lens) if window is None else (seq_lens - window).clamp(min=0)
    if first_blocks is not None:
        first_position = torch.maximum(first_position, first_blocks.int() * block_size)
    first_index = first_position // block_size
    end = (seq_lens + block_size - 1) // block_size  # one past the last block
    last_index = (end - 1).clamp(min=0)

    # Blocks first_index to end - 1, in S parts of equal length, the last ones perhaps empty.
    length = (end - first_index + num_splits - 1) // num_splits  # [B]
    part = torch.arange(num_splits, dtype=torch.int32, device=seq_lens.device)
    start = first_index[:, None] + part * length[:, None]  # [B, S]
    stop = torch.minimum(start + length[:, None], end[:, None])
    # Whole: all but the last block and, if a window begins inside it, the first.
    whole_start = torch.maximum(start, ((first_position + block_size - 1) // block_size)[:, None])
    whole_stop = torch.minimum(stop, last_index[:, None])
    full_counts = (whole_stop - whole_start).clamp(min=0)
    column = torch.arange(width, dtype=torch.int32, device=seq_lens.device)
    columns = (whole_start[..., None] + column).clamp(max=num_blocks - 1)  # [B, S, W]
    full_blocks = block_tables.gather(1, columns.flatten(1).long()).int().reshape(columns.shape)

    has_first = (start <= first_index[:, None]) & (first_index < last_index)[:, None] & (start < stop)
    has_first &= (first_position % block_size > 0)[:, None]
    has_last = (start <= last_index[:, None]) & (last_index[:, None] < stop)
    first_block = block_tables.gather(1, first_index[:, None].long()).int()  # [B, 1]
    last_block = block_tables.gather(1, last_index[:, None].long()).int()
    # Both lists have W columns, though two would do for this one: the kernel finds either by the strides of the other.
    partial_blocks = torch.where(
        column == 0, torch.where(has_first, first_block, last_block)[..., None], last_block[..., None]
    )

    def rows(per_sequence: Tensor) -> Tensor:
        return per_sequence.reshape(-1, 1).expand(-1, num_splits).flatten()

    return DecodePlan(
        full_counts.int().reshape(-1, 1, 1),
        full_blocks.reshape(-1, 1, 1, width),
        (has_first.int() + has_last.int()).reshape(-1, 1, 1),
        partial_blocks.int().reshape(-1, 1, 1, width),
        rows(last_block),
        rows(last_index),
        rows(first_index),
        rows(first_position),
        rows(seq_lens),
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
            num_splits = _splits_here(len(q), num_kv_heads, num_blocks, query.device)
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
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query token for each sequence, as planned. No sinks: they come after any merge.

    Args:
        query: [B, Hq, D].
        key_cache, value_cache: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        plan: of R = B * S rows, made for the same window.
        scale, window, softcap: as everywhere.
        alibi_slopes: [Hkv, G], or None.
        logical_index: [N] int32, a block's index in the tables that name it; needed for ALiBi alone.

    Returns:
        out [B, Hq, Dv], lse [B, Hq] float32; on a CPU lse is None.
    """
    batch, num_heads, head_dim = query.shape
    num_rows, num_kv_heads, value_dim = len(plan.seq_lens), key_cache.shape[2], value_cache.shape[3]
    num_splits = num_rows // batch
    # The heads of a group are the queries of a tile, so each key is read once for all of them.
    rows = query.reshape(batch, 1, num_kv_heads, -1, head_dim)
    rows = rows.expand(-1, num_splits, -1, -1, -1).reshape(num_rows, num_kv_heads, -1, head_dim).contiguous()
    if query.device.type == "cpu":
        plan = plan._replace(**_with_pool_columns(plan._asdict(), len(key_cache)))
    else:
        _mark_sizes((rows, key_cache, value_cache, *plan[4:]), (0,))
        _mark_sizes(plan[:4], (0, 3))
    pace = _pace(num_rows * num_kv_heads, num_splits)
    out, lse = _run(
        _compiled_decode, rows, key_cache, value_cache, plan, scale, window, softcap, alibi_slopes, logical_index, pace
    )
    if lse is None:
        return out.reshape(batch, num_heads, value_dim), None
    if num_splits == 1:
        return out.reshape(batch, num_heads, value_dim), lse.reshape(batch, num_heads)
    outs, lses = out.reshape(batch, num_splits, num_heads, value_dim), lse.reshape(batch, num_splits, num_heads)
    _mark_sizes((outs, lses), (0,))
    return _run(_compiled_merge, outs, lses)


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
        columns = _with_pool_columns(dict(enumerate(counts_and_blocks)), len(key_cache))
        counts_and_blocks = columns[0], columns[1], columns[2], columns[3]
    else:
        _mark_sizes((key_cache, value_cache, logical_index), (0,))
        _mark_sizes((query, positions), (0, 1))
        _mark_sizes(counts_and_blocks, (0, 2, 3))
    wishes = scale, window, softcap, alibi_slopes
    return _run(_compiled_chunks, query, key_cache, value_cache, counts_and_blocks, positions, logical_index, *wishes)


def plan_chunks(
    block_tables: Tensor, positions: Tensor, *, block_size: int, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which blocks each tile of query tokens reads.

    Args:
        block_tables: [B, M].
        positions: [B, Q] int32, -1 for padding, which comes last.
        block_size, window: as everywhere.

    Returns:
        full_counts [B, 1, Q / CHUNK_TILE] and full_blocks [B, 1, Q / CHUNK_TILE, M], of which every slot is seen by
        every query of the tile; partial_counts and partial_blocks, of which some are. All int32.
    """
    tiles = positions.reshape(len(positions), 1, -1, CHUNK_TILE)
    latest = tiles.amax(-1, keepdim=True)  # [B, 1, tiles, 1]
    # Padding is last, so where a tile has a query its first row is one.
    earliest = tiles[..., :1]
    first_key = torch.arange(block_tables.shape[1], device=positions.device) * block_size  # [M]
    last_key = first_key + block_size - 1
    touched, whole = first_key <= latest, last_key <= earliest
    if window is not None:
        touched = touched & (last_key > earliest - window)
        whole = whole & (first_key > latest - window)
    touched, whole = touched & (latest >= 0), whole & (latest >= 0)
    partial = touched & ~whole

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.logical_not().byte().argsort(dim=-1, stable=True)  # chosen ones first, in their order
        blocks = block_tables[:, None, None].expand(order.shape).gather(-1, order)
        return chosen.sum(-1, dtype=torch.int32), blocks.int().contiguous()

    return *listed(whole & touched), *listed(partial)


def place_blocks(block_tables: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """The index that each block of the pool has in the tables that name it.

    Args:
        block_tables: [B, M].
        seq_lens: [B].
        num_blocks: N.
        block_size: P.

    Returns:
        [N] int32; what stands at blocks that nobody uses means nothing.

    Example:
        >>> place_blocks(torch.tensor([[3, 1], [2, 0]]), torch.tensor([20, 16]), 4, 16)[1:].tolist()
        [1, 0, 0]
    """
    index = torch.arange(block_tables.shape[1], dtype=torch.int32, device=block_tables.device)
    used = index * block_size < seq_lens[:, None]  # [B, M]
    # One more place, for the entries that are not used.
    logical_index = torch.zeros(num_blocks + 1, dtype=torch.int32, device=block_tables.device)
    places = torch.where(used, block_tables, num_blocks).long()
    logical_index[places] = index.expand(places.shape)
    return logical_index[:-1]


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


def _splits_here(batch: int, num_kv_heads: int, num_blocks: int, device: torch.device) -> int:
    if device.type == "cpu":
        return 1  # there is no log-sum-exp to merge by
    num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return num_splits_for(batch, num_kv_heads, num_blocks, num_multiprocessors)


def _pace(num_programs: int, num_splits: int) -> tuple[int, int]:
    """Warps of a program, and blocks it loads ahead, as measured on an H200 for blocks of 16 (docs/performance.md).

    A decode has little to compute, so one warp is enough; what counts is how many loads are under way. With very many
    programs the chip is full of them and each needs fewer.
    """
    if num_programs > 1024:
        return 2, 3
    return (1, 4) if num_splits == 1 else (1, 3)


def _kernel_options(cache: Tensor, value_dim: int, tile: int, pace: tuple[int, int]) -> dict[str, Any]:
    """How the Triton kernel is cut: queries and the blocks loaded ahead have to fit any GPU's shared memory."""
    warps, stages = pace
    widths = [1 << (width - 1).bit_length() for width in (cache.shape[3], value_dim)]  # the kernel rounds them up
    keys, itemsize = min(cache.shape[1], 64), cache.dtype.itemsize  # keys read at a time
    while keys > SMALLEST and keys * sum(widths) * itemsize > BYTES_AHEAD:
        keys //= 2
    queries = tile
    while queries > SMALLEST and queries * widths[0] * itemsize > BYTES_AHEAD:
        queries //= 2
    bytes_ahead = keys * sum(widths) * itemsize
    if bytes_ahead > 8 * 1024:  # more than a block of 16 tokens of 128 in half precision
        warps, stages = max(warps, 2 if bytes_ahead <= 16 * 1024 else 4), 3
    return {
        "BACKEND": "TRITON",
        "BLOCK_M": queries,
        "BLOCK_N": keys,
        "num_stages": max(1, min(stages, 3 * BYTES_AHEAD // bytes_ahead)),
        "num_warps": warps,
        "FLOAT32_PRECISION": "'ieee'",
    }


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

    return _flex(
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

    out, lse = _flex(
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


def _flex(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counts_and_blocks: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    mask: Callable[..., Tensor],
    score: Callable[..., Tensor] | None,
    scale: float,
    tile: int,
    pace: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention over lists of blocks; query [R, H, Q, D] -> out [R, H, Q, Dv] and lse [R, H, Q], None on a CPU.

    The lists of full blocks may be None: then all are partial ones, and the mask looks at every slot.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "FlexAttention was about to run eagerly, where it ignores the lists of blocks and attends to the whole "
            "pool; torch.compile must not be disabled for the flex form: use attention_form='gathered' instead"
        )
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    full_counts, full_blocks, partial_counts, partial_blocks = counts_and_blocks
    on_cpu = query.device.type == "cpu"
    block_mask = BlockMask.from_kv_blocks(
        partial_counts,
        partial_blocks,
        full_counts,
        full_blocks,
        BLOCK_SIZE=(tile, block_size),
        mask_mod=mask,
        seq_lengths=(query.shape[2], num_blocks * block_size),
        compute_q_blocks=False,
    )
    # [N, P, Hkv, D] as [1, Hkv, N * P, D]: a view, for whose strides the kernel does not care.
    torch._check(value_cache.shape[0] == num_blocks)  # type: ignore[no-untyped-call]
    keys, values = (cache.flatten(0, 1)[None].transpose(1, 2) for cache in (key_cache, value_cache))
    options = _kernel_options(key_cache, value_cache.shape[3], tile, pace)
    result: Any = flex_attention(  # type: ignore[call-overload]
        query,
        keys,
        values,
        score_mod=score,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != num_kv_heads,
        return_lse=not on_cpu,
        kernel_options=None if on_cpu else options,
    )
    return (result, None) if on_cpu else (result[0], result[1])


def _mark_sizes(tensors: Iterable[Tensor], changing: tuple[int, ...]) -> None:
    """Tell the compiler which sizes change, so that one graph serves all of them (but 1, which always has its own).

    The others are fixed: if it has seen two of them it must not make a graph for any, since the kernel needs numbers.
    """
    for tensor in tensors:
        for dim in range(tensor.dim()):
            if dim in changing:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
            else:
                torch._dynamo.mark_static(tensor, dim)


def _with_pool_columns(tensors: dict[Any, Tensor], num_blocks: int) -> dict[Any, Tensor]:
    """Lists of blocks with as many columns as the pool has blocks, which is what the CPU's kernel wants."""
    return {
        name: torch.nn.functional.pad(tensor, (0, num_blocks - tensor.shape[-1])) if tensor.dim() == 4 else tensor
        for name, tensor in tensors.items()
    }


_compiled_decode = torch.compile(_decode, fullgraph=True)
# One kernel, not two: parts are few, and starting a kernel takes longer than going through them.
_compiled_merge = torch.compile(merge_parts, fullgraph=True, options={"split_reductions": False})
_compiled_chunks = torch.compile(_chunks, fullgraph=True)


def _run(compiled: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor | None]:
    # Head shapes, block sizes and features each make a graph of their own. Having seen two values of a number, the
    # compiler would take it for a variable, but numbers are part of the kernel.
    with torch._dynamo.config.patch(recompile_limit=256, specialize_int=True, specialize_float=True):
        result: tuple[Tensor, Tensor | None] = compiled(*arguments)
    return result
