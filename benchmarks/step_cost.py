"""Fit what a step costs to steps that were measured, and say how far off the fit is: the files in paged/traces/costs.

    python benchmarks/step_cost.py --name h200-llama-3-8b --decode-step decode_step.json --mixed-step mixed_step.json
    python benchmarks/step_cost.py --name ... --decode-step ... --throughput throughput.json --trace ..._conv.csv

Results of other benchmarks go in, from `benchmarks/results` if nothing is named and they are there:

    decode_step    its rows: a batch in steady decode
    mixed_step     its rows: decodes beside prompts
    throughput     the means over the steps that were CUDA graphs and over those with prompts. A result does not say how
                   much context these read, so the scheduler is run over the same trace without a model; if it does not
                   make exactly the same steps, as many of each kind and with as many tokens, the row is left out.

Of the last, the whole run is predicted as well, which is more than the steps that were fitted.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, SHAPES, ModelShape, Result, markdown, per_cent

from paged.traces import Trace, TraceError, load
from paged.traces.cost import COSTS, Fit, MeasuredStep, fit, save
from paged.traces.records import Simulation
from paged.traces.simulate import PagedSettings, simulate

# Of workload W1; throughput.py says what it is.
W1_REQUESTS, W1_MOST_PROMPT, W1_MOST_OUTPUT = 512, 2048, 512
ENVIRONMENT = ("gpu", "driver", "cuda", "torch", "transformers", "paged", "commit")


def decode_steps(result: Result, shape: ModelShape) -> Iterator[MeasuredStep]:
    """The rows of decode_step.py of one model."""
    for row in result["rows"]:
        if row["model"] == shape.name:
            batch = row["batch"]
            yield MeasuredStep(f"decode, batch {batch}", batch, batch * row["context"], batch, row["seconds"])


def mixed_steps(result: Result) -> Iterator[MeasuredStep]:
    """The rows of mixed_step.py that ran as they should."""
    for row in result["rows"]:
        if "error" not in row:
            mix = row["mix"]
            context = mix["decodes"] * (row["context"] or 0) + mix["prompts"] * mix["prompt_tokens"]
            yield MeasuredStep(row["label"], row["tokens"], context, mix["decodes"] + mix["prompts"], row["seconds"])


def w1_run(result: Result, row: dict[str, Any], shape: ModelShape, trace: Trace, found: Fit) -> Simulation:
    """The run of a row of throughput.py, without a model.

    Raises:
        TraceError: the row is of another workload.
    """
    w1 = trace.first(W1_REQUESTS).scaled(0).clipped(max_prompt=W1_MOST_PROMPT, max_output=W1_MOST_OUTPUT)
    workload, settings = result["workload"], result["settings"]
    if (w1.num_prompt_tokens, w1.num_output_tokens) != (workload["input_tokens"], workload["output_tokens"]):
        raise TraceError(f"{trace.name} makes another workload than {workload['name']} of the result")
    block_bytes = shape.kv_bytes_per_token(itemsize=2) * settings["block_size"]
    pool = PagedSettings(
        num_blocks=row["kv_bytes"] // block_bytes,
        block_size=settings["block_size"],
        max_num_seqs=row["size"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        enable_prefix_caching=False,
    )
    return simulate(w1, pool, found.cost, progress=True)


def mean_steps(row: dict[str, Any], run: Simulation) -> list[MeasuredStep] | None:
    """The means of both kinds of steps of a row; None if the simulated steps are not those that were measured."""
    steps, made = run.steps, []
    with_prompts = steps.num_tokens > steps.num_sequences
    for kind, chosen in (("with prompts", with_prompts), ("graphs", ~with_prompts)):
        measured = row["kinds"].get(kind, {"steps": 0})
        if measured["steps"] != chosen.sum() or not chosen.any():
            return None
        tokens, context, sequences = (
            float(np.mean(counts[chosen]))
            for counts in (steps.num_tokens, steps.num_context_tokens, steps.num_sequences)
        )
        if abs(tokens - measured["tokens"]) > 1e-6:
            return None
        what = f"W1, {row['size']} at once, mean of {chosen.sum()} steps: {kind}"
        made.append(MeasuredStep(what, tokens, context, sequences, measured["wall_ms"] / 1e3))
    return made


def table(steps: list[MeasuredStep], found: Fit) -> str:
    """Measured and fitted, step by step."""
    headers = ["step", "tokens", "context", "sequences", "ms, measured", "ms, fitted", "error"]
    lines = [
        [
            step.what,
            f"{step.num_tokens:,.0f}",
            f"{step.num_context_tokens:,.0f}",
            f"{step.num_sequences:,.0f}",
            f"{step.seconds * 1e3:.2f}",
            f"{step.seconds * (1 + error) * 1e3:.2f}",
            f"{error:+.1%}",
        ]
        for step, error in zip(steps, found.errors, strict=True)
    ]
    return markdown(headers, lines)


def main() -> None:
    """Fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="of the cost, and of the file in paged/traces/costs")
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    for name in ("decode-step", "mixed-step", "throughput"):
        default = RESULTS / f"{name.replace('-', '_')}.json"
        parser.add_argument(f"--{name}", type=Path, default=default if default.exists() else None, metavar="JSON")
    parser.add_argument("--trace", type=Path, help="Azure's conversation trace, for the rows of throughput")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    results = {
        name: json.loads(file.read_text())
        for name in ("decode_step", "mixed_step", "throughput")
        if (file := getattr(arguments, name)) is not None
    }
    if not results:
        raise SystemExit("step_cost.py: nothing to fit to; name a result of decode_step.py or mixed_step.py")
    steps = list(decode_steps(results["decode_step"], shape)) if "decode_step" in results else []
    steps += mixed_steps(results["mixed_step"]) if "mixed_step" in results else []
    found = fit(arguments.name, steps, shape.kv_bytes_per_token(itemsize=2))
    runs = []
    if "throughput" in results and arguments.trace is not None:
        trace = load(arguments.trace)
        rows = [row for row in results["throughput"]["rows"] if row["name"] == "paged" and "kinds" in row]
        for row in rows:  # all at once, so what a step costs does not change who is in it
            means = mean_steps(row, w1_run(results["throughput"], row, shape, trace, found))
            print(f"W1, {row['size']} at once: {'the same steps' if means else 'other steps, so left out'}")
            steps += means or []
        found = fit(arguments.name, steps, shape.kv_bytes_per_token(itemsize=2))
        runs = [(row, w1_run(results["throughput"], row, shape, trace, found)) for row in rows]
    print(table(steps, found))
    print(f"\nmean error {per_cent(found.mean_error)}; {found.cost}")
    for row, run in runs:
        predicted = float(run.steps.seconds.sum())
        print(
            f"the whole of W1, {row['size']} at once: {row['seconds']:.2f} s and {row['steps']} steps measured, "
            f"{predicted:.2f} s ({predicted / row['seconds'] - 1:+.1%}) and {len(run.steps)} steps simulated"
        )
    source = {name: {key: result["environment"].get(key) for key in ENVIRONMENT} for name, result in results.items()}
    save(COSTS / f"{arguments.name}.json", found, steps, source)


if __name__ == "__main__":
    main()
