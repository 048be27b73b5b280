"""The same trace on the same slots without paging: `reference.contiguous`, with a clock.

Arrivals, the cost of a step and what is recorded are those of `paged.traces.simulate`, so that two runs differ in who
holds the memory and in nothing else.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from paged.memory.states import SlotState
from paged.traces.cost import StepCost
from paged.traces.records import Ints, RequestRecords, Simulation, StepRecords
from paged.traces.trace import Trace, TraceError
from reference.contiguous import ContiguousServer
from reference.served import Job, ServedStep

# Entries of a step that are whole numbers, before its shares of the pool.
COUNTS = (
    "num_tokens",
    "num_context_tokens",
    "num_sequences",
    "num_running",
    "num_waiting",
    "num_copied_tokens",
    "most_held",
)


@dataclass(frozen=True, kw_only=True)
class ContiguousSettings:
    """What the contiguous server gets; see `reference.contiguous.ContiguousServer`."""

    num_slots: int
    policy: str
    batching: str = "iteration"
    allocator: str = "first-fit"
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192

    @property
    def name(self) -> str:
        """What to call it.

        Example:
            >>> ContiguousSettings(num_slots=9, policy="max", batching="static", max_model_len=4).name
            'max, static'
        """
        parts = [self.policy]
        parts += [self.allocator] if self.allocator != "first-fit" else []
        parts += [self.batching] if self.batching != "iteration" else []
        return ", ".join(parts)


def serve(trace: Trace, settings: ContiguousSettings, cost: StepCost, *, progress: bool = False) -> Simulation:
    """Serve a trace from a contiguous pool.

    Args:
        trace: the workload. A request for n samples is n requests: nothing is shared without blocks.
        settings: of the pool and the policy.
        cost: of a step.
        progress: a bar, if somebody looks.

    Raises:
        TraceError: a policy that does not exist or does not fit the pool, or every request is refused.

    Example: the two requests of `simulate`'s example, on as many slots, in rows of 18.
        >>> from paged.traces.trace import request_of
        >>> trace = Trace("two", (request_of(0, 5, 4, number=0), request_of(0, 3, 2, number=1)))
        >>> second = StepCost(name="a second a step", per_step=1, per_token=0, per_context_token=0, per_sequence=0)
        >>> run = serve(trace, ContiguousSettings(num_slots=36, policy="max", max_model_len=18), second)
        >>> run.requests.finished.tolist(), run.steps.num_tokens.tolist()
        ([4.0, 2.0], [8, 2, 1, 1])
        >>> run.steps.slots.tolist()[0]       # free, tokens, reserved, internal, external, overhead, cached
        [0, 8, 4, 24, 0, 0, 0]
    """
    try:
        server = ContiguousServer(
            num_slots=settings.num_slots,
            policy=settings.policy,
            batching=settings.batching,
            allocator=settings.allocator,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )
    except ValueError as error:
        raise TraceError(str(error)) from error
    return _Run(trace, settings, cost, server).run(progress)


class _Run:
    """One run under way. A job's name is the number of the request and that of the sample."""

    def __init__(self, trace: Trace, settings: ContiguousSettings, cost: StepCost, server: ContiguousServer) -> None:
        self.trace, self.settings, self.cost, self.server = trace, settings, cost, server
        count = len(trace)
        self.first_token, self.finished = np.full(count, np.nan), np.full(count, np.nan)
        self.num_left = [request.num_samples for request in trace]
        self.num_preemptions = np.zeros(count, np.int64)
        self.refused = np.zeros(count, np.bool_)
        self.num_recomputed_tokens = self.num_fed = 0
        self.clock = 0.0
        self.times, self.counts, self.slots, self.rounding = array("d"), array("q"), array("q"), array("q")

    def run(self, progress: bool) -> Simulation:
        """All steps."""
        requests = self.trace.requests
        with tqdm(total=len(requests), unit=" requests", disable=None if progress else True) as bar:
            while True:
                while self.num_fed < len(requests) and requests[self.num_fed].arrival <= self.clock:
                    self._feed()
                step = self.server.step()
                if step is not None:
                    bar.update(self._note(step))
                elif self.num_fed == len(requests):
                    break
                else:
                    self.clock = max(self.clock, requests[self.num_fed].arrival)
        return self._result()

    def _feed(self) -> None:
        number, wanted = self.num_fed, self.trace.requests[self.num_fed]
        self.num_fed += 1
        try:
            for sample in range(wanted.num_samples):
                self.server.add(Job(f"{number} {sample}", wanted.num_prompt_tokens, wanted.num_output_tokens))
        except ValueError:
            self.refused[number] = True

    def _note(self, step: ServedStep) -> int:
        """Write a step down, and let its time pass; returns how many requests it ended."""
        seconds = self.cost.seconds(
            num_tokens=step.num_tokens,
            num_context_tokens=step.num_context_tokens,
            num_sequences=step.num_sequences,
            num_copied_tokens=step.num_copied_tokens,
        )
        self.times.extend((self.clock, seconds))
        self.counts.extend([getattr(step, name) for name in COUNTS])
        slots = step.slots
        states = dict.fromkeys(SlotState, 0) | {
            SlotState.FREE: slots.free,
            SlotState.TOKENS: slots.live,
            SlotState.RESERVED: slots.reserved,
            SlotState.INTERNAL: slots.internal,
            SlotState.EXTERNAL: slots.external,
        }
        assert sum(states.values()) == self.settings.num_slots, "every slot is in exactly one state"
        self.slots.extend(states.values())
        self.rounding.append(slots.rounding)
        self.clock += seconds
        self.num_recomputed_tokens += step.num_recomputed_tokens
        for name in step.started:
            number = int(name.split()[0])
            self.first_token[number] = np.fmin(self.first_token[number], self.clock)
        for name in step.preempted:
            self.num_preemptions[int(name.split()[0])] += 1
        num_ended = 0
        for name in step.finished:
            number = int(name.split()[0])
            self.finished[number] = self.clock
            self.num_left[number] -= 1
            num_ended += self.num_left[number] == 0
        return num_ended

    def _result(self) -> Simulation:
        served: Ints = np.flatnonzero(~self.refused)
        if not len(served):
            longest = self.settings.max_model_len
            raise TraceError(f"every request of {self.trace.name} was refused: max_model_len is {longest}")
        wanted = [self.trace.requests[index] for index in served]
        times = np.array(self.times).reshape(-1, 2)
        counts = np.array(self.counts, np.int64).reshape(-1, len(COUNTS))
        return Simulation(
            policy=self.settings.name,
            trace=self.trace.describe(),
            notes=self.trace.notes,
            num_slots=self.settings.num_slots,
            block_size=None,
            kv_bytes_per_token=self.cost.kv_bytes_per_token,
            requests=RequestRecords(
                index=served,
                arrival=np.array([request.arrival for request in wanted]),
                first_token=self.first_token[served],
                finished=self.finished[served],
                num_prompt_tokens=np.array([request.num_prompt_tokens for request in wanted], np.int64),
                num_output_tokens=np.array([request.num_output_tokens for request in wanted], np.int64),
                num_cached_tokens=np.zeros(len(served), np.int64),
                num_preemptions=self.num_preemptions[served],
            ),
            steps=StepRecords(
                start=times[:, 0],
                seconds=times[:, 1],
                slots=np.array(self.slots, np.int64).reshape(-1, len(SlotState)),
                rounding=np.array(self.rounding, np.int64),
                **{name: counts[:, column] for column, name in enumerate(COUNTS)},
            ),
            num_preemptions=int(self.num_preemptions.sum()),
            num_recomputed_tokens=self.num_recomputed_tokens,
            num_cached_tokens=0,
            num_refused=int(self.refused.sum()),
        )
