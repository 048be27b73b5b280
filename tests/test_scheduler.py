"""The scheduler over tagged memory: random workloads, every read checked, every request ends as if it were alone."""

import logging
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation, Wanted, alone

from paged.blocks import blocks_for
from paged.request import Branch, Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.step import Step
from paged.step_draft import StepDraft

logger = logging.getLogger(__name__)


@st.composite
def simulations(draw) -> Simulation:
    """Any workload, under any settings, on a pool from just large enough to ample."""
    block_size = draw(st.integers(1, 9))
    stem = draw(st.lists(st.integers(0, 49), min_size=0, max_size=25))  # what some prompts begin with
    prompts = st.lists(st.integers(0, 49), min_size=1, max_size=30)
    wanted = draw(
        st.lists(
            st.builds(
                Wanted,
                prompt=prompts | st.builds(lambda n, rest: stem[:n] + rest, st.integers(0, 25), prompts),
                max_tokens=st.integers(1, 25),
                arrives=st.integers(0, 20),
                aborted=st.none() | st.integers(0, 30),
                n=st.sampled_from([1, 1, 1, 2, 3]),
                priority=st.integers(-1, 1),
                salt=st.sampled_from([None, None, "salt"]),
                beams=st.booleans(),
                simple=st.sampled_from([True, True, False]),
            ),
            min_size=1,
            max_size=8,
        )
    )
    wanted.sort(key=lambda w: w.arrives)  # the harness adds those of a step in this order
    longest = max(len(w.prompt) + w.max_tokens for w in wanted)
    widest = max(w.n if w.beams else 1 for w in wanted)
    chunked = draw(st.booleans())
    scheduler = Scheduler(
        num_blocks=2 + max(most_blocks(w, block_size) for w in wanted) + draw(st.integers(0, 20)),
        block_size=block_size,
        max_num_seqs=max(w.n for w in wanted) + draw(st.integers(0, 6)),
        max_num_batched_tokens=draw(st.integers(widest, 60))
        if chunked
        else max(longest, widest) + draw(st.integers(0, 60)),
        num_host_blocks=draw(st.sampled_from([0, 0, 3, 12, 60])),
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 5])) if chunked else 0,
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_prefix_caching=draw(st.booleans()),
        sliding_window=draw(st.none() | st.integers(1, 20)),
        spare_blocks_per_seq=draw(st.integers(0, 2)),
    )
    return Simulation(scheduler, wanted, eos=draw(st.none() | st.integers(0, 49)), ahead=draw(st.booleans()))


def most_blocks(w: Wanted, block_size: int) -> int:
    """Blocks of a request when all its samples are at full length: they share the full blocks of the prompt."""
    shared = len(w.prompt) // block_size
    return shared + w.n * (blocks_for(len(w.prompt) + w.max_tokens - 1, block_size) - shared)


def random_simulation(seed: int) -> Simulation:
    """The same without Hypothesis: it shrinks nothing and draws forty times as many."""
    rng = random.Random(seed)
    block_size = rng.randint(1, 9)
    stem = [rng.randrange(50) for _ in range(25)]
    wanted = [
        Wanted(
            prompt=stem[: rng.choice((0, 0, rng.randint(0, 25)))]
            + [rng.randrange(50) for _ in range(rng.randint(1, 30))],
            max_tokens=rng.randint(1, 25),
            arrives=rng.randint(0, 20),
            aborted=rng.choice((None, None, rng.randint(0, 30))),
            n=rng.choice((1, 1, 1, 2, 3)),
            priority=rng.randint(-1, 1),
            salt=rng.choice((None, None, "salt")),
            beams=rng.random() < 0.25,
        )
        for _ in range(rng.randint(1, 8))
    ]
    wanted.sort(key=lambda w: w.arrives)
    longest = max(len(w.prompt) + w.max_tokens for w in wanted)
    widest = max(w.n if w.beams else 1 for w in wanted)
    chunked = rng.random() < 0.7
    scheduler = Scheduler(
        num_blocks=2 + max(most_blocks(w, block_size) for w in wanted) + rng.randint(0, 20),
        block_size=block_size,
        max_num_seqs=max(w.n for w in wanted) + rng.randint(0, 6),
        max_num_batched_tokens=rng.randint(widest, 60) if chunked else max(longest, widest) + rng.randint(0, 60),
        num_host_blocks=rng.choice((0, 0, 3, 12, 60)),
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=rng.choice((0, 0, 1, 5)) if chunked else 0,
        policy=rng.choice(("fcfs", "priority")),
        enable_prefix_caching=rng.random() < 0.6,
        sliding_window=rng.choice((None, None, rng.randint(1, 20))),
        spare_blocks_per_seq=rng.randint(0, 2),
    )
    simulation = Simulation(scheduler, wanted, eos=rng.choice((None, rng.randrange(50))), ahead=rng.random() < 0.5)
    if rng.random() < 0.5:  # in the other half all are simple, so that as much as possible is planned ahead
        for w in wanted:
            w.simple = rng.random() < 0.8
    return simulation


