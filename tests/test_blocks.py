"""Pool and tables under random lists of operations, with tagged memory reading every table after each."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.blocks import (
    BlockError,
    BlockPool,
    BlockTable,
    CachedBlock,
    OutOfBlocks,
    PrefixCache,
    blocks_for,
    num_blocks_to_write,
)
from reference.tagged_memory import TaggedMemory

# (what, which table, how many tokens); the numbers are taken modulo what exists.
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["new", "append", "append", "fork", "free"]), st.integers(0, 9), st.integers(1, 12)),
    max_size=40,
)


class Tables:
    """Sequences that grow, fork and end over one pool, and the memory behind their tables."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.memory = TaggedMemory(num_blocks, block_size)
        self.block_size = block_size
        self.live: dict[str, tuple[BlockTable, list[int]]] = {}
        self.names = (f"sequence {i}" for i in range(1000))
        self.next_token = 0

    def apply(self, what: str, which: int, count: int) -> None:
        if what == "new" or not self.live:
            self.live[next(self.names)] = (BlockTable(self.pool, self.block_size), [])
            return
        name = list(self.live)[which % len(self.live)]
        table, tokens = self.live[name]
        if what == "append":
            self.append(name, count)
        elif what == "fork":
            self.live[next(self.names)] = (table.fork(), tokens.copy())
        else:
            table.free()
            del self.live[name]

    def append(self, name: str, count: int) -> None:
        table, tokens = self.live[name]
        start, end = len(tokens), len(tokens) + count
        before, free = table.blocks.copy(), self.pool.num_free
        needed = num_blocks_to_write(self.pool, [(table, start, end)])
        if needed > free:
            with pytest.raises(OutOfBlocks):
                table.prepare_write(start, end)
            assert table.blocks == before
            assert self.pool.num_free == free, "a failed call changed something"
            return
        change = table.prepare_write(start, end)
        assert free - self.pool.num_free == needed
        replayed = before[: change.first_index] + list(change.blocks)
        assert replayed == table.blocks, "the change does not lead from the old table to the new one"
        for copy in change.copies:
            self.memory.copy_block(copy.source, copy.target)
        tokens += range(self.next_token, self.next_token + count)  # tokens that occur nowhere else
        self.next_token += count
        self.memory.write(name, table.blocks, tokens, start, end)

    def check(self) -> None:
        for name, (table, tokens) in self.live.items():
            assert len(table.blocks) == blocks_for(len(tokens), self.block_size)
            self.memory.read(name, table.blocks, tokens)
            for position in range(len(tokens)):
                block, offset = table.blocks[position // self.block_size], position % self.block_size
                assert table.slot(position) == block * self.block_size + offset
        entries = Counter(block for table, _ in self.live.values() for block in table.blocks)
        for block in range(1, self.pool.trash_block):
            assert self.pool.ref_count(block) == entries[block], f"block {block}: counts and tables disagree"
            if not entries[block]:
                self.memory.forget(block)
        assert self.pool.num_free == self.pool.num_usable - len(entries)
        assert not {0, self.pool.trash_block} & set(entries)


@settings(max_examples=500, deadline=None)
@given(OPERATIONS, st.integers(3, 30), st.integers(1, 7))
def test_any_operations_keep_every_read_right(operations, num_blocks, block_size):
    tables = Tables(num_blocks, block_size)
    for operation in operations:
        tables.apply(*operation)
        tables.check()
    for table, _ in tables.live.values():
        table.free()
    assert tables.pool.num_free == tables.pool.num_usable


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_blocks_for_is_the_smallest_number_that_holds(num_tokens, block_size):
    count = blocks_for(num_tokens, block_size)
    assert (count - 1) * block_size < num_tokens <= count * block_size or num_tokens == count == 0


def test_a_fork_copies_only_the_block_it_writes():
    pool = BlockPool(10)
    table = BlockTable(pool, 4)
    table.prepare_write(0, 10)  # blocks 1, 2 and the partial 3
    twin = table.fork()
    change = twin.prepare_write(10, 11)
    assert [(copy.source, copy.target) for copy in change.copies] == [(3, 4)]
    assert (table.blocks, twin.blocks) == ([1, 2, 3], [1, 2, 4])
    assert table.prepare_write(10, 11).copies == (), "the other one has its block to itself again"


def test_a_fork_at_a_block_border_copies_nothing():
    pool = BlockPool(10)
    table = BlockTable(pool, 4)
    table.prepare_write(0, 8)
    twin = table.fork()
    assert twin.prepare_write(8, 9).copies == ()
    assert twin.blocks[:2] == table.blocks


@pytest.mark.parametrize("block", [0, 4, 5, -1])
def test_null_and_trash_and_strangers_cannot_be_shared_or_released(block):
    pool = BlockPool(5)
    pool.allocate(3)
    for verb in (pool.share, pool.release):
        with pytest.raises(BlockError, match="only blocks 1 to 3 are handed out"):
            verb(block)


def test_a_free_block_cannot_be_shared_or_released_again():
    pool = BlockPool(5)
    (block,) = pool.allocate(1)
    pool.release(block)
    with pytest.raises(BlockError, match=f"block {block} cannot be released: it is free"):
        pool.release(block)
    with pytest.raises(BlockError, match=f"block {block} cannot be shared: it is free"):
        pool.share(block)


def test_running_out_takes_nothing():
    pool = BlockPool(5)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks, match="2 blocks were asked for and 1 of 3 are free"):
        pool.allocate(2)
    assert pool.num_free == 1


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_a_pool_needs_a_usable_block(num_blocks):
    with pytest.raises(ValueError, match="has none to use"):
        BlockPool(num_blocks)


