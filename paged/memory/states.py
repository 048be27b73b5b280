"""What every slot of a pool is doing: one small integer for each, in address order.

The words are those of the PagedAttention paper (Kwon et al., SOSP 2023, section 3.1). A frame is the pool during one
step; its shares are what fraction of the slots is in each state, and they sum to one because every slot is in exactly
one state.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paged.memory.events import StepEvent

Frame = npt.NDArray[np.uint8]


class SlotState(enum.IntEnum):
    """What a slot is doing."""

    FREE = 0
    TOKENS = 1  # token states: K and V that a later step will read
    RESERVED = 2  # held and empty; a later token of its holder will be written here
    INTERNAL = 3  # held, and nobody will read from it or write into it again before it is given back
    EXTERNAL = 4  # free, but in a gap too small for the next request
    OVERHEAD = 5  # the null and the trash block
    CACHED = 6  # free, and full of K and V that the prefix cache can find again until somebody needs the block


@dataclass(frozen=True, slots=True)
class Span:
    """A run of slots that one request of a contiguous cache holds.

    Attributes:
        first_slot, num_slots: where.
        num_tokens: tokens whose K and V are there.
        num_final_tokens: how many there will be when the request ends.
        finished: whether it has ended already and only waits for the rest of its batch.
    """

    first_slot: int
    num_slots: int
    num_tokens: int
    num_final_tokens: int
    finished: bool = False


def paged_frame(event: StepEvent, *, num_blocks: int, block_size: int, num_final_tokens: Mapping[str, int]) -> Frame:
    """The states of a paged pool during one step.

    Args:
        event: what is held.
        num_blocks: all blocks of the pool, the null and the trash block included.
        block_size: tokens a block holds.
        num_final_tokens: how many tokens each request will have in the pool when it ends. That is known only after
            the run; it is what splits the tail of a last block into what will be used and what never will.

    Returns:
        [num_blocks * block_size] uint8.

    Example: block 1 of four holds three tokens and will hold the fourth.
        >>> from paged.memory.events import Holding
        >>> event = StepEvent((Holding("a", blocks=(1,), num_tokens=3),), num_running=1, num_waiting=0, num_tokens=1)
        >>> paged_frame(event, num_blocks=3, block_size=4, num_final_tokens={"a": 9}).reshape(3, 4).tolist()
        [[5, 5, 5, 5], [1, 1, 1, 2], [5, 5, 5, 5]]
    """
    frame = np.full((num_blocks, block_size), SlotState.FREE, np.uint8)
    frame[[0, -1]] = SlotState.OVERHEAD
    for holding in event.holdings:
        blocks = np.array(holding.blocks, np.int64)
        positions = np.arange(len(blocks) * block_size)
        states = np.where(positions < num_final_tokens[holding.request_id], SlotState.RESERVED, SlotState.INTERNAL)
        states[: holding.num_tokens] = SlotState.TOKENS
        frame[blocks] = states.reshape(-1, block_size)
    return frame.reshape(-1)


def contiguous_frame(spans: Sequence[Span], *, num_slots: int, smallest_gap: int) -> Frame:
    """The states of a pool in which every request holds one run of slots.

    Args:
        spans: what is held; they do not overlap.
        num_slots: size of the pool.
        smallest_gap: slots that the next request needs in one piece; a shorter free gap is external fragmentation.

    Returns:
        [num_slots] uint8.

    Example: four slots held, one token there and two to come; the gap of two behind is too small for the next four.
        >>> contiguous_frame([Span(0, 4, num_tokens=1, num_final_tokens=3)], num_slots=6, smallest_gap=4).tolist()
        [1, 2, 2, 3, 4, 4]
    """
    frame = np.full(num_slots, SlotState.FREE, np.uint8)
    end_of_last = 0
    for span in sorted(spans, key=lambda span: span.first_slot):
        _mark_gap(frame, end_of_last, span.first_slot, smallest_gap)
        end_of_last = span.first_slot + span.num_slots
        held = frame[span.first_slot : end_of_last]
        held[:] = SlotState.INTERNAL
        if not span.finished:
            held[: span.num_final_tokens] = SlotState.RESERVED
            held[: span.num_tokens] = SlotState.TOKENS
    _mark_gap(frame, end_of_last, num_slots, smallest_gap)
    return frame


def shares(frame: Frame) -> npt.NDArray[np.float64]:
    """Fraction of the pool in each state, indexed by `SlotState`; they sum to one.

    Example:
        >>> shares(np.array([1, 1, 3, 0], np.uint8)).tolist()
        [0.25, 0.5, 0.0, 0.25, 0.0, 0.0, 0.0]
    """
    counts = np.bincount(frame, minlength=len(SlotState))
    assert counts.sum() == frame.size, "every slot is in exactly one state"
    return counts / frame.size


def _mark_gap(frame: Frame, start: int, end: int, smallest_gap: int) -> None:
    if end - start < smallest_gap:
        frame[start:end] = SlotState.EXTERNAL
