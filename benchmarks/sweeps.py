"""What two settings do: the share of the GPU's memory, and the block size.

    python benchmarks/sweeps.py --only memory --trace AzureLLMInferenceTrace_conv.csv
    python benchmarks/sweeps.py --only block-size --trace AzureLLMInferenceTrace_conv.csv

Every point is a process of its own, so that no point inherits another's memory. For the share of memory, more requests
are submitted than most pools hold, with short outputs, and what is counted is how many run at once, how often one is
preempted, and whether the engine starts at all: too small a pool is refused with a message, too large a one leaves no
room for what the pool's size did not foresee. The workload is `throughput.py`'s, shortened.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import throughput
from common import (
    SHAPES,
    Result,
    add_arguments,
    bars,
    environment,
    fixed,
    free_memory,
    gib,
    load_engine,
    markdown,
    new_figure,
    output_file,
    peak_memory,
    per_cent,
    publish,
    run_in_new_process,
)
from matplotlib.figure import Figure

UTILIZATIONS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]
BLOCK_SIZES = [16, 32, 64, 128, 256]


def measure_point(point: dict[str, Any]) -> dict[str, Any]:
    """One setting, in this process: how it served, or why it did not start."""
    device, shape = point["device"], SHAPES[point["model"]]
    lengths = (
        throughput.read_lengths(Path(point["trace"]), throughput.TRACE_COLUMNS, point["requests"])
        if point["trace"]
        else throughput.draw_lengths(point["requests"], throughput.W1_MEANS, seed=0)
    )
    workload = throughput.make_workload(
        "sweep",
        lengths,
        most_prompt=point["most_prompt"],
        most_output=point["most_output"],
        vocab=shape.vocab,
        seed=0,
        synthetic=not point["trace"],
    )
    free_memory(device)
    started = time.perf_counter()
    try:
        llm = load_engine(
            shape,
            device=device,
            dtype="bfloat16" if device.startswith("cuda") else "float32",
            max_model_len=point["most_prompt"] + point["most_output"],
            max_num_seqs=point["max_num_seqs"],
            enable_prefix_caching=False,
            **point["setting"],
        )
    except (ValueError, RuntimeError) as error:  # torch's out-of-memory error is a RuntimeError
        return {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
    ready = time.perf_counter() - started
    try:
        throughput.serve_paged(llm, workload.first(16), most_wanted=8)  # compiles what is compiled on first use
        row = throughput.serve_paged(llm, workload)
    except (AssertionError, RuntimeError) as error:
        return {"refused": f"while serving: {type(error).__name__}: {str(error)[:300]}"}
    return row | {"start_seconds": ready, "peak_memory": peak_memory(device)}


def tables(result: Result) -> str:
    """A line for each point."""
    lines: list[list[str | None]] = []
    for row in result["rows"]:
        (setting,) = row["setting"].items()
        name = f"{setting[0]}={setting[1]}"
        if "refused" in row or "error" in row:
            lines.append([f"{name}: {row.get('refused') or row['error']}", *[None] * 6])
            continue
        lines.append(
            [
                name,
                fixed(row["requests_per_second"], 2),
                fixed(row["total_per_second"], 0),
                str(row["most_running"]),
                str(row["preemptions"]),
                per_cent(row["live_share"]),
                gib(row["kv_bytes"]),
            ]
        )
    headers = ["setting", "requests/s", "total tok/s", "most at once", "preemptions", "live share of held", "pool, GiB"]
    settings = result["settings"]
    lengths = "synthetic lengths" if settings["synthetic"] else "lengths of the trace"
    return (
        f"{settings['model']} shape, {settings['requests']} requests, {lengths}, prompts clipped to "
        f"{settings['most_prompt']} and outputs to {settings['most_output']} tokens, max_num_seqs "
        f"{settings['max_num_seqs']}.\n\n"
    ) + markdown(headers, lines)


def plot(result: Result) -> Figure:
    """Throughput on the left, concurrency on the right."""
    rows = [row for row in result["rows"] if "requests_per_second" in row]
    figure, (left, right) = new_figure(result, f"Throughput against {result['settings']['only']}", panels=2)
    names = [str(next(iter(row["setting"].values()))) for row in rows]
    bars(left, names, {"total": [row["total_per_second"] for row in rows]}, unit="tokens/s, prompts included")
    bars(right, names, {"most at once": [row["most_running"] for row in rows]}, unit="most requests at once")
    return figure


def points(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings to try."""
    if arguments.only == "memory":
        return [{"gpu_memory_utilization": share} for share in arguments.utilizations]
    return [{"block_size": size} for size in arguments.block_sizes]


def main() -> None:
    """Start a process for each point, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--only", choices=("memory", "block-size"), default="memory", help="which of the two")
    parser.add_argument("--trace", type=Path, help="as for throughput.py; without, lengths are synthetic")
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--utilizations", nargs="+", type=float, default=UTILIZATIONS)
    parser.add_argument("--block-sizes", nargs="+", type=int, default=BLOCK_SIZES)
    parser.add_argument("--requests", type=int, help="default: 768 for memory, 256 for block sizes")
    parser.add_argument("--most-prompt", type=int, default=2048)
    parser.add_argument("--most-output", type=int, help="default: 32 for memory, 128 for block sizes")
    parser.add_argument("--max-num-seqs", type=int, help="default: 768 for memory, 256 for block sizes")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure_point(json.loads(arguments.point))))
        return
    memory = arguments.only == "memory"
    if arguments.trace is not None and not arguments.trace.is_file():
        raise SystemExit(f"sweeps.py: no file {arguments.trace}; benchmarks/throughput.py says where it comes from")
    if arguments.smoke:
        arguments.model, arguments.requests, arguments.most_prompt, arguments.most_output = "tiny", 6, 40, 4
        arguments.max_num_seqs, arguments.utilizations, arguments.block_sizes = 4, [0.5], [16, 100000000]
    settings = {
        "model": arguments.model,
        "requests": arguments.requests or (768 if memory else 256),
        "most_prompt": arguments.most_prompt,
        "most_output": arguments.most_output or (32 if memory else 128),
        "max_num_seqs": arguments.max_num_seqs or (768 if memory else 256),
    }
    trace = None if arguments.trace is None else str(arguments.trace.resolve())
    rows = []
    for setting in points(arguments):
        point = settings | {"setting": setting, "device": arguments.device, "trace": trace}
        row = {"setting": setting} | run_in_new_process("sweeps.py", ["--point", json.dumps(point)])
        rows.append(row)
        print(
            f"{setting}: {row.get('refused') or row.get('error') or fixed(row['requests_per_second'], 2)}", flush=True
        )
    result = {
        "benchmark": "sweeps",
        "environment": environment(arguments.device),
        "settings": settings | {"only": arguments.only, "synthetic": trace is None},
        "rows": rows,
    }
    output = output_file(arguments, "sweep_memory" if memory else "sweep_block_size")
    publish(result, tables(result), plot(result), output)


if __name__ == "__main__":
    main()