def test_many_random_schedules(pytestconfig):
    """`--schedules N` runs more than the 20,000 of every test run."""
    totals: Counter[str] = Counter()
    for seed in range(pytestconfig.getoption("--schedules")):
        try:
            simulation = random_simulation(seed).run()
            simulation.check_outputs()
        except AssertionError as error:
            raise AssertionError(f"random_simulation({seed}): {error}") from error
        scheduler = simulation.scheduler
        totals["planned ahead"] += simulation.num_ahead
        totals["swaps"] += scheduler.num_swaps
        totals["recomputations"] += scheduler.num_preemptions - scheduler.num_swaps
        totals["blocks swapped out"] += scheduler.kv.num_swapped_out_blocks
        totals["blocks swapped in"] += scheduler.kv.num_swapped_in_blocks
        totals["cached tokens"] += sum(request.num_cached_tokens or 0 for request in simulation.requests.values())
        totals["beams swapped"] += sum(
            request.num_preemptions for request in simulation.requests.values() if request.is_beam_search
        )
    logger.info("%s", dict(totals))
    assert min(totals.values()) > 0, "the pools have to be too small, or nothing was tested"
    assert totals["blocks swapped in"] < totals["blocks swapped out"], "some are found on the device"


@settings(max_examples=500, deadline=None)
@given(simulations())
def test_every_read_is_right_and_every_request_ends(simulation):
    simulation.run().check_outputs()


def scheduler(**settings) -> Scheduler:
    defaults = {
        "num_blocks": 10,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
    }
    return Scheduler(**{**defaults, **settings})


def request(s: Scheduler, name: str, prompt_len: int, max_tokens: int = 4) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, range(prompt_len), params, block_table=s.new_block_table(), seed=0, max_tokens=max_tokens)


def planned(step) -> list[tuple[str, int, int]]:
    return [(row.request_id, row.start, row.end) for row in step.rows]


def test_a_prompt_beside_decodes_and_singles_first():
    s = scheduler()
    s.add(request(s, "a", 5))
    step = s.schedule()
    assert planned(step) == [("a", 0, 5)]
    s.update(step, [9])
    s.add(request(s, "b", 6))
    step = s.schedule()
    assert planned(step) == [("a", 5, 6), ("b", 0, 6)]
    assert step.num_single == 1


def test_the_youngest_is_preempted_and_computed_again():
    """Six usable blocks of two; "a" and "b" grow until one more block is not there."""
    s = scheduler(num_blocks=8, block_size=2, spare_blocks_per_seq=0)
    s.add(request(s, "a", 4, max_tokens=8))
    s.add(request(s, "b", 4, max_tokens=8))
    for _ in range(3):
        step = s.schedule()
        s.update(step, [1] * len(step.rows))
    step = s.schedule()
    assert step.preempted == ("b",)
    assert planned(step) == [("a", 6, 7)]
    assert [r.request_id for r in s.waiting] == ["b"]
    (b,) = s.waiting[0].sequences
    assert (b.num_tokens, b.num_computed_tokens, b.num_discarded_tokens, b.row) == (7, 0, 6, None)
    s.update(step, [1])
    while "b" not in [name for name, *_ in planned(step)]:
        step = s.schedule()
        s.update(step, [1] * len(step.rows))
    assert planned(step) == [("b", 0, 7)], "prompt and output are computed again in one go"
    assert (s.num_preemptions, s.num_recomputed_tokens) == (1, 6)


def swapping(num_host_blocks: int = 12, **settings) -> Scheduler:
    """Two requests of two samples that do not fit the pool together: "b" was just preempted, after two steps."""
    s = scheduler(num_blocks=14, block_size=2, spare_blocks_per_seq=0, num_host_blocks=num_host_blocks, **settings)
    for name, start in (("a", 0), ("b", 20)):
        params = SamplingParams(max_tokens=8, n=2)
        prompt = range(start, start + 5)
        s.add(Request(name, prompt, params, block_table=s.new_block_table(), seed=0, max_tokens=8))
    step = s.schedule()
    while not step.preempted:
        s.update(step, range(40, 40 + sum(len(row.samples) for row in step.rows)))
        step = s.schedule()
    assert step.preempted == ("b",)
    s.last = step
    return s


