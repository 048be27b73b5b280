"""Managers that hand out the wrong blocks, or too few or too many.

The null block and blocks that the pool does not have are nobody's; all others can be had down to the last one; and a
call that is refused leaves everything as it was.
"""

from collections.abc import Sequence

from paged.blocks import OutOfBlocks
from paged.oracle.mutants.managers.plain import Held, PlainManager


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

    letter = "C"

    def needed(self, num_tokens: int) -> int:
        return max(num_tokens // self.size, 1)
