"""Managers that are right although they work differently. The judge must let all of them pass."""

from collections.abc import Sequence

from paged.oracle.managers.protocol import ManagerCapabilities
from paged.oracle.mutants.managers.plain import Key, PlainManager


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
