"""From block tables to the lists of blocks that FlexAttention reads, on the device: the host waits for nothing."""

from typing import NamedTuple

import torch
from torch import Tensor

# Query tokens of one tile in a chunk.
CHUNK_TILE = 128
# Programs that should be under way on each multiprocessor: enough that memory never waits for arithmetic.
PROGRAMS_PER_MULTIPROCESSOR = 4
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
        # A tensor of its own: of one sequence a view would do, and be another kind of tensor to the compiler.
        return per_sequence.reshape(-1, 1).expand(-1, num_splits).flatten().contiguous()

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