def finish_all(s: Scheduler, step) -> list[tuple[str, int, int]]:
    """Run to the end; every row that was planned on the way."""
    rows = []
    while step is not None:
        rows += planned(step)
        s.update(step, [1] * sum(len(row.samples) for row in step.rows))
        step = s.schedule()
    return rows


def test_the_youngest_is_swapped_out_and_goes_on_where_it_was():
    s = swapping()
    (b,) = s.waiting
    first, second = b.sequences
    # Five tokens of prompt in blocks of two: two full ones are shared, and each sample has its own after that.
    assert first.host_table.blocks[:2] == second.host_table.blocks[:2]
    held = {*first.host_table.blocks, *second.host_table.blocks}
    assert len(s.last.swap_outs) == len(held) == 2 * len(first.host_table.blocks) - 2, "a shared block goes once"
    assert {copy.target for copy in s.last.swap_outs} == held
    assert (s.num_preemptions, s.num_swaps) == (1, 1)
    computed = first.num_computed_tokens
    assert computed == second.num_computed_tokens > 5
    assert first.block_table.blocks == second.block_table.blocks == []
    step, seen = s.last, []
    while not step.swap_ins:
        s.update(step, [1] * sum(len(row.samples) for row in step.rows))
        step = s.schedule()
    assert {copy.source for copy in step.swap_ins} == held
    assert first.host_table is second.host_table is None
    assert [start for name, start, _ in planned(step) if name == "b"] == [computed, computed]
    seen = finish_all(s, step)
    assert ("b", 0, 5) not in seen
    assert s.num_recomputed_tokens == 0
    assert s.kv.num_swapped_in_blocks == s.kv.num_swapped_out_blocks == len(held)
    assert s.kv.host_pool.num_free == s.kv.host_pool.num_usable
    assert s.pool.num_free == s.pool.num_usable


def test_a_full_host_means_recomputation():
    s = swapping(num_host_blocks=5)
    assert s.last.swap_outs == ()
    assert (s.num_preemptions, s.num_swaps) == (1, 0)
    assert ("b", 0, 5) in finish_all(s, s.last)
    assert s.num_recomputed_tokens > 0


def test_what_the_device_still_has_is_not_copied_back():
    """With a prefix cache: "a" and "c" share a prompt, so its blocks never leave the device."""
    s = scheduler(num_blocks=9, spare_blocks_per_seq=0, num_host_blocks=9, enable_prefix_caching=True)
    for name in ("a", "c"):
        s.add(request(s, name, 9, max_tokens=12))
    s.update(s.schedule(), [1, 2])
    # Both prompts were computed in one step, each into blocks of its own; now "c" comes again and finds those of "a".
    s.abort("c")
    s.add(request(s, "c", 9, max_tokens=12))
    step = s.schedule()
    while not step.preempted:
        s.update(step, [1 if row.request_id == "a" else 2 for row in step.rows])
        step = s.schedule()
    (c,) = s.waiting
    assert len(step.swap_outs) == len(c.sequences[0].host_table.blocks) > 2
    computed = c.sequences[0].num_computed_tokens
    rows = [(name, start) for name, start, _ in finish_all(s, step) if name == "c"]
    assert rows[0] == ("c", computed)
    assert s.num_recomputed_tokens == 0
    assert s.kv.num_swapped_in_blocks <= s.kv.num_swapped_out_blocks - 2, "two full blocks of the prompt were found"


def test_a_swapped_request_can_be_aborted():
    s = swapping()
    s.abort("b")
    assert s.kv.host_pool.num_free == s.kv.host_pool.num_usable
    assert {name for name, *_ in finish_all(s, s.last)} == {"a"}


def test_a_failed_step_has_swapped_nothing_out():
    """Nobody knows what it copied: "a" ends with an error, "b" is computed again."""
    s = swapping()
    (failed,) = s.fail(s.last)
    assert failed.request_id == "a"
    assert {sequence.finish_reason for sequence in failed.sequences} == {"error"}
    assert s.kv.host_pool.num_free == s.kv.host_pool.num_usable
    assert s.pool.num_free == s.pool.num_usable
    assert ("b", 0, 5) in finish_all(s, s.schedule())


