"""What spare blocks at admission buy: recomputed tokens, live share and steps, for several `spare_blocks_per_seq`.

    python benchmarks/admission.py > benchmarks/results/admission.md

No model runs: the scheduler is driven with drawn lengths, and every sequence ends at the length that was drawn for it.
Prompts and outputs are lognormal around 200 and 250 tokens, as in chat traffic; the pool is small against the demand,
since a pool with room for everybody never preempts.
"""

import random
import time
from dataclasses import dataclass

from paged import SamplingParams, __version__
from paged.request import Request
from paged.scheduler import Scheduler

BLOCK_SIZE = 16
MAX_LEN = 2048


@dataclass(frozen=True)
class Workload:
    """Requests that all wait at the start."""

    num_requests: int
    num_slots: int
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and of each output."""
        rng = random.Random(self.seed)

        def draw(median: float) -> int:
            return max(4, min(MAX_LEN // 2, round(rng.lognormvariate(0, 0.8) * median)))

        return [(draw(200), draw(250)) for _ in range(self.num_requests)]


def simulate(workload: Workload, spare: int) -> tuple[int, float, float, float]:
    """Steps, recomputed tokens over new ones, average live share of the pool, microseconds to plan a step."""
    scheduler = Scheduler(
        num_blocks=workload.num_slots // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        spare_blocks_per_seq=spare,
    )
    lengths = workload.lengths()
    for i, (prompt, output) in enumerate(lengths):
        # The engine does not know the length in advance: the request asks for the most and stops when it stops.
        request = Request(
            str(i),
            [1] * prompt,
            SamplingParams(max_tokens=output),
            block_table=scheduler.new_block_table(),
            seed=0,
            max_tokens=output,
        )
        scheduler.add(request)
    steps, live, planning = 0, 0, 0.0
    while True:
        started = time.perf_counter()
        step = scheduler.schedule()
        planning += time.perf_counter() - started
        if step is None:
            break
        steps += 1
        live += sum(row.end for row in step.rows)
        scheduler.update(step, [1] * len(step.rows))
    new = sum(prompt + output - 1 for prompt, output in lengths)
    return steps, scheduler.num_recomputed_tokens / new, live / steps / workload.num_slots, planning / steps * 1e6


def main() -> None:
    """Print a table for each workload."""
    print(f"paged {__version__}, block size {BLOCK_SIZE}, no model\n")
    for workload in (Workload(400, 32_768), Workload(300, 8_192)):
        print(f"{workload.num_requests} requests on {workload.num_slots:,} slots, seed {workload.seed}\n")
        print("| spare blocks per sequence | steps | recomputed | live, average | plan a step |")
        print("| --- | --- | --- | --- | --- |")
        for spare in (0, 1, 2, 4):
            steps, recomputed, live, microseconds = simulate(workload, spare)
            print(f"| {spare} | {steps:,} | {recomputed:.1%} | {live:.1%} | {microseconds:.0f} µs |")
        print()


if __name__ == "__main__":
    main()
