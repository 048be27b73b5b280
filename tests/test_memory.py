"""Frames of a pool against slots marked one by one, and pictures against the frames they are drawn from."""

import numpy as np
import pytest
from helpers import load, token_prompts
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from paged.blocks import NULL_BLOCK
from paged.engine import Engine
from paged.memory.events import Holding, StepEvent, take_event
from paged.memory.plots import LABELS, STACK, PoolHistory, pool_map, shares_over_time, side_by_side
from paged.memory.states import SlotState, Span, contiguous_frame, paged_frame, shares, slots_saved_by_sharing
from paged.model.runner import StepInFlight
from paged.request import Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.step import Step

BEST_FIRST = (SlotState.TOKENS, SlotState.RESERVED, SlotState.INTERNAL)


@given(st.data())
def test_paged_frame_marks_every_slot(data):
    """Two samples of "a" and one of "b" over tables that share blocks, are cut off by a window, and differ in tails."""
    block_size, num_blocks = data.draw(st.integers(1, 6)), data.draw(st.integers(3, 12))
    usable = range(1, num_blocks - 1)
    holdings, final = [], {}
    for owner in (("a", 0), ("a", 1), ("b", 0)):
        table = data.draw(st.permutations(usable))[: data.draw(st.integers(0, 4))]
        dropped = data.draw(st.integers(0, len(table)))
        tokens = data.draw(st.integers(dropped * block_size, len(table) * block_size))
        holdings.append(Holding(*owner, (NULL_BLOCK,) * dropped + tuple(table[dropped:]), tokens))
        final[owner] = tokens + data.draw(st.integers(0, 30))
    claims: dict[int, list[SlotState]] = {}
    named = []  # the slots that the tables name for tokens, with repeats
    for holding in holdings:
        for position in range(len(holding.blocks) * block_size):
            block = holding.blocks[position // block_size]
            if block == NULL_BLOCK:
                continue
            slot = block * block_size + position % block_size
            if position < holding.num_tokens:
                claims.setdefault(slot, []).append(SlotState.TOKENS)
                named.append(slot)
            elif position < final[holding.request_id, holding.sequence_index]:
                claims.setdefault(slot, []).append(SlotState.RESERVED)
            else:
                claims.setdefault(slot, []).append(SlotState.INTERNAL)
    unnamed = [block for block in usable if block * block_size not in claims]
    cached = tuple(block for block in unnamed if data.draw(st.booleans()))
    expected = []
    for slot in range(num_blocks * block_size):
        block = slot // block_size
        if block in (0, num_blocks - 1):
            expected.append(SlotState.OVERHEAD)
        elif slot in claims:
            expected.append(min(claims[slot], key=BEST_FIRST.index))
        else:
            expected.append(SlotState.CACHED if block in cached else SlotState.FREE)

    event = StepEvent(tuple(holdings), cached, 2, 0, 0)
    frame = paged_frame(event, num_blocks=num_blocks, block_size=block_size, num_final_tokens=final)
    assert frame.tolist() == expected
    counted = [expected.count(state) / len(expected) for state in SlotState]
    assert shares(frame).tolist() == pytest.approx(counted)
    assert shares(frame).sum() == pytest.approx(1)
    saved = slots_saved_by_sharing(event, block_size=block_size)
    assert saved == sum(named.count(slot) - 1 for slot in set(named))


# --- frames of real runs, against the pool itself ---------------------------------------------------------------------


UNWRITTEN = 12345.0  # no key of a model of this size comes near it


class WatchedPool:
    """What an engine's pool really is at every step, from its reference counts and from the keys that lie in it.

    A block that is handed out gets keys that no model computes, so a slot holds a token if its key is another one.
    Nothing here looks at a block table or a counter of tokens.

    Attributes:
        ref_counts: [steps] of the reference count of every block.
        cached: [steps] of the cached blocks.
        written: [steps] of [N, P] bool, whether the slot's key was computed since its block was handed out.
        times: [steps] of how often each block was handed out so far.
    """

    def __init__(self, engine: Engine) -> None:
        self.pool, self.keys = engine.scheduler.pool, engine.runner.caches[0][0]
        self.ref_counts: list[list[int]] = []
        self.cached: list[set[int]] = []
        self.written: list[np.ndarray] = []
        self.times: list[list[int]] = []
        self._allocate, self._launch = self.pool.allocate, engine.runner.launch
        self._num_times = [0] * self.pool.num_blocks
        self.pool.allocate, engine.runner.launch = self.allocate, self.launch

    def allocate(self, count: int) -> list[int]:
        blocks = self._allocate(count)
        self.keys[blocks] = UNWRITTEN
        for block in blocks:
            self._num_times[block] += 1
        return blocks

    def launch(self, step: Step) -> StepInFlight:
        """Take the picture where the event is defined: after the step wrote, before anybody gives blocks back."""
        flight = self._launch(step)  # which a CPU has run then
        self.ref_counts.append([self.pool.ref_count(block) for block in range(self.pool.num_blocks)])
        self.cached.append(set(self.pool.cached_blocks))
        self.written.append((self.keys[:, :, 0, 0] != UNWRITTEN).numpy())
        self.times.append(list(self._num_times))
        return flight

    def will_be_written(self, step: int, block: int) -> np.ndarray:
        """[P] bool: the slots of a block that have been written when its holders are done with it."""
        last = max(i for i in range(step, len(self.times)) if self.times[i][block] == self.times[step][block])
        return self.written[last][block]


def serve(engine: Engine, requests: list[tuple[list[int], SamplingParams, int]]) -> dict[tuple[str, int], int]:
    """Serve (prompt, wishes, priority), one more before every step; (request, sequence) -> tokens computed."""
    final = {}
    arriving = list(enumerate(requests))
    while arriving or engine.has_unfinished_requests:
        if arriving:
            name, (prompt, wishes, priority) = arriving.pop(0)
            engine.add_request(str(name), prompt, wishes, priority=priority)
        for output in engine.step():
            for answer in output.outputs:
                final[output.request_id, answer.index] = len(output.prompt_token_ids) + len(answer.token_ids) - 1
    return final


BEGINNING = [7] * 9
# Whoever draws one of these tokens ends: the samples of a request are of different lengths.
SAMPLES = SamplingParams(n=3, temperature=2.0, seed=3, max_tokens=30, stop_token_ids=list(range(10)))
ALONE = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
REQUESTS = [
    ([*BEGINNING, 3, 4], SAMPLES, 0),
    (token_prompts([30])[0], ALONE, -1),
    ([*BEGINNING, 5], ALONE, 0),
    ([*BEGINNING, 3, 4], SAMPLES, 0),
    ([*BEGINNING, 3, 4, 9, 9, 9], ALONE, 0),
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"enable_prefix_caching": False}),
        # An urgent long prompt uses the budget up while samples wait for their turn, all on the prompt's last block.
        ("llama", {"scheduling_policy": "priority", "max_num_batched_tokens": 8}),
        ("llama", {"num_gpu_blocks_override": 29, "spare_blocks_per_seq": 0}),
        ("mistral", {}),
        ("mistral", {"enable_prefix_caching": False}),
    ],
    ids=["roomy", "no cache", "priority", "preempted", "window", "window, no cache"],
)
def test_frames_of_a_run_are_what_the_pool_was(name, settings, folders):
    """Slot by slot at every step, with samples, a shared beginning, evictable blocks and blocks a window dropped."""
    llm = load(folders[name], **{"block_size": 4, "num_gpu_blocks_override": 60, "max_num_seqs": 8, **settings})
    engine, block_size = llm.engine, 4
    events, watched = engine.record_events(), WatchedPool(engine)
    final = serve(engine, REQUESTS)
    assert len({tokens for (request_id, _), tokens in final.items() if request_id == "0"}) > 1
    assert len(events) == len(watched.written) > 20
    num_blocks = watched.pool.num_blocks
    preempted = engine.scheduler.num_preemptions > 0
    assert preempted == ("num_gpu_blocks_override" in settings)
    seen = dict.fromkeys(("cached", "shared", "shared tail", "dropped"), 0)
    for step, event in enumerate(events):
        counts, cached, written = watched.ref_counts[step], watched.cached[step], watched.written[step]
        frame = paged_frame(event, num_blocks=num_blocks, block_size=block_size, num_final_tokens=final)
        for block, states in enumerate(frame.reshape(num_blocks, block_size)):
            if block in (0, num_blocks - 1):
                assert set(states) == {SlotState.OVERHEAD}
            elif counts[block] == 0:
                assert set(states) == {SlotState.CACHED if block in cached else SlotState.FREE}
                assert block not in cached or written[block].all(), "only full blocks can be found"
            else:
                assert ((states == SlotState.TOKENS) == written[block]).all()
                coming = watched.will_be_written(step, block) & ~written[block]
                assert (states[coming] == SlotState.RESERVED).all()
                # Who was preempted did not write all that it had reserved; and of several holders, the one that writes
                # into the shared block in the end need not be the one that goes furthest.
                if not preempted and counts[block] == 1:
                    assert (states[~written[block] & ~coming] == SlotState.INTERNAL).all()
                seen["shared tail"] += counts[block] > 1 and not written[block].all()
        # The K and V of a block are wanted once for each table that names it.
        tokens = written.sum(axis=1)
        wanted = sum(count * int(tokens[block]) for block, count in enumerate(counts))
        held = np.count_nonzero(frame == SlotState.TOKENS)
        assert slots_saved_by_sharing(event, block_size=block_size) == wanted - held
        seen["cached"] += len(cached)
        seen["shared"] += max(counts) > 1
        seen["dropped"] += any(NULL_BLOCK in holding.blocks for holding in event.holdings)
    assert seen["shared"]
    assert bool(seen["cached"]) == settings.get("enable_prefix_caching", True)
    assert bool(seen["dropped"]) == (name == "mistral")
    assert bool(seen["shared tail"]) == (settings.get("scheduling_policy") == "priority")


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], "......"),
        ([Span(0, 3, 1, 2)], "tri..."),
        ([Span(0, 3, 1, 2), Span(4, 2, 2, 2)], "trietT".lower()),
        ([Span(0, 3, 3, 3, finished=True)], "iii..."),
        ([Span(1, 2, 0, 2)], "err..."),
        ([Span(0, 4, 4, 4)], "ttttee"),
    ],
    ids=str,
)
def test_contiguous_frame(spans, expected):
    """t token, r reserved, i internal, e external (a gap under 3 slots), . free."""
    letters = {0: ".", 1: "t", 2: "r", 3: "i", 4: "e"}
    frame = contiguous_frame(spans, num_slots=6, smallest_gap=3)
    assert "".join(letters[state] for state in frame.tolist()) == expected


