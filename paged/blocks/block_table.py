"""The block table: one sequence's list of blocks, logical -> physical.

    position     0  1  2  3 | 4  5  6  7 | 8  9            block_size 4, ten tokens
    logical           0     |     1      |     2
                      |           |            |
    block table      [7,          2,           5]          any free blocks, in any order
                      |           |            |
    slots         28 .. 31     8 .. 11      20, 21

How many blocks `n` tokens need is `ceil(n / block_size)` and nothing else. There is no "is the last block full" test
anywhere: a table is asked to make room for the positions that are about to be written, and the difference between
what they need and what it has is what it takes from the pool.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paged.blocks.block_pool import NULL_BLOCK, BlockPool, OutOfBlocks


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens: `ceil(num_tokens / block_size)`.

    Example:
        >>> [blocks_for(n, block_size=4) for n in (0, 1, 4, 5)]
        [0, 1, 1, 2]
    """
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy one whole block, in every layer, before the step writes anything."""

    source: int
    target: int


class TableChange(NamedTuple):
    """What one call changed in a table: its entries from `first_index` on are now `blocks`.

    Whoever keeps a copy of the table (the batch does, as a row of a tensor) replays this instead of the whole table.
    """

    first_index: int
    blocks: tuple[int, ...]
    copies: tuple[BlockCopy, ...] = ()


class BlockTable:
    """The blocks of one sequence, in the order of its tokens.

    Example:
        >>> pool = BlockPool(num_blocks=8)
        >>> table = BlockTable(pool, block_size=4)
        >>> table.prepare_write(0, 5)                    # five tokens need two blocks
        TableChange(first_index=0, blocks=(1, 2), copies=())
        >>> table.prepare_write(5, 6)                    # the sixth fits into the second one
        TableChange(first_index=2, blocks=(), copies=())
        >>> table.slot(5)                                # block 2, offset 1
        9
        >>> twin = table.fork()                          # shares both blocks ...
        >>> twin.prepare_write(6, 7)                     # ... until it writes into one of them
        TableChange(first_index=1, blocks=(3,), copies=(BlockCopy(source=2, target=3),))
        >>> table.blocks, twin.blocks
        ([1, 2], [1, 3])
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.blocks: list[int] = []

    def slot(self, position: int) -> int:
        """The slot of the token at `position`: `block * block_size + offset`."""
        index, offset = divmod(position, self.block_size)
        return self.blocks[index] * self.block_size + offset

    def is_writable(self, start: int, end: int) -> bool:
        """Whether positions `start` to `end - 1` have slots of this table's own, so that writing takes no block."""
        if end > len(self.blocks) * self.block_size:
            return False
        first, last = start // self.block_size, (end - 1) // self.block_size
        if first == last:  # a decode, and so by far the most frequent question
            return not self.pool.is_shared(self.blocks[first])
        return not self.shared_between(start, end)

    def prepare_write(self, start: int, end: int) -> TableChange:
        """Make the slots of positions `start` to `end - 1` this table's own to write.

        Blocks that are missing are taken from the pool. A block that another table names too is replaced by a copy
        (copy-on-write): what the other table reads must not change under it.

        Args:
            start: first position that will be written; positions below it are kept.
            end: one past the last position that will be written.

        Returns:
            The entries that changed and the block copies to make before writing.

        Raises:
            OutOfBlocks: the pool has too few free blocks; then nothing has changed.
        """
        if self.is_writable(start, end):
            return TableChange(len(self.blocks), ())
        needed = num_blocks_to_write(self.pool, [(self, start, end)])
        if needed > self.pool.num_free:
            raise OutOfBlocks(
                f"writing tokens {start} to {end - 1} takes {needed} more blocks of {self.block_size} and "
                f"{self.pool.num_free} are free"
            )
        first_changed = len(self.blocks)
        copies = []
        for index in self.shared_between(start, end):
            (target,) = self.pool.allocate(1)
            copies.append(BlockCopy(source=self.blocks[index], target=target))
            self.pool.release(self.blocks[index])
            self.blocks[index] = target
            first_changed = min(first_changed, index)
        self.blocks += self.pool.allocate(max(0, blocks_for(end, self.block_size) - len(self.blocks)))
        return TableChange(first_changed, tuple(self.blocks[first_changed:]), tuple(copies))

    def fork(self, num_tokens: int | None = None) -> "BlockTable":
        """A second table over the same blocks. Nothing is copied until one of the two writes.

        Args:
            num_tokens: share only the blocks of so many tokens; None: all.
        """
        twin = BlockTable(self.pool, self.block_size)
        count = len(self.blocks) if num_tokens is None else blocks_for(num_tokens, self.block_size)
        twin.adopt(self.blocks[:count])
        return twin

    def adopt(self, blocks: Sequence[int]) -> None:
        """Begin with blocks that hold the sequence's first tokens already; the table has to be empty."""
        assert not self.blocks, "blocks are adopted before anything is written"
        for block in blocks:
            if block != NULL_BLOCK:
                self.pool.share(block)
        self.blocks = list(blocks)

    def drop_before(self, position: int) -> int | None:
        """Let go of the blocks all of whose tokens lie before `position`: a sliding window has left them behind.

        Their entries become the null block.

        Returns:
            Index of the first entry that changed, or None.
        """
        first_changed = None
        for index in range(min(position // self.block_size, len(self.blocks)) - 1, -1, -1):
            if self.blocks[index] == NULL_BLOCK:
                break  # everything before it was dropped earlier
            self.pool.release(self.blocks[index])
            self.blocks[index] = NULL_BLOCK
            first_changed = index
        return first_changed

    def free(self) -> None:
        """Let go of every block, last one first: the end of a sequence is worth less to others than its beginning."""
        while self.blocks:
            block = self.blocks.pop()
            if block != NULL_BLOCK:
                self.pool.release(block)

    def shared_between(self, start: int, end: int) -> list[int]:
        """Indices of the blocks under positions `start` to `end - 1` that another table names too."""
        last = min(blocks_for(end, self.block_size), len(self.blocks))
        return [i for i in range(start // self.block_size, last) if self.pool.is_shared(self.blocks[i])]


def num_blocks_to_write(pool: BlockPool, writes: Iterable[tuple[BlockTable, int, int]]) -> int:
    """Free blocks that `prepare_write(start, end)` of several tables over `pool` takes, one call after another.

    A block that r tables name and w of them write is copied for each writer, but the last table to name it keeps it:
    min(w, r - 1) copies.

    Example: two tables share a block with room for one more token. One of them copies it, the other then owns it.
        >>> pool = BlockPool(num_blocks=8)
        >>> table = BlockTable(pool, block_size=4)
        >>> _ = table.prepare_write(0, 3)
        >>> twin = table.fork()
        >>> num_blocks_to_write(pool, [(table, 3, 4)]), num_blocks_to_write(pool, [(table, 3, 4), (twin, 3, 4)])
        (1, 1)
    """
    growth = 0
    shared = []
    for table, start, end in writes:
        growth += max(0, blocks_for(end, table.block_size) - len(table.blocks))
        shared += [table.blocks[index] for index in table.shared_between(start, end)]
    return growth + sum(min(count, pool.ref_count(block) - 1) for block, count in _counted(shared))


def _counted(blocks: list[int]) -> Iterable[tuple[int, int]]:
    """Each block and how often it occurs."""
    return Counter(blocks).items() if blocks else ()  # a decode asks this for every new block, and mostly shares none
