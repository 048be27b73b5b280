"""The real scheduler without a model: `reference.tagged_memory` stands in for the pool and checks every read.

The "model" is a function of all tokens before, so a schedule that reads a wrong slot is caught at the
read, and one that loses or doubles a token gives other tokens than running each request alone.

A step is executed when it is planned, as by a device that runs steps in order. If the next one is planned ahead, the
scheduler learns only afterwards what was sampled, as from an engine.
"""

from collections import Counter
from dataclasses import dataclass, field

from paged.blocks import NULL_BLOCK, CachedBlock
from paged.request import Branch, FinishReason, Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.step import Step
from reference.tagged_memory import TaggedMemory

VOCAB = 50


def next_token(prefix: list[int], index: int = 0) -> int:
    """A stand-in for a model and its noise: some function of all tokens and of which sample it is."""
    state = len(prefix) + 17 * index
    for token in prefix:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCAB


def alone(prompt: list[int], max_tokens: int, eos: int | None, index: int = 0) -> list[int]:
    """The tokens of one sample with nothing beside it."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, index))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


def choose(beams: list[list[int]], width: int) -> list[Branch]:
    """A stand-in for the choice of beams: any of them may be continued by any number, or by none."""
    state = next_token([token for beam in beams for token in beam])
    parents = [(state // (i + 1)) % len(beams) for i in range(width)]
    return [Branch(parent, next_token(beams[parent], i)) for i, parent in enumerate(parents)]


def beams_alone(prompt: list[int], max_tokens: int, width: int) -> list[list[int]]:
    """The tokens of all beams with nothing beside them."""
    beams = [list(prompt)]
    for _ in range(max_tokens):
        beams = [[*beams[branch.parent], branch.token] for branch in choose(beams, width)]
    return [beam[len(prompt) :] for beam in beams]


@dataclass
class Wanted:
    """A request of a simulation: when it comes, and when it is aborted, in steps."""

    prompt: list[int]
    max_tokens: int
    arrives: int = 0
    aborted: int | None = None
    n: int = 1
    priority: int = 0
    salt: str | None = None
    beams: bool = False  # n beams instead of n samples
    simple: bool = True  # nothing in its wishes makes the next step wait


@dataclass
class Simulation:
    """One run of a scheduler over tagged memory, checked at every step."""

    scheduler: Scheduler
    wanted: list[Wanted]
    eos: int | None = None
    ahead: bool = False  # plan a step before the tokens of the one in flight are known, where the scheduler can
    num_ahead: int = 0
    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    num_steps: int = 0

    def run(self) -> "Simulation":
        scheduler = self.scheduler
        host_pool = scheduler.kv.host_pool
        num_host_blocks = 0 if host_pool is None else host_pool.num_blocks
        self.memory = TaggedMemory(scheduler.pool.num_blocks, scheduler.block_size, num_host_blocks)
        self.tables: dict[int, list[int]] = {}
        self.indices: dict[int, int] = {}  # row -> which sample of its request it holds
        self.latest: dict[int, int] = {}  # row -> the token sampled last for it, which the device knows at once
        flights: list[tuple[Step, list[int]]] = []  # planned and executed, not yet taken in; two at most
        self.requests: dict[str, Request] = {}
        work = sum(w.arrives + len(w.prompt) + w.n * w.max_tokens for w in self.wanted)
        limit = 50 + 4 * work * len(self.wanted)
        last_arrival = max((w.arrives for w in self.wanted), default=0)
        while scheduler.has_unfinished or self.num_steps <= last_arrival:
            self._arrivals_and_aborts()
            if not flights and (step := scheduler.schedule()) is not None:
                flights.append((step, self._execute(step)))
            if self.ahead and flights and (step := scheduler.schedule_ahead(flights[0][0])) is not None:
                flights.append((step, self._execute(step)))
                self.num_ahead += 1
            self._check_bookkeeping()
            if flights:
                self._take_in(*flights.pop(0))
            self._check_bookkeeping()
            self.num_steps += 1
            assert self.num_steps < limit, "somebody starves"
        return self

    def _take_in(self, step: Step, sampled: list[int]) -> None:
        """The scheduler learns what a step brought."""
        beams: dict[str, list[int]] = {}
        for owner in self.scheduler.update(step, sampled):
            if owner is None:
                assert self.ahead, "nobody ends while a step runs here"
                continue
            request, sequence = owner
            if request.is_beam_search:
                beams.setdefault(request.request_id, []).append(sequence.index)
            elif sequence.is_finished:
                self.outputs[request.request_id, sequence.index] = sequence.output_token_ids
        for name, computed in beams.items():
            self._branch(self.requests[name], computed)

    def check_outputs(self) -> None:
        """Every request ended, with the tokens it would have had alone."""
        for i, wanted in enumerate(self.wanted):
            if wanted.beams:
                answers = beams_alone(wanted.prompt, wanted.max_tokens, wanted.n)
            else:
                answers = [alone(wanted.prompt, wanted.max_tokens, self.eos, index) for index in range(wanted.n)]
            for index, expected in enumerate(answers):
                got = self.requests[str(i)].sequences[index].output_token_ids
                if str(i) in self.aborted:
                    # A beam that was dropped later is found in nobody's answer.
                    assert wanted.beams or got == expected[: len(got)], "an aborted request had wrong tokens"
                else:
                    assert self.outputs[str(i), index] == got == expected, f"request {i}, sample {index}"
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable, "a block leaked"
        self._check_prefix_cache()
        host_pool = self.scheduler.kv.host_pool
        assert host_pool is None or host_pool.num_free == host_pool.num_usable, "a host block leaked"

    def _check_prefix_cache(self) -> None:
        """Whatever can be found holds what it is found as: the tokens of its chain, from the first block on."""
        cache, size = self.scheduler.kv.prefix_cache, self.scheduler.block_size
        for entry in () if cache is None else cache._by_block.values():
            chain = [entry]
            while isinstance(chain[0].parent, CachedBlock):
                chain.insert(0, chain[0].parent)
            tokens = [token for found in chain for token in found.token_ids]
            table = [NULL_BLOCK] * (len(chain) - 1) + [entry.block]
            self.memory.read("the prefix cache", table, tokens, first_visible=len(tokens) - size)

    def _arrivals_and_aborts(self) -> None:
        for i, wanted in enumerate(self.wanted):
            if wanted.arrives == self.num_steps:
                request = Request(
                    str(i),
                    wanted.prompt,
                    SamplingParams(
                        max_tokens=wanted.max_tokens,
                        n=1 if wanted.beams else wanted.n,
                        logprobs=None if wanted.simple else 0,
                    ),
                    block_table=self.scheduler.new_block_table(),
                    seed=0,  # sample i has seed + i, which tells the stand-in model which one it is
                    max_tokens=wanted.max_tokens,
                    eos_token_ids=frozenset() if self.eos is None else frozenset([self.eos]),
                    priority=wanted.priority,
                    cache_salt=wanted.salt,
                    beam_width=wanted.n if wanted.beams else None,
                )
                self.requests[str(i)] = request
                self.scheduler.add(request)
            if wanted.aborted is not None and self.num_steps == wanted.arrives + wanted.aborted:
                request = self.scheduler.abort(str(i))
                if request is not None:
                    assert request.is_finished
                    assert FinishReason.ABORT in {sequence.finish_reason for sequence in request.sequences}
                    self.aborted.add(str(i))
                    self._check_bookkeeping()

    def _branch(self, request: Request, computed: list[int]) -> None:
        """All beams were computed: choose how they go on."""
        is_first = request.sequences[0].num_output_tokens == 0
        assert computed == ([0] if is_first else list(range(len(request.sequences)))), "beams out of step"
        live = [request.sequences[index].token_ids for index in computed]
        self.scheduler.branch(request, choose(live, len(request.sequences)))
        if request.sequences[0].num_output_tokens == request.max_tokens:
            self.scheduler.finish(request, FinishReason.LENGTH)
            for sequence in request.sequences:
                self.outputs[request.request_id, sequence.index] = sequence.output_token_ids

    def _check_step(self, step: Step) -> None:
        """What every Step promises."""
        assert step.rows, "a step that computes nothing: the queue would never move"
        assert step.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(step.rows) <= self.scheduler.max_num_seqs
        assert len({row.row for row in step.rows}) == len(step.rows), "two sequences in one row"
        lengths = [len(row.token_ids) for row in step.rows]
        assert all(n == 1 for n in lengths[: step.num_single])
        assert all(n > 1 for n in lengths[step.num_single :])
        names = [row.request_id for row in step.rows]
        assert not set(step.preempted) & set(names), "preempted and scheduled at once"
        new_rows = {admission.row for admission in step.admissions}
        admitted = {r.request_id for r in self.scheduler.running for s in r.sequences if s.row in new_rows}
        assert admitted <= set(names), "admitted to compute nothing: nobody would know if the step failed"
        assert not (step.swap_outs and step.swap_ins), "a host block could be read and written at once"
        for row in step.rows:
            request = self.requests[row.request_id]
            last = len(request.prompt_token_ids) + request.max_tokens - 1
            assert row.end <= last, "computed what nobody samples from: the last token of all"

    def _execute(self, step: Step) -> list[int]:
        """Replay the step's changes on rows of our own, write, read, and sample."""
        self._check_step(step)
        for copy in step.swap_outs:
            self.memory.swap_out(copy.source, copy.target)
        for copy in step.swap_ins:
            self.memory.swap_in(copy.source, copy.target)
        for copy in step.copies:
            self.memory.copy_block(copy.source, copy.target)
        for admission in step.admissions:
            self.tables[admission.row] = []
            self.indices[admission.row] = admission.seed
        sampled = []
        all_known = {}  # row -> its tokens up to the last one computed, as the device knows them
        for row in step.rows:
            table = self.tables[row.row]
            change = row.table_change
            if change is not None:
                assert change.first_index <= len(table), "a hole in the table"
                table[change.first_index :] = change.blocks
            sequence = self.requests[row.request_id].sequences[row.sequence_index]
            assert table == sequence.block_table.blocks, "the replayed table is not the sequence's"
            known = sequence.token_ids[: row.start]
            known += [self.latest[row.row] if token is None else token for token in row.token_ids]
            assert len(known) == row.end
            all_known[row.row] = known
            first = self._first_visible(row.start)
            self.memory.write(row.request_id, table, known, row.start, row.end, first)
        for row in step.rows:  # attention reads after every row has written
            sequence = self.requests[row.request_id].sequences[row.sequence_index]
            known = all_known[row.row]
            self.memory.read(row.request_id, self.tables[row.row], known, self._first_visible(row.start))
            if row.samples:
                assert row.end == sequence.length, "sampled before the end of what is known"
            for sample in row.samples:
                sampled.append(next_token(known, self.indices[sample.row]))
                self.latest[sample.row] = sampled[-1]
        return sampled

    def _first_visible(self, position: int) -> int:
        """The first position that the token at `position` sees."""
        window = self.scheduler.kv.sliding_window
        return 0 if window is None else max(0, position - window + 1)

    def _check_bookkeeping(self) -> None:
        """Reference counts are table entries; nothing is lost; order is kept."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        entries: Counter[int] = Counter()
        for request in (*scheduler.running, *scheduler.waiting):
            for sequence in request.unfinished:
                entries.update(block for block in sequence.block_table.blocks if block != NULL_BLOCK)
                assert sequence.num_computed_tokens <= sequence.num_tokens
                assert sequence.num_pending_tokens <= (request in scheduler.running and self.ahead)
                held = len((sequence.host_table or sequence.block_table).blocks) * scheduler.block_size
                assert sequence.num_computed_tokens <= held
        assert pool.trash_block not in entries
        kept = set(pool.cached_blocks)
        for block in range(1, pool.trash_block):
            assert pool.ref_count(block) == entries[block]
            if not entries[block] and block not in kept:
                self.memory.forget(block)
        assert pool.num_free + len(entries) == pool.num_usable
        self._check_host()
        for queue in (scheduler.running, scheduler.waiting):
            order = [(r.priority * scheduler.by_priority, int(r.request_id)) for r in queue]
            assert order == sorted(order), "somebody overtook"
        rows = [s.row for r in scheduler.running for s in r.sequences if not s.is_finished]
        assert None not in rows
        assert all(s.row is None for r in scheduler.waiting for s in r.sequences)

    def _check_host(self) -> None:
        """The same for the host's blocks; what is there is not on the device."""
        pool = self.scheduler.kv.host_pool
        entries: Counter[int] = Counter()
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            for sequence in request.sequences:
                if sequence.host_table is not None:
                    assert request in self.scheduler.waiting
                    assert not sequence.is_finished
                    assert not sequence.block_table.blocks
                    entries.update(block for block in sequence.host_table.blocks if block != NULL_BLOCK)
        if pool is None:
            assert not entries
            return
        for block in range(1, pool.trash_block):
            assert pool.ref_count(block) == entries[block]
            if not entries[block]:
                self.memory.forget_on_host(block)
        assert pool.num_free + len(entries) == pool.num_usable
