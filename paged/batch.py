"""The one bridge between the integers and the tensors: a Step becomes a Batch.

All tokens of a step lie one after another, whoever they belong to. Three rows of different kinds, block size 4:

    row        |  a: decode  |  b: decode  |  c: a prompt of three tokens
    token_ids  |     17      |     42      |     3       4       5
    positions  |      8      |      5      |     0       1       2
    slots      |   9*4 + 0   |   2*4 + 1   |   8*4+0   8*4+1   8*4+2
                `---------- group 0 ------'  `------- group 1 -------'

Rows with one token and rows with many are attended apart, each kind padded to its own longest, so that a long prompt
does not make every decode beside it as wide as itself. A form of attention that copies contexts (gathered, eager) gets
finer groups: every prompt alone, and decodes with others whose contexts are at least half as long. One that does
not (fused) gets two groups at most, which keeps graphs few.

The builder keeps one persistent row per sequence for what changes rarely (the block table, the sampling wishes) and
replays on it what the Step says has changed.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paged.blocks import NULL_BLOCK, blocks_for
from paged.sampling.sampler import SamplingInputs
from paged.step import Step
from paged.transfer import to_device
from paged.wishes import Wishes

# Contexts up to here are not worth a group of their own: the calls would cost more than the padding.
SHORT_CONTEXT = 64


class AttentionGroup(NamedTuple):
    """Rows that are attended together: tokens `start` to `end - 1` of the batch.

    Attributes:
        start, end: the group's tokens, host integers.
        max_query_len: most tokens in one of its rows, a host integer.
        block_tables: [B, M] int32, padded with the null block; M is what the group's longest row needs.
        seq_lens: [B] int32, tokens visible to each row's last query token, itself included.
        query_start_loc: [B + 1] int32, counted from `start`.
    """

    start: int
    end: int
    max_query_len: int
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor


class AttentionInputs(NamedTuple):
    """What every attention layer gets: where to write the T new tokens, and who reads what.

    Attributes:
        slot_mapping: [T] int64.
        groups: in the order of the batch's tokens.
    """

    slot_mapping: Tensor
    groups: tuple[AttentionGroup, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of one forward pass over T tokens of which S are sampled from.

    Attributes:
        token_ids, positions: [T] int64.
        attention: what the attention layers get.
        sampled: [S] int64, the tokens of the batch whose logits are sampled from; a token may occur more than once.
        sampled_rows: [S] int64, the persistent rows that get what is sampled.
        sampling: what the sampler gets.
        prompt_tokens: [Q] int64, tokens of the batch whose logits give the log probability of the prompt's next token.
        prompt_targets: [Q] int64, those next tokens.
        num_logprobs, num_prompt_logprobs: most likely tokens that some row wants beside a sampled token, or beside a
            token of its prompt; None if none wants any.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionInputs
    sampled: Tensor
    sampled_rows: Tensor
    sampling: SamplingInputs
    prompt_tokens: Tensor
    prompt_targets: Tensor
    num_logprobs: int | None
    num_prompt_logprobs: int | None


class BatchBuilder:
    """Turns Steps into Batches.

    Args:
        max_num_seqs: R, the persistent rows.
        max_model_len: tokens of the longest sequence.
        block_size: tokens a block holds.
        vocab_size: what "all tokens" means as a top_k.
        device: where the Batches' tensors go.
        fine_groups: make groups in which little is padded, however many that makes.
        with_groups: make groups at all; the flex form has inputs of its own.

    Example: a prompt of three tokens in blocks of two, the second block of the pool first.
        >>> from paged.blocks import TableChange
        >>> from paged.sampling_params import SamplingParams
        >>> from paged.step import Admission, RowPlan, Sample
        >>> builder = BatchBuilder(max_num_seqs=1, max_model_len=8, block_size=2, vocab_size=10, device="cpu")
        >>> table = TableChange(first_index=0, blocks=(2, 1))
        >>> row = RowPlan("a", 0, row=0, start=0, token_ids=(7, 8, 9), table_change=table, samples=(Sample(0),))
        >>> batch = builder.build(Step(rows=(row,), admissions=(Admission(0, SamplingParams(), seed=0),)))
        >>> batch.attention.slot_mapping
        tensor([4, 5, 2])
        >>> batch.attention.groups[0].block_tables
        tensor([[2, 1]], dtype=torch.int32)
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: str | torch.device,
        fine_groups: bool = False,
        with_groups: bool = True,
    ) -> None:
        self._block_size = block_size
        self._device = torch.device(device)
        self._fine_groups, self._with_groups = fine_groups, with_groups
        self._block_tables = np.full((max_num_seqs, blocks_for(max_model_len, block_size)), NULL_BLOCK, np.int32)
        # One more: the row of padding.
        self.last_token_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self._device)
        self._vocab_size = vocab_size
        self.reset()

    @property
    def block_tables(self) -> np.ndarray:
        """[R, M] int32, the persistent block tables; they stay where they are, and `replay` brings them up to date."""
        return self._block_tables

    @property
    def block_table_bytes(self) -> int:
        """Bytes of the persistent block tables."""
        return int(self._block_tables.nbytes)

    @property
    def sampling_state_bytes(self) -> int:
        """Most bytes on the device that the rows' sampling wishes keep from step to step."""
        return self._wishes.most_bytes

    def reset(self) -> None:
        """Forget all rows, and let go what they kept on the device."""
        self._block_tables.fill(NULL_BLOCK)
        self.last_token_ids.zero_()  # in its place: CUDA graphs know where it is
        self._wishes = Wishes(len(self._block_tables), self._vocab_size, self._device)

    def build(self, step: Step) -> Batch:
        """The tensors of one step. Steps have to come in the order in which they were planned."""
        self.replay(step)
        return self.tensors(step)

    def replay(self, step: Step) -> None:
        """Bring the persistent rows up to date."""
        for admission in step.admissions:
            self._block_tables[admission.row] = NULL_BLOCK
            self._wishes.admit(admission)
        for plan in step.rows:
            change = plan.table_change
            if change is not None:
                self._block_tables[plan.row, change.first_index : change.first_index + len(change.blocks)] = (
                    change.blocks
                )

    def takes_largest(self, step: Step) -> bool:
        """Whether every token that the step samples is simply the most likely one, and nothing is asked about it."""
        return self._wishes.take_largest([sample for row in step.rows for sample in row.samples])

    def tensors(self, step: Step) -> Batch:
        """The tensors of a step that was replayed."""
        rows = np.array([row.row for row in step.rows])
        starts = np.array([row.start for row in step.rows])
        lengths = np.array([len(row.token_ids) for row in step.rows])
        first_tokens = np.concatenate([[0], lengths.cumsum()])  # [rows + 1]

        owner = np.repeat(np.arange(len(rows)), lengths)  # [T], which row each token belongs to
        positions = np.arange(len(owner)) - first_tokens[owner] + starts[owner]
        blocks = self._block_tables[rows[owner], positions // self._block_size].astype(np.int64)
        slots = blocks * self._block_size + positions % self._block_size

        borders = sorted({0, step.num_single, len(rows), *self._fine_borders(step)}) if self._with_groups else []
        groups = tuple(
            self._group(rows[i:j], starts[i:j] + lengths[i:j], first_tokens[i : j + 1])
            for i, j in itertools.pairwise(borders)
        )
        samples = [sample for row in step.rows for sample in row.samples]
        num_samples = np.array([len(row.samples) for row in step.rows])
        sampled_rows = np.array([sample.row for sample in samples], np.int64)
        prompt_tokens = [np.arange(len(row.prompt_targets)) + first_tokens[i] for i, row in enumerate(step.rows)]
        prompt_targets = [target for row in step.rows for target in row.prompt_targets]
        return Batch(
            token_ids=self._token_ids(step, rows[owner]),
            positions=self._tensor(positions),
            attention=AttentionInputs(self._tensor(slots), groups),
            sampled=self._tensor(np.repeat(first_tokens[1:] - 1, num_samples)),
            sampled_rows=self._tensor(sampled_rows),
            sampling=self._wishes.inputs(samples, np.repeat(starts + lengths, num_samples)),
            prompt_tokens=self._tensor(np.concatenate(prompt_tokens)),
            prompt_targets=self._tensor(np.array(prompt_targets, np.int64)),
            num_logprobs=self._wishes.num_logprobs([sample.row for sample in samples]),
            num_prompt_logprobs=self._wishes.num_prompt_logprobs([row.row for row in step.rows if row.prompt_targets]),
        )

    def count(self, batch: Batch, token_ids: Tensor) -> None:
        """Note what was sampled, for the tokens and the penalties of later steps; nothing waits for it.

        Args:
            batch: the batch that ran.
            token_ids: [S] int64.
        """
        self.last_token_ids[batch.sampled_rows] = token_ids
        self._wishes.count(batch.sampled_rows, token_ids)

    def _token_ids(self, step: Step, rows: np.ndarray) -> Tensor:
        """[T]: the tokens of a step; what the host does not know yet is what was sampled last for the token's row."""
        planned = [token for row in step.rows for token in row.token_ids]
        given = self._tensor(np.array([0 if token is None else token for token in planned]))
        if None not in planned:
            return given
        known = self._tensor(np.array([token is not None for token in planned]))
        return torch.where(known, given, self.last_token_ids[self._tensor(rows)])

    def _fine_borders(self, step: Step) -> Iterator[int]:
        """Rows at which a group should begin so that little is padded: each prompt, and decodes half as long."""
        if self._fine_groups:
            yield from range(step.num_single, len(step.rows))
            shortest = sys.maxsize
            for i, row in enumerate(step.rows[: step.num_single]):
                if row.end < shortest:
                    yield i
                    shortest = row.end // 2 if row.end > SHORT_CONTEXT else 0

    def _group(self, rows: np.ndarray, seq_lens: np.ndarray, first_tokens: np.ndarray) -> AttentionGroup:
        width = blocks_for(int(seq_lens.max()), self._block_size)
        return AttentionGroup(
            start=int(first_tokens[0]),
            end=int(first_tokens[-1]),
            max_query_len=int(np.diff(first_tokens).max()),
            block_tables=self._tensor(self._block_tables[rows, :width]),
            seq_lens=self._tensor(seq_lens.astype(np.int32)),
            query_start_loc=self._tensor((first_tokens - first_tokens[0]).astype(np.int32)),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        # Fancy indexing and arithmetic made a fresh array, which the tensor may keep without a copy.
        return to_device(array, self._device)
