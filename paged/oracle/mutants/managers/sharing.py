"""Managers that get sharing wrong: forks, copies on write, windows, and when a block is free.

A block that several tables name is copied before one of them writes to it, and is free when the last one lets go of it:
not earlier, not never, and not twice.
"""

from collections.abc import Sequence

from paged.oracle.mutants.managers.plain import Held, PlainManager


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
