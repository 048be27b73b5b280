"""A request and its sequences: the tokens, the two counters, the state.

The two counters are the heart of the bookkeeping, and they are never one:

    num_tokens            tokens that are known: the prompt and everything sampled so far
    num_computed_tokens   tokens whose K and V are in the pool

    prompt "a b c", nothing computed yet     a b c          num_tokens 3   num_computed_tokens 0
    after the first step: d was sampled      a b c d        num_tokens 4   num_computed_tokens 3
    after the second: e was sampled          a b c d e      num_tokens 5   num_computed_tokens 4
    preempted: its blocks were taken         a b c d e      num_tokens 5   num_computed_tokens 0
    (or swapped out: they are on the host    a b c d e      num_tokens 5   num_computed_tokens 4)

A step computes the tokens between the two; a token is sampled where the step reaches the end of what is known. So a
prompt, a decode and the recomputation after a preemption are one thing, and no code asks which of them it is.

While a step is in flight and the next one is planned already, there is a token more: the pending one, which the device
has or will have in a moment and the host has not seen. It counts towards `length`, and what the step in flight computes
counts as computed:

    the second step is in flight             a b c d ?      num_tokens 4   num_computed_tokens 4   length 5
    and has brought e                        a b c d e      num_tokens 5   num_computed_tokens 4   length 5
"""

