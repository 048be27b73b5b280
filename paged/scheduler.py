"""The scheduler: who computes which tokens in the next step.

Continuous batching in three sentences. Before every step, each running request, oldest first, gets room for the
tokens it has not computed; when the pool is empty, the youngest gives its blocks back and will compute them again
(preemption by recomputation). Then waiting requests are admitted, in order of arrival, as long as the whole of the
next one fits the free blocks and the step's token budget, and the running ones keep a block each to grow into. Nobody
waits for anybody else's end.

                     add                 schedule                   update
    caller ---------------> waiting ---------------> running ---------------> finished
                               ^                        |
                               +------ preempted -------+

The oldest running request is never preempted, and every request that was accepted fits the pool alone, so each step
brings the oldest one forward and everyone ends.

Nothing here knows a tensor or a model: `schedule` gives a Step, whoever runs it gives the sampled tokens to `update`.
"""

from collections import deque
from collections.abc import Sequence as SequenceOf

from paged.blocks import BlockPool, BlockTable, TableChange, blocks_for
from paged.request import FinishReason, Request, Sequence
from paged.step import Admission, RowPlan, Step


class Scheduler:
    """Queues of requests over one pool of blocks.

    Args:
        num_blocks: all blocks of the pool, the null and the trash block included.
        block_size: tokens a block holds.
        max_num_seqs: most sequences in one step; also the number of persistent rows.
        max_num_batched_tokens: most tokens in one step. A prompt is computed in one step, so it has to be at least as
            long as the longest sequence.
        spare_blocks_per_seq: free blocks that have to be left for each running sequence when another is admitted.
            With 0, newcomers take the blocks that the others are about to need, and work is thrown away
            (docs/design.md has the measurement).

    Attributes:
        pool: the blocks.
        waiting, running: the requests, each in order of arrival.
        num_preemptions: requests that lost their blocks, so far.
        num_recomputed_tokens: tokens computed a second time because of that, so far.

    Example:
        >>> from paged.sampling_params import SamplingParams
        >>> scheduler = Scheduler(num_blocks=10, block_size=4, max_num_seqs=2, max_num_batched_tokens=32)
        >>> table = scheduler.new_block_table()
        >>> request = Request("a", [5, 6, 7], SamplingParams(), block_table=table, seed=0, max_tokens=2)
        >>> scheduler.add(request)
        >>> step = scheduler.schedule()                       # the prompt
        >>> [(row.request_id, row.start, row.token_ids) for row in step.rows]
        [('a', 0, (5, 6, 7))]
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
        spare_blocks_per_seq: int = 1,
    ) -> None:
        self.block_size = block_size
        self.spare_blocks_per_seq = spare_blocks_per_seq
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pool = BlockPool(num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self._requests: dict[str, Request] = {}
        self._free_rows = list(reversed(range(max_num_seqs)))

    def new_block_table(self) -> BlockTable:
        """An empty block table over this scheduler's pool."""
        return BlockTable(self.pool, self.block_size)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            ValueError: its name is taken, or it can never run: too long for one step or for the whole pool.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id!r} is already waiting or running; give it another name")
        # The last token sampled is never computed: nothing comes after it.
        most_tokens = len(request.prompt_token_ids) + request.max_tokens - 1
        if most_tokens > self.max_num_batched_tokens:
            raise ValueError(
                f"request {request.request_id!r} may grow to {most_tokens} tokens (prompt "
                f"{len(request.prompt_token_ids)}, max_tokens {request.max_tokens}) and one step computes at most "
                f"max_num_batched_tokens={self.max_num_batched_tokens}; raise that or lower max_tokens"
            )
        most_blocks = blocks_for(most_tokens, self.block_size)
        if most_blocks > self.pool.num_usable:
            raise ValueError(
                f"request {request.request_id!r} can never fit the pool: prompt {len(request.prompt_token_ids)} and "
                f"max_tokens {request.max_tokens} take {most_blocks} blocks of {self.block_size}, and the pool has "
                f"{self.pool.num_usable} that can be used; lower max_tokens or enlarge the pool"
            )
        self._requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self) -> Step | None:
        """Plan the next step, or None if no request is left.

        The block tables change here; the counters change in `update`, once the K and V exist.
        """
        if not self._requests:
            return None
        rows: list[RowPlan] = []
        preempted = self._schedule_running(rows)
        # Whoever lost its blocks a moment ago would only take them back from somebody else.
        admissions = [] if preempted else self._admit_waiting(rows)
        rows.sort(key=lambda row: len(row.token_ids) > 1)
        copies = tuple(copy for row in rows for copy in row.table_change.copies)
        return Step(tuple(rows), tuple(admissions), copies, tuple(preempted))

    def update(self, step: Step, token_ids: SequenceOf[int]) -> list[tuple[Request, Sequence]]:
        """Take in what a step brought: its K and V exist now, and these tokens were sampled.

        Args:
            step: the step that ran.
            token_ids: one token for each of its rows that samples, in the order of the rows.

        Returns:
            The sequences that got a token. Those that it ended have their `finish_reason` set and their blocks back
            in the pool.
        """
        grown = []
        sampled = iter(token_ids)
        for row in step.rows:
            token = next(sampled) if row.samples else None
            request = self._requests.get(row.request_id)
            if request is None:  # aborted while the step ran
                continue
            sequence = request.sequences[row.index]
            self.num_recomputed_tokens += max(0, min(row.end, sequence.num_discarded_tokens) - row.start)
            sequence.num_computed_tokens = row.end
            if token is not None:
                sequence.token_ids.append(token)
                request.stop_if_done(sequence)
                grown.append((request, sequence))
                if sequence.is_finished:
                    self._release(request, sequence)
        return grown

    def finish(self, request: Request, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End whatever of a request has not ended, at any moment, and take its blocks back."""
        for sequence in request.unfinished:
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason
            self._release(request, sequence)

    def abort(self, request_id: str) -> Request | None:
        """End a request; None if no such request waits or runs (it may have ended a moment ago: that is no error)."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, FinishReason.ABORT)
        return request

    def _schedule_running(self, rows: list[RowPlan]) -> list[str]:
        """Give every running request, oldest first, room for its next tokens; returns who lost its blocks for it."""
        preempted: list[str] = []
        budget = self.max_num_batched_tokens
        position = 0
        while position < len(self.running):  # the end of the list may be preempted under way
            request = self.running[position]
            num_tokens = sum(s.num_tokens - s.num_computed_tokens for s in request.unfinished)
            if num_tokens > budget:
                break
            while self._blocks_needed(request) > self.pool.num_free:
                victim = self.running.pop()
                self._preempt(victim)
                preempted.append(victim.request_id)
                if victim is request:
                    return preempted
            rows += [self._plan(request, sequence) for sequence in request.unfinished]
            budget -= num_tokens
            position += 1
        return preempted

    def _admit_waiting(self, rows: list[RowPlan]) -> list[Admission]:
        """Admit waiting requests in order of arrival, as long as the next one fits as a whole."""
        admissions = []
        budget = self.max_num_batched_tokens - sum(len(row.token_ids) for row in rows)
        while self.waiting:
            request = self.waiting[0]
            sequences = request.unfinished
            num_tokens = sum(s.num_tokens for s in sequences)
            num_spare = self.spare_blocks_per_seq * sum(len(r.unfinished) for r in self.running)
            if (
                len(sequences) > len(self._free_rows)
                or num_tokens > budget
                or self._blocks_needed(request) + num_spare > self.pool.num_free
            ):
                break  # nobody overtakes the head of the queue, or a long prompt would wait forever
            self.running.append(self.waiting.popleft())
            budget -= num_tokens
            for sequence in sequences:
                sequence.row = self._free_rows.pop()
                admissions.append(Admission(sequence.row, request.sampling_params, request.seed + sequence.index))
                rows.append(self._plan(request, sequence))
        return admissions

    def _blocks_needed(self, request: Request) -> int:
        """Free blocks that computing everything known of a request takes."""
        return sum(s.block_table.num_blocks_to_write(s.num_computed_tokens, s.num_tokens) for s in request.unfinished)

    def _plan(self, request: Request, sequence: Sequence) -> RowPlan:
        start, end = sequence.num_computed_tokens, sequence.num_tokens
        change: TableChange = sequence.block_table.prepare_write(start, end)
        assert sequence.row is not None, "only a sequence with a row is planned"
        tokens = tuple(sequence.token_ids[start:end])
        return RowPlan(request.request_id, sequence.index, sequence.row, start, tokens, change, samples=True)

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks away. It keeps its tokens and goes to the head of the queue."""
        for sequence in request.unfinished:
            self._give_back(sequence)
            sequence.num_discarded_tokens = max(sequence.num_discarded_tokens, sequence.num_computed_tokens)
            sequence.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request, sequence: Sequence) -> None:
        """A sequence has ended: its blocks and its row are free; after the last one so is the request's name."""
        self._give_back(sequence)
        if request.is_finished:
            del self._requests[request.request_id]
            if request in self.running:
                self.running.remove(request)
            else:
                self.waiting.remove(request)

    def _give_back(self, sequence: Sequence) -> None:
        sequence.block_table.free()
        if sequence.row is not None:
            self._free_rows.append(sequence.row)
            sequence.row = None
