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

from paged.blocks import NULL_BLOCK
from paged.memory.events import Holding, StepEvent

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


def paged_frame(
    event: StepEvent, *, num_blocks: int, block_size: int, num_final_tokens: Mapping[tuple[str, int], int]
) -> Frame:
    """The states of a paged pool during one step.

    A block that several tables name is counted once, and each of its slots by what its holders make of it: tokens if
    any has one there, else reserved if any will, else internal.

    Args:
        event: what is held, and what is cached.
        num_blocks: all blocks of the pool, the null and the trash block included.
        block_size: tokens a block holds.
        num_final_tokens: (request id, sequence index) -> tokens that will have been computed when the sequence ends.
            That is known only after the run; it is what splits the tail of a last block into what will be used and
            what never will.

    Returns:
        [num_blocks * block_size] uint8.

    Example: block 1 of four holds three tokens and will hold the fourth; block 2 is cached, block 3 is free.
        >>> event = StepEvent((Holding("a", 0, blocks=(1,), num_tokens=3),), (2,), 1, 0, num_tokens=1)
        >>> paged_frame(event, num_blocks=5, block_size=4, num_final_tokens={("a", 0): 9}).reshape(5, 4).tolist()
        [[5, 5, 5, 5], [1, 1, 1, 2], [6, 6, 6, 6], [0, 0, 0, 0], [5, 5, 5, 5]]
    """
    frame = np.full((num_blocks, block_size), SlotState.FREE, np.uint8)
    frame[list(event.cached_blocks)] = SlotState.CACHED
    slots = frame.reshape(-1)  # the same memory, slot by slot
    # Holders of one block may see its tail differently, so each state is painted for all of them before the next one.
    held = [(holding, _slots(holding, block_size)) for holding in event.holdings]
    for _, places in held:
        slots[places] = SlotState.INTERNAL
    for holding, places in held:
        slots[places[: num_final_tokens[holding.request_id, holding.sequence_index]]] = SlotState.RESERVED
    for holding, places in held:
        slots[places[: holding.num_tokens]] = SlotState.TOKENS
    # Last, because a table names the null block wherever a sliding window has dropped a block.
    frame[[NULL_BLOCK, -1]] = SlotState.OVERHEAD
    return slots


def slots_saved_by_sharing(event: StepEvent, *, block_size: int) -> int:
    """Slots that the tokens of all sequences would take more if no two block tables named the same block.

    That is the tokens that the tables name, one table after another, less the slots that these lie in. The paper
    measures the same saving in blocks (section 6.3).

    Example: two samples of one prompt share its full block, and each has a token of its own behind it.
        >>> holdings = Holding("a", 0, blocks=(1, 2), num_tokens=5), Holding("a", 1, blocks=(1, 3), num_tokens=5)
        >>> slots_saved_by_sharing(StepEvent(holdings, (), 1, 0, num_tokens=2), block_size=4)
        4
    """
    named: list[int] = []
    for holding in event.holdings:
        places = _slots(holding, block_size)[: holding.num_tokens]
        named += places[places // block_size != NULL_BLOCK].tolist()
    return len(named) - len(set(named))


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


def _slots(holding: Holding, block_size: int) -> npt.NDArray[np.int64]:
    """[blocks of the table * block_size]: the slots a sequence's table names, in the order of its positions."""
    first = np.array(holding.blocks, np.int64) * block_size
    return (first[:, None] + np.arange(block_size)).reshape(-1)


def _mark_gap(frame: Frame, start: int, end: int, smallest_gap: int) -> None:
    if end - start < smallest_gap:
        frame[start:end] = SlotState.EXTERNAL