import enum
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from paged.blocks import BlockTable, CachedBlock
from paged.sampling_params import RequestOutputKind, SamplingParams


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the strings are those of the OpenAI API, and of vLLM where it has none."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Sequence:
    """One growing list of tokens with a block table of its own.

    Attributes:
        index: which of the request's samples it is.
        token_ids: the prompt's tokens and the sampled ones.
        num_prompt_tokens: how many of them are the prompt's.
        num_computed_tokens: how many of them have their K and V in the pool, or get them from a step in flight behind
            which another is planned.
        num_pending_tokens: 1 while such a step samples a token of this sequence, else 0.
        num_discarded_tokens: how many had them there before the last preemption: what has to be computed again.
        block_table: where the K and V are; empty while the sequence waits.
        host_table: where they are in host memory while the sequence is swapped out, else None.
        chain: the first blocks of the table, as far as the prefix cache knows them.
        row: its place in the batch's persistent tensors, from admission until it is preempted or ends.
        num_told_blocks: entries of the table that the batch has been told of.
        finish_reason, stop_reason: set when it ends; `stop_reason` is the stop string or the stop token id.
    """

    def __init__(self, index: int, prompt_token_ids: SequenceOf[int], block_table: BlockTable) -> None:
        self.index = index
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_discarded_tokens = 0
        self.block_table = block_table
        self.host_table: BlockTable | None = None
        self.chain: list[CachedBlock] = []
        self.row: int | None = None
        self.num_told_blocks = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are known."""
        return len(self.token_ids)

    @property
    def length(self) -> int:
        """Tokens that are known or pending."""
        return len(self.token_ids) + self.num_pending_tokens

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


class Branch(NamedTuple):
    """How a beam goes on.

    Attributes:
        parent: index of the beam that it continues.
        token: the token that comes next.
    """

    parent: int
    token: int


class Request:
    """A prompt, its wishes, and the sequences that answer it.

    The n sequences of a request share the K and V of its prompt. The first one, the leader, computes it while the
    others wait; then they fork its block table, and each goes on alone. The beams of a beam search are sequences too,
    but they get their tokens together (`paged.beam_search` chooses them), so they are always equally long.

    Args:
        request_id: the caller's name for it.
        prompt_token_ids: at least one token.
        sampling_params: the wishes.
        block_table: an empty one, for the first sequence; the others get empty twins.
        seed: what the sampling noise is keyed by: sequence `i` uses `seed + i`.
        max_tokens: most tokens to generate, already cut to what max_model_len leaves.
        eos_token_ids: the model's end-of-sequence tokens.
        bad_words: token sequences that must not be generated.
        priority: lower is served first, where the scheduler goes by it.
        cache_salt: its blocks are shared only with requests of the same salt.
        prompt: the text the tokens came from, if they came from text.
        beam_width: number of beams, if this is a beam search.

    Attributes:
        sequences: one for each sample or beam.
        arrival: its number among all requests, given by the scheduler.
        num_preemptions: how often its blocks were taken away.
        is_beam_search: whether the sequences are beams.
        may_ban: whether `banned_token_ids` is ever not empty.
        is_simple: whether the step behind one of its own can be planned before that one's token is known.
        is_told_at_end: whether nobody wants to see anything of it before its end.
        num_cached_tokens: prompt tokens that were found computed when it was first admitted; None before.

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
        bad_words: SequenceOf[tuple[int, ...]] = (),
        priority: int = 0,
        cache_salt: str | None = None,
        prompt: str | None = None,
        beam_width: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.sampling_params = sampling_params
        self.seed = seed
        self.max_tokens = max_tokens
        self.eos_token_ids = frozenset() if sampling_params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(sampling_params.stop_token_ids or ())
        self.bad_words = tuple(bad_words)
        self.priority = priority
        self.cache_salt = cache_salt
        self.is_beam_search = beam_width is not None
        tables = [block_table, *(block_table.fork() for _ in range(1, beam_width or sampling_params.n))]
        self.sequences = [Sequence(i, self.prompt_token_ids, table) for i, table in enumerate(tables)]
        self.arrival = 0
        self.num_preemptions = 0
        self.num_cached_tokens: int | None = None
        self.is_told_at_end = sampling_params.output_kind is RequestOutputKind.FINAL_ONLY
        self.may_ban = bool(self.bad_words) or sampling_params.min_tokens > 0
        self.is_simple = self._is_simple()

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return not self.unfinished

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that still grow; the first one is the leader."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def is_swapped(self) -> bool:
        """Whether its K and V are in host memory."""
        return any(sequence.host_table is not None for sequence in self.sequences)

    @property
    def followers(self) -> list[Sequence]:
        """The sequences that wait for the leader to compute the prompt."""
        return [sequence for sequence in self.unfinished[1:] if sequence.num_computed_tokens == 0]

    def will_end(self, sequence: Sequence) -> bool:
        """Whether the token that is pending is the last one of `sequence`, whatever it will be."""
        return len(sequence.token_ids) + sequence.num_pending_tokens - sequence.num_prompt_tokens >= self.max_tokens

    def banned_token_ids(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that `sequence` must not get next: what would end it too early, and the ends of bad words."""
        banned: set[int] = set()
        if sequence.num_output_tokens < self.sampling_params.min_tokens:
            banned |= self.eos_token_ids | self.stop_token_ids
        tokens = sequence.token_ids
        for *beginning, last in self.bad_words:
            # Only the end is looked at, so that a step costs the same however long the output is.
            start = len(tokens) - len(beginning)
            if start >= sequence.num_prompt_tokens and tokens[start:] == beginning:
                banned.add(last)
        return tuple(sorted(banned))

    def stop_if_done(self, sequence: Sequence) -> None:
        """End `sequence` if its last token asks for it. End of sequence first, then stop tokens, then length."""
        token = sequence.token_ids[-1]
        if token in self.eos_token_ids:
            sequence.finish_reason = FinishReason.STOP
        elif token in self.stop_token_ids:
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, token
        elif len(sequence.token_ids) - sequence.num_prompt_tokens >= self.max_tokens:
            sequence.finish_reason = FinishReason.LENGTH

    def _is_simple(self) -> bool:
        """Whether a token's value changes nothing in the plan of the next step, but that it may be the last one.

        An end of sequence or a stop token is found one step late, and the row that was computed in vain is ignored.
        Penalties are no obstacle: the device counts what it samples, step after step. What has to wait:
        """
        params = self.sampling_params
        return not (
            self.is_beam_search  # who continues whom is chosen by all the candidates
            or self.may_ban  # what is banned next depends on the tokens so far
            or params.stop_strings  # they are found in the text, by the engine, after everybody's tokens were taken in
            # Their numbers stay on the device until they are fetched, and the pool was sized with one step's of them.
            or params.logprobs is not None
            or params.prompt_logprobs is not None
        )
