"""The scheduler: who computes which tokens in the next step.

Continuous batching in five sentences. Before every step, each running request, oldest first, gets room for tokens that
it has not computed, as many as the step's token budget allows: one for a decode, a chunk for a long prompt. When the
pool is empty, the youngest is preempted: it gives its blocks back, to compute them again later or, if they were swapped
out to host memory, to copy them back. Then waiting requests are admitted, in order, as long as all that is known of the
next one fits the free blocks and the running ones keep a block each to grow into. Nobody waits for anybody else's end.

                     add                 schedule                   update
    caller ---------------> waiting ---------------> running ---------------> finished
                               ^                        |
                               +------ preempted -------+

The first in order is never preempted, and every request that was accepted fits the pool alone, so each step brings it
forward and everyone ends.

Nothing here knows a tensor or a model: `schedule` gives a Step, whoever runs it gives the sampled tokens to `update`.
While that one runs, `schedule_ahead` can plan the next: it needs to know how many tokens come, and not which.
This file decides who and when; how blocks are filled, shared and moved is the KVCacheManager's business.
"""

import bisect
from collections.abc import Sequence as SequenceOf

from paged.blocks import BlockTable, num_blocks_to_write
from paged.kv_cache_manager import KVCacheManager
from paged.request import Branch, FinishReason, Request, Sequence
from paged.step import RowPlan, Step
from paged.step_draft import StepDraft


