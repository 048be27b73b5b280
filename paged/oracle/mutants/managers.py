"""Block managers with one mistake each, and managers that are right although they work differently.

`PlainManager` is right, and written to be broken: each step is a method of a few lines, and a mutant is a subclass that
overrides one of them. It shares no code with the engine's own blocks. Its free blocks are one queue: what was let go
longest ago is handed out next, findable or not, as vLLM has it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
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


# Mutants: forks and copies.


class NoCopyOnWrite(PlainManager):
    """A shared block is written in place."""

    letter, threads = "Q", ("Atlas#373",)

    def must_copy(self, held: Held, start: int) -> bool:
        return False


class CopiesFullBlocksOnly(PlainManager):
    """A shared block is copied only if it is the first one of its sequence."""

    letter = "Q"

    def must_copy(self, held: Held, start: int) -> bool:
        return super().must_copy(held, start) and start < self.size


class CopyNotTold(PlainManager):
    """A shared block is replaced, and nobody is told to copy what it held."""

    letter = "Q"

    def copied(self, held: Held, index: int, target: int) -> list[tuple[int, int]]:
        super().copied(held, index, target)
        return []


class CopiedBackwards(PlainManager):
    """Source and target of a copy are exchanged."""

    letter, threads = "P", ("vllm-gaudi#329",)

    def copied(self, held: Held, index: int, target: int) -> list[tuple[int, int]]:
        return [(new, old) for old, new in super().copied(held, index, target)]


class CopyKeepsTheOld(PlainManager):
    """A block that was copied is not let go."""

    letter = "Q"

    def copied(self, held: Held, index: int, target: int) -> list[tuple[int, int]]:
        source, held.blocks[index] = held.blocks[index], target
        return [(source, target)]


class CopyFreesTheOld(PlainManager):
    """A block that was copied is free, although others name it."""

    letter, threads = "Q", ("vllm-project/vllm#417",)

    def copied(self, held: Held, index: int, target: int) -> list[tuple[int, int]]:
        source = held.blocks[index]
        self.refs[source] = 1
        return super().copied(held, index, target)


class ForkNotCounted(PlainManager):
    """A fork names blocks and does not count itself."""

    letter, threads = "Q", ("vllm-project/vllm#417",)

    def fork(self, name: str, twin: str) -> Sequence[tuple[int, int]]:
        held = self.held[name]
        self.held[twin] = Held(held.tokens.copy(), held.blocks.copy(), held.num_found)
        return []

    def release(self, block: int) -> None:
        if self.refs[block] > 0:
            super().release(block)


class ForkSharesTheTable(PlainManager):
    """A fork has the same list as its parent, so it grows with it."""

    letter, threads = "Q", ("Atlas#373",)

    def fork(self, name: str, twin: str) -> Sequence[tuple[int, int]]:
        super().fork(name, twin)
        self.held[twin].blocks = self.held[name].blocks
        return []


class ForkLosesTheLast(PlainManager):
    """A fork has the full blocks only."""

    letter = "C"

    def fork(self, name: str, twin: str) -> Sequence[tuple[int, int]]:
        super().fork(name, twin)
        held = self.held[twin]
        if len(held.tokens) % self.size:
            self.release(held.blocks.pop())
        return []


# Mutants: freeing.


class FreesShared(PlainManager):
    """The first of two sequences to end frees the blocks of both."""

    letter, threads = "Q", ("vllm-project/vllm#417", "vllm-project/vllm#1556")

    def free(self, name: str) -> None:
        for block in reversed(self.held.pop(name).blocks):
            if block and self.refs[block]:
                self.refs[block] = 0
                self.queue.append(block)


class FreesTwice(PlainManager):
    """A sequence that is freed again frees its blocks again."""

    letter, threads = "Q", ("vllm-project/vllm#3347",)

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.gone: dict[str, list[int]] = {}

    def free(self, name: str) -> None:
        if name in self.gone:
            self.queue += self.gone[name]
            return
        self.gone[name] = [block for block in self.held[name].blocks if block]
        super().free(name)


class FreesSilently(PlainManager):
    """A sequence that is not there is freed without a word."""

    letter = "Q"

    def free(self, name: str) -> None:
        if name in self.held:
            super().free(name)


class LeaksTheLast(PlainManager):
    """A last block that is not full is never let go."""

    letter, threads = "Q", ("NVIDIA/TensorRT-LLM#2699",)

    def free(self, name: str) -> None:
        held = self.held.pop(name)
        for block in reversed(held.blocks[: len(held.tokens) // self.size]):
            if block:
                self.release(block)


class LeaksForks(PlainManager):
    """A block that was shared once is never free again."""

    letter = "Q"

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0 and block not in self.shared:
            self.queue.append(block)

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.shared: set[int] = set()

    def fork(self, name: str, twin: str) -> Sequence[tuple[int, int]]:
        self.shared |= set(self.held[name].blocks)
        return super().fork(name, twin)


class WindowFreesTwice(PlainManager):
    """What a window has left behind stays in the table, and is freed again at the end."""

    letter, threads = "Q", ("vllm-project/vllm#1556", "vllm-project/vllm#3347")

    def drop_before(self, name: str, position: int) -> None:
        for block in self.held[name].blocks[: self.num_passed(position)]:
            if self.refs[block]:
                self.release(block)


class WindowFreesShared(PlainManager):
    """What a window has left behind is free, although a fork still reads it."""

    letter, threads = "Q", ("vllm-project/vllm#1556",)

    def drop_before(self, name: str, position: int) -> None:
        blocks = self.held[name].blocks
        for index in range(self.num_passed(position)):
            if blocks[index]:
                self.refs[blocks[index]] = 1
                self.release(blocks[index])
                blocks[index] = 0


class WindowDropsOneMore(PlainManager):
    """A window lets go of the block that it still reaches into."""

    letter, threads = "G", ("NVIDIA/TensorRT-LLM#6379",)

    def num_passed(self, position: int) -> int:
        return -(-position // self.size)


# Mutants: handing out.


class NullBlockHandedOut(PlainManager):
    """The null block is in the queue."""

    letter, threads = "Q", ("sgl-project/sglang#32477",)

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.queue.append(0)


class OneBlockTooMany(PlainManager):
    """The queue has a block that the pool has not."""

    letter = "C"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.queue.append(num_blocks)


class LastBlockNeverUsed(PlainManager):
    """The pool's last block is not in the queue."""

    letter = "C"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.queue.pop()


