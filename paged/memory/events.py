"""What the pool holds during a step, as integers: the log that every memory figure and picture is made from."""

from dataclasses import dataclass

from paged.scheduler import Scheduler
from paged.step import Step


@dataclass(frozen=True, slots=True)
class Holding:
    """What one sequence holds of the pool.

    Attributes:
        request_id, sequence_index: whose it is.
        blocks: its block table. Other tables may name the same blocks; where a sliding window has dropped a block, the
            entry is the null block.
        num_tokens: tokens whose K and V were written by the end of the step: the first so many slots of the table.
    """

    request_id: str
    sequence_index: int
    blocks: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepEvent:
    """The pool during one step: after the step's K and V are written, before whoever it ends gives its blocks back.

    Attributes:
        holdings: of every running sequence.
        cached_blocks: blocks that no table names and the prefix cache can still find; each of them is full.
        num_running, num_waiting: requests.
        num_tokens: tokens that the step computes.
    """

    holdings: tuple[Holding, ...]
    cached_blocks: tuple[int, ...]
    num_running: int
    num_waiting: int
    num_tokens: int


def take_event(step: Step, scheduler: Scheduler) -> StepEvent:
    """Note what the pool holds, between `schedule` and `update`."""
    written = {(row.request_id, row.sequence_index): row.end for row in step.rows}
    holdings = tuple(
        Holding(
            request.request_id,
            sequence.index,
            tuple(sequence.block_table.blocks),
            written.get((request.request_id, sequence.index), sequence.num_computed_tokens),
        )
        for request in scheduler.running
        for sequence in request.unfinished
    )
    return StepEvent(
        holdings,
        cached_blocks=tuple(scheduler.pool.cached_blocks),
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_tokens=step.num_tokens,
    )
