"""One decode step of the whole engine: milliseconds, and what share of them reading the bytes alone would take.

    python benchmarks/decode_step.py
    python benchmarks/decode_step.py --models llama-3-8b --batches 64 --profile

`batch` requests are submitted; when all of them decode, `--steps` steps are timed by the host's clock with the device
waited for at both ends. So planning, sampling, and handing tokens out are in it, as they are in a server. The floor is

    (weights read + K and V of the live tokens) / bytes a second of a copy, measured in the same run

where the embedding table counts with the rows that the batch names (all of it if it is the output projection too), and
the context is the mean over the timed steps. Activations, written K and V and arithmetic are not in it: at large
batches a step can be bound by arithmetic, and then no engine reaches the floor. The weights are random, the shapes
real.
"""

import argparse
import itertools
import random
import statistics
import time
from typing import Any, NamedTuple

from common import (
    SHAPES,
    ModelShape,
    Result,
    add_arguments,
    bars,
    copy_bandwidth,
    environment,
    fixed,
    floor_seconds,
    free_memory,
    gib,
    load_engine,
    markdown,
    new_figure,
    output_file,
    peak_memory,
    per_cent,
    publish,
    synchronize,
)
from matplotlib.figure import Figure
from profiling import kernels_table, largest_kernels, recorded_spans, summarise

from paged import LLM, Engine, RequestOutputKind, SamplingParams

# Steps before the clock starts: whatever is compiled or captured on first use is so then.
WARM_UP = 8
PROFILED_STEPS = 3
MOST_KERNELS = 12
COUNTERS = ("num_steps", "num_overlapped_steps")


class Plan(NamedTuple):
    """How long prompts and answers are, so that the mean context of the timed steps is what was asked for."""

    prompt_tokens: int
    max_tokens: int


