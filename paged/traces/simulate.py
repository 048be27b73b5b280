"""The real scheduler and block rooms over a trace, with made-up tokens and no model.

    trace ---arrivals---> Scheduler.schedule -> Step -> a cost for its time -> Scheduler.update -> ...

Everything that decides about memory is what the engine runs: admission, chunking, preemption, copy-on-write, the prefix
cache. What is left out is the model, so a sequence ends when the trace says so; and that steps are planned ahead of
the one that runs, so the clock stands still while a step is planned.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from paged.request import Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.step import Step
from paged.traces.cost import StepCost
from paged.traces.ledger import Ledger
from paged.traces.records import RequestRecords, Simulation, StepRecords
from paged.traces.trace import PIECE_SPAN, Trace, TraceError, TraceRequest

# Requests that are made before it is their turn. The scheduler looks at the head of its queue only, so more of them
# would take memory and change nothing.
MOST_QUEUED = 64
# Ids of a sample's tokens lie this far from those of the sample before it.
SAMPLE_SPAN = PIECE_SPAN << 42


@dataclass(frozen=True, kw_only=True)
class PagedSettings:
    """What the scheduler gets; names and defaults are the engine's (`paged.config`).

    Args:
        num_blocks: of the pool, the null and the trash block included.
        enable_prefix_caching: None for yes if two prompts of the trace have a piece in common.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = None
    spare_blocks_per_seq: int = 1


def simulate(trace: Trace, settings: PagedSettings, cost: StepCost, *, progress: bool = False) -> Simulation:
    """Run the paged scheduler over a trace.

    Args:
        trace: the workload.
        settings: of the pool and the scheduler.
        cost: of a step; decides when it ends, and so who has arrived before the next.
        progress: a bar, if somebody looks.

    Returns:
        What became of each request, and what each step did. Requests that can never fit the pool, or are longer than
        max_model_len, are refused and counted.

    Raises:
        TraceError: all requests are refused, or the pool is too small for any.

    Example: two requests through nine blocks of four. The second one is short, and gone after two steps.
        >>> from paged.traces.trace import request_of
        >>> trace = Trace("two", (request_of(0, 5, 4, number=0), request_of(0, 3, 2, number=1)))
        >>> second = StepCost(name="a second a step", per_step=1, per_token=0, per_context_token=0, per_sequence=0)
        >>> run = simulate(trace, PagedSettings(num_blocks=9, block_size=4), second)
        >>> run.requests.finished.tolist(), run.steps.num_tokens.tolist()
        ([4.0, 2.0], [8, 2, 1, 1])
        >>> run.steps.slots.tolist()[0]       # free, tokens, reserved, internal, external, overhead, cached
        [16, 8, 4, 0, 0, 8, 0]
    """
    return _Run(trace, settings, cost, progress).run()


