"""A request and its sequences: the tokens, the two counters, the state.

The two counters are the heart of the bookkeeping, and they are never one:

    num_tokens            tokens that are known: the prompt and everything sampled so far
    num_computed_tokens   tokens whose K and V are in the pool

    prompt "a b c", nothing computed yet     a b c          num_tokens 3   num_computed_tokens 0
    after the first step: d was sampled      a b c d        num_tokens 4   num_computed_tokens 3
    after the second: e was sampled          a b c d e      num_tokens 5   num_computed_tokens 4
    preempted: its blocks were taken         a b c d e      num_tokens 5   num_computed_tokens 0

A step computes the tokens between the two; a token is sampled where the step reaches the end of what is known. So a
prompt, a decode and the recomputation after a preemption are one thing, and no code asks which of them it is.
"""

import enum
from collections.abc import Sequence as SequenceOf

from paged.blocks import BlockTable
from paged.sampling_params import SamplingParams


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the strings are those of the OpenAI API, and of vLLM where it has none."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Sequence:
    """One growing list of tokens with a block table of its own.

    Attributes:
        index: which of the request's samples it is.
        token_ids: the prompt's tokens and the sampled ones.
        num_prompt_tokens: how many of them are the prompt's.
        num_computed_tokens: how many of them have their K and V in the pool.
        num_discarded_tokens: how many had them there before the last preemption: what has to be computed again.
        block_table: where the K and V are; empty while the sequence waits.
        row: its place in the batch's persistent tensors, from admission until it is preempted or ends.
        finish_reason, stop_reason: set when it ends; `stop_reason` is the stop string or the stop token id.
    """

    def __init__(self, index: int, prompt_token_ids: SequenceOf[int], block_table: BlockTable) -> None:
        self.index = index
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_discarded_tokens = 0
        self.block_table = block_table
        self.row: int | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were sampled."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The sampled tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


class Request:
    """A prompt, its wishes, and the sequences that answer it.

    Args:
        request_id: the caller's name for it.
        prompt_token_ids: at least one token.
        sampling_params: the wishes.
        block_table: an empty one, for the first sequence.
        seed: what the sampling noise is keyed by: sequence `i` uses `seed + i`.
        max_tokens: most tokens to generate, already cut to what max_model_len leaves.
        eos_token_ids: the model's end-of-sequence tokens.
        prompt: the text the tokens came from, if they came from text.

    Attributes:
        sequences: one for each sample.
        num_preemptions: how often its blocks were taken away.

    Example:
        >>> from paged.blocks import BlockPool
        >>> table = BlockTable(BlockPool(num_blocks=4), block_size=16)
        >>> request = Request("a", [5, 6, 7], SamplingParams(), block_table=table, seed=0, max_tokens=2)
        >>> sequence = request.sequences[0]
        >>> sequence.num_tokens, sequence.num_computed_tokens
        (3, 0)
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        sampling_params: SamplingParams,
        *,
        block_table: BlockTable,
        seed: int,
        max_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        prompt: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.sampling_params = sampling_params
        self.seed = seed
        self.max_tokens = max_tokens
        self.eos_token_ids = frozenset() if sampling_params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(sampling_params.stop_token_ids or ())
        self.sequences = [Sequence(0, self.prompt_token_ids, block_table)]
        self.num_preemptions = 0

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that still grow."""
        return [sequence for sequence in self.sequences if not sequence.is_finished]

    def stop_if_done(self, sequence: Sequence) -> None:
        """End `sequence` if its last token asks for it. End of sequence first, then stop tokens, then length."""
        token = sequence.token_ids[-1]
        if token in self.eos_token_ids:
            sequence.finish_reason = FinishReason.STOP
        elif token in self.stop_token_ids:
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, token
        elif sequence.num_output_tokens >= self.max_tokens:
            sequence.finish_reason = FinishReason.LENGTH