def test_beams_are_computed_together_or_not_at_all():
    s = scheduler(num_blocks=40, max_num_batched_tokens=6)
    s.add(request(s, "a", 3, max_tokens=9))
    params = SamplingParams()
    tables = {"block_table": s.new_block_table(), "seed": 0, "max_tokens": 9}
    beams = Request("b", range(20, 25), params, beam_width=3, **tables)
    s.add(beams)
    step = s.schedule()
    assert planned(step) == [("a", 0, 3), ("b", 0, 3)]
    s.update(step, [1])
    step = s.schedule()
    assert planned(step) == [("a", 3, 4), ("b", 3, 5)]
    assert len(step.rows[1].samples) == 1, "all begin with what the first one finds"
    s.update(step, [1, 7])
    assert beams.sequences[0].num_output_tokens == 0, "beams get their tokens from branch"
    s.branch(beams, [Branch(0, 7), Branch(0, 8), Branch(0, 9)])
    assert [sequence.output_token_ids for sequence in beams.sequences] == [[7], [8], [9]]
    step = s.schedule()
    assert planned(step) == [("b", 5, 6)] * 3 + [("a", 4, 5)]
    tables = [sequence.block_table.blocks for sequence in beams.sequences]
    assert len({table[0] for table in tables}) == 1
    assert len({table[1] for table in tables}) == 3, "two copies, and one keeps the block"
    assert len(step.copies) == 2
    s.update(step, [1] * 4)
    s.branch(beams, [Branch(2, 1), Branch(2, 2), Branch(0, 3)])
    assert [sequence.output_token_ids for sequence in beams.sequences] == [[9, 1], [9, 2], [7, 3]]
    for name in ("c", "d"):
        s.add(request(s, name, 1, max_tokens=9))
    step = s.schedule()
    assert [name for name, *_ in planned(step)].count("b") == 3
    s.max_num_batched_tokens = 3  # "a" takes one
    s.update(step, [1] * sum(len(row.samples) for row in step.rows))
    s.branch(beams, [Branch(0, 1)] * 3)
    assert "b" not in [name for name, *_ in planned(s.schedule())], "two tokens are left, and three beams"


def test_beams_that_are_computed_again_wait_for_each_other():
    """With too few tokens a step for all of them, their last tokens still come in the same step."""
    s = scheduler(num_blocks=40, max_num_batched_tokens=6)
    table = s.new_block_table()
    beams = Request("b", range(5), SamplingParams(), block_table=table, seed=0, max_tokens=9, beam_width=3)
    s.add(beams)
    step, sampled = s.schedule(), []
    while step is not None:
        sampled.append([len(row.samples) for row in step.rows])
        s.update(step, [1] * sum(sampled[-1]))
        if sampled[-1] in ([1], [1, 1, 1]):
            s.branch(beams, [Branch(i if len(sampled[-1]) == 3 else 0, 10 * i) for i in range(3)])
        if len(sampled) == 6:
            s._preempt(beams, StepDraft(0))
        if beams.sequences[0].num_output_tokens == 7:
            s.finish(beams, "length")
        step = s.schedule()
    assert s.num_recomputed_tokens > 0
    assert len(sampled) > 10
    assert all(samples in ([1], [1, 1, 1]) or not any(samples) for samples in sampled)
    assert sampled.count([1]) == 1, "only the prompt's end is one beam's alone"


def test_spare_blocks_are_kept_for_the_running():
    s = scheduler(num_blocks=7, block_size=4, spare_blocks_per_seq=1)  # five usable
    s.add(request(s, "a", 8))
    s.add(request(s, "b", 8))
    s.add(request(s, "c", 4))
    assert [name for name, *_ in planned(s.schedule())] == ["a", "b"], "the last block is for a or b to grow into"
    s = scheduler(num_blocks=7, block_size=4, spare_blocks_per_seq=0)
    for name, n in (("a", 8), ("b", 8), ("c", 4)):
        s.add(request(s, name, n))
    assert [name for name, *_ in planned(s.schedule())] == ["a", "b", "c"]


def test_nobody_overtakes_the_head_of_the_queue():
    s = scheduler(num_blocks=6, block_size=4)  # four usable
    s.add(request(s, "a", 8, max_tokens=2))
    s.add(request(s, "long", 12, max_tokens=2))
    s.add(request(s, "short", 1, max_tokens=2))
    assert [name for name, *_ in planned(s.schedule())] == ["a"]


def test_the_token_budget_is_kept():
    s = scheduler(num_blocks=40, max_num_batched_tokens=20, enable_chunked_prefill=False)
    for name in "abc":
        s.add(request(s, name, 9))
    step = s.schedule()
    assert planned(step) == [("a", 0, 9), ("b", 0, 9)]
    s.update(step, [1, 1])
    assert planned(s.schedule()) == [("a", 9, 10), ("b", 9, 10), ("c", 0, 9)]


def test_a_prompt_is_cut_into_chunks_beside_decodes():
    s = scheduler(num_blocks=40, max_num_batched_tokens=12)
    s.add(request(s, "a", 9))
    s.add(request(s, "b", 18))
    step = s.schedule()
    assert planned(step) == [("a", 0, 9), ("b", 0, 3)]
    assert [len(row.samples) for row in step.rows] == [1, 0]
    s.update(step, [1])
    step = s.schedule()
    assert planned(step) == [("a", 9, 10), ("b", 3, 14)]
    s.update(step, [1])
    step = s.schedule()
    assert planned(step) == [("a", 10, 11), ("b", 14, 18)]
    assert [len(row.samples) for row in step.rows] == [1, 1]


