"""Samples of one long prompt: a decode step with cascade attention and without.

    python benchmarks/shared_prefix.py
    python benchmarks/shared_prefix.py --models llama-3-8b --samples 8 32 128 --prompt 8192

One request with n samples, whose block tables all begin with the prompt's blocks. Both engines run in one process, one
after the other, with the same random weights, and what is timed is a step in steady decode, by the host's clock.
"""

import argparse
import random
import time
from typing import Any

from common import (
    SHAPES,
    ModelShape,
    Result,
    add_arguments,
    bars,
    environment,
    fixed,
    free_memory,
    load_engine,
    markdown,
    new_figure,
    output_file,
    publish,
    synchronize,
)
from matplotlib.figure import Figure

from paged import LLM, RequestOutputKind, SamplingParams

WARM_UP = 8


def measure(llm: LLM, shape: ModelShape, samples: int, *, prompt: int, steps: int, device: str) -> dict[str, Any]:
    """Milliseconds of a step in which all samples decode, and how many of the timed steps read the prompt once."""
    engine = llm.engine
    rng = random.Random(samples)
    params = SamplingParams(
        n=samples,
        temperature=1,
        seed=0,
        max_tokens=2 * WARM_UP + steps,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine.add_request("samples", [rng.randrange(shape.vocab) for _ in range(prompt)], params)
    (request,) = engine.scheduler.waiting
    while any(sequence.num_computed_tokens < prompt for sequence in request.sequences):
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    synchronize(device)
    before = engine.runner.num_cascade_steps
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    synchronize(device)
    seconds = (time.perf_counter() - started) / steps
    cascade_steps = engine.runner.num_cascade_steps - before
    assert all(not sequence.is_finished for sequence in request.sequences), "somebody ended while the clock ran"
    engine.abort_request("samples")
    while engine.has_unfinished_requests:
        engine.step()
    return {"seconds": seconds, "cascade_steps": cascade_steps}


def tables(result: Result) -> str:
    """A line for each number of samples."""
    lines = [
        [
            f"{row['model']}, {row['samples']} samples",
            fixed(row["off"]["seconds"] * 1e3, 2),
            fixed(row["on"]["seconds"] * 1e3, 2),
            fixed(row["off"]["seconds"] / row["on"]["seconds"], 2),
            f"{row['on']['cascade_steps']} of {result['settings']['steps']}",
        ]
        for row in result["rows"]
    ]
    headers = [f"prompt of {result['settings']['prompt']:,} tokens", "off, ms", "on, ms", "off / on", "cascade steps"]
    return markdown(headers, lines)


def plot(result: Result) -> Figure:
    """Steps with and without, side by side."""
    rows = result["rows"]
    figure, (ax,) = new_figure(
        result, f"A decode step of samples of one prompt of {result['settings']['prompt']} tokens"
    )
    values = {
        "each sample reads the prompt": [row["off"]["seconds"] * 1e3 for row in rows],
        "it is read once (cascade attention)": [row["on"]["seconds"] * 1e3 for row in rows],
    }
    bars(ax, [f"{row['model']}, {row['samples']} samples" for row in rows], values, unit="ms")
    ax.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3-8b", "qwen3-0.6b"])
    parser.add_argument("--samples", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=64, help="steps that are timed")
    parser.add_argument("--block-size", type=int, default=16)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.smoke:
        arguments.models, arguments.samples, arguments.prompt, arguments.steps = ["tiny"], [2, 4], 40, 4
    length = arguments.prompt + 2 * WARM_UP + arguments.steps
    own_blocks = (length - arguments.prompt) // arguments.block_size + 2
    rows = []
    for name in arguments.models:
        found: dict[int, dict[str, Any]] = {samples: {} for samples in arguments.samples}
        for switch in ("off", "on"):
            free_memory(device)
            llm = load_engine(
                SHAPES[name],
                device=device,
                dtype="bfloat16" if device.startswith("cuda") else "float32",
                max_model_len=length,
                max_num_seqs=max(arguments.samples),
                block_size=arguments.block_size,
                num_gpu_blocks_override=length // arguments.block_size + 3 + max(arguments.samples) * own_blocks * 2,
                enable_cascade_attention=switch == "on",
            )
            for samples in arguments.samples:
                sizes = {"prompt": arguments.prompt, "steps": arguments.steps}
                found[samples][switch] = measure(llm, SHAPES[name], samples, device=device, **sizes)
                milliseconds = found[samples][switch]["seconds"] * 1e3
                print(f"{name}, {samples} samples, cascade {switch}: {milliseconds:.2f} ms", flush=True)
            del llm
        rows += [{"model": name, "samples": samples, **switches} for samples, switches in found.items()]
    settings = {"prompt": arguments.prompt, "steps": arguments.steps, "block_size": arguments.block_size}
    result = {"benchmark": "shared_prefix", "environment": environment(device), "settings": settings, "rows": rows}
    publish(result, tables(result), plot(result), output_file(arguments, "shared_prefix"))


if __name__ == "__main__":
    main()
