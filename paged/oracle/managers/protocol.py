"""What a block manager is, to its judge: a few verbs, and block tables that can be read.

A manager hands out blocks of a pool to sequences, and holds no keys nor values. The judge names the sequences, plays
the model that writes into the blocks, and looks at the tables. Any manager fits with an adapter of some twenty lines;
`OwnBlocks` is the one for this project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paged.blocks import BlockPool, BlockTable, CachedBlock, OutOfBlocks, PrefixCache

# (source, target): the content of one block is to be copied to another before anything is written.
Copies = Sequence[tuple[int, int]]


class Manager(Protocol):
    """The verbs. Those that need more blocks than are free raise what `ManagerCapabilities.out_of_blocks` names.

    Sequences have names. A table lists a sequence's blocks in the order of its tokens, without padding.
    """

    def allocate(self, name: str, tokens: Sequence[int]) -> int:
        """Begin a sequence with these tokens; how many of them are in its blocks already, found by prefix."""
        ...

    def append(self, name: str, tokens: Sequence[int]) -> Copies:
        """The sequence goes on with these tokens: make room that is its own to write."""
        ...

    def fork(self, name: str, twin: str) -> Copies:
        """Begin a second sequence with all tokens of the first."""
        ...

    def free(self, name: str) -> None:
        """The sequence has ended. One that is not there is refused by an exception."""
        ...

    def table(self, name: str) -> Sequence[int]:
        """The sequence's blocks."""
        ...

    def num_free(self) -> int:
        """Blocks that are in no table: those that may be handed out, findable ones included."""
        ...


class PrefixManager(Manager, Protocol):
    """A manager that finds blocks by the tokens they stand for."""

    def computed(self, name: str) -> None:
        """Keys and values of all the sequence's tokens have been written: full blocks may be found from now on."""
        ...

    def lookup(self, tokens: Sequence[int]) -> Sequence[int]:
        """The blocks that hold the beginning of these tokens, in order; nothing changes."""
        ...


class WindowManager(Manager, Protocol):
    """A manager that lets go of what a sliding window has left behind."""

    def drop_before(self, name: str, position: int) -> None:
        """Nobody reads the sequence's tokens before `position` any more; entries of blocks let go are reserved ones."""
        ...


@dataclass(frozen=True)
class ManagerCapabilities:
    """What a manager can do. What is declared is tried; what is not is never asked for.

    Args:
        block_sizes: P, tokens.
        reserved: blocks that are never handed out; -1 is the last one of the pool.
        fork: sequences can be forked.
        prefix_caching: it has the verbs of `PrefixManager`.
        window: it has the verb of `WindowManager`.
        eviction: "lru" if the findable block that was let go longest ago is given up first; None: any order.
        lookahead: so many blocks more than its tokens need may be in a table.
        double_free: freeing a sequence again is "refused" by an exception, or "ignored".
        out_of_blocks: the exception that says that too few blocks are free.

    Raises:
        ValueError: an unknown choice, or a number that cannot be.

    Example:
        >>> ManagerCapabilities(eviction="fifo")
        Traceback (most recent call last):
        ...
        ValueError: eviction is 'lru' or None, got 'fifo'
    """

    block_sizes: tuple[int, ...] = (4, 1, 3)
    reserved: tuple[int, ...] = (0,)
    fork: bool = True
    prefix_caching: bool = False
    window: bool = False
    eviction: str | None = None
    lookahead: int = 0
    double_free: str = "refused"
    out_of_blocks: type[Exception] = OutOfBlocks

    def __post_init__(self) -> None:
        if self.eviction not in (None, "lru"):
            raise ValueError(f"eviction is 'lru' or None, got {self.eviction!r}")
        if self.double_free not in ("refused", "ignored"):
            raise ValueError(f"double_free is 'refused' or 'ignored', got {self.double_free!r}")
        if not self.block_sizes or any(size < 1 for size in self.block_sizes):
            raise ValueError(f"block_sizes are one or more integers of at least 1, got {self.block_sizes}")
        if self.eviction is not None and not self.prefix_caching:
            raise ValueError("eviction is of findable blocks: declare prefix_caching as well")

    def usable(self, num_blocks: int) -> frozenset[int]:
        """Blocks that may be handed out, of a pool of so many."""
        return frozenset(range(num_blocks)) - {block % num_blocks for block in self.reserved}


class OwnBlocks:
    """This project's own BlockPool, BlockTable and PrefixCache, with the verbs of all three protocols.

    Args:
        num_blocks: of the pool, the null and the trash block included.
        block_size: P.

    Example:
        >>> manager = OwnBlocks(num_blocks=8, block_size=4)
        >>> manager.allocate("A", [7] * 6), manager.table("A"), manager.num_free()
        (0, [1, 2], 4)
        >>> manager.fork("A", "B"), manager.append("B", [8])
        ((), [(2, 3)])
    """

    CAPABILITIES = ManagerCapabilities(reserved=(0, -1), prefix_caching=True, window=True, eviction="lru")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(self._pool, block_size)
        self._block_size = block_size
        self._tables: dict[str, BlockTable] = {}
        self._tokens: dict[str, list[int]] = {}
        self._chains: dict[str, list[CachedBlock]] = {}

    def allocate(self, name: str, tokens: Sequence[int]) -> int:
        """See `Manager`."""
        table, chain = BlockTable(self._pool, self._block_size), self._cache.lookup(tokens)
        table.adopt([entry.block for entry in chain])
        try:
            table.prepare_write(len(chain) * self._block_size, len(tokens))
        except OutOfBlocks:
            table.free()
            raise
        self._tables[name], self._tokens[name], self._chains[name] = table, list(tokens), chain
        return len(chain) * self._block_size

    def append(self, name: str, tokens: Sequence[int]) -> Copies:
        """See `Manager`."""
        known = self._tokens[name]
        change = self._tables[name].prepare_write(len(known), len(known) + len(tokens))
        known += tokens
        return [(copy.source, copy.target) for copy in change.copies]

    def fork(self, name: str, twin: str) -> Copies:
        """See `Manager`."""
        self._tables[twin] = self._tables[name].fork()
        self._tokens[twin], self._chains[twin] = self._tokens[name].copy(), self._chains[name].copy()
        return ()

    def free(self, name: str) -> None:
        """See `Manager`."""
        self._tables.pop(name).free()

    def table(self, name: str) -> Sequence[int]:
        """See `Manager`."""
        return self._tables[name].blocks

    def num_free(self) -> int:
        """See `Manager`."""
        return self._pool.num_free

    def computed(self, name: str) -> None:
        """See `PrefixManager`."""
        tokens = self._tokens[name]
        self._cache.publish(self._chains[name], tokens, self._tables[name].blocks, len(tokens))

    def lookup(self, tokens: Sequence[int]) -> Sequence[int]:
        """See `PrefixManager`."""
        return [entry.block for entry in self._cache.lookup(tokens)]

    def drop_before(self, name: str, position: int) -> None:
        """See `WindowManager`."""
        self._tables[name].drop_before(position)
