"""Serving from a contiguous pool without a model: who holds which slots at every step, and what is done with them.

A request needs one run of slots. How long a run it gets, before anybody knows how long its answer will be:

    max       max_model_len
    pow2      its prompt, and its output rounded up to a power of two: a good guess
    oracle    its prompt and its output exactly: what no system can know
    grow      what it has; for each new token a run that is one longer, into which everything is copied (`torch.cat`)

and who runs together:

    static        a batch runs until the last of it has ended; who ends early keeps its run, and its row is computed on
    iteration     at each step whoever has ended leaves, and the next in order comes if its run fits

The first three with iteration-level batching are the PagedAttention paper's Orca (Max), (Pow2) and (Oracle). Nothing is
ever moved to close gaps. Nobody overtakes the head of the queue, and a prompt is computed in one step.
"""

from collections import deque
from collections.abc import Callable

from reference.buddy import BuddyPool
from reference.reservation import ContiguousPool, PoolFull
from reference.served import Job, Moves, Row, ServedStep, Slots

POLICIES = ("max", "pow2", "oracle", "grow")
BATCHING = ("iteration", "static")


class ContiguousServer:
    """A queue over one contiguous pool.

    Args:
        num_slots: size of the pool.
        policy, batching: see the head of this file.
        allocator: "first-fit" in address order, or "buddy".
        max_model_len: longest request, prompt and output.
        max_num_seqs: most rows in one step.
        max_num_batched_tokens: prompts are added to a step up to so many tokens, but the first one in any case. A
            static batch computes all of its prompts in one step.
        spare_slots: of policy grow with iteration-level batching: free slots that stay for each row when another comes.

    Raises:
        ValueError: another policy, batching or allocator; or the pool is too small for one request.

    Example: 16 slots, two rows of 8. "b" ends after two tokens, and its place is taken at once.
        >>> server = ContiguousServer(
        ...     num_slots=16, policy="max", batching="iteration", max_model_len=8, max_num_seqs=9,
        ...     max_num_batched_tokens=100,
        ... )
        >>> for name, output in (("a", 4), ("b", 2), ("c", 1)):
        ...     server.add(Job(name, 3, output))
        >>> while (step := server.step()) is not None:
        ...     slots = step.slots
        ...     print(step.num_tokens, slots.live, slots.reserved, slots.internal, step.num_waiting, step.finished)
        6 6 4 6 1 ()
        2 8 2 6 1 ('b',)
        4 8 1 7 0 ('c',)
        1 6 0 2 0 ('a',)
    """

    def __init__(
        self,
        *,
        num_slots: int,
        policy: str,
        batching: str,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        allocator: str = "first-fit",
        spare_slots: int = 128,
    ) -> None:
        pools: dict[str, Callable[[int], ContiguousPool | BuddyPool]]
        pools = {"first-fit": ContiguousPool, "buddy": BuddyPool}
        for value, known in ((policy, POLICIES), (batching, BATCHING), (allocator, tuple(pools))):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        if policy == "grow" and allocator == "buddy":
            raise ValueError("policy grow needs allocator first-fit: a buddy's run has room to grow in it")
        self.pool = pools[allocator](num_slots)
        self.policy, self.batching, self.max_model_len = policy, batching, max_model_len
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.spare_slots = spare_slots
        # A run of n somewhere in the pool leaves a gap of at least (num_slots - n) / 2 beside it, and n + 1 are needed.
        least = 3 * max_model_len + 2 if policy == "grow" else max_model_len
        if max(self.pool.gaps) < least:
            raise ValueError(
                f"policy {policy} needs {least} slots in one piece for a request of {max_model_len} tokens; the "
                f"largest of the pool's {num_slots} has {max(self.pool.gaps)}"
            )
        # All rows of a growing batch are one tensor, so that many rows of the longest can be copied.
        self._most_static = num_slots // least if policy == "grow" else max_num_seqs
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._width = 0  # of a growing static batch: its longest prompt, and a token for each step
        self._num_moves = 0
        self._is_tight = (
            False  # somebody lost its run, and nobody has ended since: whoever came would only lose it again
        )

    def add(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            ValueError: it is longer than max_model_len.
        """
        if job.num_prompt_tokens + job.num_output_tokens > self.max_model_len:
            raise ValueError(
                f"request {job.name!r} has {job.num_prompt_tokens} tokens and gets {job.num_output_tokens} more; "
                f"max_model_len is {self.max_model_len}"
            )
        self.waiting.append(Row(job))

    def reserved_slots(self, job: Job) -> int:
        """How many slots a job asks for at once."""
        if self.policy == "max":
            return self.max_model_len
        if self.policy == "pow2":
            guess = 1 << (job.num_output_tokens - 1).bit_length()
            return min(self.max_model_len, job.num_prompt_tokens + guess)
        return job.num_final_tokens

    def step(self) -> ServedStep | None:
        """One step, or None if nobody is left."""
        if not self.running and not self.waiting:
            return None
        moves = self._grow() if self.policy == "grow" and self.running else Moves()
        self._is_tight = bool(self.running) and (self._is_tight or bool(moves.preempted))
        if not self._is_tight and not (self.batching == "static" and self.running):
            self._admit()
        assert self.running, "whoever is alone in the pool fits"
        done = [row for row in self.running if row.finished]  # of a static batch
        rows = [row for row in self.running if not row.finished]
        num_tokens, num_context_tokens = self._work(rows)
        recomputed = sum(min(row.num_fresh, row.num_discarded) for row in rows)
        started = tuple(row.job.name for row in rows if row.num_sampled == 0)
        for row in rows:
            row.num_written += row.num_fresh
            row.num_discarded = 0
            row.num_sampled += 1
        slots = self._slots(rows)
        most_held = self.pool.num_slots - self.pool.num_free
        self._leave()
        return ServedStep(
            num_tokens,
            num_context_tokens,
            num_sequences=len(rows) + len(done),
            num_recomputed_tokens=recomputed,
            num_running=len(rows),
            num_waiting=len(self.waiting),
            slots=slots,
            num_copied_tokens=moves.num_copied,
            most_held=max(moves.most_held, most_held),
            started=started,
            finished=tuple(row.job.name for row in rows if row.finished),
            preempted=tuple(moves.preempted),
        )

    def _admit(self) -> None:
        """Give waiting jobs their runs, in order, as long as the next one fits."""
        budget = self.max_num_batched_tokens - len(self.running)
        limit = min(self.max_num_seqs, self._most_static) if self.batching == "static" else self.max_num_seqs
        together = self.batching == "static" and self.policy == "grow"
        for row in list(self.waiting):
            if len(self.running) >= limit:
                break
            if self.batching == "iteration" and row.num_fresh > budget and any(r.num_fresh > 1 for r in self.running):
                break
            if not together:
                row.num_asked = row.num_fresh if self.policy == "grow" else self.reserved_slots(row.job)
                if not self.pool.fits(row.num_asked):
                    break
                row.run = self.pool.reserve(row.job.name, row.num_asked)
                if self.policy == "grow" and self.running and not self._can_grow([*self.running, row]):
                    self._release(row)
                    break
            budget -= row.num_fresh
            self.running.append(self.waiting.popleft())
        if together:
            self._width = max(row.num_fresh for row in self.running)
            first = self.running[0]
            first.num_asked = self._width * len(self.running)
            first.run = self.pool.reserve("batch", first.num_asked)

    def _can_grow(self, rows: list[Row]) -> bool:
        """Whether the longest of them could be copied, and beside it everybody grow for a while without a victim."""
        longest = max(row.num_asked for row in rows) + 1
        return self.pool.fits(longest) and self.pool.num_free >= longest + self.spare_slots * len(rows)

    def _grow(self) -> Moves:
        """Move everybody who runs to a run that is one token longer; who stands in the way is preempted."""
        moves = Moves()
        if self.batching == "static":
            self._width += 1
            self._move(self.running[0], self._width * len(self.running), moves)
            return moves
        position = 0
        while position < len(self.running):  # the list may become shorter under way
            row = self.running[position]
            try:
                self._move(row, row.num_asked + 1, moves)
                position += 1
            except PoolFull:
                victim = self.running.pop()
                self._release(victim)
                victim.num_discarded, victim.num_written = victim.num_written, 0
                self.waiting.appendleft(victim)
                moves.preempted.append(victim.job.name)
        return moves

    def _move(self, row: Row, num_slots: int, moves: Moves) -> None:
        old = row.run
        assert old is not None, "it runs"
        self._num_moves += 1
        row.run = self.pool.reserve(f"{row.job.name}, moved {self._num_moves} times", num_slots)
        moves.most_held = max(moves.most_held, self.pool.num_slots - self.pool.num_free)
        moves.num_copied += row.num_asked
        self.pool.release(old.request_id)
        row.num_asked = num_slots

    def _work(self, rows: list[Row]) -> tuple[int, int]:
        """Tokens that are computed, and tokens of context that are read for them."""
        if self.batching == "iteration":
            return sum(row.num_fresh for row in rows), sum(row.num_written + row.num_fresh for row in rows)
        # Every row of a batch is as wide as the widest, whoever has ended included.
        widest = max(row.num_fresh for row in rows)
        longest = self._width if self.policy == "grow" else max(row.num_written + row.num_fresh for row in rows)
        return widest * len(self.running), longest * len(self.running)

    def _slots(self, rows: list[Row]) -> Slots:
        """The shares of the pool; `rows` are those that had not ended before this step."""
        runs = [(row.run, row.num_asked) for row in self.running if row.run is not None]
        held = sum(run.num_slots for run, _ in runs)
        rounding = held - sum(asked for _, asked in runs)
        live = sum(row.num_written for row in rows)
        grows = self.policy == "grow"
        reserved = 0 if grows else sum(row.job.num_final_tokens - row.num_written for row in rows)
        needed = 0
        if self.waiting:
            head = self.waiting[0]
            needed = head.num_fresh if grows else self.reserved_slots(head.job)
        gaps = self.pool.gaps
        external = sum(gap for gap in gaps if gap < needed)
        slots = Slots(live, reserved, held - live - reserved, external, sum(gaps) - external, rounding)
        assert slots.live + slots.reserved + slots.internal + slots.external + slots.free == self.pool.num_slots
        return slots

    def _leave(self) -> None:
        """Whoever has ended gives its run back; in a static batch all do at once."""
        if self.batching == "static" and not all(row.finished for row in self.running):
            return
        for row in self.running:
            if row.finished:
                self._is_tight = False
                if row.run is not None:
                    self._release(row)
        self.running = [row for row in self.running if not row.finished]

    def _release(self, row: Row) -> None:
        assert row.run is not None, "it has one"
        self.pool.release(row.run.request_id)
        row.run = None