class _Run:
    """One simulation under way.

    Attributes:
        clock: seconds; the end of the last step.
        accepted: the requests that the scheduler took, by number of arrival.
    """

    def __init__(self, trace: Trace, settings: PagedSettings, cost: StepCost, progress: bool) -> None:
        self.trace, self.settings, self.cost, self.progress = trace, settings, cost, progress
        caching = settings.enable_prefix_caching
        self.caching = trace.can_share if caching is None else caching
        if settings.max_num_batched_tokens < settings.max_num_seqs:
            raise TraceError(
                f"max_num_batched_tokens={settings.max_num_batched_tokens} is less than "
                f"max_num_seqs={settings.max_num_seqs}: a step could not hold one token of every sequence"
            )
        try:
            self.scheduler = Scheduler(
                num_blocks=settings.num_blocks,
                block_size=settings.block_size,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                enable_prefix_caching=self.caching,
                spare_blocks_per_seq=settings.spare_blocks_per_seq,
            )
        except ValueError as error:
            raise TraceError(str(error)) from error
        # A request whose samples share a block that is not full makes counting slower; most traces have none.
        self.shares = any(request.num_samples > 1 for request in trace)
        self.arrivals = [request.arrival for request in trace]
        count = len(trace)
        self.num_prompt_tokens, self.num_output_tokens = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.num_cached_tokens, self.num_preemptions = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.ledger = Ledger(self.scheduler, self.num_prompt_tokens, self.num_output_tokens)
        self.clock = 0.0
        self.accepted: list[int] = []
        self.live: dict[int, Request] = {}
        self.num_refused = self.num_fed = self.num_arrived = 0
        self.steps = array("d")

    def run(self) -> Simulation:
        """All steps."""
        scheduler = self.scheduler
        zeros = [0] * self.settings.max_num_seqs
        with tqdm(total=len(self.trace), unit=" requests", disable=None if self.progress else True) as bar:
            while True:
                self._feed()
                step = scheduler.schedule()
                if step is None:
                    if self.num_fed == len(self.trace):
                        break
                    self.clock = max(self.clock, self.arrivals[self.num_fed])
                    continue
                self._note(step)
                scheduler.update(step, self._sampled(step) if self.caching else zeros)
                self._forget(bar)
        return self._result()

    def _feed(self) -> None:
        """Hand the scheduler who has arrived, as long as its queue is short."""
        while self.num_arrived < len(self.arrivals) and self.arrivals[self.num_arrived] <= self.clock:
            self.num_arrived += 1
        while self.num_fed < self.num_arrived and len(self.scheduler.waiting) < MOST_QUEUED:
            wanted = self.trace.requests[self.num_fed]
            if self._accept(wanted):
                self.accepted.append(self.num_fed)
            else:
                self.num_refused += 1
            self.num_fed += 1

    def _accept(self, wanted: TraceRequest) -> bool:
        number, longest = len(self.accepted), self.settings.max_model_len
        num_prompt, num_output = wanted.num_prompt_tokens, wanted.num_output_tokens
        if longest is not None and num_prompt + num_output > longest:
            return False
        request = Request(
            str(number),
            # Without a prefix cache nobody looks at a token, and so many zeros are quicker to make.
            wanted.prompt_token_ids() if self.caching else (0,) * num_prompt,
            SamplingParams(n=wanted.num_samples),
            block_table=self.scheduler.new_block_table(),
            seed=0,
            max_tokens=num_output,
        )
        try:
            self.scheduler.add(request)
        except ValueError:
            return False
        self.num_prompt_tokens[number], self.num_output_tokens[number] = num_prompt, num_output
        self.live[number] = request
        return True

    def _note(self, step: Step) -> None:
        """Write a step down, and let its time pass."""
        num_waiting = len(self.scheduler.waiting) + self.num_arrived - self.num_fed
        num_tokens = step.num_tokens if len(step.rows[-1].token_ids) > 1 else len(step.rows)
        num_context_tokens = self.ledger.note(step, shares=self.shares)
        seconds = self.cost.seconds(
            num_tokens=num_tokens,
            num_context_tokens=num_context_tokens,
            num_sequences=len(step.rows),
            num_copied_tokens=len(step.copies) * self.settings.block_size,
        )
        num_running = len(self.scheduler.running)
        assert self.shares or len(step.rows) == num_running, "who holds memory computes something"
        row = (self.clock, seconds, num_tokens, num_context_tokens, len(step.rows), num_running, num_waiting)
        self.steps.extend(row)
        self.clock += seconds

    def _sampled(self, step: Step) -> Sequence[int]:
        """The tokens that the trace says come next: a prompt that quotes an answer has the same ones."""
        tokens = []
        for row in step.rows:
            if row.samples:
                wanted = self.trace.requests[self.accepted[row.arrival]]
                token = wanted.answer.seed * PIECE_SPAN + row.end - wanted.num_prompt_tokens
                first = row.sequence_index
                tokens += [token + (first + i) * SAMPLE_SPAN for i in range(len(row.samples))]
        return tokens

    def _forget(self, bar: "tqdm[Any]") -> None:
        """Keep two numbers of the requests that have ended."""
        if len(self.live) < 2 * (len(self.scheduler.running) + len(self.scheduler.waiting)) + MOST_QUEUED:
            return
        ended = [number for number, request in self.live.items() if request.is_finished]
        for number in ended:
            request = self.live.pop(number)
            self.num_cached_tokens[number] = request.num_cached_tokens or 0
            self.num_preemptions[number] = request.num_preemptions
        bar.update(len(ended))

    def _result(self) -> Simulation:
        for number, request in self.live.items():
            self.num_cached_tokens[number] = request.num_cached_tokens or 0
            self.num_preemptions[number] = request.num_preemptions
        if not self.accepted:
            raise TraceError(
                f"every request of {self.trace.name} was refused: the pool has {self.scheduler.pool.num_usable} blocks "
                f"of {self.settings.block_size} to use, max_model_len is {self.settings.max_model_len}"
            )
        self.ledger.add_up()
        columns = np.frombuffer(self.steps).reshape(-1, 7)
        start, seconds = columns[:, 0].copy(), columns[:, 1].copy()
        counts = columns[:, 2:].astype(np.int64)
        end, count, slots = start + seconds, len(self.accepted), self.ledger.slots
        assert (self.ledger.last_step[:count] >= 0).all(), "everybody who was accepted ends"
        zeros = np.zeros(len(start), np.int64)
        usable = self.scheduler.pool.num_usable
        held = slots[:, 1:4].sum(axis=1)
        assert held.max() <= usable * self.settings.block_size
        return Simulation(
            policy="paged",
            trace=self.trace.describe(),
            notes=self.trace.notes,
            num_slots=self.settings.num_blocks * self.settings.block_size,
            block_size=self.settings.block_size,
            kv_bytes_per_token=self.cost.kv_bytes_per_token,
            requests=RequestRecords(
                index=np.array(self.accepted, np.int64),
                arrival=np.array([self.arrivals[index] for index in self.accepted]),
                first_token=end[self.ledger.first_step[:count]],
                finished=end[self.ledger.last_step[:count]],
                num_prompt_tokens=self.num_prompt_tokens[:count],
                num_output_tokens=self.num_output_tokens[:count],
                num_cached_tokens=self.num_cached_tokens[:count],
                num_preemptions=self.num_preemptions[:count],
            ),
            steps=StepRecords(
                start,
                seconds,
                num_tokens=counts[:, 0],
                num_context_tokens=counts[:, 1],
                num_sequences=counts[:, 2],
                num_running=counts[:, 3],
                num_waiting=counts[:, 4],
                slots=slots,
                rounding=zeros,
                num_copied_tokens=zeros,
                most_held=held,
            ),
            num_preemptions=self.scheduler.num_preemptions,
            num_recomputed_tokens=self.scheduler.num_recomputed_tokens,
            num_cached_tokens=int(self.num_cached_tokens.sum()),
            num_refused=self.num_refused,
        )