class HandsOutTwice(PlainManager):
    """A block stays in the queue if it is the only one there."""

    letter, threads = "Q", ("Atlas#373",)

    def take(self, count: int) -> list[int]:
        last = self.queue[-1:] if count == len(self.queue) else []
        taken = super().take(count)
        self.queue += last
        return taken


class RefusedKeepsSome(PlainManager):
    """A call that is refused has taken what there was."""

    letter, threads = "Q", ("NVIDIA/TensorRT-LLM#10875",)

    def take(self, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            taken += super().take(1)
        return taken


class RefusedKeepsFound(PlainManager):
    """An allocation that is refused does not let go of what it found."""

    letter, threads = "Q", ("NVIDIA/TensorRT-LLM#12834",)

    def allocate(self, name: str, tokens: Sequence[int]) -> int:
        found = self.found_by(tokens)
        for block in found:
            self.share(block)
        new = self.take(self.needed(len(tokens)) - len(found))
        self.held[name] = Held(list(tokens), found + new, len(found))
        return len(found) * self.size


class RefusedEndsTheSequence(PlainManager):
    """Tokens of an append that is refused are counted all the same."""

    letter = "Q"

    def append(self, name: str, tokens: Sequence[int]) -> Sequence[tuple[int, int]]:
        held = self.held[name]
        try:
            return super().append(name, tokens)
        except OutOfBlocks:
            held.blocks += self.take(len(self.queue))
            raise


class RefusesTheLast(PlainManager):
    """The last free block is never handed out."""

    letter = "C"

    def take(self, count: int) -> list[int]:
        if count and count == len(self.queue):
            raise OutOfBlocks("one block is kept")
        return super().take(count)


class SurplusBlock(PlainManager):
    """A full last block brings another one with it."""

    letter, threads = "C", ("pegainfer#350", "pegainfer#291")

    def needed(self, num_tokens: int) -> int:
        return num_tokens // self.size + 1


class MissingBlock(PlainManager):
    """A last block that is not full is not counted, unless it is the only one."""

    letter, threads = "C", ("onnxruntime-genai#2354",)

    def needed(self, num_tokens: int) -> int:
        return max(num_tokens // self.size, 1)


# Mutants: prefixes.


class IgnoresTheLastToken(PlainManager):
    """A block is known by all its tokens but the last."""

    letter, threads = "Q", ("openvino.genai#3722",)

    def key(self, tokens: Sequence[int], index: int, blocks: Sequence[int]) -> Key:
        return (*super().key(tokens, index, blocks)[:-1], index)


class IgnoresTheParent(PlainManager):
    """A block is known by its own tokens, whatever comes before them."""

    letter, threads = "Q", ("NVIDIA/Megatron-LM#4158",)

    def key(self, tokens: Sequence[int], index: int, blocks: Sequence[int]) -> Key:
        return tuple(tokens[index * self.size : (index + 1) * self.size])


class IgnoresOrder(PlainManager):
    """A block is known by the sum of all tokens up to it."""

    letter, threads = "Q", ("openvino.genai#3722", "NVIDIA/Megatron-LM#4158")

    def key(self, tokens: Sequence[int], index: int, blocks: Sequence[int]) -> Key:
        return (sum(super().key(tokens, index, blocks)) % 7, index)


class ParentByBlock(PlainManager):
    """The beginning is known by the block it lies in, which may hold something else by now."""

    letter, threads = "Q", ("vllm-project/vllm#4761",)

    def key(self, tokens: Sequence[int], index: int, blocks: Sequence[int]) -> Key:
        own = tokens[index * self.size : (index + 1) * self.size]
        return (blocks[index - 1] if index else 0, *own)


class StaysFindable(PlainManager):
    """What a block held can still be found when the block has been handed out again."""

    letter, threads = "Q", ("vllm-project/vllm#4761",)

    def forget(self, block: int) -> None:
        self.key_of.pop(block, None)


class ForgetsTheWrongOne(PlainManager):
    """Two blocks with one content: when the later one is given up, the earlier one's entry goes, and it stays known."""

    letter, threads = "Q", ("vllm-project/vllm#49145",)

    def publish(self, key: Key, block: int) -> None:
        self.by_key[key], self.key_of[block] = block, key

    def forget(self, block: int) -> None:
        if block in self.key_of:
            key = self.key_of.pop(block)
            if self.by_key.get(key) != block:
                self.by_key.pop(key, None)


class PartialFindable(PlainManager):
    """A block that is not full yet can be found."""

    letter, threads = "Q", ("vllm-project/vllm#49125",)

    def num_full(self, held: Held) -> int:
        return self.needed(len(held.tokens))

    def key(self, tokens: Sequence[int], index: int, blocks: Sequence[int]) -> Key:
        return tuple(tokens[: index * self.size + 1])


class HitStaysInQueue(PlainManager):
    """A block that is found again stays in the queue, and is handed out to somebody else."""

    letter, threads = "Q", ("tenstorrent/vllm#415",)

    def share(self, block: int) -> None:
        self.refs[block] += 1


class HitNotCounted(PlainManager):
    """A block that is found while another sequence has it is not counted for both."""

    letter, threads = "Q", ("MinivLLM#98",)

    def share(self, block: int) -> None:
        if self.refs[block] == 0:
            super().share(block)


class FindsOneMore(PlainManager):
    """A hit is told to be one block longer than it is."""

    letter, threads = "Q", ("tenstorrent/vllm#415",)

    def allocate(self, name: str, tokens: Sequence[int]) -> int:
        found = super().allocate(name, tokens)
        return min(found + self.size, len(tokens)) if found else 0


class TakesTheNewest(PlainManager):
    """The block let go last is given up first."""

    letter = "Q"

    def next_block(self) -> int:
        return -1


class EvictsInUse(PlainManager):
    """If the queue is short, a findable block is taken from the sequence that reads it."""

    letter, threads = "Q", ("vllm-project/vllm#49449",)

    def take(self, count: int) -> list[int]:
        for block in list(self.key_of):
            if count > len(self.queue) and block not in self.queue:
                self.refs[block] = 0
                self.queue.append(block)
        return super().take(count)


class LookupTakes(PlainManager):
    """Looking something up takes the blocks that are found out of the queue."""

    letter = "Q"

    def lookup(self, tokens: Sequence[int]) -> Sequence[int]:
        found = self.found_by(tokens)
        for block in found:
            self.share(block)
        return found


class CountsFindableTwice(PlainManager):
    """Findable blocks that nobody names are counted once as free and once as findable."""

    letter, threads = "Q", ("kvcached#362",)

    def num_free(self) -> int:
        return len(self.queue) + sum(block in self.queue for block in self.key_of)


# Right, although different.


class LastInFirstOut(PlainManager):
    """The block freed last is handed out next; which findable block is given up is left open."""

    capabilities = ManagerCapabilities(prefix_caching=True, window=True)

    def next_block(self) -> int:
        return -1


class WithoutPrefixes(PlainManager):
    """Finds nothing, and is not asked to."""

    capabilities = ManagerCapabilities()


class CopiesAtOnce(PlainManager):
    """A fork copies the block that is not full when it is made, not when it is written."""

    def fork(self, name: str, twin: str) -> Sequence[tuple[int, int]]:
        held = self.held[name]
        partial = len(held.tokens) % self.size != 0 and held.blocks[-1] != 0
        new = self.take(int(partial))
        super().fork(name, twin)
        return self.copied(self.held[twin], len(held.blocks) - 1, new[0]) if partial else []


class LooksAhead(PlainManager):
    """Takes a block more than it needs, as is declared."""

    capabilities = ManagerCapabilities(prefix_caching=True, window=True, lookahead=1)

    def needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.size) + 1

    def fork(self, name: str, twin: str) -> Sequence[tuple[int, int]]:
        super().fork(name, twin)
        held = self.held[twin]
        while len(held.blocks) > -(-len(held.tokens) // self.size):  # what was taken ahead is not shared
            block = held.blocks.pop()
            if block:
                self.release(block)
        return []


class KeepsTheNewest(PlainManager):
    """Of two blocks with one content the later one is found."""

    def publish(self, key: Key, block: int) -> None:
        if key in self.by_key:
            del self.key_of[self.by_key[key]]
        super().forget(block)
        self.by_key[key], self.key_of[block] = block, key


class IgnoresASecondFree(PlainManager):
    """Freeing a sequence again does nothing, as is declared."""

    capabilities = ManagerCapabilities(double_free="ignored", prefix_caching=True)

    def free(self, name: str) -> None:
        if name in self.held:
            super().free(name)


class TablesAreTuples(PlainManager):
    """Tables and copies come as other sequences of integers."""

    def table(self, name: str) -> Sequence[int]:
        return tuple(super().table(name))

    def append(self, name: str, tokens: Sequence[int]) -> Sequence[tuple[int, int]]:
        return tuple(super().append(name, tokens))


def _defined(is_mutant: Callable[[type[PlainManager]], bool]) -> tuple[type[PlainManager], ...]:
    """The managers of this file, in the order in which they are written."""
    found = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, PlainManager)]
    return tuple(kind for kind in found if is_mutant(kind))


MANAGERS = _defined(lambda kind: bool(kind.letter))
RIGHT_MANAGERS = _defined(lambda kind: not kind.letter)
