"""A request without its tokens, and what a step of serving it from a contiguous pool did, in numbers."""

from dataclasses import dataclass, field

from reference.reservation import Reservation


@dataclass(frozen=True, slots=True)
class Job:
    """A request without its tokens."""

    name: str
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def num_final_tokens(self) -> int:
        """Tokens in the cache at the end. The last token sampled is not: nothing comes after it."""
        return self.num_prompt_tokens + self.num_output_tokens - 1


@dataclass(slots=True)
class Row:
    """A job that waits or runs.

    Attributes:
        run: the slots that it holds; in a growing static batch all rows are in the first one's.
        num_asked: how many it asked for. The allocator may have rounded up.
        num_written: tokens in the cache.
        num_sampled: tokens of its output that are known.
        num_discarded: tokens that were in the cache before it lost its run.
    """

    job: Job
    run: Reservation | None = None
    num_asked: int = 0
    num_written: int = 0
    num_sampled: int = 0
    num_discarded: int = 0

    @property
    def finished(self) -> bool:
        """Whether its output is complete."""
        return self.num_sampled == self.job.num_output_tokens

    @property
    def num_fresh(self) -> int:
        """Known tokens that are not in the cache: one for a decode, many for a prompt."""
        return self.job.num_prompt_tokens + self.num_sampled - self.num_written


@dataclass(frozen=True, slots=True)
class Slots:
    """What the slots of the pool are doing; the first five sum to the pool.

    Attributes:
        live: hold a token that a later step reads.
        reserved: will hold one.
        internal: held, and neither.
        external: free, in gaps too short for the head of the queue.
        free: free, and of use.
        rounding: of the internal ones, those that the allocator added to round up.
    """

    live: int
    reserved: int
    internal: int
    external: int
    free: int
    rounding: int


@dataclass(frozen=True, slots=True)
class ServedStep:
    """What one step did.

    Attributes:
        num_tokens, num_context_tokens, num_sequences: computed, read, and rows. A static batch pads its prompts to the
            longest, and computes rows on that have ended: they count.
        num_recomputed_tokens: of the computed ones, those that were computed before.
        num_running, num_waiting: requests that had not ended before.
        slots: of the pool, after the step's tokens are written and before anybody leaves.
        num_copied_tokens: moved to longer runs before the step.
        most_held: slots held at once, during the moves or after them.
        started, finished, preempted: who got its first token, its last, and who lost its run.
    """

    num_tokens: int
    num_context_tokens: int
    num_sequences: int
    num_recomputed_tokens: int
    num_running: int
    num_waiting: int
    slots: Slots
    num_copied_tokens: int
    most_held: int
    started: tuple[str, ...]
    finished: tuple[str, ...]
    preempted: tuple[str, ...]


@dataclass(slots=True)
class Moves:
    """What growing took, before a step: tokens copied, most slots held at once, and who lost its run."""

    num_copied: int = 0
    most_held: int = 0
    preempted: list[str] = field(default_factory=list)
