"""A block manager that is right, and written to be broken.

Each step is a method of a few lines, and a mutant is a subclass that overrides one of them. It shares no code with the
engine's own blocks. Its free blocks are one queue: what was let go longest ago is handed out next, findable or not, as
vLLM has it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from paged.blocks import OutOfBlocks
from paged.oracle.managers.protocol import ManagerCapabilities

Key = tuple[Any, ...]


@dataclass
class Held:
    """A sequence's tokens, its blocks, and how many of its leading blocks have been made findable."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_found: int = 0


class PlainManager:
    """A block manager with forks, prefixes and windows. Block 0 is the null block.

    Attributes:
        letter: for mutants, the class of bug in the catalogue, A to R.
        threads: for mutants, public threads in which such a bug was reported, owner/repository#number.
        capabilities: what it is to be asked for.

    Example:
        >>> manager = PlainManager(num_blocks=6, block_size=2)
        >>> manager.allocate("A", [7, 8, 9]), manager.table("A"), manager.fork("A", "B"), manager.append("B", [5])
        (0, [1, 2], [], [(2, 3)])
    """

    letter: ClassVar[str] = ""
    threads: ClassVar[tuple[str, ...]] = ()
    capabilities: ClassVar[ManagerCapabilities] = ManagerCapabilities(prefix_caching=True, window=True, eviction="lru")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.queue = list(range(1, num_blocks))
        self.refs: Counter[int] = Counter()
        self.held: dict[str, Held] = {}
        self.by_key: dict[Key, int] = {}
        self.key_of: dict[int, Key] = {}

    # The verbs.

    def allocate(self, name: str, tokens: Sequence[int]) -> int:
        """Begin on what is found, and take the rest from the queue."""
        found = self.found_by(tokens)
        for block in found:
            self.share(block)
        try:
            new = self.take(self.needed(len(tokens)) - len(found))
        except OutOfBlocks:
            for block in found:
                self.release(block)
            raise
        self.held[name] = Held(list(tokens), found + new, len(found))
        return len(found) * self.size

    def append(self, name: str, tokens: Sequence[int]) -> Sequence[tuple[int, int]]:
        """Copy the last block if others name it, and take what is missing."""
        held = self.held[name]
        start, growth = len(held.tokens), self.needed(len(held.tokens) + len(tokens)) - len(held.blocks)
        index = start // self.size
        copies = self.must_copy(held, start)
        new = self.take(max(growth, 0) + copies)
        pairs = []
        if copies:
            pairs = self.copied(held, index, new.pop())
        held.blocks += new
        held.tokens += tokens
        return pairs

    def fork(self, name: str, twin: str) -> Sequence[tuple[int, int]]:
        """Name the same blocks."""
        held = self.held[name]
        for block in held.blocks:
            if block:
                self.refs[block] += 1
        self.held[twin] = Held(held.tokens.copy(), held.blocks.copy(), held.num_found)
        return []

    def free(self, name: str) -> None:
        """Let go of everything, the last block first."""
        for block in reversed(self.held.pop(name).blocks):
            if block:
                self.release(block)

    def table(self, name: str) -> Sequence[int]:
        """The sequence's blocks."""
        return self.held[name].blocks

    def num_free(self) -> int:
        """Blocks in the queue."""
        return len(self.queue)

    def computed(self, name: str) -> None:
        """Make full blocks findable."""
        held = self.held[name]
        for index in range(held.num_found, self.num_full(held)):
            block, key = held.blocks[index], self.key(held.tokens, index, held.blocks)
            if block == 0:
                break
            self.publish(key, block)
            held.num_found = index + 1

    def lookup(self, tokens: Sequence[int]) -> Sequence[int]:
        """The blocks of the longest beginning that is there."""
        return self.found_by(tokens)

    def drop_before(self, name: str, position: int) -> None:
        """Let go of blocks that lie before a position, the last one first."""
        blocks = self.held[name].blocks
        for index in reversed(range(self.num_passed(position))):
            if blocks[index]:
                self.release(blocks[index])
                blocks[index] = 0

    # The steps.

    def needed(self, num_tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-num_tokens // self.size)

    def num_full(self, held: Held) -> int:
        """Blocks that may be found."""
        return len(held.tokens) // self.size

    def num_passed(self, position: int) -> int:
        """Blocks of which nothing is read any more."""
        return position // self.size

    def must_copy(self, held: Held, start: int) -> bool:
        """Whether the block that is written next is partly filled and others name it."""
        return start % self.size != 0 and self.refs[held.blocks[start // self.size]] > 1

    def copied(self, held: Held, index: int, target: int) -> list[tuple[int, int]]:
        """Replace a block by a copy of it."""
        source = held.blocks[index]
        held.blocks[index] = target
        self.release(source)
        return [(source, target)]

    def take(self, count: int) -> list[int]:
        """Blocks from the head of the queue; what they held is forgotten."""
        if count > len(self.queue):
            raise OutOfBlocks(f"{count} blocks were asked for, {len(self.queue)} are free")
        taken = []
        for _ in range(count):
            block = self.queue.pop(self.next_block())
            self.forget(block)
            self.refs[block] = 1
            taken.append(block)
        return taken

    def next_block(self) -> int:
        """Where in the queue the next block is taken."""
        return 0

    def share(self, block: int) -> None:
        """One more table names a block that was found."""
        if self.refs[block] == 0:
            self.queue.remove(block)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One table less names a block."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.queue.append(block)

    def publish(self, key: Key, block: int) -> None:
        """Make a block findable, unless another one with this content is."""
        if key not in self.by_key:
            self.by_key[key], self.key_of[block] = block, key

    def forget(self, block: int) -> None:
        """A block's content is given up."""
        if block in self.key_of:
            del self.by_key[self.key_of.pop(block)]

    def key(self, tokens: Sequence[int], index: int, blocks: Sequence[int]) -> Key:
        """What a block stands for: its tokens and all before them."""
        return tuple(tokens[: (index + 1) * self.size])

    def found_by(self, tokens: Sequence[int]) -> list[int]:
        """Blocks of the beginning, never of the last token."""
        found: list[int] = []
        for index in range((len(tokens) - 1) // self.size):
            block = self.by_key.get(self.key(tokens, index, found))
            if block is None:
                break
            found.append(block)
        return found
