"""The scheduler over tagged memory: random workloads, every read checked, every request ends as if it were alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation, Wanted, alone

from paged.blocks import blocks_for
from paged.request import Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler


@st.composite
def simulations(draw) -> Simulation:
    """Any workload on a pool from just large enough to ample."""
    block_size = draw(st.integers(1, 9))
    wanted = draw(
        st.lists(
            st.builds(
                Wanted,
                prompt=st.lists(st.integers(0, 49), min_size=1, max_size=30),
                max_tokens=st.integers(1, 25),
                arrives=st.integers(0, 20),
                aborted=st.none() | st.integers(0, 30),
            ),
            min_size=1,
            max_size=8,
        )
    )
    wanted.sort(key=lambda w: w.arrives)  # the harness adds those of a step in this order
    longest = max(len(w.prompt) + w.max_tokens for w in wanted)
    smallest = max(blocks_for(len(w.prompt) + w.max_tokens - 1, block_size) for w in wanted)
    scheduler = Scheduler(
        num_blocks=2 + smallest + draw(st.integers(0, 20)),
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=longest + draw(st.integers(0, 60)),
        spare_blocks_per_seq=draw(st.integers(0, 2)),
    )
    return Simulation(scheduler, wanted, eos=draw(st.none() | st.integers(0, 49)))


@settings(max_examples=1000, deadline=None)
@given(simulations())
def test_every_read_is_right_and_every_request_ends(simulation):
    simulation.run().check_outputs()


def scheduler(**settings) -> Scheduler:
    defaults = {"num_blocks": 10, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64}
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
    s = scheduler(num_blocks=40, max_num_batched_tokens=20)
    for name in "abc":
        s.add(request(s, name, 9))
    step = s.schedule()
    assert planned(step) == [("a", 0, 9), ("b", 0, 9)]
    s.update(step, [1, 1])
    assert planned(s.schedule()) == [("a", 9, 10), ("b", 9, 10), ("c", 0, 9)]


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
    ((b, _),) = s.update(step, [1, 2])
    assert b.request_id == "b"
    assert b.sequences[0].output_token_ids == [2]


def test_what_can_never_run_is_refused():
    s = scheduler()
    with pytest.raises(ValueError, match=r"never fit the pool: prompt 30 and max_tokens 4 take 9 blocks of 4.* has 8"):
        s.add(request(s, "a", 30))
    with pytest.raises(ValueError, match=r"may grow to 70 tokens .* max_num_batched_tokens=64"):
        s.add(request(s, "a", 67))
    assert not s.has_unfinished


def test_the_stand_in_model_depends_on_every_token():
    assert alone([1, 2, 3], 5, None) != alone([2, 2, 3], 5, None)
