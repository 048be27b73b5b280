"""A Step: the scheduler's plan for one forward pass, in integers, complete when made.

Everything that follows a schedule depends on the Step alone:

    Scheduler -> Step -> Batch -> model -> logits -> sampler -> tokens -> Scheduler

It names no tensor, so that the same plan can drive a model, a simulation without one, or several ranks at once. It
says what *changed* (rows that were handed out, entries of block tables), not what is, because the batch keeps one
persistent row per sequence, and a decode step of 256 sequences then touches a few integers for each.
"""

from dataclasses import dataclass
from typing import NamedTuple

from paged.blocks import BlockCopy, TableChange
from paged.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Admission:
    """A row that was handed to a sequence before this step: what the batch has to know of it once.

    Attributes:
        row: the row.
        sampling_params, seed: how its tokens are chosen.
        prompt_token_ids: the prompt.
        output_token_ids: what was sampled before, if the sequence was preempted.
    """

    row: int
    sampling_params: SamplingParams
    seed: int
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()


class Sample(NamedTuple):
    """A token to sample from the logits of a row's last token.

    Attributes:
        row: the row whose sequence gets it, and whose wishes count. It is the row that computes, and also the rows of
            the other samples of a request when its prompt is done: they all begin from the same logits. (So do beams,
            but what they get is chosen among the leader's candidates.)
        banned_token_ids: tokens that must not be sampled now.
    """

    row: int
    banned_token_ids: tuple[int, ...] = ()


class RowPlan(NamedTuple):
    """What one sequence computes in this step.

    Attributes:
        request_id, sequence_index: which sequence.
        row: its row in the batch's persistent tensors.
        start: position of the first token computed, which is the number of tokens computed before.
        token_ids: the tokens computed, at positions `start`, `start + 1`, ...: one for a decode, many for a prompt.
            None is the token that was sampled last for this row: the step that samples it was still in flight when this
            one was planned, so only the device knows it. It is a row's only token then.
        table_change: what to replay on the row's block table before; None if nothing changed.
        samples: what to sample after the last token; nothing if more of what is known has still to be computed.
        prompt_targets: the prompt's tokens behind the first computed ones, if their log probabilities are wanted.
        arrival: the request's number. While the step is in flight another one may get the name, but never the number.
    """

    request_id: str
    sequence_index: int
    row: int
    start: int
    token_ids: tuple[int | None, ...]
    table_change: TableChange | None
    samples: tuple[Sample, ...] = ()
    prompt_targets: tuple[int, ...] = ()
    arrival: int = 0

    @property
    def end(self) -> int:
        """One past the last position computed: the tokens the last query token sees, itself included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Step:
    """The plan of one forward pass.

    Attributes:
        rows: what each sequence computes. Those with a single token come first, the longest before the others, so that
            rows of a kind (one query against a context of about that length, or many queries) lie beside each other.
        admissions: rows handed out since the last step.
        swap_outs: blocks to copy to host blocks, before anything else: they may be written in this very step.
        swap_ins: host blocks to copy to blocks, next. A step has swap_outs or swap_ins, never both.
        copies: blocks to copy before anything is written.
        preempted: requests whose blocks were taken away to make this step possible.
        short_of_blocks: somebody was left out who did not find its blocks, because nobody is preempted while another
            step is in flight. So nothing is planned behind this step before it has ended.

    Example: sequence "a" decodes its sixth token while the three of prompt "b" are computed beside it.
        >>> a = RowPlan("a", 0, row=0, start=5, token_ids=(17,), table_change=None, samples=(Sample(0),))
        >>> b = RowPlan("b", 0, 1, 0, (3, 4, 5), table_change=TableChange(0, (8,)), samples=(Sample(1),))
        >>> step = Step(rows=(a, b), admissions=(Admission(1, SamplingParams(), seed=0),))
        >>> step.num_tokens, step.num_single
        (4, 1)
    """

    rows: tuple[RowPlan, ...]
    admissions: tuple[Admission, ...] = ()
    swap_outs: tuple[BlockCopy, ...] = ()
    swap_ins: tuple[BlockCopy, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    preempted: tuple[str, ...] = ()
    short_of_blocks: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward pass computes."""
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def num_single(self) -> int:
        """Rows with a single token; they are the first ones."""
        return sum(len(row.token_ids) == 1 for row in self.rows)
