"""The scheduler: who computes which tokens in the next step.

Continuous batching in four sentences. Before every step, each running request, oldest first, gets room for tokens that
it has not computed, as many as the step's token budget allows: one for a decode, a chunk for a long prompt. When the
pool is empty, the youngest gives its blocks back and will compute them again (preemption by recomputation). Then
waiting requests are admitted, in order, as long as all that is known of the next one fits the free blocks and the
running ones keep a block each to grow into. Nobody waits for anybody else's end.

                     add                 schedule                   update
    caller ---------------> waiting ---------------> running ---------------> finished
                               ^                        |
                               +------ preempted -------+

The first in order is never preempted, and every request that was accepted fits the pool alone, so each step brings it
forward and everyone ends.

Nothing here knows a tensor or a model: `schedule` gives a Step, whoever runs it gives the sampled tokens to `update`.
"""

import bisect
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from paged.blocks import BlockPool, BlockTable, CachedBlock, PrefixCache, TableChange, blocks_for
from paged.request import FinishReason, Request, Sequence
from paged.step import Admission, RowPlan, Sample, Step

# A request that wants log probabilities of its prompt gets logits for every token of it: at most so many at once.
PROMPT_LOGPROBS_CHUNK = 128


@dataclass
class _Draft:
    """A step while it is planned: rows with a single token apart from the others, since they come first."""

    budget: int
    singles: list[RowPlan] = field(default_factory=list)
    chunks: list[RowPlan] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)

    def add(self, row: RowPlan, num_tokens: int) -> None:
        (self.singles if num_tokens == 1 else self.chunks).append(row)
        self.budget -= num_tokens

    def drop(self, request: Request) -> None:
        """A request was preempted: what was planned for it is not done."""
        for rows in (self.singles, self.chunks):
            self.budget += sum(len(row.token_ids) for row in rows if row.request_id == request.request_id)
            rows[:] = [row for row in rows if row.request_id != request.request_id]
        self.preempted.append(request.request_id)

    def finish(self) -> Step:
        # In order of length, so that whoever pads contexts to the longest can take neighbours together.
        self.singles.sort(key=lambda row: row.start)
        rows = (*self.singles, *self.chunks)
        copies = tuple(copy for row in rows if row.table_change is not None for copy in row.table_change.copies)
        return Step(rows, tuple(self.admissions), copies, tuple(self.preempted))


