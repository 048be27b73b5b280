"""Admission and swapping of single requests: what is promised is what is taken, down to the block."""

import pytest

from paged.kv_cache_manager import KVCacheManager
from paged.request import Branch, Request
from paged.sampling_params import SamplingParams


def manager(*, caching: bool = True, window: int | None = None) -> KVCacheManager:
    """Blocks of two, room for everything."""
    return KVCacheManager(
        num_blocks=60, num_host_blocks=60, block_size=2, enable_prefix_caching=caching, sliding_window=window
    )


def request(kv: KVCacheManager, tokens, *, beam_width: int | None = None, n: int = 1) -> Request:
    params = SamplingParams(n=n, max_tokens=20)
    table = kv.new_block_table()
    return Request("r", tokens, params, block_table=table, seed=0, max_tokens=20, beam_width=beam_width)


def compute(kv: KVCacheManager, r: Request) -> None:
    """What a step does with every token that is known."""
    leader = r.unfinished[0]
    for sequence in [leader] if r.followers else r.unfinished:
        sequence.block_table.prepare_write(sequence.num_computed_tokens, sequence.num_tokens)
        kv.computed(r, sequence, sequence.num_tokens)


def admitted(kv: KVCacheManager, r: Request) -> int:
    """Blocks that admitting a request and computing what is known of it takes; checked against what was said."""
    free = kv.pool.num_free
    placement = kv.placement(r)
    kv.admit(r, placement)
    for sequence in r.unfinished:
        if sequence not in r.followers:
            sequence.block_table.prepare_write(sequence.num_computed_tokens, sequence.num_tokens)
    assert free - kv.pool.num_free == placement.num_blocks
    return placement.num_blocks


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8])
def test_what_admission_takes_is_what_was_said(num_tokens, caching):
    kv = manager(caching=caching)
    first = request(kv, range(num_tokens))
    admitted(kv, first)
    kv.computed(first, first.sequences[0], num_tokens)
    # The full blocks before the last token are in use by the first.
    shared = (num_tokens - 1) // 2 if caching else 0
    assert admitted(kv, request(kv, range(num_tokens))) == (num_tokens + 1) // 2 - shared


def swapped_samples(kv: KVCacheManager, num_prompt: int, num_more: int) -> Request:
    """A request of three samples that were computed so far, and swapped out, with a token each to compute."""
    r = request(kv, range(num_prompt), n=3)
    kv.admit(r, kv.placement(r))
    compute(kv, r)
    for follower in r.followers:
        kv.follow(r.sequences[0], follower)
    for i in range(num_more):
        for sequence in r.sequences:
            sequence.token_ids.append(100 + 10 * sequence.index + i)
        compute(kv, r)
    for sequence in r.sequences:
        sequence.token_ids.append(200 + sequence.index)
    assert kv.swap_out(r)
    return r


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num_prompt", [5, 6])
@pytest.mark.parametrize("num_more", [0, 1, 2, 5])
def test_what_swapping_in_takes_is_what_was_said(num_prompt, num_more, caching):
    """Samples that share their last block, that share full ones only, and that go on in a block of their own."""
    kv = manager(caching=caching)
    r = swapped_samples(kv, num_prompt, num_more)
    assert kv.pool.num_free == kv.pool.num_usable
    admitted(kv, r)
    assert kv.host_pool.num_free == kv.host_pool.num_usable
    assert len({s.block_table.blocks[0] for s in r.sequences}) == 1
    assert len({s.block_table.blocks[-1] for s in r.sequences}) == 3


def test_what_somebody_still_holds_is_not_counted():
    kv = manager()
    r = swapped_samples(kv, 6, 2)
    other = request(kv, range(6))
    admitted(kv, other)
    kv.computed(other, other.sequences[0], 6)
    held = kv.placement(r)
    kv.release(other.sequences[0])
    assert kv.placement(r).num_blocks == held.num_blocks + 2, "two of the prompt's three full blocks were found by it"
    admitted(kv, r)
    assert kv.num_swapped_in_blocks == 0, "all of it is still on the device"


def test_a_window_has_left_the_beginning_so_nobody_looks_for_it():
    kv = manager(window=4)
    r = request(kv, range(8))
    kv.admit(r, kv.placement(r))
    compute(kv, r)
    r.sequences[0].token_ids.append(99)
    assert r.sequences[0].block_table.blocks[:2] == [0, 0]
    assert len(kv.swap_out(r)) == 2
    other = request(kv, range(8))
    assert admitted(kv, other) == 4, "three blocks that nobody held are taken up again, and one is new"
    assert admitted(kv, r) == 3, "two come back, one is new"
    assert r.sequences[0].block_table.blocks[:2] == [0, 0]


def test_beams_of_one_parent_publish_each_what_they_computed():
    """Blocks after a fork are found by the tokens of the beam that computed them, not of its twin."""
    kv = manager()
    r = request(kv, range(4), beam_width=2)
    kv.admit(r, kv.placement(r))
    compute(kv, r)
    kv.branch(r, [Branch(0, 10), Branch(0, 20)])
    for token in (11, 12, 13):
        compute(kv, r)
        kv.branch(r, [Branch(0, token), Branch(1, token + 10)])
    first, second = r.sequences
    assert first.token_ids == [0, 1, 2, 3, 10, 11, 12, 13]
    assert second.token_ids == [0, 1, 2, 3, 20, 21, 22, 23]
    for sequence in r.sequences:
        found = kv.prefix_cache.lookup([*sequence.token_ids[:6], 0])
        assert [entry.block for entry in found] == sequence.block_table.blocks[:3]
    assert len(kv.prefix_cache.lookup([0, 1, 2, 3, 10, 11, 22, 23, 0])) == 3


def test_nothing_is_swapped_where_there_is_nothing_or_no_room():
    kv = KVCacheManager(
        num_blocks=20, num_host_blocks=4, block_size=2, enable_prefix_caching=False, sliding_window=None
    )
    r = request(kv, range(6))
    assert kv.swap_out(r) is None
    admitted(kv, r)
    before = list(r.sequences[0].block_table.blocks)
    assert kv.swap_out(r) is None, "three blocks, and room for two"
    assert r.sequences[0].block_table.blocks == before
    assert kv.num_swapped_out_blocks == 0