def test_an_event_is_the_pool_after_the_step_wrote():
    s = Scheduler(num_blocks=10, block_size=4, max_num_seqs=2, max_num_batched_tokens=16)
    for name in "abc":
        s.add(
            Request(name, range(6), SamplingParams(), block_table=s.new_block_table(), seed=0, max_tokens=4),
        )
    event = take_event(s.schedule(), s)
    assert [(h.request_id, len(h.blocks), h.num_tokens) for h in event.holdings] == [("a", 2, 6), ("b", 2, 6)]
    assert (event.num_running, event.num_waiting, event.num_tokens) == (2, 1, 12)
    assert event.cached_blocks == ()


def test_an_event_tells_samples_apart_and_knows_what_can_be_found():
    s = Scheduler(num_blocks=12, block_size=4, max_num_seqs=2, max_num_batched_tokens=16)
    for name, n in (("a", 1), ("b", 2)):
        s.add(
            Request(name, range(6), SamplingParams(n=n), block_table=s.new_block_table(), seed=0, max_tokens=4),
        )
    s.update(s.schedule(), [7])
    s.abort("a")  # its first block is full and the prefix cache knows it; its second one is not
    assert take_event(s.schedule(), s).cached_blocks == ()  # "b" begins alike, and has taken it up
    s.abort("b")
    s.add(Request("c", range(50, 53), SamplingParams(n=2), block_table=s.new_block_table(), seed=0, max_tokens=4))
    s.update(s.schedule(), [7, 8])
    event = take_event(s.schedule(), s)
    assert [(h.request_id, h.sequence_index, h.num_tokens) for h in event.holdings] == [("c", 0, 4), ("c", 1, 4)]
    assert event.cached_blocks == (1,)


