"""Managers whose prefix cache finds what it should not, or gives up what is in use.

A block stands for its tokens and all that come before them, from when they are computed until the block is handed out
again. What is found is shared like anything else, and the longest unused is given up first.
"""

from collections.abc import Sequence

from paged.oracle.mutants.managers.plain import Held, Key, PlainManager


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