def cached(pool: BlockPool, cache: PrefixCache, tokens: list[int], salt: str | None = None) -> list[int]:
    """Publish the full blocks of some tokens and let go of them; returns the blocks."""
    blocks = pool.allocate(len(tokens) // 2)
    cache.publish([], tokens, blocks, len(tokens), salt)
    for block in reversed(blocks):
        pool.release(block)
    return blocks


def found(cache: PrefixCache, tokens: list[int], salt: str | None = None) -> list[int]:
    return [entry.block for entry in cache.lookup(tokens, salt)]


def test_a_beginning_is_found_with_its_own_salt_only():
    pool = BlockPool(num_blocks=20)
    cache = PrefixCache(pool, block_size=2)
    plain = cached(pool, cache, [1, 2, 3, 4])
    salted = cached(pool, cache, [1, 2, 3, 4], "salt")
    assert found(cache, [1, 2, 3, 4, 5]) == plain
    assert found(cache, [1, 2, 3, 4, 5], "salt") == salted
    assert found(cache, [1, 2, 3, 4, 5], "other") == []
    assert found(cache, [1, 2, 9, 4, 5]) == plain[:1]
    assert found(cache, [9, 2, 3, 4, 5]) == []


def test_a_collision_is_a_miss():
    """Two beginnings with one key: what is found is compared, and the later one takes the key over."""
    pool = BlockPool(num_blocks=20)
    cache = PrefixCache(pool, block_size=2)
    cached(pool, cache, [1, 2])
    (entry,) = cache.lookup([1, 2, 3])
    key = hash((hash(None), (7, 8)))
    cache._by_key[key] = CachedBlock(key, None, (1, 2), entry.block)
    assert found(cache, [7, 8, 9]) == []
    # Likewise for the same tokens behind another parent.
    cached(pool, cache, [5, 6, 3, 4])
    first, second = cache.lookup([5, 6, 3, 4, 0])
    twin = CachedBlock(second.key, entry, second.token_ids, second.block)
    cache._by_key[second.key] = twin
    assert found(cache, [5, 6, 3, 4, 0]) == [first.block]


def test_the_block_let_go_first_is_given_up_first():
    pool = BlockPool(num_blocks=6)  # four usable
    cache = PrefixCache(pool, block_size=2)
    old = cached(pool, cache, [1, 2, 3, 4])
    cached(pool, cache, [5, 6])
    assert pool.cached_blocks == [old[1], old[0], 3], "the end of a chain before its beginning"
    pool.allocate(2)  # the one block that was never used, and then the oldest
    assert found(cache, [1, 2, 3, 4, 5]) == old[:1]
    assert found(cache, [5, 6, 7]) == [3]
    pool.share(old[0])  # somebody reads it again: it is not given up
    pool.allocate(1)
    assert found(cache, [1, 2, 3]) == old[:1]
    assert found(cache, [5, 6, 7]) == []
    cache.reset()
    assert found(cache, [1, 2, 3]) == []
    assert len(cache) == 0
