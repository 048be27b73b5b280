"""What planning a step costs, without a model: microseconds of Python, which no GPU makes faster.

    python benchmarks/bookkeeping.py > benchmarks/results/bookkeeping.md

One decode step of 256 running sequences, `schedule` and `update` together; the same with a hundred times the blocks in
the pool, and with ten thousand requests behind it; and the prefix lookup of a prompt of 32,768 tokens. Medians.
"""

import platform
import statistics
import time

from paged import SamplingParams, __version__
from paged.blocks import BlockPool, PrefixCache
from paged.request import Request
from paged.scheduler import Scheduler

BLOCK_SIZE = 16
NUM_SEQS = 256


def request(scheduler: Scheduler, name: str, prompt: list[int], max_tokens: int) -> Request:
    """A request that runs to its length."""
    return Request(
        name,
        prompt,
        SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        block_table=scheduler.new_block_table(),
        seed=0,
        max_tokens=max_tokens,
    )


def decode_step(num_blocks: int, num_finished: int) -> float:
    """Median microseconds of `schedule` and `update` for one token of 256 sequences."""
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=NUM_SEQS, max_num_batched_tokens=16384
    )
    for i in range(num_finished):
        scheduler.add(request(scheduler, f"old {i}", [i % 1000, i], 1))
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(step, [1])
    for i in range(NUM_SEQS):
        scheduler.add(request(scheduler, str(i), [i] * 40, 300))
    seconds = []
    while scheduler.has_unfinished:
        started = time.perf_counter()
        step = scheduler.schedule()
        assert step is not None
        scheduled = time.perf_counter()
        sampled = [1] * len(step.rows)
        resumed = time.perf_counter()
        scheduler.update(step, sampled)
        ended = time.perf_counter()
        if len(step.rows) == NUM_SEQS and step.num_tokens == NUM_SEQS:
            seconds.append(scheduled - started + ended - resumed)
    assert len(seconds) > 100, "nobody was preempted"
    return statistics.median(seconds) * 1e6


def prefix_lookup(num_tokens: int) -> tuple[float, float]:
    """Median microseconds to publish, and to find, a prompt's blocks."""
    publishing, finding = [], []
    for repeat in range(20):
        pool = BlockPool(num_tokens // BLOCK_SIZE + 2)
        cache = PrefixCache(pool, BLOCK_SIZE)
        tokens = [(i * 7 + repeat) % 50_000 for i in range(num_tokens + 1)]
        blocks = pool.allocate(num_tokens // BLOCK_SIZE)
        started = time.perf_counter()
        cache.publish([], tokens, blocks, num_tokens)
        published = time.perf_counter()
        found = cache.lookup(tokens)
        ended = time.perf_counter()
        assert len(found) == num_tokens // BLOCK_SIZE
        publishing.append(published - started)
        finding.append(ended - published)
    return statistics.median(publishing) * 1e6, statistics.median(finding) * 1e6


def main() -> None:
    """Print one table."""
    print(f"paged {__version__}, Python {platform.python_version()}, {platform.machine()}, no model\n")
    print("| what | microseconds |")
    print("| --- | ---: |")
    print(f"| a decode step of {NUM_SEQS} sequences, 8,192 blocks | {decode_step(8_192, 0):,.0f} |")
    print(f"| the same, 819,200 blocks | {decode_step(819_200, 0):,.0f} |")
    print(f"| the same, 8,192 blocks, 10,000 requests finished before | {decode_step(8_192, 10_000):,.0f} |")
    publishing, finding = prefix_lookup(32_768)
    print(f"| find the blocks of a prompt of 32,768 tokens | {finding:,.0f} |")
    print(f"| make them findable | {publishing:,.0f} |")


if __name__ == "__main__":
    main()
