"""Simulations without a model: counts against painted pools, schedules worked out by hand, and published figures."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import kv_shares
import numpy as np
import pytest
import step_cost
from hypothesis import given, settings
from hypothesis import strategies as st
from test_traces import AZURE, data

from paged.cli import main
from paged.memory.events import StepEvent, take_event
from paged.memory.states import SlotState, Span, contiguous_frame, paged_frame
from paged.traces import Piece, Trace, TraceError, TraceRequest, load, request_of
from paged.traces.baselines import ContiguousSettings, serve
from paged.traces.cost import COEFFICIENTS, COSTS, MeasuredStep, StepCost, fit, load_cost
from paged.traces.ledger import Ledger
from paged.traces.records import Simulation
from paged.traces.simulate import MOST_QUEUED, PagedSettings, simulate
from paged.traces.synthetic import SHAREGPT, fixed, like, with_rate, with_system_prompts, workload
from reference.buddy import BuddyPool
from reference.contiguous import ContiguousServer
from reference.reservation import ContiguousPool, PoolFull
from reference.served import Job

SECOND = StepCost(name="a second a step", per_step=1, per_token=0, per_context_token=0, per_sequence=0)
COUNTED = (SlotState.TOKENS, SlotState.RESERVED, SlotState.INTERNAL, SlotState.EXTERNAL)


def jobs(*lengths: tuple[int, int], arrivals: tuple[float, ...] = (), samples: int = 1) -> Trace:
    times = arrivals or (0.0,) * len(lengths)
    requests = [request_of(time, *pair, number=i) for i, (time, pair) in enumerate(zip(times, lengths, strict=True))]
    return Trace("jobs", tuple(replace(request, num_samples=samples) for request in requests))


def contiguous(trace: Trace, num_slots: int, policy: str, cost: StepCost = SECOND, **more) -> Simulation:
    limits = {"max_model_len": 16} | more
    return serve(trace, ContiguousSettings(num_slots=num_slots, policy=policy, **limits), cost)


def column(run: Simulation, state: SlotState) -> list[int]:
    return run.steps.slots[:, state].tolist()


# --- counted against painted ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_paged_counts_are_those_of_the_painted_pool(data):
    """Small pools, so that requests are preempted; samples that share blocks; prompts that begin alike."""
    block_size = data.draw(st.sampled_from([1, 3, 4]))
    requests = []
    for i in range(data.draw(st.integers(1, 7))):
        own = Piece(10 + 2 * i, data.draw(st.integers(1, 12)))
        shared = data.draw(st.lists(st.builds(Piece, st.just(1), st.integers(1, 9)), max_size=1))
        answer = Piece(11 + 2 * i, data.draw(st.integers(1, 9)))
        requests.append(TraceRequest(float(i // 3), (*shared, own), answer, data.draw(st.integers(1, 3))))
    trace = Trace("drawn", tuple(requests))
    pool = PagedSettings(
        # Two blocks are never used, and the longest request with three samples has to fit.
        num_blocks=2 + max(-(-(30 + 3 * 9) // block_size) + 6, data.draw(st.integers(40, 160)) // block_size),
        block_size=block_size,
        max_num_seqs=8,
        max_num_batched_tokens=data.draw(st.sampled_from([8, 11, 100])),
        enable_prefix_caching=data.draw(st.booleans()),
        spare_blocks_per_seq=data.draw(st.integers(0, 1)),
    )
    events: list[StepEvent] = []
    note = Ledger.note

    def watched(ledger, step, *, shares):
        events.append(take_event(step, ledger._scheduler))
        return note(ledger, step, shares=shares)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "note", watched)
        run = simulate(trace, pool, SECOND)
    final = {
        (str(number), sample): trace.requests[index].num_prompt_tokens + trace.requests[index].num_output_tokens - 1
        for number, index in enumerate(run.requests.index)
        for sample in range(3)
    }
    assert len(events) == len(run.steps)
    for event, slots in zip(events, run.steps.slots, strict=True):
        frame = paged_frame(event, num_blocks=pool.num_blocks, block_size=block_size, num_final_tokens=final)
        assert slots.tolist() == np.bincount(frame, minlength=len(SlotState)).tolist()
    assert run.steps.num_waiting.tolist() == [event.num_waiting for event in events]
    assert len(run.requests.index) + run.num_refused == len(trace)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_contiguous_counts_are_those_of_the_painted_pool(data):
    policy = data.draw(st.sampled_from(["max", "pow2", "oracle"]))
    allocator = data.draw(st.sampled_from(["first-fit", "buddy"]))
    num_slots = data.draw(st.integers(16, 90))
    server = ContiguousServer(
        num_slots=num_slots,
        policy=policy,
        batching=data.draw(st.sampled_from(["iteration", "static"])),
        allocator=allocator,
        max_model_len=16,
        max_num_seqs=6,
        max_num_batched_tokens=20,
    )
    count, total = data.draw(st.integers(1, 12)), 0
    for i in range(count):
        prompt = data.draw(st.integers(1, 15))
        output = data.draw(st.integers(1, 16 - prompt))
        server.add(Job(str(i), prompt, output))
        total += prompt + output - 1
    painted: list[list[int]] = []
    slots = ContiguousServer._slots

    def watched(server, rows):
        spans = [
            Span(run.first_slot, run.num_slots, row.num_written, row.job.num_final_tokens, row not in rows)
            for row in server.running
            for run in server.pool.reservations
            if run.request_id == row.job.name
        ]
        needed = server.reserved_slots(server.waiting[0].job) if server.waiting else 0
        frame = contiguous_frame(spans, num_slots=num_slots, smallest_gap=needed)
        painted.append(np.bincount(frame, minlength=len(SlotState)).tolist())
        return slots(server, rows)

    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContiguousServer, "_slots", watched)
        while (step := server.step()) is not None:
            steps.append(step)
    for step, frame in zip(steps, painted, strict=True):
        found = step.slots
        assert [found.live, found.reserved, found.internal] == [frame[state] for state in COUNTED[:3]]
        if allocator == "first-fit":  # buddies that lie beside each other are one gap only in a picture
            assert (found.external, found.free) == (frame[SlotState.EXTERNAL], frame[SlotState.FREE])
            assert found.rounding == 0
        assert found.live + found.reserved + found.internal + found.external + found.free == num_slots
    if server.batching == "iteration":
        assert sum(step.num_tokens for step in steps) == total
    assert Counter(name for step in steps for name in step.finished) == Counter(map(str, range(count)))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=40))
def test_buddies_never_overlap_and_join_again(num_slots, operations):
    pool = BuddyPool(num_slots)
    whole = pool.gaps
    held: list[str] = []
    for i, (give_back, number) in enumerate(operations):
        if give_back and held:
            pool.release(held.pop(number % len(held)))
        elif pool.fits(number):
            run = pool.reserve(str(i), number)
            assert number <= run.num_slots < 2 * number
            assert run.num_slots & (run.num_slots - 1) == 0
            held.append(str(i))
        else:
            with pytest.raises(PoolFull):
                pool.reserve(str(i), number)
        runs = pool.reservations
        assert all(left.end <= right.first_slot for left, right in itertools.pairwise(runs))
        assert not runs or runs[-1].end <= num_slots
        assert pool.num_free == sum(pool.gaps) == num_slots - sum(run.num_slots for run in runs)
    for name in held:
        pool.release(name)
    assert pool.gaps == whole
    assert sum(whole) == num_slots


def test_gaps_of_a_first_fit_pool():
    pool = ContiguousPool(12)
    for name in "abc":
        pool.reserve(name, 3)
    pool.release("b")
    assert (pool.gaps, pool.num_free) == ([3, 3], 6)
    pool.release("c")
    assert (pool.gaps, pool.num_free) == ([9], 9)


# --- worked out by hand -----------------------------------------------------------------------------------------------


def test_a_power_of_two_is_reserved_for_the_output():
    """Prompt 3, output 5: 3 + 8 slots, of which 7 are used. Two of them do not fit 20 slots, two of 3 + 4 do."""
    run = contiguous(jobs((3, 5), (3, 5)), 20, "pow2")
    assert column(run, SlotState.TOKENS) == [3, 4, 5, 6, 7] * 2
    assert column(run, SlotState.RESERVED) == [4, 3, 2, 1, 0] * 2
    assert column(run, SlotState.INTERNAL) == [4] * 10
    assert column(run, SlotState.EXTERNAL) == [9] * 5 + [0] * 5  # nobody waits any more in the second half
    assert contiguous(jobs((3, 4), (3, 3)), 14 + 2, "pow2").steps.num_running.tolist() == [2, 2, 2, 1]
    # Rounded up to 16 by a buddy allocator.
    assert contiguous(jobs((3, 5)), 20, "pow2", allocator="buddy").steps.rounding.tolist() == [5] * 5


def test_a_hole_is_external_until_somebody_small_comes():
    """Oracle, 10 slots: "a" has 0 to 3, "b" 4 to 6. When "a" has ended, 4 + 3 free slots do not hold the 5 of "c"."""
    run = contiguous(jobs((3, 2), (1, 3), (1, 5)), 10, "oracle", max_model_len=6)
    assert run.steps.num_running.tolist() == [2, 2, 1, 1, 1, 1, 1, 1]
    assert column(run, SlotState.EXTERNAL) == [3, 3, 7, 0, 0, 0, 0, 0]
    assert run.requests.finished.tolist() == [2, 3, 8]


def test_a_gap_that_is_just_long_enough_is_free():
    """Only one row may run, so the second request waits beside a gap that it would fit."""
    run = contiguous(jobs((3, 2), (3, 1)), 32, "max", max_num_seqs=1)
    assert (column(run, SlotState.EXTERNAL), column(run, SlotState.FREE)) == ([0, 0, 0], [16, 16, 16])


def test_static_batches_keep_their_rows_and_compute_them():
    run = contiguous(jobs((4, 1), (2, 3), (5, 1)), 32, "max", batching="static")
    assert run.steps.num_tokens.tolist() == [8, 2, 2, 5]  # both prompts as wide as the wider one
    assert run.steps.num_context_tokens.tolist() == [8, 6, 8, 5]
    assert column(run, SlotState.INTERNAL) == [26 - 2 + 0, 16 + 12, 16 + 12, 11]
    assert run.requests.finished.tolist() == [1, 3, 4]


def test_growing_copies_everything_for_each_token():
    """Two requests, 3 and 2 tokens long at first: each step copies what the step before left."""
    run = contiguous(jobs((3, 3), (2, 3)), 600, "grow", max_model_len=8)
    assert column(run, SlotState.TOKENS) == [5, 7, 9]
    assert run.steps.num_copied_tokens.tolist() == [0, 5, 7]
    # First "a" moves from 3 slots to 4 beside them, then "b" from 2 to 3: 5 + 4, then 4 + 2 + 3.
    assert run.steps.most_held.tolist() == [5, 9, 12]
    slow = replace(SECOND, per_context_token=1)
    assert contiguous(jobs((3, 3), (2, 3)), 600, "grow", slow, max_model_len=8).steps.seconds.tolist() == [
        1 + 5,
        1 + 7 + 2 * 5,
        1 + 9 + 2 * 7,
    ]


def test_a_growing_batch_is_one_tensor():
    """Rows of 3 and 2 tokens: padded to 3, and both wider at each step, whoever has ended."""
    run = contiguous(jobs((3, 1), (2, 3)), 52, "grow", batching="static", max_model_len=8)
    held = run.num_slots - run.steps.slots[:, [SlotState.FREE, SlotState.EXTERNAL]].sum(axis=1)
    assert held.tolist() == [6, 8, 10]
    assert column(run, SlotState.TOKENS) == [5, 3, 4]
    assert run.steps.num_copied_tokens.tolist() == [0, 6, 8]
    assert run.steps.most_held.tolist() == [6, 14, 18]


def test_growing_requests_are_preempted_and_nobody_is_lost():
    trace = workload("some", 40, prompt=fixed(20), output=fixed(30), seed=0)
    run = contiguous(trace, 3 * 50 + 2, "grow", max_model_len=50)
    assert run.steps.num_tokens.sum() - run.num_recomputed_tokens == 40 * 49
    assert not np.isnan(run.requests.finished).any()
    tight = ContiguousServer(
        num_slots=152, policy="grow", batching="iteration", max_model_len=50, max_num_seqs=9,
        max_num_batched_tokens=999, spare_slots=0,
    )  # fmt: skip
    for i in range(12):
        tight.add(Job(str(i), 20, 30))
    steps = list(iter(tight.step, None))
    assert sum(len(step.preempted) for step in steps) > 0
    assert sum(step.num_tokens - step.num_recomputed_tokens for step in steps) == 12 * 49
    assert Counter(name for step in steps for name in step.finished) == Counter(map(str, range(12)))


def test_samples_without_blocks_are_requests_of_their_own():
    """One run fits: the second sample comes when the first has ended, and computes the prompt again."""
    run = contiguous(jobs((3, 2), samples=2), 16, "max")
    assert run.steps.num_tokens.tolist() == [3, 1, 3, 1]
    assert (run.requests.first_token.tolist(), run.requests.finished.tolist()) == ([1], [4])
    paged = simulate(jobs((3, 2), samples=2), PagedSettings(num_blocks=9, block_size=4), SECOND)
    assert paged.steps.num_tokens.tolist() == [3, 2]  # both go on from one prompt
    assert (paged.requests.first_token.tolist(), paged.requests.finished.tolist()) == ([1], [2])


def test_paged_by_hand():
    """Four blocks of 4. Both take their second one at the fifth token; at the ninth "a" gets that of "b"."""
    run = simulate(
        jobs((4, 6), (4, 6)),
        PagedSettings(num_blocks=6, block_size=4, max_num_seqs=2, spare_blocks_per_seq=0),
        SECOND,
    )
    assert run.steps.num_tokens.tolist()[:6] == [8, 2, 2, 2, 2, 1]
    assert (run.num_preemptions, run.requests.num_preemptions.tolist()) == (1, [0, 1])
    assert run.num_recomputed_tokens == 8
    assert column(run, SlotState.TOKENS)[:6] == [8, 10, 12, 14, 16, 9]
    assert column(run, SlotState.RESERVED)[:6] == [0, 6, 4, 2, 0, 0]
    assert column(run, SlotState.INTERNAL)[:6] == [0, 0, 0, 0, 0, 3]


def test_equal_hashes_are_computed_once_and_answers_are_found_by_who_quotes_them():
    same = TraceRequest(0, (Piece(1, 32), Piece(2, 5)), Piece(3, 12))
    other = TraceRequest(50, (Piece(1, 32), Piece(4, 5)), Piece(5, 1))
    quoting = TraceRequest(100, (Piece(1, 32), Piece(2, 5), Piece(3, 12), Piece(6, 3)), Piece(7, 1))
    run = simulate(Trace("some", (same, other, quoting)), PagedSettings(num_blocks=40), SECOND)
    # Two whole blocks of 16; and of the 48 tokens that the first one left, three.
    assert run.requests.num_cached_tokens.tolist() == [0, 32, 48]
    assert run.num_cached_tokens == 80
    off = simulate(Trace("some", (same, other)), PagedSettings(num_blocks=40, enable_prefix_caching=False), SECOND)
    assert off.num_cached_tokens == 0


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["paged", "max"])
def test_latencies(policy):
    """One at a time, a second a step: the second waits for the first, the third for nobody."""
    trace = jobs((5, 3), (5, 2), (5, 1), arrivals=(0.5, 1.0, 100.0))
    if policy == "paged":
        run = simulate(trace, PagedSettings(num_blocks=10, max_num_seqs=1), SECOND)
    else:
        run = contiguous(trace, 16, policy)
    assert run.requests.first_token.tolist() == [1.5, 4.5, 101]
    assert run.requests.finished.tolist() == [3.5, 5.5, 101]
    assert run.requests.ttft.tolist() == [1, 3.5, 1]
    assert run.requests.tpot[:2].tolist() == [1, 1]
    assert math.isnan(run.requests.tpot[2])
    assert run.requests.normalised_latency.tolist() == [1, 4.5 / 2, 1]
    assert run.steps.num_waiting.tolist() == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("policy", ["paged", "max"])
def test_waiting_is_that_of_queueing_theory(policy):
    """One server, a second for each, Poisson arrivals at 0.5 a second: Pollaczek and Khinchine say half a second."""
    trace = with_rate(workload("ones", 20_000, prompt=fixed(3), output=fixed(1), seed=0), 0.5, seed=1)
    if policy == "paged":
        run = simulate(trace, PagedSettings(num_blocks=4, max_num_seqs=1), SECOND)
    else:
        run = contiguous(trace, 16, policy)
    waits = run.requests.ttft - 1
    batches = waits.reshape(40, 500).mean(axis=1)  # long enough to be nearly independent
    assert abs(waits.mean() - 0.5) < 4 * batches.std() / math.sqrt(40)


def test_who_comes_late_is_not_in_the_queue_and_the_queue_is_made_bit_by_bit(monkeypatch):
    """However long a trace is, a few requests exist at a time."""
    most = []
    note = Ledger.note

    def watched(ledger, step, *, shares):
        most.append(len(ledger._scheduler.waiting))
        return note(ledger, step, shares=shares)

    monkeypatch.setattr(Ledger, "note", watched)
    run = simulate(
        workload("some", 900, prompt=fixed(40), output=fixed(3), seed=0), PagedSettings(num_blocks=99), SECOND
    )
    assert max(most) <= MOST_QUEUED
    assert run.steps.num_waiting[0] + run.steps.num_running[0] == 900


def test_refused_requests_are_counted():
    trace = jobs((5, 3), (500, 2), (5, 1))
    run = simulate(trace, PagedSettings(num_blocks=10), SECOND)
    assert (run.num_refused, run.requests.index.tolist()) == (1, [0, 2])
    assert contiguous(trace, 16, "max").num_refused == 1
    assert simulate(trace, PagedSettings(num_blocks=99, max_model_len=7), SECOND).requests.index.tolist() == [2]
    for wrong in (
        lambda: simulate(jobs((500, 2)), PagedSettings(num_blocks=10), SECOND),
        lambda: simulate(trace, PagedSettings(num_blocks=2), SECOND),
        lambda: simulate(trace, PagedSettings(num_blocks=9, max_num_batched_tokens=8), SECOND),
        lambda: contiguous(jobs((500, 2)), 16, "max"),
        lambda: contiguous(trace, 15, "max"),
        lambda: contiguous(trace, 49, "grow"),
        lambda: contiguous(trace, 90, "grow", allocator="buddy"),
        lambda: contiguous(trace, 90, "best"),
    ):
        with pytest.raises(TraceError):
            wrong()


# --- what a step costs ------------------------------------------------------------------------------------------------


def test_fits_find_what_was_put_in():
    true = StepCost(name="true", per_step=3e-3, per_token=2e-5, per_context_token=3e-8, per_sequence=1e-5)
    features = [(1, 900, 1), (64, 9000, 64), (64, 70_000, 64), (4000, 4000, 1), (8000, 90_000, 77)]
    steps = [
        MeasuredStep("", *each, true.seconds(num_tokens=each[0], num_context_tokens=each[1], num_sequences=each[2]))
        for each in features
    ]
    found = fit("true", steps)
    for name in COEFFICIENTS:
        assert getattr(found.cost, name) == pytest.approx(getattr(true, name), rel=1e-6)
    assert found.mean_error < 1e-9
    # Faster the more there is to do: no coefficient is negative all the same.
    odd = fit("odd", [MeasuredStep("", n, 0, 0, 1 / n) for n in (1, 2, 3)])
    assert min(getattr(odd.cost, name) for name in COEFFICIENTS) == 0
    assert odd.mean_error > 0.1


@pytest.mark.parametrize("file", sorted(COSTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_costs_that_ship_are_those_of_their_steps(file):
    content = json.loads(file.read_text())
    steps = [MeasuredStep(**step) for step in content["steps"]]
    found = fit(content["name"], steps, content["kv_bytes_per_token"])
    shipped = load_cost(file.stem)
    for name in COEFFICIENTS:
        assert getattr(shipped, name) == pytest.approx(getattr(found.cost, name), rel=1e-9)
    assert content["mean_error"] == pytest.approx(found.mean_error, abs=1e-4)
    assert content["largest_error"] < 0.15


def test_unknown_costs(tmp_path):
    with pytest.raises(TraceError, match="there are: h200-llama-3-8b"):
        load_cost("abacus")
    (tmp_path / "a.json").write_text('{"name": "a"}')
    with pytest.raises(TraceError, match="is no cost file"):
        load_cost(tmp_path / "a.json")


def test_steps_are_those_that_a_gpu_made():
    """Workload W1 on an H200 made 27 steps with prompts and 511 without; the means of their tokens are in the cost."""
    trace = load(data("azure-llm-2023", "AzureLLMInferenceTrace_conv.csv"))
    w1 = trace.first(512).scaled(0).clipped(max_prompt=2048, max_output=512)
    pool = PagedSettings(num_blocks=54_123, max_num_seqs=512, max_num_batched_tokens=16_384)
    steps = simulate(w1, pool, SECOND).steps
    prompts = steps.num_tokens > steps.num_sequences
    assert (prompts.sum(), (~prompts).sum()) == (27, 511)
    assert steps.num_tokens[prompts].mean() == pytest.approx(15983.777777778)
    assert steps.num_tokens[~prompts].mean() == pytest.approx(249.765166341)


# --- published --------------------------------------------------------------------------------------------------------

# The paper's figure 2 in per cent: token states, reserved, internal, external and others; and figure 13's batch sizes.
PUBLISHED = {
    "max": (20.4, 13.3, 57.3, 8.9, 7.0),
    "pow2": (26.8, 17.9, 13.6, 41.6, 9.81),
    "oracle": (38.2, 25.2, 0, 36.6, 13.62),
}


@pytest.mark.parametrize("policy", PUBLISHED)
def test_reservations_waste_what_the_paper_says(policy):
    """Token states and reserved slots within five points, on lengths of the published means.

    The rest is one number here: which slots the paper counts as internal, and whether what a buddy allocator rounds up
    is among them, its text does not say. It is off by what the two are off together.
    """
    run = contiguous(like(SHAREGPT, 600, seed=3), 15_696, policy, allocator="buddy", max_model_len=2048)
    tokens, reserved, internal, external = (run.mean_shares()[state] * 100 for state in COUNTED)
    *shares, running = PUBLISHED[policy]
    assert [tokens, reserved] == pytest.approx(shares[:2], abs=5)
    assert internal + external == pytest.approx(sum(shares[2:]), abs=7)
    assert run.steps.num_running[run.counted].mean() == pytest.approx(running, rel=0.15)


def test_paging_wastes_less_than_four_per_cent():
    run = simulate(like(SHAREGPT, 400, seed=3), PagedSettings(num_blocks=981), SECOND)
    assert run.paged_waste < 0.04
    assert run.steps.shares[run.steps.fullest, SlotState.TOKENS] > 0.96
    shares = run.mean_shares()
    assert shares[SlotState.TOKENS] * 100 == pytest.approx(96.3, abs=5)
    assert shares.sum() == pytest.approx(1)


def test_a_shared_system_prompt_is_held_once():
    """By everybody who comes after the first one has computed it."""
    plain = workload("some", 30, prompt=fixed(16), output=fixed(16), seed=0).with_arrivals([0] + [5] * 29, "one first")
    pool = PagedSettings(num_blocks=400)
    alone, shared = simulate(plain, pool, SECOND), simulate(with_system_prompts(plain, 160), pool, SECOND)
    assert (alone.num_cached_tokens, shared.num_cached_tokens) == (0, 29 * 160)
    assert shared.steps.most_held.max() == alone.steps.most_held.max() + 160


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_json(capsys):
    policies = ["paged", "max", "pow2", "oracle", "grow"]
    assert main(["simulate", "sharegpt-like", "--requests", "60", "--policy", *policies, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    runs = {run["policy"]: run for run in result["runs"]}
    assert list(runs) == policies
    assert {run["num_slots"] for run in runs.values()} == {981 * 16}
    assert runs["max"]["most_running"] == 7
    assert runs["paged"]["most_running"] > runs["oracle"]["most_running"] > 7
    assert all(sum(run["mean_shares"].values()) == pytest.approx(1) for run in runs.values())
    needed = runs["max"]["num_computed_tokens"]
    assert runs["paged"]["num_computed_tokens"] == needed + runs["paged"]["num_recomputed_tokens"]


def test_command_table_rates_and_pictures(tmp_path, capsys):
    picture = tmp_path / "rates.png"
    arguments = ["simulate", "alpaca-like", "--requests", "40", "--policy", "paged", "max", "--plot", str(picture)]
    assert main([*arguments, "--rate", "2", "50", "inf", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert "2 requests a second" in out
    assert "all at once" in out
    assert "of them recomputed" in out
    assert "8,192 slots" in out  # 1 GiB of 131,072 bytes a token
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 0


def test_command_sizes(capsys):
    sizes = ["--blocks", "500", "--block-size", "8", "--max-prompt", "50", "--max-model-len", "90", "--requests", "99"]
    assert main(["simulate", "sharegpt-like", *sizes, "--policy", "max", "--time-scale", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["runs"][0]["num_slots"] == 4000
    assert result["runs"][0]["most_running"] == 4000 // 90
    drawn, scaled, prompts, outputs = result["notes"]
    assert (drawn, scaled) == ("lengths drawn with seed 0", "times multiplied by 2")
    assert prompts.endswith("of 99 prompts cut to 50 tokens")
    assert outputs.endswith("of 99 outputs cut so that prompt and output fit 90 tokens")


def test_command_shares_a_system_prompt(capsys):
    """Ten whole blocks, found by everybody but the first."""
    arguments = ["simulate", "alpaca-like", "--requests", "40", "--system-prompt", "160", "--json", "--rate", "10"]
    assert main(arguments) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["num_cached_tokens"] == 39 * 160
    assert main([*arguments, "--no-prefix-caching"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["num_cached_tokens"] == 0


def test_command_errors(tmp_path, capsys):
    file = tmp_path / "trace.csv"
    file.write_text(AZURE + "\nbad,1,2\n")
    assert main(["simulate", str(file)]) == 2
    assert f"{file}:4: TIMESTAMP is 'bad'" in capsys.readouterr().err
    assert main(["simulate", str(file), "--skip-bad", "--json", "--thin", "1", "--samples", "2"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes[0].startswith("1 bad rows left out")
    for wrong, message in (
        (["nowhere.csv"], "no file nowhere.csv"),
        (["alpaca-like", "--policy", "best"], "no policy 'best'; there are: paged, max"),
        (["alpaca-like", "--memory", "much"], "'much' is no size"),
        (["alpaca-like", "--block-size", "0"], "--block-size 0"),
        (["alpaca-like", "--rate", "0"], "rate 0.0"),
        (["alpaca-like", "--plot", "nowhere/a.png"], "no folder"),
        (["alpaca-like", "--cost", "abacus"], "no cost file"),
        (["alpaca-like", "--requests", "0"], "0 requests"),
    ):
        assert main(["simulate", *wrong]) == 2
        assert message in capsys.readouterr().err


# --- the benchmarks that go with it -----------------------------------------------------------------------------------


def test_published_figures_stand_beside_ours(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kv_shares.py", "--requests", "25"])
    kv_shares.main()
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("| max, buddy, iteration") and "20.4" in line)
    assert line.split(" | ")[3:6] == ["20.4, 13.3, 57.3, 8.9", "7.0", "7.0"]
    assert out.count("| paged |") == 2


def test_costs_are_fitted_to_results_of_other_benchmarks(tmp_path, monkeypatch, capsys):
    """Results that a true cost would give: decodes, decodes beside prompts, and both kinds of steps of workload W1."""
    true = StepCost(name="true", per_step=2e-3, per_token=2e-5, per_context_token=4e-8, per_sequence=0)
    file = tmp_path / "conv.csv"
    rows = [f"2023-11-16 18:00:{i % 60:02},{50 + i % 7 * 400},{3 + i % 5}" for i in range(600)]
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    w1 = load(file).first(512).scaled(0).clipped(max_prompt=2048, max_output=512)
    steps = simulate(w1, PagedSettings(num_blocks=4000, max_num_seqs=64), true).steps
    prompts = steps.num_tokens > steps.num_sequences
    kinds = {
        kind: {
            "steps": int(chosen.sum()),
            "tokens": float(steps.num_tokens[chosen].mean()),
            "wall_ms": float(steps.seconds[chosen].mean() * 1e3),
        }
        for kind, chosen in (("with prompts", prompts), ("graphs", ~prompts))
    }
    environment = {"environment": {"gpu": "none"}}
    decode = {"model": "Llama-3-8B", "batch": 8, "context": 1000.0}
    decode["seconds"] = true.seconds(num_tokens=8, num_context_tokens=8000, num_sequences=8)
    mix = {"decodes": 4, "context": 500, "prompts": 2, "prompt_tokens": 300}
    mixed = {"mix": mix, "label": "both", "tokens": 604, "context": 510.0}
    mixed["seconds"] = true.seconds(num_tokens=604, num_context_tokens=4 * 510 + 600, num_sequences=6)
    workload = {"name": "W1", "input_tokens": w1.num_prompt_tokens, "output_tokens": w1.num_output_tokens}
    served = {"name": "paged", "size": 64, "kv_bytes": 4000 * 16 * 131_072, "kinds": kinds, "steps": len(steps)}
    other = served | {"kinds": {**kinds, "graphs": {**kinds["graphs"], "steps": 1}}}
    total = float(steps.seconds.sum())
    results = {
        "decode_step": {"rows": [decode, decode | {"model": "another"}]},
        "mixed_step": {"rows": [mixed, {"error": "the wrong steps"}]},
        "throughput": {
            "workload": workload,
            "settings": {"block_size": 16, "max_num_batched_tokens": 8192},
            "rows": [served | {"seconds": total}, other | {"seconds": 2 * total}],
        },
    }
    arguments = ["step_cost.py", "--name", "true", "--trace", str(file)]
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result | environment))
        arguments += [f"--{name.replace('_', '-')}", str(tmp_path / f"{name}.json")]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(step_cost, "COSTS", tmp_path)
    step_cost.main()
    out = capsys.readouterr().out
    assert out.count("the same steps") == out.count("other steps, so left out") == 1
    assert "(+0.0%)" in out
    assert "(-50.0%)" in out
    content = json.loads((tmp_path / "true.json").read_text())
    assert len(content["steps"]) == 4
    for name in COEFFICIENTS:
        assert content[name] == pytest.approx(getattr(true, name), rel=1e-5, abs=1e-12)
