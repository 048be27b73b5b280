"""A Step while it is planned: what the scheduler decides about requests, written down for whoever runs it."""

from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter

from paged.blocks import BlockCopy, TableChange
from paged.request import Request, Sequence
from paged.step import Admission, RowPlan, Sample, Step

# Prompt tokens whose log probabilities one step computes: each needs logits, a number for every word of the vocabulary.
MOST_PROMPT_TARGETS = 128


@dataclass
class StepDraft:
    """A Step that grows.

    Attributes:
        budget: tokens that it may still take.
        is_ahead: another step is in flight while this one is planned.
        target_budget: prompt tokens whose log probabilities it may still compute.
        admissions, swap_outs, swap_ins, preempted, short_of_blocks: as in Step.
    """

    budget: int
    is_ahead: bool = False
    target_budget: int = MOST_PROMPT_TARGETS
    admissions: list[Admission] = field(default_factory=list)
    swap_outs: list[BlockCopy] = field(default_factory=list)
    swap_ins: list[BlockCopy] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    short_of_blocks: bool = False
    # Rows with a single token apart from the others, since they come first.
    _singles: list[RowPlan] = field(default_factory=list)
    _chunks: list[RowPlan] = field(default_factory=list)

    def admit(self, request: Request, sequence: Sequence, row: int) -> None:
        """A sequence got a row."""
        sequence.row = row
        sequence.num_told_blocks = 0
        self.admissions.append(
            Admission(
                row,
                request.sampling_params,
                request.seed + sequence.index,
                request.prompt_token_ids,
                tuple(sequence.output_token_ids),
            )
        )

    def plan(self, request: Request, sequence: Sequence, end: int, change: TableChange | None) -> None:
        """A sequence computes its tokens up to `end`.

        Args:
            request, sequence: whose.
            end: one past the last position.
            change: what its table was prepared with; None if nothing had to be done.
        """
        start, row, num_blocks = sequence.num_computed_tokens, sequence.row, len(sequence.block_table.blocks)
        assert row is not None, "only a sequence with a row is planned"
        first = sequence.num_told_blocks if change is None else min(change.first_index, sequence.num_told_blocks)
        told = None
        if first < num_blocks:
            copies = () if change is None else change.copies
            told = TableChange(first, tuple(sequence.block_table.blocks[first:]), copies)
            sequence.num_told_blocks = num_blocks
        samples: tuple[Sample, ...] = ()
        if end == sequence.length:
            samples = (_sample(request, sequence),)
            if end == sequence.num_prompt_tokens and not request.is_beam_search:
                samples += tuple(_sample(request, follower) for follower in request.followers)
        targets: tuple[int, ...] = ()
        if start < sequence.num_prompt_tokens and request.sampling_params.prompt_logprobs is not None:
            targets = request.prompt_token_ids[start + 1 : end + 1]
            self.target_budget -= len(targets)
        tokens: tuple[int | None, ...] = tuple(sequence.token_ids[start:end])
        if start == sequence.num_tokens:  # everything known is computed: what comes next is pending
            tokens = (None,)
        rows = self._singles if end - start == 1 else self._chunks
        rows.append(
            RowPlan(
                request.request_id, sequence.index, row, start, tokens, told, samples, targets, arrival=request.arrival
            )
        )
        self.budget -= end - start

    def plan_decode(self, request: Request, sequence: Sequence) -> None:
        """A sequence, the only one of its request, computes its latest token, and nothing has to be done before."""
        start, row = sequence.num_computed_tokens, sequence.row
        assert row is not None, "only a sequence with a row is planned"
        token = None if start == len(sequence.token_ids) else sequence.token_ids[start]
        samples = (_sample(request, sequence),) if request.may_ban else _plain_sample(row)
        self._singles.append(
            RowPlan(request.request_id, sequence.index, row, start, (token,), None, samples, (), request.arrival)
        )
        self.budget -= 1

    def finish(self) -> Step:
        """The Step."""
        # In order of length, so that whoever pads contexts to the longest can take neighbours together; and the longest
        # first, because a GPU begins with the first rows: begun last, a long one would keep it waiting alone.
        self._singles.sort(key=_length_before, reverse=True)
        rows = (*self._singles, *self._chunks)
        copies = tuple(copy for row in rows if row.table_change is not None for copy in row.table_change.copies)
        return Step(
            rows,
            tuple(self.admissions),
            swap_outs=tuple(self.swap_outs),
            swap_ins=tuple(self.swap_ins),
            copies=copies,
            preempted=tuple(self.preempted),
            short_of_blocks=self.short_of_blocks,
        )


_length_before = attrgetter("start")


@cache
def _plain_sample(row: int) -> tuple[Sample]:
    """The one sample of a row that bans nothing: the same in every step."""
    return (Sample(row),)


def _sample(request: Request, sequence: Sequence) -> Sample:
    assert sequence.row is not None, "every sequence of a running request has a row"
    return Sample(sequence.row, request.banned_token_ids(sequence) if request.may_ban else ())
