"""Cascade attention: a prefix that many sequences share is read once for all of them.

Decodes are bound by how fast K and V come from memory. When 32 samples go on from one prompt, their block tables begin
with the same blocks, and ordinary attention reads these 32 times. Here the context is cut where the sequences part:

    table of row 0:   [7, 2, 9 | 4, 6]         prefix [7, 2, 9]: one list for the queries of all rows together
    table of row 1:   [5, 8]                   suffixes [4, 6], [5, 8], [3]: a list for each row, as always
    table of row 2:   [7, 2, 9 | 3]

and the two parts of each row are merged by their log-sum-exp (paged/attention/merge.py). Row 1 reads nothing of the
prefix elsewhere, so its whole table is its suffix.

In the prefix part the query heads of a group, of all rows, are the queries of one long chunk without a mask: so many
tiles of PREFIX_TILE queries, each of which reads the prefix once. There are few tiles, so the prefix is split to keep
the GPU busy, and a split is a tile of its own that gets a part of the list. All rows take part, whether they begin with
the prefix or not, so that shapes depend on the number of rows alone and a step can be captured in a CUDA graph; what
the others get weighs nothing in the merge.

The idea is that of Hydragen (Juravsky et al. 2024) and of FlashInfer's cascade inference (Ye et al. 2024).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from paged.attention.flex import attend_decode
from paged.attention.flex_kernel import (
    COMPILE_OPTIONS,
    MERGE_OPTIONS,
    attend_blocks,
    mark_sizes,
    run_compiled,
    with_pool_columns,
)
from paged.attention.flex_plan import DecodePlan
from paged.attention.merge import merge_parts, merge_two

# Queries of one tile of the prefix part.
PREFIX_TILE = 64
# Warps of a program, and blocks it loads ahead: its tiles are as large as those of a chunk.
PREFIX_PACE = (4, 3)


class PrefixPlan(NamedTuple):
    """What the prefix part reads: S splits of T tiles each, tiles of a split beside each other.

    Attributes:
        counts: [S * T] int32, blocks that a tile reads.
        blocks: [S * T * W] int32, those blocks; W = ceil(M / S).
        is_member: [B] bool, the rows that begin with the prefix.

    The lists are flat, so that nothing about them has size 1, for which the compiler would make graphs of its own.
    """

    counts: Tensor
    blocks: Tensor
    is_member: Tensor


def num_tiles(batch: int, group: int) -> int:
    """Tiles that the queries of B rows fill, which is how often the prefix is read.

    Args:
        batch: B.
        group: query heads for each KV head.

    Example:
        >>> num_tiles(32, 4), num_tiles(33, 4)
        (2, 3)
    """
    return -(-batch * group // PREFIX_TILE)


def plan_prefix(block_tables: Tensor, first_blocks: Tensor, *, num_splits: int, num_tiles: int) -> PrefixPlan:
    """Turn the number of blocks that each row leaves to the prefix part into lists, on the device.

    Args:
        block_tables: [B, M] int32.
        first_blocks: [B] integers, the prefix's blocks for the rows that begin with it, 0 for the others.
        num_splits: S.
        num_tiles: T.

    Example: three blocks in two splits, read by rows 0 and 2.
        >>> tables = torch.tensor([[7, 2, 9, 4], [5, 8, 0, 0], [7, 2, 9, 3]])
        >>> plan = plan_prefix(tables, torch.tensor([3, 0, 3]), num_splits=2, num_tiles=1)
        >>> plan.counts.tolist(), plan.blocks.reshape(2, 2).tolist(), plan.is_member.tolist()
        ([2, 1], [[7, 2], [9, 4]], [True, False, True])
    """
    num_columns = block_tables.shape[1]  # M
    width = -(-num_columns // num_splits)  # W
    num_blocks, reader = first_blocks.max(dim=0, keepdim=True)  # [1], [1]
    length = (num_blocks + num_splits - 1) // num_splits  # [1], blocks of a split; the last ones may have fewer
    start = torch.arange(num_splits, device=block_tables.device) * length  # [S]
    counts = torch.minimum((num_blocks - start).clamp(min=0), length)  # [S]
    columns = start[:, None] + torch.arange(width, device=block_tables.device)  # [S, W]
    blocks = block_tables.index_select(0, reader)[0][columns.clamp(max=num_columns - 1)]  # [S, W]
    return PrefixPlan(
        counts.int().repeat_interleave(num_tiles, output_size=num_splits * num_tiles),
        blocks.int()[:, None].expand(-1, num_tiles, -1).flatten(),
        first_blocks > 0,
    )


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    suffixes: DecodePlan,
    prefix: PrefixPlan,
    *,
    num_splits: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token for each sequence, some of which share a prefix. No sinks: they come after.

    There are no windows and no ALiBi: a prefix would not look the same to all rows.

    Args:
        query: [B, Hq, D], on a GPU.
        key_cache, value_cache: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        suffixes: made with the `first_blocks` that the prefix was made with.
        prefix: what is read once.
        num_splits: S, into which the prefix was split.
        scale, softcap: as everywhere.

    Returns:
        out [B, Hq, Dv], lse [B, Hq] float32.
    """
    out, lse = attend_decode(query, key_cache, value_cache, suffixes, scale=scale, softcap=softcap)
    outs, lses = attend_prefix(
        query, key_cache, value_cache, prefix, num_splits=num_splits, scale=scale, softcap=softcap
    )
    assert lse is not None, "this form runs on a GPU"
    assert lses is not None, "this form runs on a GPU"
    mark_sizes((out, lse, prefix.is_member), (0,))
    mark_sizes((outs, lses), (0, 2))
    merged, merged_lse = run_compiled(_compiled_join, out, lse, outs, lses, prefix.is_member)
    assert merged_lse is not None, "merging gives it"
    return merged, merged_lse