class Scheduler:
    """Queues of requests over one pool of blocks.

    Args:
        num_blocks: all blocks of the pool, the null and the trash block included.
        block_size: tokens a block holds.
        max_num_seqs: most sequences in one step; also the number of persistent rows.
        max_num_batched_tokens: most tokens in one step.
        enable_chunked_prefill: compute a prompt that does not fit one step in several. Without, a step has to hold the
            longest sequence.
        long_prefill_token_threshold: most tokens of one sequence in one step; 0 for no such limit.
        policy: "fcfs" (first come, first served) or "priority" (lower numbers first, then order of arrival).
        enable_prefix_caching: find the blocks of tokens that were computed before.
        sliding_window: blocks whose tokens every layer's window has left behind are freed; None if some layer sees all.
        spare_blocks_per_seq: free blocks that have to be left for each running sequence when another is admitted.
            With 0, newcomers take the blocks that the others are about to need, and work is thrown away
            (docs/design.md has the measurement).

    Attributes:
        pool: the blocks.
        prefix_cache: what can be found, or None.
        waiting, running: the requests, each in order.
        num_preemptions: requests that lost their blocks, so far.
        num_recomputed_tokens: tokens computed a second time because of that, so far.

    Example:
        >>> from paged.sampling_params import SamplingParams
        >>> scheduler = Scheduler(num_blocks=10, block_size=4, max_num_seqs=2, max_num_batched_tokens=2)
        >>> table = scheduler.new_block_table()
        >>> request = Request("a", [5, 6, 7], SamplingParams(), block_table=table, seed=0, max_tokens=2)
        >>> scheduler.add(request)
        >>> step = scheduler.schedule()                       # the prompt, as far as the budget goes
        >>> [(row.request_id, row.start, row.token_ids, row.samples) for row in step.rows]
        [('a', 0, (5, 6), ())]
        >>> _ = scheduler.update(step, [])
        >>> step = scheduler.schedule()                       # the rest, and a token is sampled
        >>> [(row.start, row.token_ids, len(row.samples)) for row in step.rows]
        [(2, (7,), 1)]
        >>> _ = scheduler.update(step, [8])                   # the model sampled 8
        >>> [(row.start, row.token_ids) for row in scheduler.schedule().rows]
        [(3, (8,))]
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        policy: str = "fcfs",
        enable_prefix_caching: bool = True,
        sliding_window: int | None = None,
        spare_blocks_per_seq: int = 1,
    ) -> None:
        self.block_size = block_size
        self.spare_blocks_per_seq = spare_blocks_per_seq
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.by_priority = policy == "priority"
        self.sliding_window = sliding_window
        self.pool = BlockPool(num_blocks)
        self.prefix_cache = PrefixCache(self.pool, block_size) if enable_prefix_caching else None
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self._requests: dict[str, Request] = {}
        self._free_rows = list(reversed(range(max_num_seqs)))
        self._num_arrivals = 0

    def new_block_table(self) -> BlockTable:
        """An empty block table over this scheduler's pool."""
        return BlockTable(self.pool, self.block_size)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            ValueError: its name is taken, or it can never run: too many samples, or too long for one step or for the
                whole pool.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id!r} is already waiting or running; give it another name")
        num_prompt, num_sequences = len(request.prompt_token_ids), len(request.sequences)
        if num_sequences > self.max_num_seqs:
            raise ValueError(
                f"request {request.request_id!r} wants n={num_sequences} samples and a step runs at most "
                f"max_num_seqs={self.max_num_seqs} sequences; raise that or lower n"
            )
        # The last token sampled is never computed: nothing comes after it.
        most_tokens = num_prompt + request.max_tokens - 1
        if most_tokens > self.max_num_batched_tokens and not self.enable_chunked_prefill:
            raise ValueError(
                f"request {request.request_id!r} may grow to {most_tokens} tokens (prompt {num_prompt}, max_tokens "
                f"{request.max_tokens}) and without chunked prefill one step computes at most "
                f"max_num_batched_tokens={self.max_num_batched_tokens}; raise that or lower max_tokens"
            )
        shared = num_prompt // self.block_size
        most_blocks = shared + num_sequences * (blocks_for(most_tokens, self.block_size) - shared)
        if most_blocks > self.pool.num_usable:
            raise ValueError(
                f"request {request.request_id!r} can never fit the pool: prompt {num_prompt}, max_tokens "
                f"{request.max_tokens} and n={num_sequences} take {most_blocks} blocks of {self.block_size}, and the "
                f"pool has {self.pool.num_usable} that can be used; lower max_tokens or enlarge the pool"
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        bisect.insort(self.waiting, request, key=self._order)

    def schedule(self) -> Step | None:
        """Plan the next step, or None if no request is left.

        The block tables change here; the counters change in `update`, once the K and V exist.
        """
        if not self._requests:
            return None
        draft = _Draft(self.max_num_batched_tokens)
        self._schedule_running(draft)
        # Whoever lost its blocks a moment ago would only take them back from somebody else.
        if not draft.preempted:
            self._admit_waiting(draft)
        return draft.finish()

    def update(self, step: Step, token_ids: SequenceOf[int | None]) -> list[tuple[Request, Sequence] | None]:
        """Take in what a step brought: its K and V exist now, and these tokens were sampled.

        Args:
            step: the step that ran.
            token_ids: one token for each of its samples, in order; None where the logits were no numbers, which ends
                the sequence with an error.

        Returns:
            For each token who got it, or None if its request was aborted while the step ran. Sequences that it ended
            have their `finish_reason` set and their blocks back in the pool.
        """
        grown: list[tuple[Request, Sequence] | None] = []
        first = 0
        for row in step.rows:
            num_samples = len(row.samples)
            tokens = token_ids[first : first + num_samples]
            first += num_samples
            request = self._requests.get(row.request_id)
            if request is None or request.sequences[row.sequence_index].row != row.row:  # aborted while the step ran
                grown += [None] * num_samples
                continue
            sequence = request.sequences[row.sequence_index]
            self._computed(request, sequence, row.start + len(row.token_ids))
            if num_samples:
                followers = request.followers if num_samples > 1 else ()
                for follower in followers:  # before the leader may end and let go of its blocks
                    self._follow(sequence, follower)
                for receiver, token in zip((sequence, *followers), tokens, strict=True):
                    self._receive(request, receiver, token)
                    grown.append((request, receiver))
        return grown

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: str | None = None, *, only: Sequence | None = None
    ) -> None:
        """End whatever of a request has not ended, or `only` one sequence, at any moment, and free its blocks."""
        for sequence in request.unfinished if only is None else [only]:
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason
            self._release(request, sequence)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """End a request; None if no such request waits or runs (it may have ended a moment ago: that is no error)."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, reason)
        return request

    def reset_prefix_cache(self) -> bool:
        """Forget what can be found; False if nothing was done, because a block is in use or there is no cache."""
        if self.prefix_cache is None or self.pool.num_free < self.pool.num_usable:
            return False
        self.prefix_cache.reset()
        return True

    def _order(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.by_priority else 0, request.arrival)

    def _schedule_running(self, draft: _Draft) -> None:
        """Give every running request, in order, room for its next tokens; who stands in its way is preempted."""
        position = 0
        while position < len(self.running) and draft.budget > 0:  # the list may become shorter under way
            request = self.running[position]
            for sequence in self._ready(request):
                num_tokens = self._chunk(request, sequence, draft.budget)
                if num_tokens == 0:
                    break
                table, start = sequence.block_table, sequence.num_computed_tokens
                end = start + num_tokens
                if table.is_writable(start, end):  # a decode inside a block: nothing has to be found for it
                    draft.add(self._plan(request, sequence, end, None), num_tokens)
                    continue
                while table.num_blocks_to_write(start, end) > self.pool.num_free:
                    victim = self.running[-1]
                    self._preempt(victim)
                    draft.drop(victim)
                    if victim is request:
                        return
                draft.add(self._plan(request, sequence, end, table.prepare_write(start, end)), num_tokens)
            position += 1

    def _admit_waiting(self, draft: _Draft) -> None:
        """Admit waiting requests in order, as long as the next one fits as a whole."""
        while self.waiting and draft.budget > 0:
            request = self.waiting[0]
            leader, *others = request.unfinished
            found = self._lookup(request, leader)
            # A block that nobody names counts as free until it is taken up again.
            num_blocks = blocks_for(leader.num_tokens, self.block_size) - sum(
                self.pool.ref_count(entry.block) > 0 for entry in found
            )
            shared = leader.num_prompt_tokens // self.block_size
            if leader.num_output_tokens:
                num_blocks += sum(blocks_for(other.num_tokens, self.block_size) - shared for other in others)
            num_spare = self.spare_blocks_per_seq * sum(len(r.unfinished) for r in self.running)
            if 1 + len(others) > len(self._free_rows) or num_blocks + num_spare > self.pool.num_free:
                return  # nobody overtakes the head of the queue, or a long prompt would wait forever
            start = len(found) * self.block_size
            num_tokens = self._chunk(request, leader, draft.budget, start)
            if num_tokens == 0:
                return
            bisect.insort(self.running, self.waiting.pop(0), key=self._order)
            for sequence in request.unfinished:
                draft.admissions.append(self._seat(request, sequence))
            leader.block_table.adopt([entry.block for entry in found])
            leader.chain, leader.num_computed_tokens = found, start
            self._ready(request)  # the prompt may have been found whole; then the others begin where the leader does
            if request.num_cached_tokens is None:
                request.num_cached_tokens = start
            end = start + num_tokens
            draft.add(self._plan(request, leader, end, leader.block_table.prepare_write(start, end)), num_tokens)

    def _lookup(self, request: Request, leader: Sequence) -> list[CachedBlock]:
        """The blocks of a request's beginning that are there already."""
        if self.prefix_cache is None or request.sampling_params.prompt_logprobs is not None:
            return []
        # Others will begin where the prompt ends, so the leader may not begin behind it.
        end = leader.num_tokens if len(request.unfinished) == 1 else leader.num_prompt_tokens + 1
        return self.prefix_cache.lookup(leader.token_ids[:end], request.cache_salt)

    def _ready(self, request: Request) -> list[Sequence]:
        """The sequences of a running request that can compute something now."""
        if len(request.sequences) == 1:
            return request.sequences
        unfinished = request.unfinished
        leader, followers = unfinished[0], request.followers
        if followers and leader.num_computed_tokens < leader.num_prompt_tokens:
            return [leader]
        for follower in followers:  # of a request that was preempted: they have tokens of their own already
            self._follow(leader, follower)
        return unfinished

    def _chunk(self, request: Request, sequence: Sequence, budget: int, start: int | None = None) -> int:
        """How many tokens of a sequence this step computes; 0 if its turn has not come."""
        start = sequence.num_computed_tokens if start is None else start
        num_tokens = len(sequence.token_ids) - start
        if num_tokens == 1:
            return min(1, budget)
        if request.followers and start < sequence.num_prompt_tokens:
            num_tokens = sequence.num_prompt_tokens - start
        if self.long_prefill_token_threshold > 0:
            num_tokens = min(num_tokens, self.long_prefill_token_threshold)
        if request.sampling_params.prompt_logprobs is not None:
            num_tokens = min(num_tokens, PROMPT_LOGPROBS_CHUNK)
        if num_tokens > budget and not self.enable_chunked_prefill:
            return 0
        return min(num_tokens, budget)

    def _plan(self, request: Request, sequence: Sequence, end: int, change: TableChange | None) -> RowPlan:
        """Write down that a sequence computes its tokens up to `end`, for which its table was changed like that."""
        start, row, num_blocks = sequence.num_computed_tokens, sequence.row, len(sequence.block_table.blocks)
        assert row is not None, "only a sequence with a row is planned"
        first = sequence.num_told_blocks if change is None else min(change.first_index, sequence.num_told_blocks)
        told = None
        if first < num_blocks:
            copies = () if change is None else change.copies
            told = TableChange(first, tuple(sequence.block_table.blocks[first:]), copies)
            sequence.num_told_blocks = num_blocks
        samples: tuple[Sample, ...] = ()
        if end == len(sequence.token_ids):
            samples = (_sample(request, sequence),)
            if end == sequence.num_prompt_tokens:
                samples += tuple(_sample(request, follower) for follower in request.followers)
        targets: tuple[int, ...] = ()
        if start < sequence.num_prompt_tokens and request.sampling_params.prompt_logprobs is not None:
            targets = request.prompt_token_ids[start + 1 : end + 1]
        tokens = tuple(sequence.token_ids[start:end])
        return RowPlan(request.request_id, sequence.index, row, start, tokens, told, samples, targets)

    def _receive(self, request: Request, sequence: Sequence, token: int | None) -> None:
        """A sequence gets a token, which may be its last."""
        if token is None:
            sequence.finish_reason = FinishReason.ERROR
        else:
            sequence.token_ids.append(token)
            request.stop_if_done(sequence)
        if sequence.finish_reason is not None:
            self._release(request, sequence)

    def _computed(self, request: Request, sequence: Sequence, end: int) -> None:
        """The K and V of a sequence's tokens up to `end` are in the pool."""
        if sequence.num_computed_tokens < sequence.num_discarded_tokens:
            self.num_recomputed_tokens += min(end, sequence.num_discarded_tokens) - sequence.num_computed_tokens
        sequence.num_computed_tokens = end
        if self.prefix_cache is not None and end // self.block_size > len(sequence.chain):
            blocks = sequence.block_table.blocks
            self.prefix_cache.publish(sequence.chain, sequence.token_ids, blocks, end, request.cache_salt)
        if self.sliding_window is not None:
            # The next token, at position `end`, sees itself and sliding_window - 1 tokens before it.
            first_changed = sequence.block_table.drop_before(end - self.sliding_window + 1)
            if first_changed is not None:
                sequence.num_told_blocks = min(sequence.num_told_blocks, first_changed)

    def _follow(self, leader: Sequence, follower: Sequence) -> None:
        """Begin where the leader stands at the end of the prompt, on the same blocks."""
        follower.block_table = leader.block_table.fork(follower.num_prompt_tokens)
        follower.chain = leader.chain[: follower.num_prompt_tokens // self.block_size]
        follower.num_computed_tokens = follower.num_prompt_tokens
        follower.num_told_blocks = 0

    def _seat(self, request: Request, sequence: Sequence) -> Admission:
        """Give a sequence a row."""
        sequence.row = self._free_rows.pop()
        sequence.num_told_blocks = 0
        return Admission(
            sequence.row,
            request.sampling_params,
            request.seed + sequence.index,
            request.prompt_token_ids,
            tuple(sequence.output_token_ids),
        )

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks away. It keeps its tokens and goes back to its place in the queue."""
        for sequence in request.unfinished:
            self._give_back(sequence)
            sequence.num_discarded_tokens = max(sequence.num_discarded_tokens, sequence.num_computed_tokens)
            sequence.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.running.remove(request)
        bisect.insort(self.waiting, request, key=self._order)

    def _release(self, request: Request, sequence: Sequence) -> None:
        """A sequence has ended: its blocks and its row are free; after the last one so is the request's name."""
        self._give_back(sequence)
        if request.is_finished and self._requests.pop(request.request_id, None) is not None:
            if request in self.running:
                self.running.remove(request)
            else:
                self.waiting.remove(request)

    def _give_back(self, sequence: Sequence) -> None:
        sequence.block_table.free()
        if sequence.row is not None:
            self._free_rows.append(sequence.row)
            sequence.row = None


def _sample(request: Request, sequence: Sequence) -> Sample:
    assert sequence.row is not None, "every sequence of a running request has a row"
    return Sample(sequence.row, request.banned_token_ids(sequence) if request.may_ban else ())