def test_few_prompt_tokens_are_scored_in_a_step():
    """Each needs a row of logits. What one request leaves of the 128, the next one may have."""
    s = scheduler(num_blocks=200, max_num_batched_tokens=500)
    for name, length in (("a", 100), ("b", 70), ("c", 5)):
        params = SamplingParams(max_tokens=4, prompt_logprobs=1)
        s.add(Request(name, range(length), params, block_table=s.new_block_table(), seed=0, max_tokens=4))
    s.add(request(s, "d", 30))
    seen = []
    while len(seen) < 2:
        step = s.schedule()
        assert sum(len(row.prompt_targets) for row in step.rows) <= 128
        seen.append(planned(step))
        s.update(step, [1] * sum(len(row.samples) for row in step.rows))
    assert seen[0] == [("a", 0, 100), ("b", 0, 29)]
    assert seen[1] == [("a", 100, 101), ("b", 29, 70), ("c", 0, 5), ("d", 0, 30)]


def test_a_long_prompt_leaves_room_for_others():
    s = scheduler(num_blocks=40, long_prefill_token_threshold=5)
    s.add(request(s, "long", 18))
    s.add(request(s, "short", 4))
    assert planned(s.schedule()) == [("long", 0, 5), ("short", 0, 4)]


def test_lower_priorities_are_served_first_and_preempted_last():
    s = scheduler(num_blocks=6, block_size=4, policy="priority", spare_blocks_per_seq=0)  # four usable
    for name, priority in (("late", 5), ("first", -1), ("later", 5)):
        r = request(s, name, 5, max_tokens=8)
        r.priority = priority
        s.add(r)
    step = s.schedule()
    assert planned(step) == [("first", 0, 5), ("late", 0, 5)]
    for _ in range(4):
        s.update(step, [1] * len(step.rows))
        step = s.schedule()
    assert step.preempted == ("late",)
    assert [r.request_id for r in s.waiting] == ["late", "later"]


def test_samples_share_their_prompt_and_copy_the_block_they_write():
    s = scheduler(num_blocks=12, block_size=4)
    params = SamplingParams(n=3)
    s.add(Request("a", range(6), params, block_table=s.new_block_table(), seed=7, max_tokens=4))
    step = s.schedule()
    assert planned(step) == [("a", 0, 6)]
    assert [admission.seed for admission in step.admissions] == [7, 8, 9]
    assert [sample.row for sample in step.rows[0].samples] == [admission.row for admission in step.admissions]
    s.update(step, [1, 2, 3])
    tables = [sequence.block_table.blocks for sequence in s.running[0].sequences]
    assert tables == [[1, 2]] * 3
    assert s.pool.ref_count(1) == s.pool.ref_count(2) == 3
    step = s.schedule()
    assert planned(step) == [("a", 6, 7)] * 3
    assert [copy.source for copy in step.copies] == [2, 2], "the last one to write keeps the block"
    assert [sequence.block_table.blocks[0] for sequence in s.running[0].sequences] == [1, 1, 1]
    assert s.pool.num_usable - s.pool.num_free == 4


def test_a_beginning_that_was_computed_is_found_again():
    s = scheduler(enable_prefix_caching=True, num_blocks=20)
    s.add(request(s, "a", 10, max_tokens=1))
    assert s.update(s.schedule(), [1])
    assert s.pool.num_free == s.pool.num_usable
    s.add(request(s, "b", 11))
    step = s.schedule()
    assert planned(step) == [("b", 8, 11)], "two full blocks of four"
    assert s.running[0].num_cached_tokens == 8
    assert step.rows[0].table_change.blocks[:2] == (1, 2)
    s.add(request(s, "c", 8))
    s.update(step, [1])
    assert ("c", 4, 8) in planned(s.schedule()), "at least one token is computed, so the last block is"
    assert not s.reset_prefix_cache(), "blocks are in use"
    s.abort("b")
    s.abort("c")
    assert s.reset_prefix_cache()
    s.add(request(s, "d", 10))
    assert planned(s.schedule()) == [("d", 0, 10)]


def test_blocks_behind_the_window_are_freed():
    s = scheduler(num_blocks=40, sliding_window=4, max_num_batched_tokens=8)
    s.add(request(s, "a", 30, max_tokens=20))
    step = s.schedule()
    while step is not None and s.running:
        # A query sees itself and three tokens before it: at most two blocks, and those of the chunk.
        held = [block for block in s.running[0].sequences[0].block_table.blocks if block]
        assert len(held) <= 4
        s.update(step, [1] * sum(len(row.samples) for row in step.rows))
        step = s.schedule()
    assert s.pool.num_free == s.pool.num_usable