def plan(batch: int, context: int, steps: int, budget: int) -> Plan:
    """Lengths for a batch, given how many tokens a step may compute.

    Prompts are computed some steps apart, and who comes first decodes meanwhile: half of that is the mean lead.

    >>> plan(batch=1, context=100, steps=20, budget=4096)
    Plan(prompt_tokens=81, max_tokens=48)
    """
    prefill_steps = -(-batch * context // max(1, budget - batch))
    prompt = max(1, context - prefill_steps // 2 - WARM_UP - steps // 2 - PROFILED_STEPS // 2)
    return Plan(prompt, 2 * prefill_steps + WARM_UP + steps + 4 * PROFILED_STEPS + 6)


def live_tokens(engine: Engine) -> int:
    """Tokens whose K and V the running sequences have in the pool."""
    return sum(sequence.num_computed_tokens for request in engine.scheduler.running for sequence in request.sequences)


def all_decode(engine: Engine, batch: int) -> bool:
    """Whether every request has its prompt computed and is running."""
    running = engine.scheduler.running
    return len(running) == batch and all(
        request.sequences[0].num_computed_tokens >= len(request.prompt_token_ids) for request in running
    )


def measure(
    llm: LLM, shape: ModelShape, batch: int, *, context: int, steps: int, bandwidth: float, profile: bool, device: str
) -> dict[str, Any]:
    """One row: time, floor and counters of a batch in steady decode."""
    engine = llm.engine
    budget = engine.config.max_num_batched_tokens or 0
    lengths = plan(batch, context, steps, budget)
    rng = random.Random(batch)
    params = SamplingParams(
        temperature=0,
        max_tokens=lengths.max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    names = [f"{batch}-{i}" for i in range(batch)]
    for name in names:
        engine.add_request(name, [rng.randrange(shape.vocab) for _ in range(lengths.prompt_tokens)], params)
    while not all_decode(engine, batch):
        engine.step()
        if not engine.has_unfinished_requests:
            raise RuntimeError(
                f"{batch} requests never ran at once; the pool is too small, or a step failed (see the log)"
            )
    for _ in range(WARM_UP):
        engine.step()
    synchronize(device)

    before = {name: getattr(engine, name, None) for name in COUNTERS}
    tokens_before = live_tokens(engine)
    marks = [time.perf_counter()]
    for _ in range(steps):
        engine.step()
        marks.append(time.perf_counter())
    synchronize(device)
    seconds = (time.perf_counter() - marks[0]) / steps
    assert all_decode(engine, batch), "somebody ended or was preempted while the clock ran; the pool may be too small"
    mean_context = (tokens_before + live_tokens(engine)) / 2 / batch

    itemsize = 2 if device.startswith("cuda") else 4
    floor = floor_seconds(shape, batch=batch, context=mean_context, itemsize=itemsize, bytes_per_second=bandwidth)
    row: dict[str, Any] = {
        "model": shape.name,
        "batch": batch,
        "context": mean_context,
        "steps": steps,
        "seconds": seconds,
        "median_seconds": statistics.median(after - mark for mark, after in itertools.pairwise(marks)),
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "tokens_per_second": batch / seconds,
    }
    for name in COUNTERS:
        row[name] = None if before[name] is None else getattr(engine, name) - before[name]
    if profile:
        row["profile"] = profiled(engine, device)
    for name in names:
        engine.abort_request(name)
    return row


def profiled(engine: Engine, device: str) -> dict[str, Any]:
    """Where the device's time goes in a few steps, and how long it waits between kernels."""
    with recorded_spans(device, host=True) as spans:
        started = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            engine.step()
        synchronize(device)
        wall = time.perf_counter() - started
    found = summarise(spans, PROFILED_STEPS) | {"largest": largest_kernels(spans, PROFILED_STEPS, MOST_KERNELS)}
    return found | {"wall_ms": wall / PROFILED_STEPS * 1e3}


def tables(result: Result) -> str:
    """The steps, and below them the profiles if there are any."""
    lines = [
        [
            f"{row['model']}, batch {row['batch']}",
            fixed(row["context"], 0),
            fixed(row["seconds"] * 1e3, 2),
            fixed(row["median_seconds"] * 1e3, 2),
            fixed(row["floor_seconds"] * 1e3, 2),
            per_cent(row["share_of_floor"]),
            fixed(row["tokens_per_second"], 0),
            None if row["num_overlapped_steps"] is None else f"{row['num_overlapped_steps']} of {row['num_steps']}",
        ]
        for row in result["rows"]
    ]
    headers = [
        "decode step",
        "mean context",
        "ms a step",
        "median",
        "floor, ms",
        "floor / step",
        "tokens/s",
        "overlapped",
    ]
    text = markdown(headers, lines)
    text += f"\n\nThe floor is at {result['copy_bandwidth'] / 1e9:,.0f} GB/s, a copy on the same device."
    for row in result["rows"]:
        if "profile" in row:
            found = row["profile"]
            costs = [[name, fixed(value, 3)] for name, value in found["groups_ms"].items()]
            costs.append(["all kernels, overlaps counted once", fixed(found["busy_ms"], 3)])
            costs.append(
                ["no kernel runs: unprofiled step less that", fixed(row["seconds"] * 1e3 - found["busy_ms"], 3)]
            )
            title = f"{row['model']}, batch {row['batch']}, {found['kernels']:.0f} kernels a step"
            text += f"\n\n{markdown([title, 'ms a step'], costs)}"
            if "largest" in found:
                text += f"\n\n{kernels_table(found['largest'])}"
    return text


def plot(result: Result) -> Figure:
    """Step and floor side by side."""
    rows = result["rows"]
    figure, (ax,) = new_figure(result, "A decode step, and the time that reading its bytes takes")
    values = {
        "step": [row["seconds"] * 1e3 for row in rows],
        "floor: weights and live K and V at a copy's speed": [row["floor_seconds"] * 1e3 for row in rows],
    }
    bars(ax, [f"{row['model']}, batch {row['batch']}" for row in rows], values, unit="ms")
    ax.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3-8b", "qwen3-0.6b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=1024, help="mean tokens of context in the timed steps")
    parser.add_argument("--steps", type=int, default=64, help="steps that are timed")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--enforce-eager", action="store_true", help="without torch.compile")
    parser.add_argument("--profile", action="store_true", help="and where the time of three steps goes")
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.smoke:
        arguments.models, arguments.batches, arguments.context, arguments.steps = ["tiny"], [1, 3], 64, 6

    bandwidth = copy_bandwidth(device)
    rows = []
    start_up: dict[str, Any] = {}
    for name in arguments.models:
        shape = SHAPES[name]
        free_memory(device)
        started = time.perf_counter()
        largest = max(arguments.batches)
        longest = max(
            sum(plan(batch, arguments.context, arguments.steps, max(4096, largest))) for batch in arguments.batches
        )
        llm = load_engine(
            shape,
            device=device,
            dtype="bfloat16" if device.startswith("cuda") else "float32",
            max_model_len=longest + 64,
            max_num_seqs=largest,
            block_size=arguments.block_size,
            enable_prefix_caching=False,
            enforce_eager=True if arguments.enforce_eager else None,
        )
        print(f"{shape.name}: engine ready after {time.perf_counter() - started:.0f} s", flush=True)
        start_up[shape.name] = getattr(llm.engine.runner, "start_up_seconds", None)
        for batch in arguments.batches:
            row = measure(
                llm,
                shape,
                batch,
                context=arguments.context,
                steps=arguments.steps,
                bandwidth=bandwidth,
                profile=arguments.profile,
                device=device,
            )
            rows.append(row | {"peak_memory": peak_memory(device)})
            milliseconds, share = row["seconds"] * 1e3, per_cent(row["share_of_floor"])
            peak = gib(peak_memory(device)) or "?"
            print(f"{shape.name}, batch {batch}: {milliseconds:.2f} ms, floor {share} of it, {peak} GiB", flush=True)
        del llm
    result = {
        "benchmark": "decode_step",
        "environment": environment(device),
        "settings": {
            "context": arguments.context,
            "steps": arguments.steps,
            "block_size": arguments.block_size,
            "enforce_eager": arguments.enforce_eager,
        },
        "copy_bandwidth": bandwidth,
        "start_up_seconds": start_up,
        "rows": rows,
    }
    publish(result, tables(result), plot(result), output_file(arguments, "decode_step"))


if __name__ == "__main__":
    main()
