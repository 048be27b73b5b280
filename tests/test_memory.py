"""Frames of a pool against slots marked one by one, and pictures against the frames they are drawn from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from paged.memory.events import Holding, StepEvent, take_event
from paged.memory.plots import LABELS, STACK, PoolHistory, pool_map, shares_over_time, side_by_side
from paged.memory.states import SlotState, Span, contiguous_frame, paged_frame, shares
from paged.request import Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler


@given(st.data())
def test_paged_frame_marks_every_slot(data):
    block_size, num_blocks = data.draw(st.integers(1, 6)), data.draw(st.integers(3, 15))
    free = data.draw(st.permutations(range(1, num_blocks - 1)))
    holdings, final = [], {}
    for name in "abc":
        count = data.draw(st.integers(0, min(4, len(free))))
        blocks, free = free[:count], free[count:]
        tokens = data.draw(st.integers(0, count * block_size))
        holdings.append(Holding(name, tuple(blocks), tokens))
        final[name] = tokens + data.draw(st.integers(0, 30))
    event = StepEvent(tuple(holdings), 3, 0, 0)
    frame = paged_frame(event, num_blocks=num_blocks, block_size=block_size, num_final_tokens=final)
    expected = [SlotState.FREE] * (num_blocks * block_size)
    for slot in (*range(block_size), *range((num_blocks - 1) * block_size, num_blocks * block_size)):
        expected[slot] = SlotState.OVERHEAD
    for holding in holdings:
        for position in range(len(holding.blocks) * block_size):
            slot = holding.blocks[position // block_size] * block_size + position % block_size
            if position < holding.num_tokens:
                expected[slot] = SlotState.TOKENS
            elif position < final[holding.request_id]:
                expected[slot] = SlotState.RESERVED
            else:
                expected[slot] = SlotState.INTERNAL
    assert frame.tolist() == expected
    counted = [expected.count(state) / len(expected) for state in SlotState]
    assert shares(frame).tolist() == pytest.approx(counted)
    assert shares(frame).sum() == pytest.approx(1)


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
