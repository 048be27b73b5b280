"""The pool of blocks: which are free, and how many block tables name each of the others.

A block is room for `block_size` tokens of K and V in every layer. This file does not know the block size, nor a
tensor, nor a token: it hands out integers and counts references, the way an operating system hands out page frames.

    block id     0      1      2      3      4   ...   N-2    N-1
              +------+------+------+------+------+     +------+-------+
              | null |  A   | A, B | free |  B   | ... | free | trash |
              +------+------+------+------+------+     +------+-------+
    ref count    -      1      2      0      1            0       -

Two blocks are never handed out. Block 0, the null block, holds zeros and is what every padding entry of a block table
points at. Block N-1, the trash block, is where padded rows of a batch write, and nobody reads it. So a pool of N
blocks has N-2 that requests can use, and N times the bytes of a block is exactly what the tensors take.

A block that nobody names any more may still be worth something: the prefix cache can find it again. Such blocks are
free like the others, but they are handed out last, the one let go first before the rest.
"""

from collections.abc import Callable

NULL_BLOCK = 0


class BlockError(RuntimeError):
    """A block was used against the rules: released twice, shared while free, or never handed out."""


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free. Nothing was handed out."""


class BlockPool:
    """Hands out block ids and counts the block tables that name each one.

    Args:
        num_blocks: all blocks of the pool's tensors, the null and the trash block included.

    Raises:
        ValueError: fewer than 3 blocks, so that none would be left to use.

    Example:
        >>> pool = BlockPool(num_blocks=5)      # blocks 1, 2 and 3 can be used
        >>> pool.allocate(2)
        [1, 2]
        >>> pool.share(2)                       # a second table names block 2
        >>> pool.release(2), pool.num_free      # one of the two lets go: still held
        (False, 1)
        >>> pool.release(2), pool.num_free      # so does the other: free again
        (True, 2)
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 3:
            raise ValueError(
                f"a pool of {num_blocks} blocks has none to use: block 0 is the null block and the last one the trash "
                "block; give it at least 3"
            )
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        # A stack: the block freed last is used next, while its bytes may still be in a cache. Low ids come first.
        self._free = list(range(num_blocks - 2, NULL_BLOCK, -1))
        # Free blocks that are worth keeping, in the order in which they were let go: a dictionary keeps it, and gives
        # up any of its keys at once.
        self._cached: dict[int, None] = {}
        self._when_evicted: dict[int, Callable[[int], None]] = {}

    @property
    def trash_block(self) -> int:
        """The block that padded rows write to: the last one."""
        return self.num_blocks - 1

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold: all but the null and the trash block."""
        return self.num_blocks - 2

    @property
    def num_free(self) -> int:
        """Blocks that no table names, those worth keeping included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that are worth keeping; a caller that only counts them is spared the list."""
        return len(self._cached)

    @property
    def cached_blocks(self) -> list[int]:
        """Free blocks that are worth keeping, the next one to be handed out first."""
        return list(self._cached)

    def ref_count(self, block: int) -> int:
        """How many block tables name `block`."""
        return self._ref_counts[block]

    def is_shared(self, block: int) -> bool:
        """Whether more than one block table names `block`."""
        return self._ref_counts[block] > 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference.

        Raises:
            OutOfBlocks: fewer than `count` are free; then none is taken.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks were asked for and {self.num_free} of {self.num_usable} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Count one more table that names `block`: one that is held, or one that was kept.

        Raises:
            BlockError: the block is free and not kept, so whoever names it would read what somebody else writes.
        """
        if block in self._cached:
            del self._cached[block]
        else:
            self._check_held(block, "shared")
        self._ref_counts[block] += 1

    def keep(self, block: int, when_evicted: Callable[[int], None]) -> None:
        """Mark a held block as worth keeping; `when_evicted` is called with it once its content is given up.

        Raises:
            BlockError: the block is free, so its content is nobody's.
        """
        self._check_held(block, "kept")
        self._when_evicted[block] = when_evicted

    def forget(self, block: int) -> None:
        """Take a mark away: the block's content is no longer worth keeping. Nobody is called."""
        self._when_evicted.pop(block, None)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def release(self, block: int) -> bool:
        """Count one table less that names `block`; True if that was the last one and the block is free again.

        Raises:
            BlockError: the block is free already.
        """
        self._check_held(block, "released")
        self._ref_counts[block] -= 1
        if self._ref_counts[block] > 0:
            return False
        if block in self._when_evicted:
            self._cached[block] = None
        else:
            self._free.append(block)
        return True

    def _evict(self) -> int:
        """The kept block that was let go first, its content given up."""
        block = next(iter(self._cached))
        del self._cached[block]
        self._when_evicted.pop(block)(block)
        return block

    def _check_held(self, block: int, verb: str) -> None:
        if not 0 < block < self.trash_block:
            raise BlockError(f"block {block} cannot be {verb}: only blocks 1 to {self.trash_block - 1} are handed out")
        if self._ref_counts[block] == 0:
            raise BlockError(f"block {block} cannot be {verb}: it is free")
