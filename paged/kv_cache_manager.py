"""Who holds which blocks: requests and their block tables, from the first admission to the end.

The scheduler decides when; this file knows how. A request's tables are filled, shared and emptied in five ways:

    admit      it begins on the blocks that hold its first tokens already, if the prefix cache knows any
    follow     the other samples of a request begin on the first one's blocks, once these hold the prompt
    branch     beams go on from one another: a table is forked for each beam that another one continues
    swap_out   all its blocks move to host memory, each once, however many of its tables name it
    release    a sequence has ended, or will be computed again

and a block that every layer's sliding window has left is let go at once.
"""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from paged.blocks import (
    NULL_BLOCK,
    BlockCopy,
    BlockPool,
    BlockTable,
    CachedBlock,
    PrefixCache,
    blocks_for,
    num_blocks_to_write,
)
from paged.request import Branch, Request, Sequence


class Placement(NamedTuple):
    """What it would take to admit a request now.

    Attributes:
        num_blocks: free blocks that everything known of it takes.
        found: for each sequence that arrives with it, the blocks of its beginning that are there already.
    """

    num_blocks: int
    found: list[list[CachedBlock]]


class KVCacheManager:
    """The blocks of requests, on the device and on the host.

    Args:
        num_blocks: blocks of the device's pool, the null and the trash block included.
        num_host_blocks: the same of the host's, where preempted requests are swapped to; 0 for none.
        block_size: tokens a block holds.
        enable_prefix_caching: find the blocks of tokens that were computed before.
        sliding_window: blocks whose tokens every layer's window has left behind are freed; None if some layer sees all.

    Attributes:
        pool, host_pool: the blocks; `host_pool` may be None.
        prefix_cache: what can be found, or None.
        num_swapped_out_blocks, num_swapped_in_blocks: blocks that went to the host and came back, so far.

    Example: a request of six tokens goes to the host and comes back.
        >>> from paged.sampling_params import SamplingParams
        >>> kv = KVCacheManager(
        ...     num_blocks=9, num_host_blocks=9, block_size=4, enable_prefix_caching=False, sliding_window=None
        ... )
        >>> a = Request("a", range(6), SamplingParams(), block_table=kv.new_block_table(), seed=0, max_tokens=1)
        >>> _ = kv.admit(a, kv.placement(a))
        >>> table = a.sequences[0].block_table
        >>> _ = table.prepare_write(0, 6)
        >>> kv.computed(a, a.sequences[0], end=6)
        >>> kv.swap_out(a)
        (BlockCopy(source=1, target=1), BlockCopy(source=2, target=2))
        >>> kv.pool.num_free, kv.host_pool.num_free
        (7, 5)
        >>> kv.admit(a, kv.placement(a)), table.blocks
        ((BlockCopy(source=1, target=1), BlockCopy(source=2, target=2)), [1, 2])
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        enable_prefix_caching: bool,
        sliding_window: int | None,
    ) -> None:
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(num_host_blocks) if num_host_blocks else None
        self.prefix_cache = PrefixCache(self.pool, block_size) if enable_prefix_caching else None
        self.num_swapped_out_blocks = 0
        self.num_swapped_in_blocks = 0

    def new_block_table(self) -> BlockTable:
        """An empty block table over the device's pool."""
        return BlockTable(self.pool, self.block_size)

    def most_blocks(self, request: Request) -> int:
        """Blocks that a request takes at its longest: its sequences share the full blocks of the prompt, no more."""
        num_prompt = len(request.prompt_token_ids)
        shared = num_prompt // self.block_size
        # The last token sampled is never computed: nothing comes after it.
        longest = blocks_for(num_prompt + request.max_tokens - 1, self.block_size)
        return shared + len(request.sequences) * (longest - shared)

    def placement(self, request: Request) -> Placement:
        """What it would take to admit a waiting request; nothing changes yet."""
        arriving, followers = _arriving(request), request.followers
        found = [self._find(request, sequence) for sequence in arriving]
        # A block that nobody names counts as free until it is taken up again.
        in_use = {entry.block for entries in found for entry in entries if self.pool.ref_count(entry.block) > 0}
        num_blocks = -len(in_use)
        if request.is_swapped:
            # Its tables on the host are shared like those it had, so they tell what it still has to write.
            assert self.host_pool is not None, "it was swapped there"
            tables = [sequence.host_table for sequence in arriving if sequence.host_table is not None]
            num_blocks += len(_named_blocks(tables))
            pool = self.host_pool
        else:
            tables = [sequence.block_table for sequence in arriving]
            pool = self.pool
        num_blocks += num_blocks_to_write(
            pool, [(table, s.num_computed_tokens, s.num_tokens) for table, s in zip(tables, arriving, strict=True)]
        )
        if arriving[0].num_output_tokens:  # then the followers have tokens of their own, beyond the prompt
            shared = arriving[0].num_prompt_tokens // self.block_size
            num_blocks += sum(blocks_for(follower.num_tokens, self.block_size) - shared for follower in followers)
        return Placement(num_blocks, found)

    def admit(self, request: Request, placement: Placement) -> tuple[BlockCopy, ...]:
        """Give a request the blocks that hold its first tokens.

        Args:
            request: it waits.
            placement: what was found for it; nothing may have changed since.

        Returns:
            The copies from host blocks to blocks of the device that bring back what was swapped out.
        """
        if request.is_swapped:
            return self._swap_in(request, placement.found)
        (leader,), (found,) = _arriving(request), placement.found
        leader.block_table.adopt([entry.block for entry in found])
        leader.chain, leader.num_computed_tokens = found, len(found) * self.block_size
        return ()

    def swap_out(self, request: Request) -> tuple[BlockCopy, ...] | None:
        """Move all blocks of a running request to the host; its tables are empty then.

        Returns:
            The copies from blocks of the device to host blocks, each block once; None if the host has too few free
            blocks, or there is nothing to move. Then nothing has changed.
        """
        moving = [sequence for sequence in request.unfinished if sequence.block_table.blocks]
        blocks = _named_blocks([sequence.block_table for sequence in moving])
        if self.host_pool is None or not 0 < len(blocks) <= self.host_pool.num_free:
            return None
        on_host = dict(zip(blocks, self.host_pool.allocate(len(blocks)), strict=True))
        for sequence in moving:
            sequence.host_table = BlockTable(self.host_pool, self.block_size)
            sequence.host_table.adopt([on_host.get(block, NULL_BLOCK) for block in sequence.block_table.blocks])
            sequence.block_table.free()
        for host_block in on_host.values():  # the tables hold them now
            self.host_pool.release(host_block)
        self.num_swapped_out_blocks += len(blocks)
        return tuple(BlockCopy(block, host_block) for block, host_block in on_host.items())

    def follow(self, leader: Sequence, follower: Sequence) -> None:
        """Begin where the leader stands at the end of the prompt, on the same blocks."""
        follower.block_table = leader.block_table.fork(follower.num_prompt_tokens)
        follower.chain = leader.chain[: follower.num_prompt_tokens // self.block_size]
        follower.num_computed_tokens = follower.num_prompt_tokens

    def branch(self, request: Request, branches: SequenceOf[Branch]) -> None:
        """Let the beams of a request go on from one another, each with a token more.

        Args:
            request: all of its sequences are computed equally far.
            branches: for each of its sequences, which one it continues and with which token.
        """
        parents = [request.sequences[branch.parent] for branch in branches]
        # Everything is taken from the parents before the first of them changes: one may be continued by several.
        num_computed_tokens = parents[0].num_computed_tokens
        token_ids = [[*parent.token_ids, branch.token] for parent, branch in zip(parents, branches, strict=True)]
        tables = [
            None if parent is sequence else parent.block_table.fork()
            for parent, sequence in zip(parents, request.sequences, strict=True)
        ]
        chains = [list(parent.chain) for parent in parents]
        for i, sequence in enumerate(request.sequences):
            table = tables[i]
            if table is not None:
                sequence.block_table.free()
                sequence.block_table, sequence.num_told_blocks = table, 0
            sequence.token_ids, sequence.chain = token_ids[i], chains[i]
            sequence.num_computed_tokens = num_computed_tokens

    def computed(self, request: Request, sequence: Sequence, end: int) -> None:
        """The K and V of a sequence's tokens up to `end` are in the pool: publish them, let go of what nobody reads."""
        sequence.num_computed_tokens = end
        if self.prefix_cache is not None and end // self.block_size > len(sequence.chain):
            blocks = sequence.block_table.blocks
            self.prefix_cache.publish(sequence.chain, sequence.token_ids, blocks, end, request.cache_salt)
        if self.sliding_window is not None:
            # The next token, at position `end`, sees itself and sliding_window - 1 tokens before it.
            first_changed = sequence.block_table.drop_before(end - self.sliding_window + 1)
            if first_changed is not None:
                sequence.num_told_blocks = min(sequence.num_told_blocks, first_changed)

    def release(self, sequence: Sequence) -> None:
        """Let go of everything a sequence holds, here and on the host."""
        sequence.block_table.free()
        if sequence.host_table is not None:
            sequence.host_table.free()
            sequence.host_table = None

    def _find(self, request: Request, sequence: Sequence) -> list[CachedBlock]:
        """The blocks of an arriving sequence's beginning that are on the device already."""
        if self.prefix_cache is None:
            return []
        if sequence.host_table is not None:
            # Only what was computed; and nothing if a window has left the beginning, which nobody needs any more.
            end = sequence.num_computed_tokens + 1 if sequence.host_table.blocks[0] != NULL_BLOCK else 0
        elif request.sampling_params.prompt_logprobs is not None:
            end = 0  # they come from logits, so the prompt has to be computed
        elif len(request.unfinished) > 1:
            end = sequence.num_prompt_tokens + 1  # others will begin where the prompt ends, so not behind it
        else:
            end = sequence.num_tokens
        return self.prefix_cache.lookup(sequence.token_ids[:end], request.cache_salt)

    def _swap_in(self, request: Request, found: list[list[CachedBlock]]) -> tuple[BlockCopy, ...]:
        """Bring a request's blocks back, except those whose content never left the device."""
        arriving = _arriving(request)
        tables = [sequence.host_table for sequence in arriving if sequence.host_table is not None]
        on_device: dict[int, int] = {}  # host block -> the block with the same content
        for table, entries in zip(tables, found, strict=True):
            for host_block, entry in zip(table.blocks, entries, strict=False):  # more blocks than are found
                if host_block not in on_device:
                    self.pool.share(entry.block)  # held, before the pool could give it up for what comes next
                    on_device[host_block] = entry.block
        missing = [host_block for host_block in _named_blocks(tables) if host_block not in on_device]
        copies = tuple(
            BlockCopy(host_block, block)
            for host_block, block in zip(missing, self.pool.allocate(len(missing)), strict=True)
        )
        on_device.update((copy.source, copy.target) for copy in copies)
        for sequence, table, entries in zip(arriving, tables, found, strict=True):
            sequence.block_table.adopt([on_device.get(host_block, NULL_BLOCK) for host_block in table.blocks])
            sequence.chain = entries
            table.free()
            sequence.host_table = None
        for block in on_device.values():  # the tables hold them now
            self.pool.release(block)
        self.num_swapped_in_blocks += len(copies)
        return copies


def _arriving(request: Request) -> list[Sequence]:
    """The sequences that bring something with them when their request is admitted; the others follow later."""
    followers = request.followers
    return [sequence for sequence in request.unfinished if sequence not in followers]


def _named_blocks(tables: SequenceOf[BlockTable]) -> list[int]:
    """The blocks that some of the tables name, each once."""
    return list(dict.fromkeys(block for table in tables for block in table.blocks if block != NULL_BLOCK))