def test_rows_and_names_can_be_used_again():
    s = scheduler(max_num_seqs=1)
    for _ in range(3):
        s.add(request(s, "a", 3, max_tokens=1))
        step = s.schedule()
        assert step.rows[0].row == 0
        (grown,) = s.update(step, [7])
        assert grown[1].finish_reason == "length"
        assert s.schedule() is None


def test_a_step_in_flight_outlives_an_abort():
    s = scheduler()
    s.add(request(s, "a", 3))
    s.add(request(s, "b", 3))
    step = s.schedule()
    s.abort("a")
    nobody, grown = s.update(step, [1, 2])
    assert nobody is None
    b, _ = grown
    assert b.request_id == "b"
    assert b.sequences[0].output_token_ids == [2]


# --- a step in flight, and the next one planned -----------------------------------------------------------------------


def test_a_step_is_planned_behind_one_in_flight():
    """A decode's token is not known; a prompt goes on with its next chunk; and whoever ends by length is left out."""
    s = scheduler(num_blocks=40, max_num_batched_tokens=12)
    for name, length, max_tokens in (("a", 5, 4), ("b", 4, 2), ("c", 9, 4)):
        s.add(request(s, name, length, max_tokens))
    first = s.schedule()
    assert planned(first) == [("a", 0, 5), ("b", 0, 4), ("c", 0, 3)]
    second = s.schedule_ahead(first)
    assert [(row.request_id, row.start, row.token_ids) for row in second.rows] == [
        ("a", 5, (None,)),
        ("b", 4, (None,)),
        ("c", 3, (3, 4, 5, 6, 7, 8)),
    ]
    a, b, c = (r.sequences[0] for r in s.running)
    assert (a.num_tokens, a.num_computed_tokens, a.num_pending_tokens, a.length) == (5, 5, 1, 6)
    assert (c.num_tokens, c.num_computed_tokens, c.num_pending_tokens, c.length) == (9, 3, 0, 9)
    s.update(first, [20, 21])
    assert (a.token_ids[5:], a.num_pending_tokens, a.length) == ([20], 0, 6)
    third = s.schedule_ahead(second)
    assert planned(third) == [("c", 9, 10), ("a", 6, 7)], "the second token of b is its last"
    s.update(second, [30, 31, 32])
    assert b.finish_reason == "length"
    assert (b.output_token_ids, a.output_token_ids, c.output_token_ids) == ([21, 31], [20, 30], [32])


def test_a_row_that_was_planned_in_vain_is_ignored():
    """The first token of "a" ends it, which is known when its second one is in flight."""
    s = scheduler()
    for name in "ab":
        s.add(request(s, name, 3))
    s.waiting[0].stop_token_ids = frozenset([7])
    first = s.schedule()
    second = s.schedule_ahead(first)
    assert planned(second) == [("a", 3, 4), ("b", 3, 4)]
    (_, a), (_, b) = s.update(first, [7, 8])
    assert (a.finish_reason, a.row, a.block_table.blocks) == ("stop", None, [])
    third = s.schedule_ahead(second)
    assert planned(third) == [("b", 4, 5)]
    nobody, (_, b) = s.update(second, [9, 10])
    assert nobody is None
    assert (a.output_token_ids, b.output_token_ids) == ([7], [8, 10])


def test_a_name_and_a_row_can_be_used_again_while_a_step_is_in_flight():
    for how in ("update", "fail"):
        s = scheduler(max_num_seqs=1)
        s.add(request(s, "a", 3))
        first = s.schedule()
        second = s.schedule_ahead(first)
        s.update(first, [1])
        s.abort("a")
        s.add(request(s, "a", 3))
        third = s.schedule_ahead(second)
        assert planned(third) == [("a", 0, 3)]
        assert third.rows[0].row == second.rows[0].row
        if how == "update":
            assert s.update(second, [2]) == [None]
        else:
            assert s.fail(second) == []
        ((_, a),) = s.update(third, [3])
        assert a.output_token_ids == [3]


