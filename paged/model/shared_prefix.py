"""Which rows of a decode step begin with the same blocks, and whether reading these once pays.

The host looks at its copy of the block tables before every decode step, so looking has to cost next to nothing where
nothing is shared: then all it compares is the first block of each row. Tables are compared block by block, by the
blocks' numbers: rows that name the same block share its K and V, whoever computed them.
"""

from typing import NamedTuple

import numpy as np

from paged.attention.cascade import num_tiles
from paged.blocks import NULL_BLOCK
from paged.step import Step

# What the prefix part costs in each layer (copying queries, starting two more kernels, merging), as the bytes that
# attention could have read from memory meanwhile: about 10 microseconds at 4 TB/s. An estimate, not measured yet.
BYTES_WORTH_A_CASCADE = 40 * 10**6
# Places where tables part that are looked behind. Rows that share more are fewer there, so the first ones matter.
MOST_FORKS = 8


class SharedPrefix(NamedTuple):
    """Rows of a step that begin with the same blocks.

    Attributes:
        members: [rows that do] int64, their places in the step.
        num_blocks: how many blocks they share; all of them full, and before the token that is computed.
    """

    members: np.ndarray
    num_blocks: int

    def num_blocks_saved(self, num_reads: int) -> int:
        """Blocks that need not be read, if the prefix is read so many times instead of once for each member."""
        return (len(self.members) - num_reads) * self.num_blocks


def find_shared_prefix(
    block_tables: np.ndarray, rows: np.ndarray, num_full: np.ndarray, *, num_reads: int = 1
) -> SharedPrefix | None:
    """The prefix that saves most, along the way that most rows take.

    Where tables part, the search goes on with the largest party: a system prompt shared by all may be followed by the
    long prompt of one request with many samples, and then either may save more.

    Args:
        block_tables: [R, M], of all persistent rows.
        rows: [B], those of the step.
        num_full: [B], blocks of each of them that may be shared: full, and before the token that is computed.
        num_reads: times that the prefix is read instead of once for each member.

    Returns:
        The prefix; None if there is none that saves a block.

    Example: three rows begin with block 7, which saves two reads of a block; two share three blocks, which saves three.
        >>> tables = np.array([[7, 2, 9, 4], [7, 4, 0, 0], [5, 8, 0, 0], [7, 2, 9, 3]])
        >>> find_shared_prefix(tables, np.arange(4), np.array([3, 1, 1, 3]))
        SharedPrefix(members=array([0, 3]), num_blocks=3)
    """
    best, best_saved = None, 0
    members, start = np.arange(len(rows)), 0
    for _ in range(MOST_FORKS):
        members = members[num_full[members] > start]
        if len(members) < 2:
            break
        blocks, counts = np.unique(block_tables[rows[members], start], return_counts=True)
        most_frequent = blocks[counts.argmax()]
        if most_frequent == NULL_BLOCK:  # what a window has left behind is nobody's
            break
        members = members[block_tables[rows[members], start] == most_frequent]
        if len(members) < 2 or len(members) <= num_reads:
            break
        start = _end_of_common(block_tables, rows[members], start, int(num_full[members].min()))
        prefix = SharedPrefix(members, start)
        if prefix.num_blocks_saved(num_reads) > best_saved:
            best, best_saved = prefix, prefix.num_blocks_saved(num_reads)
    return best


def _end_of_common(block_tables: np.ndarray, rows: np.ndarray, start: int, stop: int) -> int:
    """The first column from `start` on in which rows differ; `stop` if there is none before it."""
    width = 32  # of what is compared at once: most rows part soon, and what lies behind need not be touched
    while start < stop:
        tables = block_tables[rows, start : min(start + width, stop)]
        differs = (tables != tables[0]).any(axis=0)
        if differs.any():
            return start + int(differs.argmax())
        start, width = start + width, 2 * width
    return stop


def pays(prefix: SharedPrefix, *, num_reads: int, block_bytes: int) -> bool:
    """Whether what is not read from memory takes longer than what the prefix part costs.

    It is read by each tile of queries, and all rows of the step have queries in these, members or not:

        (members - tiles) * prefix blocks * block bytes > BYTES_WORTH_A_CASCADE

    Args:
        prefix: the rows and blocks in question.
        num_reads: tiles.
        block_bytes: bytes of a block in one layer.

    Example: 32 samples, blocks of 16 tokens of 8 KV heads of 128 in bfloat16; prompts of 8,192 and of 256 tokens.
        >>> [pays(SharedPrefix(np.arange(32), n), num_reads=2, block_bytes=2**16) for n in (512, 16)]
        [True, False]
    """
    return prefix.num_blocks_saved(num_reads) * block_bytes > BYTES_WORTH_A_CASCADE


class PrefixFinder:
    """Decides for each step which rows attend to a shared prefix together.

    Args:
        block_tables: [R, M], the host's persistent ones, kept up to date by somebody else.
        block_size: P.
        group: query heads for each KV head.
        block_bytes: bytes of a block in one layer.
    """

    def __init__(self, block_tables: np.ndarray, *, block_size: int, group: int, block_bytes: int) -> None:
        self._block_tables = block_tables
        self._block_size = block_size
        self._group = group
        self._block_bytes = block_bytes

    def first_blocks(self, step: Step) -> np.ndarray | None:
        """How many blocks each row leaves to the prefix part.

        Args:
            step: its tables were replayed.

        Returns:
            [B] int64: the prefix's blocks for its members, 0 for the others. None for a step that does something else
            than decode, and where it would not pay.
        """
        if len(step.rows) < 2:
            return None
        rows = np.array([row.row for row in step.rows])
        # The ordinary case first, as quickly as possible: a step without two rows that begin alike.
        first = np.sort(self._block_tables[rows, 0])
        if not ((first[1:] == first[:-1]) & (first[1:] != NULL_BLOCK)).any() or step.num_single < len(rows):
            return None
        num_full = np.array([row.start for row in step.rows]) // self._block_size
        num_reads = num_tiles(len(rows), self._group)
        prefix = find_shared_prefix(self._block_tables, rows, num_full, num_reads=num_reads)
        if prefix is None or not pays(prefix, num_reads=num_reads, block_bytes=self._block_bytes):
            return None
        first_blocks = np.zeros(len(rows), np.int64)
        first_blocks[prefix.members] = prefix.num_blocks
        return first_blocks
