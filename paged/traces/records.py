"""What a simulation gives: arrays with a number for each request, and arrays with a number for each step.

A trace of an hour has a million steps, so nothing here is an object for each of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from paged.memory.states import SlotState

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RequestRecords:
    """One entry for each request that was served, in order of arrival.

    Attributes:
        index: which request of the trace.
        arrival, first_token, finished: seconds of the simulation's clock.
        num_prompt_tokens, num_output_tokens: of one sample.
        num_cached_tokens: prompt tokens that were found computed.
        num_preemptions: how often it lost its memory.

    Example: two requests; the second one waits for a second.
        >>> none, five = np.zeros(2, np.int64), np.full(2, 5)
        >>> first, last = np.array([1.0, 2.0]), np.array([3.0, 4.0])
        >>> records = RequestRecords(none, 0.0 * first, first, last, five, five, none, none)
        >>> records.ttft.tolist(), records.tpot.tolist(), records.normalised_latency.tolist()
        ([1.0, 2.0], [0.5, 0.5], [0.6, 0.8])
    """

    index: Ints
    arrival: Floats
    first_token: Floats
    finished: Floats
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    num_cached_tokens: Ints
    num_preemptions: Ints

    @property
    def ttft(self) -> Floats:
        """Seconds to the first token."""
        return self.first_token - self.arrival

    @property
    def latency(self) -> Floats:
        """Seconds from arrival to the last token."""
        return self.finished - self.arrival

    @property
    def tpot(self) -> Floats:
        """Seconds for each further token; of requests with one token only, not a number."""
        more = np.where(self.num_output_tokens > 1, self.num_output_tokens - 1, np.nan)
        return (self.finished - self.first_token) / more

    @property
    def normalised_latency(self) -> Floats:
        """Seconds for each token of the output, waiting included: the paper's measure (section 6.1)."""
        return self.latency / self.num_output_tokens


@dataclass(frozen=True)
class StepRecords:
    """One entry for each step.

    Attributes:
        start, seconds: of the simulation's clock.
        num_tokens, num_context_tokens, num_sequences: as in `StepCost.seconds`.
        num_running, num_waiting: requests.
        slots: [steps, states] slots of the pool in each `SlotState`; a row sums to the pool.
        rounding: of the internal slots, those that an allocator added to round up.
        num_copied_tokens: moved to a longer run.
        most_held: slots held at once, during such moves or after them.
    """

    start: Floats
    seconds: Floats
    num_tokens: Ints
    num_context_tokens: Ints
    num_sequences: Ints
    num_running: Ints
    num_waiting: Ints
    slots: Ints
    rounding: Ints
    num_copied_tokens: Ints
    most_held: Ints

    def __len__(self) -> int:
        return len(self.start)

    @property
    def shares(self) -> Floats:
        """[steps, states]: `slots` over the pool."""
        shares: Floats = self.slots / self.slots.sum(axis=1, keepdims=True)
        return shares

    @property
    def fullest(self) -> int:
        """The step during which most slots held tokens."""
        return int(self.slots[:, SlotState.TOKENS].argmax())


@dataclass(frozen=True)
class Simulation:
    """One policy over one trace.

    Attributes:
        policy: "paged", or what the contiguous pool reserved.
        trace: one line on the workload.
        notes: what was changed or left out of it; requests that were refused are counted here.
        num_slots, block_size: of the pool, all blocks included; the size is None without blocks.
        kv_bytes_per_token: of the model, if known.
        requests, steps: the records.
        num_preemptions, num_recomputed_tokens, num_cached_tokens: over the whole run.
        num_refused: requests that could never run.
    """

    policy: str
    trace: str
    notes: tuple[str, ...]
    num_slots: int
    block_size: int | None
    kv_bytes_per_token: int | None
    requests: RequestRecords
    steps: StepRecords
    num_preemptions: int
    num_recomputed_tokens: int
    num_cached_tokens: int
    num_refused: int

    @property
    def queued(self) -> npt.NDArray[np.bool_]:
        """[steps] Whether somebody waited."""
        waited: npt.NDArray[np.bool_] = self.steps.num_waiting > 0
        return waited

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """[steps] Which of them means are over: those with a queue, or all if none had one.

        What a policy makes of a pool shows while somebody waits for it; ramp-up and drain show the workload.
        """
        return self.queued if self.queued.any() else np.ones(len(self.steps), np.bool_)

    def mean_shares(self) -> Floats:
        """[states]: mean share of the pool in each state over the `counted` steps."""
        means: Floats = self.steps.shares[self.counted].mean(axis=0)
        return means

    @property
    def paged_waste(self) -> float:
        """Of the slots in blocks that are held, the share that holds no token, at the fullest step."""
        slots = self.steps.slots[self.steps.fullest]
        held = slots[[SlotState.TOKENS, SlotState.RESERVED, SlotState.INTERNAL]].sum()
        return float(1 - slots[SlotState.TOKENS] / held)

    def summary(self) -> dict[str, Any]:
        """What `paged simulate --json` prints of a policy; milliseconds are of the simulation's clock."""
        steps, requests = self.steps, self.requests
        seconds = float(steps.start[-1] + steps.seconds[-1] - steps.start[0])
        shares = self.mean_shares()
        copied = int(steps.num_copied_tokens.sum())
        return {
            "policy": self.policy,
            "num_slots": self.num_slots,
            "block_size": self.block_size,
            "kv_bytes": None if self.kv_bytes_per_token is None else self.num_slots * self.kv_bytes_per_token,
            "num_requests": len(requests.index),
            "num_refused": self.num_refused,
            "num_steps": len(steps),
            "steps_with_queue": int(self.queued.sum()),
            "seconds": seconds,
            "requests_per_second": len(requests.index) / seconds,
            "output_tokens_per_second": float(requests.num_output_tokens.sum()) / seconds,
            "most_running": int(steps.num_running.max()),
            "mean_running": float(steps.num_running[self.counted].mean()),
            "means_over": "steps with a queue" if self.queued.any() else "all steps, since nobody waited",
            "mean_shares": {state.name.lower(): float(shares[state]) for state in SlotState},
            "shares_at_fullest": {state.name.lower(): float(steps.shares[steps.fullest, state]) for state in SlotState},
            "num_computed_tokens": int(steps.num_tokens.sum()),
            "num_recomputed_tokens": self.num_recomputed_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_preemptions": self.num_preemptions,
            "num_copied_tokens": copied,
            "copied_bytes": None if self.kv_bytes_per_token is None else copied * self.kv_bytes_per_token,
            "most_held_slots": int(steps.most_held.max()),
            "ttft_ms": percentiles(requests.ttft * 1e3),
            "tpot_ms": percentiles(requests.tpot * 1e3),
            "latency_ms": percentiles(requests.latency * 1e3),
            "normalised_latency_ms": float(requests.normalised_latency.mean() * 1e3),
        }


def percentiles(values: Floats) -> dict[str, float | None]:
    """Mean, median, 90th and 99th percentile of those that are numbers; None if none is.

    Example:
        >>> percentiles(np.array([1.0, 2.0, np.nan, 3.0]))
        {'mean': 2.0, 'p50': 2.0, 'p90': 2.8, 'p99': 2.98}
    """
    there = values[~np.isnan(values)]
    if not len(there):
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    ranks = {f"p{rank}": float(np.percentile(there, rank)) for rank in (50, 90, 99)}
    return {name: round(value, 9) for name, value in {"mean": float(there.mean()), **ranks}.items()}