class Scheduler:
    """Queues of requests over one pool of blocks.

    Args:
        num_blocks: all blocks of the pool, the null and the trash block included.
        num_host_blocks: the same of a pool in host memory, where preempted requests are swapped to as long as it has
            room; with 0, or without room, they are computed again.
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
        kv: who holds which blocks.
        pool: the blocks.
        waiting, running: the requests, each in order.
        num_preemptions: requests that lost their blocks, so far.
        num_swaps: how many of these times the blocks went to host memory.
        num_recomputed_tokens: tokens computed a second time because they did not, so far.

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
        num_host_blocks: int = 0,
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
        self.kv = KVCacheManager(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            sliding_window=sliding_window,
        )
        self.pool = self.kv.pool
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_swaps = 0
        self.num_recomputed_tokens = 0
        self._requests: dict[str, Request] = {}
        self._free_rows = list(reversed(range(max_num_seqs)))
        self._num_arrivals = 0

    def new_block_table(self) -> BlockTable:
        """An empty block table over this scheduler's pool."""
        return self.kv.new_block_table()

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            ValueError: its name is taken, or it can never run: too many samples or beams, or too long for one step or
                for the whole pool.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id!r} is already waiting or running; give it another name")
        num_prompt, num_sequences = len(request.prompt_token_ids), len(request.sequences)
        count = f"beam_width={num_sequences}" if request.is_beam_search else f"n={num_sequences}"
        if num_sequences > self.max_num_seqs:
            raise ValueError(
                f"request {request.request_id!r} wants {count} sequences and a step runs at most "
                f"max_num_seqs={self.max_num_seqs}; raise that or lower the number"
            )
        if request.is_beam_search and num_sequences > self.max_num_batched_tokens:
            raise ValueError(
                f"request {request.request_id!r} wants {count} and all beams go on in one step, which computes at most "
                f"max_num_batched_tokens={self.max_num_batched_tokens}; raise that or lower the number"
            )
        # The last token sampled is never computed: nothing comes after it.
        most_tokens = num_prompt + request.max_tokens - 1
        if most_tokens > self.max_num_batched_tokens and not self.enable_chunked_prefill:
            raise ValueError(
                f"request {request.request_id!r} may grow to {most_tokens} tokens (prompt {num_prompt}, max_tokens "
                f"{request.max_tokens}) and without chunked prefill one step computes at most "
                f"max_num_batched_tokens={self.max_num_batched_tokens}; raise that or lower max_tokens"
            )
        most_blocks = self.kv.most_blocks(request)
        if most_blocks > self.pool.num_usable:
            raise ValueError(
                f"request {request.request_id!r} can never fit the pool: prompt {num_prompt}, max_tokens "
                f"{request.max_tokens} and {count} take {most_blocks} blocks of {self.block_size}, and the "
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
        return self._fill(StepDraft(self.max_num_batched_tokens))

    def schedule_ahead(self, step: Step) -> Step | None:
        """Plan what comes behind a step in flight, before it is known what that one samples.

        Its rows count as computed, and a sequence that it samples from has a pending token (paged/request.py). Who ends
        with that token for sure, by length, gets no row here. Who turns out to end with it otherwise has a row in vain,
        which `update` ignores. That row may write into a block that is free by then: it does so before anybody whom
        the block is given to later, because the device runs steps in the order in which they were planned; and behind
        everything that the prefix cache can find, because only full blocks of known tokens are published.

        Nobody is preempted here: a sequence whose latest token is not known can be neither computed again nor moved.

        Args:
            step: the only step that is in flight.

        Returns:
            The next step; or None if it cannot be planned yet, which is when a request in `step` is not simple
            (`Request.is_simple`) or begins its samples, when `step` preempted somebody or would have had to, and when
            nobody has anything to compute. Then `schedule` can plan it after `update`.

        Example: what "a" samples is not known, and is computed next.
            >>> from paged.sampling_params import SamplingParams
            >>> scheduler = Scheduler(num_blocks=10, block_size=4, max_num_seqs=2, max_num_batched_tokens=9)
            >>> table = scheduler.new_block_table()
            >>> scheduler.add(Request("a", [5, 6, 7], SamplingParams(), block_table=table, seed=0, max_tokens=2))
            >>> first = scheduler.schedule()
            >>> second = scheduler.schedule_ahead(first)
            >>> [(row.start, row.token_ids) for row in second.rows]
            [(3, (None,))]
            >>> _ = scheduler.update(first, [8])
            >>> scheduler.schedule_ahead(second)                     # it is about to end
        """
        if step.preempted or step.short_of_blocks:
            return None
        owned = []
        for row in step.rows:
            owner = self.owner(row)
            if owner is None:
                continue
            request, sequence = owner
            if not request.is_simple or len(row.samples) > 1:
                return None
            owned.append((row, sequence))
        for row, sequence in owned:
            sequence.num_computed_tokens = row.end
            sequence.num_pending_tokens = len(row.samples)
        ahead = self._fill(StepDraft(self.max_num_batched_tokens, is_ahead=True))
        return ahead if ahead.rows else None

    def owner(self, row: RowPlan) -> tuple[Request, Sequence] | None:
        """Whose row this is; None if that has ended since the row was planned."""
        request = self._requests.get(row.request_id)
        if request is None or request.arrival != row.arrival:  # ended, and perhaps another has its name
            return None
        sequence = request.sequences[row.sequence_index]
        return (request, sequence) if sequence.row == row.row else None

    def update(self, step: Step, token_ids: SequenceOf[int | None]) -> list[tuple[Request, Sequence] | None]:
        """Take in what a step brought: its K and V exist now, and these tokens were sampled.

        Args:
            step: the step that ran. Steps are taken in in the order in which they were planned.
            token_ids: one token for each of its samples, in order; None where the logits were no numbers, which ends
                the sequence with an error.

        Returns:
            For each token who got it, or None if that had ended before: it was aborted while the step ran, or ended
            with a step that was still in flight when this one was planned. Sequences that it ended
            have their `finish_reason` set and their blocks back in the pool. Beams get nothing here: `branch` says
            how they go on.
        """
        grown: list[tuple[Request, Sequence] | None] = []
        first = 0
        for row in step.rows:
            num_samples, place = len(row.samples), first
            first += num_samples
            owner = self.owner(row)
            if owner is None:
                grown += [None] * num_samples
                continue
            request, sequence = owner
            self._computed(request, sequence, row.start, row.end)
            sequence.num_pending_tokens = 0
            if num_samples == 1:
                self._receive(request, sequence, token_ids[place])
                grown.append(owner)
            elif num_samples:
                followers = request.followers
                for follower in followers:  # before the leader may end and let go of its blocks
                    self.kv.follow(sequence, follower)
                tokens = token_ids[place:first]
                for receiver, token in zip((sequence, *followers), tokens, strict=True):
                    self._receive(request, receiver, token)
                    grown.append((request, receiver))
        return grown

    def branch(self, request: Request, branches: SequenceOf[Branch]) -> None:
        """Let the beams of a request go on, each with one more token, from whichever beam it is to continue.

        Args:
            request: a beam search, all of whose beams were computed in the step before.
            branches: one for each beam.
        """
        self.kv.branch(request, branches)

    def fail(self, step: Step) -> list[Request]:
        """A step failed, so nothing is sure of what it was to compute or to move.

        Returns:
            The requests that were in it, ended with the reason "error". Those that it was to swap out are not among
            them: they will be computed again.
        """
        for request_id in step.preempted:
            if request_id in self._requests:
                self._discard(self._requests[request_id])
        owners = [owner for row in step.rows if (owner := self.owner(row)) is not None]
        failed = {request.request_id: request for request, _ in owners}
        for request in failed.values():
            self.finish(request, FinishReason.ERROR)
        return list(failed.values())

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
        if self.kv.prefix_cache is None or self.pool.num_free < self.pool.num_usable:
            return False
        self.kv.prefix_cache.reset()
        return True

    def _order(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.by_priority else 0, request.arrival)

    def _fill(self, draft: StepDraft) -> Step:
        """Plan as much as there is room for."""
        self._schedule_running(draft)
        # Whoever lost its blocks a moment ago would only take them back from somebody else.
        if not draft.preempted and not draft.short_of_blocks:
            self._admit_waiting(draft)
        return draft.finish()

    def _schedule_running(self, draft: StepDraft) -> None:
        """Give every running request, in order, room for its next tokens; who stands in its way is preempted."""
        position = 0
        while position < len(self.running) and draft.budget > 0:  # the list may become shorter under way
            request = self.running[position]
            position += 1
            if self._decodes_in_place(request):
                draft.plan_decode(request, request.sequences[0])
                continue
            writes = self._writes(request, draft)
            needs_blocks = False
            for sequence, end in writes:
                if not sequence.block_table.is_writable(sequence.num_computed_tokens, end):
                    needs_blocks = True
            while needs_blocks and self._num_blocks(writes) > self.pool.num_free:
                if draft.is_ahead:
                    draft.short_of_blocks = True
                    return
                victim = self.running[-1]  # nothing is planned for it yet: the list is gone through in order
                self._preempt(victim, draft)
                if victim is request:
                    return
            for sequence, end in writes:
                start = sequence.num_computed_tokens
                change = sequence.block_table.prepare_write(start, end) if needs_blocks else None
                draft.plan(request, sequence, end, change)

    def _decodes_in_place(self, request: Request) -> bool:
        """Whether all that a request computes is its latest token, in a block of its own that the batch knows of.

        That is so for nearly every row of nearly every step. Nothing has to be found then, and its plan is short.
        """
        if len(request.sequences) > 1:
            return False
        (sequence,) = request.sequences
        start, table = sequence.num_computed_tokens, sequence.block_table
        return (
            start + 1 == sequence.length
            and not request.will_end(sequence)
            and sequence.num_told_blocks == len(table.blocks)
            and table.is_writable(start, start + 1)
        )

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Admit waiting requests in order, as long as the next one fits as a whole."""
        while self.waiting and draft.budget > 0:
            request = self.waiting[0]
            leader, num_sequences = request.unfinished[0], len(request.unfinished)
            # Rows first: while all are taken, a step should not look the head's prompt up in the prefix cache.
            if num_sequences > len(self._free_rows):
                return  # nobody overtakes the head of the queue, or a long prompt would wait forever
            placement = self.kv.placement(request)
            num_spare = self.spare_blocks_per_seq * sum(len(r.unfinished) for r in self.running)
            if placement.num_blocks + num_spare > self.pool.num_free:
                return
            start = leader.num_computed_tokens or len(placement.found[0]) * self.block_size
            if self._chunk(request, leader, draft, draft.budget, start) == 0:
                return
            if request.is_beam_search and num_sequences > draft.budget:
                return
            bisect.insort(self.running, self.waiting.pop(0), key=self._order)
            for sequence in request.unfinished:
                draft.admit(request, sequence, self._free_rows.pop())
            draft.swap_ins += self.kv.admit(request, placement)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = leader.num_computed_tokens
            for sequence, end in self._writes(request, draft):
                change = sequence.block_table.prepare_write(sequence.num_computed_tokens, end)
                draft.plan(request, sequence, end, change)

    def _writes(self, request: Request, draft: StepDraft) -> list[tuple[Sequence, int]]:
        """What a running request computes in this step: its sequences, and how far each of them gets."""
        budget = draft.budget
        sequences = self._ready(request)
        if request.is_beam_search:
            # Beams are compared with each other, so their last tokens are computed together or not at all.
            behind = [sequence for sequence in sequences if sequence.num_computed_tokens < sequence.num_tokens - 1]
            if not behind and len(sequences) > budget:
                return []
            sequences = behind or sequences
        writes = []
        for sequence in sequences:
            if request.will_end(sequence):
                continue
            num_tokens = self._chunk(request, sequence, draft, budget)
            if num_tokens == 0:
                break
            writes.append((sequence, sequence.num_computed_tokens + num_tokens))
            budget -= num_tokens
        return writes

    def _ready(self, request: Request) -> list[Sequence]:
        """The sequences of a running request that can compute something now."""
        unfinished = request.unfinished
        leader, followers = unfinished[0], request.followers
        if followers and leader.num_computed_tokens < leader.num_prompt_tokens:
            return [leader]
        for follower in followers:  # of a request that was preempted: they have tokens of their own already
            self.kv.follow(leader, follower)
        return unfinished

    def _chunk(
        self, request: Request, sequence: Sequence, draft: StepDraft, budget: int, start: int | None = None
    ) -> int:
        """How many tokens of a sequence this step computes, of `budget` at most; 0 if its turn has not come."""
        start = sequence.num_computed_tokens if start is None else start
        num_tokens = sequence.length - start
        if num_tokens == 1:
            return min(1, budget)
        if request.followers and start < sequence.num_prompt_tokens:
            num_tokens = sequence.num_prompt_tokens - start
        elif request.is_beam_search and len(request.sequences) > 1:
            num_tokens -= 1
        if self.long_prefill_token_threshold > 0:
            num_tokens = min(num_tokens, self.long_prefill_token_threshold)
        if request.sampling_params.prompt_logprobs is not None:
            num_tokens = min(num_tokens, draft.target_budget)
        if num_tokens > budget and not self.enable_chunked_prefill:
            return 0
        return min(num_tokens, budget)

    def _num_blocks(self, writes: list[tuple[Sequence, int]]) -> int:
        """Free blocks that these writes take."""
        return num_blocks_to_write(self.pool, [(s.block_table, s.num_computed_tokens, end) for s, end in writes])

    def _receive(self, request: Request, sequence: Sequence, token: int | None) -> None:
        """A sequence gets a token, which may be its last."""
        if request.is_beam_search:
            if token is None:  # without its candidates the others cannot be compared
                self.finish(request, FinishReason.ERROR)
            return
        if token is None:
            sequence.finish_reason = FinishReason.ERROR
        else:
            sequence.token_ids.append(token)
            request.stop_if_done(sequence)
        if sequence.finish_reason is not None:
            self._release(request, sequence)

    def _computed(self, request: Request, sequence: Sequence, start: int, end: int) -> None:
        """The K and V of a sequence's tokens from `start` to `end - 1` are in the pool, as those before are."""
        if start < sequence.num_discarded_tokens:
            self.num_recomputed_tokens += min(end, sequence.num_discarded_tokens) - start
        self.kv.computed(request, sequence, end)

    def _preempt(self, request: Request, draft: StepDraft) -> None:
        """Take a request's blocks away. It keeps its tokens and goes back to its place in the queue."""
        copies = self.kv.swap_out(request)
        if copies is None:
            self._discard(request)
        else:
            draft.swap_outs += copies
            self.num_swaps += 1
        for sequence in request.unfinished:
            self._leave_row(sequence)
        draft.preempted.append(request.request_id)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.running.remove(request)
        bisect.insort(self.waiting, request, key=self._order)

    def _discard(self, request: Request) -> None:
        """Let go of the K and V of a request, which will be computed again."""
        for sequence in request.unfinished:
            self.kv.release(sequence)
            sequence.num_discarded_tokens = max(sequence.num_discarded_tokens, sequence.num_computed_tokens)
            sequence.num_computed_tokens = 0

    def _release(self, request: Request, sequence: Sequence) -> None:
        """A sequence has ended: its blocks and its row are free; after the last one so is the request's name."""
        self.kv.release(sequence)
        self._leave_row(sequence)
        if request.is_finished and self._requests.pop(request.request_id, None) is not None:
            if request in self.running:
                self.running.remove(request)
            else:
                self.waiting.remove(request)

    def _leave_row(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self._free_rows.append(sequence.row)
            sequence.row = None