def history(
    name: str, steps: int, num_slots: int = 24, states: tuple[SlotState, ...] = tuple(SlotState)
) -> PoolHistory:
    generator = np.random.default_rng(steps)
    frames = [generator.choice(states, num_slots).astype(np.uint8) for _ in range(steps)]
    stacked = np.array([shares(frame) for frame in frames])
    return PoolHistory(name, frames, stacked, [1] * steps, [2] * steps, "done")


def test_the_map_shows_the_frame_in_address_order():
    frame = history("x", 3).frames[0]
    image = pool_map(Figure().subplots(), frame, slots_per_row=8)[0]
    assert image.get_array().reshape(-1).tolist() == frame.tolist()


def test_the_areas_are_the_shares():
    run = history("x", 5)
    areas = shares_over_time(Figure().subplots(), run.shares, num_steps=9)
    bottom = np.zeros(5)
    for area, state in zip(areas, STACK, strict=True):
        top = bottom + run.shares[:, state]
        highest = area.get_paths()[0].vertices[:, 1].max()
        assert highest == pytest.approx(top.max())
        bottom = top


def test_side_by_side_shows_both_at_one_step_and_scale():
    left, right = history("left", 9), history("right", 4)
    figure = side_by_side(left, right, caption="seed 0")
    maps, below = figure.axes[:2], figure.axes[2:]
    step = right.fullest_step
    for axes, run in zip(maps, (left, right), strict=True):
        assert axes.images[0].get_array().reshape(-1).tolist() == run.frames[step].tolist()
        assert f"step {step}: 1 running, 2 waiting" in axes.get_title(loc="left")
    assert {axes.get_xlim() for axes in below} == {(0, 9)}
    assert {axes.get_ylim() for axes in below} == {(0, 1)}


@pytest.mark.parametrize("missing", [(), (SlotState.CACHED,), (SlotState.EXTERNAL, SlotState.INTERNAL)])
def test_the_legend_names_the_states_that_occur(missing):
    """In the order of the stack, which knows all of them, and within the figure."""
    occurring = tuple(state for state in STACK if state not in missing)
    assert sorted((*occurring, *missing)) == sorted(SlotState)
    figure = side_by_side(history("left", 9, states=occurring), history("right", 4, states=occurring), caption="")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [LABELS[state] for state in occurring]
    figure.draw_without_rendering()
    assert legend.get_window_extent().width < figure.bbox.width


def test_pools_of_different_sizes_do_not_stand_side_by_side():
    with pytest.raises(ValueError, match="left has 24 slots and right 32"):
        side_by_side(history("left", 3), history("right", 3, num_slots=32), caption="")
