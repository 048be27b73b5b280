"""The prefix cache: blocks that can be found again by the tokens they stand for.

The K and V of a token depend on the token and on everything before it, and on nothing else. So two sequences that
begin with the same tokens can name the same blocks. Only full blocks are found, since a block that is still written
belongs to its writer. A block's key is a hash of its tokens and of the key of the block before it:

    tokens      a b c d | e f g h | i j          block_size 4
    keys        k0 = hash(salt, "abcd")    k1 = hash(k0, "efgh")     "ij" is no full block

so one key stands for the whole beginning. Hashes can collide, and then a request would read somebody else's context:
what is found is compared, token by token and parent by parent, and a mismatch is a miss.

A block stays findable after its last table has let go of it, until the pool needs it for something else; the pool gives
up the one let go longest ago. A table lets go of its last block first, so the beginning of a chain outlives its end.
"""

from collections.abc import Sequence
from typing import Final

from paged.blocks.block_pool import NULL_BLOCK, BlockPool


class CachedBlock:
    """One block that can be found.

    Attributes:
        key: of the block and everything before it.
        parent: the block before it, or the salt for a first one.
        token_ids: the block's tokens.
        block: where its K and V lie.
    """

    __slots__ = ("block", "key", "parent", "token_ids")

    def __init__(self, key: int, parent: "CachedBlock | str | None", token_ids: tuple[int, ...], block: int) -> None:
        self.key: Final = key
        self.parent: Final = parent
        self.token_ids: Final = token_ids
        self.block: Final = block

    def stands_for(self, parent: "CachedBlock | str | None", token_ids: tuple[int, ...]) -> bool:
        """Whether this is the block of these tokens behind that parent, and not one whose key only looks like it."""
        same_parent = self.parent is parent if isinstance(parent, CachedBlock) else self.parent == parent
        return same_parent and self.token_ids == token_ids


class PrefixCache:
    """Finds blocks by the tokens they stand for.

    Args:
        pool: the blocks; it decides which of them are given up.
        block_size: tokens a block holds.

    Example: the block of the first two tokens is found; that of the last token is not full.
        >>> pool = BlockPool(num_blocks=6)
        >>> cache = PrefixCache(pool, block_size=2)
        >>> (block,) = pool.allocate(1)
        >>> chain = cache.publish([], [7, 8, 9], [block], num_computed_tokens=3)
        >>> [found.block for found in cache.lookup([7, 8, 9])]
        [1]
        >>> cache.lookup([7, 8])        # a prompt is never found whole: its last token has to be computed
        []
        >>> cache.lookup([7, 8, 9], salt="mine")
        []
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._by_key: dict[int, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}

    def __len__(self) -> int:
        """Blocks that can be found."""
        return len(self._by_block)

    def lookup(self, token_ids: Sequence[int], salt: str | None = None) -> list[CachedBlock]:
        """The longest beginning of `token_ids` that is there, without the last token.

        The last token is always left to compute, because a step has to give logits to sample from.

        Args:
            token_ids: a sequence's tokens.
            salt: only what was published with the same salt is found.

        Returns:
            The blocks, in order. They are not held yet: `share` them before anything is allocated.
        """
        found: list[CachedBlock] = []
        parent: CachedBlock | str | None = salt
        key = hash(salt)
        size = self._block_size
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            tokens = tuple(token_ids[start : start + size])
            key = hash((key, tokens))
            entry = self._by_key.get(key)
            if entry is None or not entry.stands_for(parent, tokens):
                break
            found.append(entry)
            parent = entry
        return found

    def publish(
        self,
        chain: list[CachedBlock],
        token_ids: Sequence[int],
        blocks: Sequence[int],
        num_computed_tokens: int,
        salt: str | None = None,
    ) -> list[CachedBlock]:
        """Make a sequence's full blocks findable, once their K and V exist.

        Args:
            chain: what `lookup` found of the sequence and what was published of it before; it grows in place.
            token_ids, blocks: the sequence's tokens and block table.
            num_computed_tokens: tokens whose K and V are in the pool.
            salt: as in `lookup`.

        Returns:
            The chain.
        """
        size = self._block_size
        for index in range(len(chain), num_computed_tokens // size):
            block = blocks[index]
            if block == NULL_BLOCK:  # it has left the window already
                break
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            parent = chain[-1] if chain else salt
            key = hash((chain[-1].key if chain else hash(salt), tokens))
            entry = self._by_key.get(key)
            if entry is not None and not entry.stands_for(parent, tokens):
                self._give_up(entry)
                entry = None
            if entry is None:
                entry = CachedBlock(key, parent, tokens, block)
                self._by_key[key] = self._by_block[block] = entry
                self._pool.keep(block, self._evicted)
            chain.append(entry)
        return chain

    def reset(self) -> None:
        """Forget everything; blocks that tables name stay theirs."""
        for block in list(self._by_block):
            self._pool.forget(block)
        self._by_key.clear()
        self._by_block.clear()

    def _give_up(self, entry: CachedBlock) -> None:
        """Forget an entry whose key another one takes: its parent is gone, or their hashes collide."""
        self._pool.forget(entry.block)
        self._evicted(entry.block)

    def _evicted(self, block: int) -> None:
        entry = self._by_block.pop(block)
        del self._by_key[entry.key]
