"""What the KV memory holds under each policy, beside what the PagedAttention paper published.

    python benchmarks/kv_shares.py > benchmarks/results/kv_shares.md
    python benchmarks/kv_shares.py --spread sharegpt_8k_filtered_stats_llama2_tokenizer.csv

The paper (Kwon et al., SOSP 2023) has the shares in figure 2 and the mean batch sizes in figure 13, of OPT-13B on an
A100 with 40 GB: 12 GB of KV memory, about 15.7k tokens, sequences of up to 2048. No model runs here: the scheduler and
the contiguous pools are driven with drawn lengths of the published means. All requests wait at the start, and means are
over the steps during which somebody waited: ramp-up and drain do not count, and the time of a step does not matter.

The second form prints the spread of the lengths that `paged.traces.synthetic` takes: the file is from
github.com/project-etalon/etalon, data/processed_traces (Apache-2.0), and has a row for each turn of a conversation. A
turn is a first one if its prompt is shorter than all that was said up to the row before.
"""

import argparse
import math
import statistics
from pathlib import Path

import numpy as np
from common import markdown

from paged import __version__
from paged.memory.states import SlotState
from paged.traces import Trace, load
from paged.traces.baselines import ContiguousSettings, serve
from paged.traces.cost import StepCost
from paged.traces.records import Simulation
from paged.traces.simulate import PagedSettings, simulate
from paged.traces.synthetic import ALPACA, MAX_MODEL_LEN, SHAREGPT, like

NUM_BLOCKS, BLOCK_SIZE = 981, 16  # 15,696 slots, the null and the trash block included
# Token states, reserved, internal, external and others, in per cent; mean batch sizes at 2 and at 30 requests a second.
FIGURE_2 = {
    "max": "20.4, 13.3, 57.3, 8.9",
    "pow2": "26.8, 17.9, 13.6, 41.6",
    "oracle": "38.2, 25.2, -, 36.6",
    "paged": "96.3, -, -, -",
}
FIGURE_13 = {
    SHAREGPT.name: {"max": 7.00, "pow2": 9.81, "oracle": 13.62, "paged": 30.42},
    ALPACA.name: {"max": 7.00, "pow2": 43.24, "oracle": 72.75, "paged": 132.44},
}
# Every step takes as long as any other.
STEPS = StepCost(name="steps", per_step=1, per_token=0, per_context_token=0, per_sequence=0)


def run(trace: Trace, policy: str, allocator: str, batching: str) -> Simulation:
    """One policy on the paper's pool."""
    if policy == "paged":
        return simulate(trace, PagedSettings(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE), STEPS, progress=True)
    settings = ContiguousSettings(
        num_slots=NUM_BLOCKS * BLOCK_SIZE,
        policy=policy,
        batching=batching,
        allocator=allocator,
        max_model_len=MAX_MODEL_LEN,
    )
    return serve(trace, settings, STEPS, progress=True)


def row(found: Simulation, trace: Trace, policy: str, allocator: str, batching: str) -> list[str | None]:
    """A line of the table."""
    shares = found.mean_shares() * 100
    rounding = float((found.steps.rounding[found.counted] / found.num_slots).mean()) * 100
    internal, external = abs(shares[SlotState.INTERNAL] - rounding), shares[SlotState.EXTERNAL]  # -0.0 would be ugly
    others = shares[[SlotState.FREE, SlotState.OVERHEAD, SlotState.CACHED]].sum()
    published = batching == "iteration" and (allocator == "buddy" or policy == "paged")
    ours = shares[SlotState.TOKENS], shares[SlotState.RESERVED], internal, rounding + external + others
    return [
        policy if policy == "paged" else f"{policy}, {allocator}, {batching}",
        ", ".join(f"{share:.1f}" for share in ours),
        f"{rounding:.1f}, {external:.1f}, {others:.1f}",
        FIGURE_2.get(policy) if published and trace.name == SHAREGPT.name else None,
        f"{found.steps.num_running[found.counted].mean():.1f}",
        f"{FIGURE_13[trace.name][policy]:.1f}" if published and policy in FIGURE_2 else None,
        f"{len(found.steps):,}",
        f"{found.num_recomputed_tokens / (trace.num_prompt_tokens + trace.num_output_tokens):.1%}",
    ]


def spread(file: Path) -> str:
    """Of the first turns' prompts and outputs with 4 to 1024 tokens: how many, and the deviation of the logarithm."""
    last, lengths = math.inf, []
    for request in load(file):
        if request.num_prompt_tokens < last:
            lengths.append((request.num_prompt_tokens, request.num_output_tokens))
        last = request.num_prompt_tokens + request.num_output_tokens
    lines = []
    for what, column in (("prompts", 0), ("outputs", 1)):
        kept = [pair[column] for pair in lengths if 4 <= pair[column] <= 1024]
        lines.append(f"{len(kept):,} {what}: {statistics.pstdev(map(math.log, kept)):.2f}, mean {np.mean(kept):.1f}")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--spread", type=Path, metavar="CSV", help="print the spread of these lengths instead")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.spread is not None:
        print(spread(arguments.spread))
        return
    print(f"paged {__version__}, no model; {NUM_BLOCKS * BLOCK_SIZE:,} slots, max_model_len {MAX_MODEL_LEN:,}\n")
    headers = [
        "policy",
        "% token states, reserved, internal, external and others",
        "the last: rounded up, external, free",
        "published, figure 2",
        "running",
        "figure 13",
        "steps",
        "recomputed",
    ]
    contiguous = [
        (policy, allocator, batching)
        for batching in ("iteration", "static")
        for allocator in ("buddy", "first-fit")
        for policy in ("max", "pow2", "oracle", "grow")
        if (policy, allocator) != ("grow", "buddy") and (batching, allocator) != ("static", "buddy")
    ]
    for data in (SHAREGPT, ALPACA):
        trace = like(data, arguments.requests, seed=arguments.seed)
        lines = [row(run(trace, *kind), trace, *kind) for kind in (*contiguous, ("paged", "first-fit", "iteration"))]
        print(f"{trace.describe()}; seed {arguments.seed}\n\n{markdown(headers, lines)}\n")


if __name__ == "__main__":
    main()