def attend_prefix(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix: PrefixPlan,
    *,
    num_splits: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all rows to the S parts of the prefix.

    Args:
        query, key_cache, value_cache, prefix, num_splits, scale, softcap: as in `attend`.

    Returns:
        outs [S, Hkv, B, G, Dv], lses [S, Hkv, B, G] float32; on a CPU lses is None.
    """
    batch, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    tiles = len(prefix.counts) // num_splits
    # Each KV head's queries one after another, once for each split. What pads the last tile is never looked at.
    padded = query.new_empty(num_kv_heads, num_splits, tiles * PREFIX_TILE, head_dim)
    heads = query.reshape(batch, num_kv_heads, 1, group, head_dim).permute(1, 2, 0, 3, 4)  # [Hkv, 1, B, G, D]
    padded[:, :, : batch * group].view(num_kv_heads, num_splits, batch, group, head_dim).copy_(heads)
    queries = padded.flatten(1, 2)[None]  # [1, Hkv, S * T * PREFIX_TILE, D]

    counts = prefix.counts.reshape(1, 1, -1)
    blocks = prefix.blocks.reshape(1, 1, len(prefix.counts), -1)
    if query.device.type == "cpu":
        blocks = with_pool_columns(blocks, len(key_cache))
    else:
        mark_sizes((key_cache, value_cache), (0,))
        mark_sizes((queries, counts), (2,))
        mark_sizes((blocks,), (2, 3))
    out, lse = run_compiled(_compiled_prefix, queries, key_cache, value_cache, counts, blocks, scale, softcap)

    def by_row(tensor: Tensor) -> Tensor:
        """[1, Hkv, S * T * PREFIX_TILE, ...] -> [S, Hkv, B, G, ...]"""
        width = tensor.shape[3:]
        per_split = tensor.reshape(num_kv_heads, num_splits, -1, *width)[:, :, : batch * group]
        return per_split.reshape(num_kv_heads, num_splits, batch, group, *width).transpose(0, 1)

    return by_row(out), None if lse is None else by_row(lse)


def join(out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor, is_member: Tensor) -> tuple[Tensor, Tensor]:
    """Put suffixes and the parts of the prefix together; the prefix is nothing to rows that do not begin with it.

    Args:
        out: [B, Hq, Dv], over the suffixes.
        lse: [B, Hq].
        outs: [S, Hkv, B, G, Dv], over the prefix's parts.
        lses: [S, Hkv, B, G].
        is_member: [B].

    Returns:
        out [B, Hq, Dv], lse [B, Hq].
    """
    outs = outs.permute(2, 0, 1, 3, 4).flatten(2, 3)  # [B, S, Hq, Dv]
    lses = lses.permute(2, 0, 1, 3).flatten(2, 3)  # [B, S, Hq]
    lses = torch.where(is_member[:, None, None], lses, -torch.inf)
    return merge_two(out, lse, *merge_parts(outs, lses))


def _prefix(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counts: Tensor,
    blocks: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Tiles over their lists: query [1, Hkv, Q, D] -> out [1, Hkv, Q, Dv], lse [1, Hkv, Q]."""

    def everything(_row: Tensor, _head: Tensor, _query: Tensor, slot: Tensor) -> Tensor:
        return slot >= 0

    def score(score: Tensor, _row: Tensor, _head: Tensor, _query: Tensor, _slot: Tensor) -> Tensor:
        assert softcap is not None, "else scores stay as they are"
        return softcap * torch.tanh(score / softcap)

    # "Partial" blocks with a mask that lets all through: then there is one list and not a second, empty one.
    lists = None, None, counts, blocks
    wanted_score: Callable[..., Tensor] | None = None if softcap is None else score
    return attend_blocks(
        query, key_cache, value_cache, lists, everything, wanted_score, scale, PREFIX_TILE, PREFIX_PACE
    )


_compiled_prefix = torch.compile(_prefix, fullgraph=True, options=COMPILE_OPTIONS)
_compiled_join = torch.compile(join, fullgraph=True, options=MERGE_OPTIONS)
