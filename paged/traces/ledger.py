"""What every slot of a paged pool did at every step, counted and not painted.

`paged.memory.states` paints a pool slot by slot, which is what a picture needs and too slow for a trace of an hour. The
same counts follow from how far each sequence has got: every block that is held is full but the last one of a sequence,

    held blocks * block_size  =  tokens  +  tails            tail = what its last block still has room for
    tail                      =  what will be used before the sequence ends  +  what never will

so a step leaves behind which sequences it had and how far they got, two integers each, and thousands of steps are added
up at a time. Tests hold the counts against the painted pool.
"""

from array import array

import numpy as np

from paged.memory.states import SlotState
from paged.scheduler import Scheduler
from paged.step import Step
from paged.traces.records import Ints

# Rows that are kept before they are added up.
MOST_ROWS = 1 << 17


class Ledger:
    """Counts slots, and notes when each request got its first and its last token.

    Args:
        scheduler: whose pool it is.
        num_prompt_tokens, num_output_tokens: by number of arrival, filled before a request is first in a step.

    Attributes:
        first_step, last_step: by number of arrival; -1 until it happened.
    """

    def __init__(self, scheduler: Scheduler, num_prompt_tokens: Ints, num_output_tokens: Ints) -> None:
        self._scheduler = scheduler
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = num_output_tokens
        self.first_step = np.full(len(num_prompt_tokens), -1, np.int64)
        self.last_step = np.full(len(num_prompt_tokens), -1, np.int64)
        self._num_steps = 0
        self._slots: list[Ints] = []
        self._sizes, self._arrivals, self._ends = array("q"), array("q"), array("q")
        self._pool_counts = array("q")  # of each step: blocks free, blocks cached, tail slots or -1 to derive them, ...

    def note(self, step: Step, *, shares: bool) -> int:
        """Note a step, between `schedule` and `update`.

        Args:
            step: what was planned.
            shares: whether a block that is not full may be in several tables: samples of one request do that.

        Returns:
            Tokens of context that the step reads, the computed ones included.
        """
        pool, rows = self._scheduler.pool, step.rows
        ends = [row.start + len(row.token_ids) for row in rows]
        self._sizes.append(len(rows))
        self._arrivals.extend([row.arrival for row in rows])
        self._ends.extend(ends)
        tails, reserved = _shared_tails(step, self._scheduler) if shares else (0, 0)
        self._pool_counts.extend((pool.num_free, pool.num_cached, shares, tails, reserved))
        if len(self._ends) > MOST_ROWS:
            self.add_up()
        return sum(ends)

    def add_up(self) -> None:
        """Turn what was noted into counts."""
        sizes, arrivals, ends = (np.frombuffer(noted, np.int64) for noted in (self._sizes, self._arrivals, self._ends))
        counts = np.frombuffer(self._pool_counts, np.int64).reshape(-1, 5)
        if len(sizes):
            self._slots.append(self._count(sizes, arrivals, ends, counts))
            self._note_times(np.repeat(np.arange(len(sizes)) + self._num_steps, sizes), arrivals, ends)
            self._num_steps += len(sizes)
        # New ones: an array cannot shrink while numpy looks at it.
        self._sizes, self._arrivals, self._ends = array("q"), array("q"), array("q")
        self._pool_counts = array("q")

    @property
    def slots(self) -> Ints:
        """[steps, states] of the steps that were added up."""
        return np.concatenate(self._slots)

    def _count(self, sizes: Ints, arrivals: Ints, ends: Ints, counts: Ints) -> Ints:
        pool, size = self._scheduler.pool, self._scheduler.block_size
        free, cached, shares, noted_tails, noted_reserved = counts.T
        step = np.repeat(np.arange(len(sizes)), sizes)
        tail = -ends % size
        used_later = np.minimum(tail, self._num_final_tokens(arrivals) - ends)
        tails, reserved = (
            np.where(shares, noted, np.bincount(step, values, len(sizes)).astype(np.int64))
            for noted, values in ((noted_tails, tail), (noted_reserved, used_later))
        )
        held = (pool.num_usable - free) * size
        slots = np.zeros((len(sizes), len(SlotState)), np.int64)
        slots[:, SlotState.TOKENS] = held - tails
        slots[:, SlotState.RESERVED] = reserved
        slots[:, SlotState.INTERNAL] = tails - reserved
        slots[:, SlotState.OVERHEAD] = (pool.num_blocks - pool.num_usable) * size
        slots[:, SlotState.CACHED] = cached * size
        slots[:, SlotState.FREE] = (free - cached) * size
        assert (slots >= 0).all(), "no state has fewer than no slots"
        assert (slots.sum(axis=1) == pool.num_blocks * size).all(), "every slot is in exactly one state"
        # Tables that name the same blocks have more tokens than slots; nobody has fewer.
        tokens = np.bincount(step, ends, len(sizes)).astype(np.int64)
        assert (slots[:, SlotState.TOKENS] <= tokens)[shares == 0].all(), "a slot counts for a token that nobody has"
        if self._scheduler.kv.prefix_cache is None:
            assert (slots[:, SlotState.TOKENS] == tokens)[shares == 0].all(), "a token without a slot"
        return slots

    def _num_final_tokens(self, arrivals: Ints) -> Ints:
        # The last token sampled is never computed: nothing comes after it.
        return self._num_prompt_tokens[arrivals] + self._num_output_tokens[arrivals] - 1

    def _note_times(self, step: Ints, arrivals: Ints, ends: Ints) -> None:
        at_prompt = ends >= self._num_prompt_tokens[arrivals]
        # The last assignment counts, so from the back; and only those that have none yet.
        latest_first = np.flatnonzero(at_prompt & (self.first_step[arrivals] < 0))[::-1]
        self.first_step[arrivals[latest_first]] = step[latest_first]
        at_end = np.flatnonzero(ends == self._num_final_tokens(arrivals))
        self.last_step[arrivals[at_end]] = step[at_end]


def _shared_tails(step: Step, scheduler: Scheduler) -> tuple[int, int]:
    """Room in blocks that are not full, and how much of it will be used; a block in several tables counts once."""
    size = scheduler.block_size
    written = {(row.arrival, row.sequence_index): row.start + len(row.token_ids) for row in step.rows}
    # Block -> its room, and how much of that will be used. Who shares a block that is not full is a sample of the same
    # request and has got as far, so they all say the same of it.
    tails: dict[int, tuple[int, int]] = {}
    for request in scheduler.running:
        final = len(request.prompt_token_ids) + request.max_tokens - 1
        for sequence in request.unfinished:
            if sequence.block_table.blocks:
                end = written.get((request.arrival, sequence.index), sequence.num_computed_tokens)
                room = -end % size
                tails[sequence.block_table.blocks[-1]] = room, min(room, final - end)
    return sum(room for room, _ in tails.values()), sum(used for _, used in tails.values())
