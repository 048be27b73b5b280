"""The real scheduler without a model: `reference.tagged_memory` stands in for the pool and checks every read.

The "model" is a function of all tokens before, so a schedule that reads a wrong slot is caught at the
read, and one that loses or doubles a token gives other tokens than running each request alone.
"""

from collections import Counter
from dataclasses import dataclass, field

from paged.blocks import NULL_BLOCK
from paged.request import FinishReason, Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.step import Step
from reference.tagged_memory import TaggedMemory

VOCAB = 50


def next_token(prefix: list[int]) -> int:
    """A stand-in for a model: some function of all tokens."""
    state = len(prefix)
    for token in prefix:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCAB


def alone(prompt: list[int], max_tokens: int, eos: int | None) -> list[int]:
    """The tokens of one request with nothing beside it."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


@dataclass
class Wanted:
    """A request of a simulation: when it comes, and when it is aborted, in steps."""

    prompt: list[int]
    max_tokens: int
    arrives: int = 0
    aborted: int | None = None


@dataclass
class Simulation:
    """One run of a scheduler over tagged memory, checked at every step."""

    scheduler: Scheduler
    wanted: list[Wanted]
    eos: int | None = None
    outputs: dict[str, list[int]] = field(default_factory=dict)
    aborted: dict[str, list[int]] = field(default_factory=dict)
    num_steps: int = 0

    def run(self) -> "Simulation":
        scheduler = self.scheduler
        self.memory = TaggedMemory(scheduler.pool.num_blocks, scheduler.block_size)
        self.tables: dict[int, list[int]] = {}
        self.requests: dict[str, Request] = {}
        limit = 50 + 4 * sum(w.arrives + len(w.prompt) + w.max_tokens for w in self.wanted) * len(self.wanted)
        last_arrival = max((w.arrives for w in self.wanted), default=0)
        while scheduler.has_unfinished or self.num_steps <= last_arrival:
            self._arrivals_and_aborts()
            step = scheduler.schedule()
            if step is not None:
                assert step.rows, "a step that computes nothing: the queue would never move"
                self._check_step(step)
                sampled = self._execute(step)
                for request, sequence in scheduler.update(step, sampled):
                    if sequence.is_finished:
                        self.outputs[request.request_id] = sequence.output_token_ids
            self._check_bookkeeping()
            self.num_steps += 1
            assert self.num_steps < limit, "somebody starves"
        return self

    def check_outputs(self) -> None:
        """Every request ended, with the tokens it would have had alone."""
        for i, wanted in enumerate(self.wanted):
            expected = alone(wanted.prompt, wanted.max_tokens, self.eos)
            if str(i) in self.aborted:
                got = self.aborted[str(i)]
                assert got == expected[: len(got)], "an aborted request had wrong tokens"
            else:
                assert self.outputs[str(i)] == expected, f"request {i}"
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable, "a block leaked"

    def _arrivals_and_aborts(self) -> None:
        for i, wanted in enumerate(self.wanted):
            if wanted.arrives == self.num_steps:
                request = Request(
                    str(i),
                    wanted.prompt,
                    SamplingParams(max_tokens=wanted.max_tokens),
                    block_table=self.scheduler.new_block_table(),
                    seed=i,
                    max_tokens=wanted.max_tokens,
                    eos_token_ids=frozenset() if self.eos is None else frozenset([self.eos]),
                )
                self.requests[str(i)] = request
                self.scheduler.add(request)
            if wanted.aborted is not None and self.num_steps == wanted.arrives + wanted.aborted:
                request = self.scheduler.abort(str(i))
                if request is not None:
                    (sequence,) = request.sequences
                    assert sequence.finish_reason is FinishReason.ABORT
                    self.aborted[str(i)] = sequence.output_token_ids

    def _check_step(self, step: Step) -> None:
        """What every Step promises."""
        assert step.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(step.rows) <= self.scheduler.max_num_seqs
        assert len({row.row for row in step.rows}) == len(step.rows), "two sequences in one row"
        lengths = [len(row.token_ids) for row in step.rows]
        assert all(n == 1 for n in lengths[: step.num_single])
        assert all(n > 1 for n in lengths[step.num_single :])
        names = [row.request_id for row in step.rows]
        assert not set(step.preempted) & set(names), "preempted and scheduled at once"

    def _execute(self, step: Step) -> list[int]:
        """Replay the step's changes on rows of our own, write, read, and sample."""
        for copy in step.copies:
            self.memory.copy_block(copy.source, copy.target)
        for admission in step.admissions:
            self.tables[admission.row] = []
        sampled = []
        for row in step.rows:
            table = self.tables[row.row]
            change = row.table_change
            assert change.first_index <= len(table), "a hole in the table"
            table[change.first_index :] = change.blocks
            sequence = self.requests[row.request_id].sequences[row.index]
            assert table == sequence.block_table.blocks, "the replayed table is not the sequence's"
            known = sequence.token_ids[: row.start] + list(row.token_ids)
            self.memory.write(row.request_id, table, known, row.start, row.end)
        for row in step.rows:  # attention reads after every row has written
            sequence = self.requests[row.request_id].sequences[row.index]
            known = sequence.token_ids[: row.end]
            self.memory.read(row.request_id, self.tables[row.row], known)
            if row.samples:
                assert row.end == sequence.num_tokens, "sampled before the end of what is known"
                sampled.append(next_token(known))
        return sampled

    def _check_bookkeeping(self) -> None:
        """Reference counts are table entries; nothing is lost; order is kept."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        entries: Counter[int] = Counter()
        for request in (*scheduler.running, *scheduler.waiting):
            for sequence in request.sequences:
                entries.update(sequence.block_table.blocks)
                assert sequence.num_computed_tokens <= sequence.num_tokens
                held = len(sequence.block_table.blocks) * scheduler.block_size
                assert sequence.num_computed_tokens <= held
        assert NULL_BLOCK not in entries
        assert pool.trash_block not in entries
        for block in range(1, pool.trash_block):
            assert pool.ref_count(block) == entries[block]
            if not entries[block]:
                self.memory.forget(block)
        assert pool.num_free + len(entries) == pool.num_usable
        for queue in (scheduler.running, scheduler.waiting):
            arrivals = [(self.wanted[int(r.request_id)].arrives, int(r.request_id)) for r in queue]
            assert arrivals == sorted(arrivals), "somebody overtook"
        rows = [s.row for r in scheduler.running for s in r.sequences if not s.is_finished]
        assert None not in rows
        assert all(s.row is None for r in scheduler.waiting for s in r.sequences)