@pytest.mark.parametrize(
    ("wishes", "simple"),
    [
        ({"stop": ["x"]}, False),
        ({"min_tokens": 2}, False),
        ({"logprobs": 0}, False),
        ({"prompt_logprobs": 0}, False),
        ({"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0}, True),
        ({"stop_token_ids": [5], "logit_bias": {3: 1.0}, "allowed_token_ids": [3, 5], "seed": 5, "top_p": 0.5}, True),
    ],
    ids=str,
)
def test_the_next_step_waits_for_a_request_whose_tokens_decide_more_than_its_end(wishes, simple):
    s = scheduler()
    s.add(request(s, "a", 3))
    params = SamplingParams(max_tokens=4, **wishes)
    s.add(Request("b", range(3), params, block_table=s.new_block_table(), seed=0, max_tokens=4))
    first = s.schedule()
    assert (s.schedule_ahead(first) is not None) == simple
    if not simple:
        s.update(first, [1, 2])
        s.abort("b")
        second = s.schedule()
        assert s.schedule_ahead(second) is not None


def test_the_next_step_waits_until_samples_have_forked():
    s = scheduler()
    params = SamplingParams(max_tokens=4, n=3)
    s.add(Request("a", range(6), params, block_table=s.new_block_table(), seed=0, max_tokens=4))
    first = s.schedule()
    assert s.schedule_ahead(first) is None
    s.update(first, [1, 2, 3])
    second = s.schedule()
    third = s.schedule_ahead(second)
    assert planned(second) == [("a", 6, 7)] * 3
    assert planned(third) == [("a", 7, 8)] * 3


def test_nobody_is_preempted_while_a_step_is_in_flight():
    """Six usable blocks of two, and "b" does not find its fourth: it is left out, and then the next step waits."""
    s = scheduler(num_blocks=8, block_size=2, spare_blocks_per_seq=0)
    for name in "ab":
        s.add(request(s, name, 5, max_tokens=8))
    step = s.schedule()
    ahead = s.schedule_ahead(step)
    assert planned(ahead) == [("a", 5, 6), ("b", 5, 6)]
    s.update(step, [1, 1])
    s.add(request(s, "c", 1))
    assert s.pool.num_free == 0
    assert s.schedule_ahead(ahead) is None, "not even a finds a block"
    s.update(ahead, [1, 1])
    step = s.schedule()
    assert step.preempted == ("b",)
    assert planned(step) == [("a", 6, 7)]
    assert s.schedule_ahead(step) is None, "b is to be told first if this step fails"


def test_who_finds_no_block_behind_a_step_in_flight_is_left_out_once():
    """Seven usable blocks of two: "a" takes the last one."""
    s = scheduler(num_blocks=9, block_size=2, spare_blocks_per_seq=0)
    for name in "ab":
        s.add(request(s, name, 5, max_tokens=8))
    first = s.schedule()
    second = s.schedule_ahead(first)
    s.update(first, [1, 1])
    third = s.schedule_ahead(second)
    assert planned(third) == [("a", 6, 7)]
    assert third.short_of_blocks
    assert third.preempted == ()
    s.update(second, [2, 2])
    assert s.schedule_ahead(third) is None, "or b could be left out for long"
    s.update(third, [3])
    fourth = s.schedule()
    assert fourth.preempted == ("b",)
    assert planned(fourth) == [("a", 7, 8)]
    assert [r.sequences[0].output_token_ids for r in (*s.running, *s.waiting)] == [[1, 2, 3], [1, 2]]
    while "b" not in [name for name, *_ in planned(fourth)]:
        s.update(fourth, [4])
        fourth = s.schedule()
    assert planned(fourth) == [("b", 0, 7)]
    fifth = s.schedule_ahead(fourth)
    assert planned(fifth) == [("b", 7, 8)]
    s.update(fourth, [5])
    s.update(fifth, [6])
    assert s.num_recomputed_tokens == 6


def test_nobody_is_admitted_beside_somebody_who_found_no_blocks_behind_a_step_in_flight():
    """Six usable blocks of two: the samples of "b" need two more at once, and one is left, enough for "c"."""
    s = scheduler(num_blocks=8, block_size=2, spare_blocks_per_seq=0)
    params = SamplingParams(max_tokens=5, n=2)
    s.add(Request("b", range(4), params, block_table=s.new_block_table(), seed=0, max_tokens=5))
    s.update(s.schedule(), [1, 1])
    second = s.schedule()
    s.add(request(s, "a", 1))
    third = s.schedule_ahead(second)
    assert planned(third) == [("b", 5, 6), ("b", 5, 6), ("a", 0, 1)]
    s.update(second, [2, 2])
    s.add(request(s, "c", 1))
    assert s.pool.num_free == 1
    assert s.schedule_ahead(third) is None
    assert [r.request_id for r in s.waiting] == ["c"]


def test_nothing_can_be_found_of_a_step_that_failed_after_the_next_was_planned():
    s = scheduler(enable_prefix_caching=True)
    s.add(request(s, "a", 8))
    first = s.schedule()
    second = s.schedule_ahead(first)
    s.add(request(s, "b", 8))
    (failed,) = s.fail(first)
    assert failed.request_id == "a"
    assert s.update(second, [1]) == [None]
    assert planned(s.schedule()) == [("b", 0, 8)]


def test_a_step_that_waits_leaves_a_plan_that_schedule_goes_on_with():
    """What was counted as computed by a step in flight is, once it has been taken in."""
    s = scheduler()
    s.add(request(s, "a", 3, max_tokens=1))
    first = s.schedule()
    assert s.schedule_ahead(first) is None, "its only token is its last"
    s.add(request(s, "b", 3))
    second = s.schedule_ahead(first)
    assert planned(second) == [("b", 0, 3)], "newcomers are admitted"
    assert [owner[0].request_id for owner in s.update(first, [1])] == ["a"]
    s.update(second, [2])
    assert planned(s.schedule()) == [("b", 3, 4)]


def test_samples_whose_prompt_is_found_whole_begin_before_its_blocks_are_dropped():
    """Preempted, then admitted again with the prompt in the cache: the leader goes on at once, a window behind it."""
    s = scheduler(
        num_blocks=5, block_size=3, max_num_seqs=3, sliding_window=2, spare_blocks_per_seq=0, enable_prefix_caching=True
    )
    simulation = Simulation(s, [Wanted([0, 0], 2), Wanted([0, 0, 0], 3, n=2)]).run()
    simulation.check_outputs()
    assert s.num_preemptions == 1


def test_what_can_never_run_is_refused():
    s = scheduler(enable_chunked_prefill=False)
    with pytest.raises(
        ValueError, match=r"never fit the pool: prompt 30, max_tokens 4 and n=1 take 9 blocks of 4.* has 8"
    ):
        s.add(request(s, "a", 30))
    with pytest.raises(ValueError, match=r"may grow to 70 tokens .* max_num_batched_tokens=64"):
        s.add(request(s, "a", 67))
    too_many = Request("a", [1], SamplingParams(n=5), block_table=s.new_block_table(), seed=0, max_tokens=1)
    with pytest.raises(ValueError, match=r"wants n=5 sequences .* max_num_seqs=4"):
        s.add(too_many)
    assert not s.has_unfinished


def test_the_stand_in_model_depends_on_every_token():
    assert alone([1, 2, 3], 5, None) != alone([2, 2, 3], 5, None)


def test_the_short_plan_of_a_decode_says_the_same(pytestconfig, monkeypatch):
    """`plan_decode` gives what `plan` gives, and is what plans most decodes."""
    num_short = 0
    plan_decode, finish = StepDraft.plan_decode, StepDraft.finish
    steps: list[Step] = []

    def counted(draft, request, sequence):
        nonlocal num_short
        num_short += 1
        plan_decode(draft, request, sequence)

    def noted(draft):
        steps.append(finish(draft))
        return steps[-1]

    monkeypatch.setattr(StepDraft, "finish", noted)
    for seed in range(pytestconfig.getoption("--schedules") // 16):
        with monkeypatch.context() as patch:
            patch.setattr(StepDraft, "plan_decode", counted)
            random_simulation(seed).run()
        short, steps = steps, []
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "_decodes_in_place", lambda scheduler, request: False)
            random_simulation(seed).run()
        assert short == steps, f"random_simulation({seed})"
        steps = []
    assert num_short > 0


def test_nobody_is_looked_up_while_all_rows_are_taken(monkeypatch):
    scheduler = Scheduler(num_blocks=100, block_size=4, max_num_seqs=2, max_num_batched_tokens=50)
    for i in range(4):
        table = scheduler.new_block_table()
        scheduler.add(Request(str(i), [i, 5], SamplingParams(), block_table=table, seed=0, max_tokens=10))
    asked, placement = [], scheduler.kv.placement
    monkeypatch.setattr(scheduler.kv, "placement", lambda request: asked.append(request) or placement(request))
    while any(request.request_id == "0" for request in (*scheduler.waiting, *scheduler.running)):
        step = scheduler.schedule()
        scheduler.update(step, [1] * len(step.rows))
    assert [request.request_id for request in asked] == ["0", "1"], "each when there was a row for it"


def test_bad_words_do_not_begin_in_the_prompt():
    table = Scheduler(num_blocks=9, block_size=4, max_num_seqs=1, max_num_batched_tokens=9).new_block_table()
    words = [(7, 8), (7, 7, 9), (4,)]
    request = Request("a", [6, 7, 7], SamplingParams(), block_table=table, seed=0, max_tokens=9, bad_words=words)
    (sequence,) = request.sequences
    banned = []
    for token in (7, 7, 5):
        banned.append(request.banned_token_ids(sequence))
        sequence.token_ids.append(token)
    assert banned == [(4,), (4, 8), (4, 8, 9)]
    assert request.banned_token_ids(sequence) == (4,)
