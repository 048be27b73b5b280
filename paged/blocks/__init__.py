"""Block bookkeeping: integers only, no tensors, so it runs in microseconds and can be read without knowing torch."""

from paged.blocks.block_pool import NULL_BLOCK, BlockError, BlockPool, OutOfBlocks
from paged.blocks.block_table import BlockCopy, BlockTable, TableChange, blocks_for, num_blocks_to_write
from paged.blocks.prefix_cache import CachedBlock, PrefixCache

__all__ = [
    "NULL_BLOCK",
    "BlockCopy",
    "BlockError",
    "BlockPool",
    "BlockTable",
    "CachedBlock",
    "OutOfBlocks",
    "PrefixCache",
    "TableChange",
    "blocks_for",
    "num_blocks_to_write",
]
