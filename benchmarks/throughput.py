"""Requests and tokens per second on lengths from production, beside engines without paging and one with it.

    python benchmarks/throughput.py --trace AzureLLMInferenceTrace_conv.csv
    python benchmarks/throughput.py --trace ... --baselines reference generate generate_batch
    python benchmarks/throughput.py --lengths sharegpt_8k_filtered_stats_llama2_tokenizer.csv
    python benchmarks/throughput.py --samples

Workload W1 is the first 512 requests of Azure's conversation trace of 2023, prompts clipped to 2048 and outputs to 512
tokens. Only lengths are real: token ids are random, so are the weights; greedy, no end-of-sequence token, all requests
submitted at once, prefix caching off. Nothing is shipped with the repository:

    trace    AzureLLMInferenceTrace_conv.csv, CC-BY-4.0, github.com/Azure/AzurePublicDataset, folder data
    lengths  *_stats_llama2_tokenizer*.csv, Apache-2.0, github.com/project-etalon/etalon, folder data/processed_traces

Without either, lengths are drawn with W1's means and the result is marked as synthetic.

The baselines take minutes where the engine takes seconds, so they are asked for by name and run on the first
`--baseline-requests`; the engine runs on those too, and the ratio is between rows of the same requests. Each baseline
is tried with several batch sizes and its best counts. A token is useful if its request asked for it: what a static
batch computes for rows that are done does not count.

    reference       `reference.engine`: static batches over a contiguous cache, this repository's own naive twin
    generate        transformers' `generate`, static batches, left padded, each run to its longest output
    generate_batch  transformers' own continuous batching, each request with its own length, start-up not counted
"""

import argparse
import csv
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import (
    SHAPES,
    ModelShape,
    Result,
    add_arguments,
    bars,
    environment,
    first_line,
    fixed,
    free_memory,
    gib,
    in_batches,
    load_engine,
    markdown,
    new_figure,
    output_file,
    peak_memory,
    publish,
    save,
    synchronize,
    write_config,
)
from matplotlib.figure import Figure
from profiling import by_kind, kinds_table, num_graph_steps, profile_steps, profile_table, watched
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from paged import LLM, RequestOutputKind, SamplingParams
from paged.config import EngineConfig
from reference.engine import Prompt, ReferenceEngine

# Column names of the two formats: tokens in, tokens out.
TRACE_COLUMNS = ("ContextTokens", "GeneratedTokens")
LENGTHS_COLUMNS = ("num_prefill_tokens", "num_decode_tokens")
# W1's means after clipping, for lengths that are drawn when there is no trace.
W1_MEANS = (829, 264)
# Published elsewhere, and so a row of its own that no ratio here uses: docs/performance.md has where it is from.
PUBLISHED = {
    "name": "vLLM 0.25.1 (measured separately, the same kind of machine)",
    "requests_per_second": 24.2,
    "output_per_second": 6396.0,
    "total_per_second": 26500.0,
    "workload": "W1",
}
SAMPLED_EVERY = 4


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, and how many are wanted."""

    prompt: tuple[int, ...]
    wanted: int


@dataclass(frozen=True)
class Workload:
    """Requests, and what to call them."""

    name: str
    requests: tuple[Request, ...]
    synthetic: bool

    def first(self, count: int) -> "Workload":
        """The same, of the first requests only."""
        return Workload(self.name, self.requests[:count], self.synthetic)

    @property
    def input_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Wanted by all."""
        return sum(request.wanted for request in self.requests)


# ---------------------------------------------------------------------------------------------------------- workloads


def read_lengths(file: Path, columns: tuple[str, str], count: int) -> list[tuple[int, int]]:
    """(tokens in, tokens out) of the first rows of a CSV file.

    Raises:
        ValueError: no such file, other columns, or too few rows; the message says what is wanted and where to get it.
    """
    if not file.is_file():
        raise ValueError(
            f"no file {file}: it is not part of the repository. The head of benchmarks/throughput.py says where both "
            "kinds of files come from; without --trace and --lengths the lengths are synthetic"
        )
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(f"{file.name} has the columns {reader.fieldnames}; wanted are {' and '.join(columns)}")
        rows = [(int(row[columns[0]]), int(row[columns[1]])) for row, _ in zip(reader, range(count), strict=False)]
    if len(rows) < count:
        raise ValueError(f"{file.name} has {len(rows)} rows and {count} requests were asked for")
    return rows


def draw_lengths(count: int, means: tuple[int, int], seed: int) -> list[tuple[int, int]]:
    """Lognormal lengths with these means: most short, a few long."""
    rng, spread = random.Random(seed), 0.8
    # The mean of a lognormal is its median times exp(spread^2 / 2).
    medians = [mean / math.exp(spread**2 / 2) for mean in means]
    return [
        (round(rng.lognormvariate(0, spread) * m), round(rng.lognormvariate(0, spread) * n))
        for m, n in [medians] * count
    ]


def make_workload(
    name: str,
    lengths: list[tuple[int, int]],
    *,
    most_prompt: int,
    most_output: int,
    vocab: int,
    seed: int,
    synthetic: bool = False,
) -> Workload:
    """Requests of these lengths, clipped, with random token ids."""
    rng = random.Random(seed)
    requests = []
    for prompt, output in lengths:
        size = min(max(1, prompt), most_prompt)
        requests.append(Request(tuple(rng.choices(range(vocab), k=size)), min(max(1, output), most_output)))
    return Workload(name, tuple(requests), synthetic)


# ------------------------------------------------------------------------------------------------------- the engines


def served(workload: Workload, seconds: float, **more: Any) -> dict[str, Any]:
    """A row: how fast some requests were served, useful tokens only."""
    total = workload.input_tokens + workload.output_tokens
    return {
        "requests": len(workload.requests),
        "seconds": seconds,
        "requests_per_second": len(workload.requests) / seconds,
        "output_per_second": workload.output_tokens / seconds,
        "total_per_second": total / seconds,
        **more,
    }


def serve_paged(llm: LLM, workload: Workload, *, most_wanted: int | None = None) -> dict[str, Any]:
    """The engine on requests that all wait at the start.

    Every few steps the pool is looked at: how many run, and what share of the slots in their blocks holds tokens.
    """
    engine, scheduler = llm.engine, llm.engine.scheduler
    wanted = {str(i): min(request.wanted, most_wanted or request.wanted) for i, request in enumerate(workload.requests)}
    preemptions, recomputed = scheduler.num_preemptions, scheduler.num_recomputed_tokens
    overlapped, graphs = engine.num_overlapped_steps, num_graph_steps(engine)
    lengths: dict[str, int] = {}
    live_shares: list[float] = []
    num_steps = most_running = 0
    with watched(engine) as launches:
        started = time.perf_counter()
        submit(llm, workload, wanted)
        while engine.has_unfinished_requests:
            for output in engine.step():
                if output.finished:
                    lengths[output.request_id] = len(output.outputs[0].token_ids)
            num_steps += 1
            most_running = max(most_running, len(scheduler.running))
            held = (scheduler.pool.num_usable - scheduler.pool.num_free) * scheduler.block_size
            if num_steps % SAMPLED_EVERY == 0 and held:
                sequences = [sequence for request in scheduler.running for sequence in request.sequences]
                live_shares.append(sum(sequence.num_computed_tokens for sequence in sequences) / held)
        seconds = time.perf_counter() - started
    assert lengths == wanted, "a request did not get the tokens that it asked for"
    return served(
        workload,
        seconds,
        steps=num_steps,
        most_running=most_running,
        preemptions=scheduler.num_preemptions - preemptions,
        recomputed_tokens=scheduler.num_recomputed_tokens - recomputed,
        live_share=statistics.mean(live_shares) if live_shares else None,
        kv_bytes=engine.runner.kv_cache_bytes,
        overlapped_steps=engine.num_overlapped_steps - overlapped,
        graph_steps=None if graphs is None else (num_graph_steps(engine) or 0) - graphs,
        kinds=by_kind(launches),
        start_up_seconds=getattr(engine.runner, "start_up_seconds", None),
    )


def submit(llm: LLM, workload: Workload, wanted: dict[str, int]) -> None:
    """Queue all requests, named by their number; `wanted` says how many tokens each gets."""
    for i, request in enumerate(workload.requests):
        params = SamplingParams(
            temperature=0,
            max_tokens=wanted[str(i)],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        llm.engine.add_request(str(i), request.prompt, params)


def profile_middle(llm: LLM, workload: Workload, steps: int, device: str, *, ended_share: float) -> dict[str, Any]:
    """Serve the workload until this share of its requests has ended, profile so many steps, and drop the rest."""
    engine = llm.engine
    submit(llm, workload, {str(i): request.wanted for i, request in enumerate(workload.requests)})
    ended = 0
    while ended < ended_share * len(workload.requests):
        ended += sum(output.finished for output in engine.step())
    found = profile_steps(engine, device, steps)
    for i in range(len(workload.requests)):
        engine.abort_request(str(i))
    return found


def plain_model(shape: ModelShape, device: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """transformers' model with the weights that the engine makes from the same seed on the same device."""
    with TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_config(shape, Path(folder)))
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def serve_reference(model: PreTrainedModel, workload: Workload, size: int) -> dict[str, Any]:
    """Static batches over a contiguous cache: every row as long as the longest sequence of the workload."""
    longest = max(len(request.prompt) + request.wanted for request in workload.requests)
    engine = ReferenceEngine(model, num_rows=size, max_model_len=longest, eos_token_ids=())
    prompts = [
        Prompt(str(i), request.prompt, request.wanted, ignore_eos=True) for i, request in enumerate(workload.requests)
    ]
    run = engine.generate(prompts)
    assert [len(answer.token_ids) for answer in run.answers] == [request.wanted for request in workload.requests]
    shares = [
        sum(held.num_tokens for held in step.held if not held.finished) / sum(held.num_slots for held in step.held)
        for step in run.steps
    ]
    return served(
        workload,
        run.seconds,
        steps=len(run.steps),
        most_running=max(step.num_running for step in run.steps),
        live_share=statistics.mean(shares),
        kv_bytes=engine.cache.num_bytes,
        slots_per_sequence=longest,
    )


@torch.inference_mode()
def serve_generate(model: PreTrainedModel, workload: Workload, size: int) -> dict[str, Any]:
    """transformers' `generate`, one left-padded batch after another."""
    model.set_attn_implementation("sdpa")
    synchronize(model.device.type)
    started = time.perf_counter()
    for batch in in_batches(workload.requests, size):
        width = max(len(request.prompt) for request in batch)
        padding = [width - len(request.prompt) for request in batch]
        ids = [[0] * pad + list(request.prompt) for pad, request in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        wanted = max(request.wanted for request in batch)
        out = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=wanted,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == width + wanted
    synchronize(model.device.type)
    return served(workload, time.perf_counter() - started, most_running=min(size, len(workload.requests)))


@torch.no_grad()  # its loop runs in a thread of its own, which tensors of inference mode do not survive
def serve_generate_batch(model: PreTrainedModel, workload: Workload, size: int) -> dict[str, Any]:
    """transformers' own paged continuous batching, every request with its own length; size 0 is its own choice."""
    model.set_attn_implementation("sdpa")
    limits: dict[str, Any] = {"max_requests_per_batch": size or None}
    if model.device.type == "cpu":  # where it would take most of the host's memory
        limits |= {"num_blocks": 16, "max_batch_tokens": 256}
    config = ContinuousBatchingConfig(allow_block_sharing=False, **limits)
    generation = GenerationConfig(
        max_new_tokens=max(request.wanted for request in workload.requests), do_sample=False, pad_token_id=0
    )
    lengths = []
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=5
    ) as manager:
        started = time.perf_counter()
        for request in workload.requests:
            manager.add_request(list(request.prompt), max_new_tokens=request.wanted, eos_token_id=-1)
        while len(lengths) < len(workload.requests):
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                raise RuntimeError("generate_batch ended before its requests did")
            if output is not None and output.is_finished():
                lengths.append(len(output.generated_tokens))
        seconds = time.perf_counter() - started
    assert sorted(lengths) == sorted(request.wanted for request in workload.requests)
    return served(workload, seconds)


BASELINES: dict[str, Callable[[PreTrainedModel, Workload, int], dict[str, Any]]] = {
    "reference": serve_reference,
    "generate": serve_generate,
    "generate_batch": serve_generate_batch,
}


def run_paged(shape: ModelShape, workload: Workload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of this engine: all requests for each max_num_seqs, and once those that the baselines get."""
    longest = max(len(request.prompt) + request.wanted for request in workload.requests)
    for number, most in enumerate(arguments.max_num_seqs):
        free_memory(arguments.device)
        llm = load_engine(
            shape,
            device=arguments.device,
            dtype=arguments.dtype,
            seed=arguments.seed,
            max_model_len=longest,
            max_num_seqs=most,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            block_size=arguments.block_size,
            gpu_memory_utilization=arguments.gpu_memory_utilization,
            enable_prefix_caching=False,
        )
        serve_paged(llm, workload.first(min(2 * most, 64)), most_wanted=8)  # compiles what is compiled on first use
        counts = [len(workload.requests)] * arguments.rounds
        if arguments.baselines and number == 0:
            counts.append(min(arguments.baseline_requests, len(workload.requests)))
        for i, count in enumerate(counts):
            row = serve_paged(llm, workload.first(count))
            row |= {"name": "paged", "size": most, "peak_memory": peak_memory(arguments.device)}
            if arguments.profile_steps and i == len(counts) - 1:
                row["profile"] = profile_middle(
                    llm, workload, arguments.profile_steps, arguments.device, ended_share=arguments.profile_at
                )
            yield row
        del llm


def run_baselines(shape: ModelShape, workload: Workload, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the others, each with every size; what fails, for lack of memory as a rule, says so."""
    if not arguments.baselines:
        return
    left = free_memory(arguments.device)
    print(f"the engine is gone; {left / 2**30:.2f} GiB are still in use", flush=True)
    model = plain_model(shape, arguments.device, getattr(torch, arguments.dtype), arguments.seed)
    for name in arguments.baselines:
        for size in arguments.sizes[name]:
            free_memory(arguments.device)
            row: dict[str, Any] = {"name": name, "size": size, "requests": len(workload.requests)}
            try:
                row |= BASELINES[name](model, workload, size)
            except Exception as error:  # a size that does not fit must not end the others
                row["error"] = first_line(error)
            yield row | {"peak_memory": peak_memory(arguments.device)}


def report(row: dict[str, Any]) -> None:
    """A line as soon as something is known."""
    said = row.get("error") or f"{row['seconds']:.1f} s, {row['output_per_second']:,.0f} output tokens/s"
    print(f"{row['name']}, size {row['size']}, {row['requests']} requests: {said}", flush=True)
    if "kinds" in row:
        print(f"start-up: {row['start_up_seconds']}")
        graphs = "not counted" if row["graph_steps"] is None else row["graph_steps"]
        print(
            f"{row['steps']} steps, {row['overlapped_steps']} overlapped, CUDA graphs by the runner's count: {graphs}"
        )
        print(kinds_table(row["kinds"]), flush=True)
    if "profile" in row:
        print(f"\nof another run, cut short:\n{profile_table(row['profile'])}")
        print(kinds_table(row["profile"]["kinds"]), flush=True)


# ------------------------------------------------------------------------------------------------------------ samples


def measure_samples(shape: ModelShape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """32 samples of one long prompt: with cascade attention and without, if the engine knows it."""
    num_samples, prompt_tokens, wanted = (4, 40, 6) if arguments.smoke else (32, 8192, 128)
    has_cascade = "enable_cascade_attention" in {field.name for field in fields(EngineConfig)}
    rng = random.Random(arguments.seed)
    prompt = [rng.randrange(shape.vocab) for _ in range(prompt_tokens)]
    rows = []
    for cascade in (False, True) if has_cascade else (None,):
        free_memory(arguments.device)
        llm = load_engine(
            shape,
            device=arguments.device,
            dtype=arguments.dtype,
            seed=arguments.seed,
            max_model_len=prompt_tokens + wanted,
            max_num_seqs=num_samples,
            block_size=arguments.block_size,
            enable_prefix_caching=False,
            **({} if cascade is None else {"enable_cascade_attention": cascade}),
        )
        for count in (4, wanted):  # the first one compiles
            params = SamplingParams(
                n=num_samples, temperature=1, seed=0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            started = time.perf_counter()
            (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            seconds = time.perf_counter() - started
        tokens = [len(answer.token_ids) for answer in output.outputs]
        assert tokens == [wanted] * num_samples
        rows.append(
            {
                "cascade": cascade,
                "samples": num_samples,
                "prompt_tokens": prompt_tokens,
                "wanted": wanted,
                "seconds": seconds,
                "output_per_second": sum(tokens) / seconds,
            }
        )
        del llm
    return rows


# ------------------------------------------------------------------------------------------------------------- output


def best_baseline(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The baseline row with most requests a second."""
    done = [row for row in rows if row["name"] != "paged" and "error" not in row]
    return max(done, key=lambda row: row["requests_per_second"], default=None)


def tables(result: Result) -> str:
    """What was served how fast, and against the best baseline on the same requests."""
    if result["benchmark"] == "samples":
        return samples_table(result)
    rows, workload = result["rows"], result["workload"]
    best = best_baseline(rows)
    lines: list[list[str | None]] = []
    for row in rows:
        name = f"{row['name']}, {row['size'] or 'its own choice'} at once, {row['requests']} requests"
        if "error" in row:
            lines.append([f"{name}: {row['error']}", *[None] * 6])
            continue
        comparable = best is not None and best["requests"] == row["requests"]
        ratio = row["requests_per_second"] / best["requests_per_second"] if best and comparable else None
        lines.append(
            [
                name,
                fixed(row["requests_per_second"], 2),
                fixed(row["output_per_second"], 0),
                fixed(row["total_per_second"], 0),
                fixed(row["seconds"], 1),
                gib(row["peak_memory"]),
                fixed(ratio, 2),
            ]
        )
    if workload["name"] == PUBLISHED["workload"] and result["settings"]["model"] == SHAPES["llama-3-8b"].name:
        speeds = [PUBLISHED["requests_per_second"], PUBLISHED["output_per_second"], PUBLISHED["total_per_second"]]
        lines.append([f"*{PUBLISHED['name']}*", *(f"{speed:,.10g}" for speed in speeds), None, None, None])
    headers = ["system", "requests/s", "output tok/s", "total tok/s", "seconds", "peak GiB", "against best baseline"]
    mark = "SYNTHETIC lengths: " if workload["synthetic"] else ""
    text = (
        f"{mark}{workload['name']}, {result['settings']['model']} shape, {workload['requests']} requests, "
        f"{workload['input_tokens']:,} tokens in, {workload['output_tokens']:,} out.\n\n"
    )
    text += markdown(headers, lines)
    counted = next((row for row in rows if "kinds" in row), None)
    if counted is not None:
        overlapped = f"{counted['overlapped_steps']} of {counted['steps']}"
        text += (
            f"\n\nThe first row's steps, {overlapped} launched while another ran:\n\n{kinds_table(counted['kinds'])}"
        )
    return text


def samples_table(result: Result) -> str:
    """Cascade attention off and on."""
    names = {None: "not known to this version", False: "off", True: "on"}
    lines = [
        [names[row["cascade"]], fixed(row["seconds"], 2), fixed(row["output_per_second"], 0)] for row in result["rows"]
    ]
    row = result["rows"][0]
    text = f"{row['samples']} samples of {row['wanted']} tokens of one prompt of {row['prompt_tokens']:,}.\n\n"
    return text + markdown(["cascade attention", "seconds, prompt included", "output tok/s"], lines)


def course_table(result: Result) -> str | None:
    """Allocation, fragmentation, throughput, batching: naive contiguous against paged, on the same requests."""
    rows = [row for row in result["rows"] if "error" not in row]
    naive = max(
        (row for row in rows if row["name"] == "reference"), key=lambda row: row["requests_per_second"], default=None
    )
    if naive is None:
        return None
    paged = next((row for row in rows if row["name"] == "paged" and row["requests"] == naive["requests"]), None)
    if paged is None:
        return None
    block = result["settings"]["block_size"]
    lines = [
        [
            "allocation",
            f"{naive['slots_per_sequence']:,} slots for each row, from start to end",
            f"{block} slots when they are needed",
        ],
        [
            "fragmentation: held slots without a live token, mean over steps",
            f"{100 * (1 - naive['live_share']):.1f} %",
            None if paged["live_share"] is None else f"{100 * (1 - paged['live_share']):.1f} %",
        ],
        ["batching", "static: all wait for the longest", "continuous: a place is free when a request ends"],
        ["most requests at once", str(naive["most_running"]), str(paged["most_running"])],
        ["throughput, requests/s", fixed(naive["requests_per_second"], 2), fixed(paged["requests_per_second"], 2)],
        ["throughput, output tok/s", fixed(naive["output_per_second"], 0), fixed(paged["output_per_second"], 0)],
    ]
    return markdown([f"{naive['requests']} requests", "naive contiguous", "paged"], lines)


def plot(result: Result) -> Figure:
    """Bars of requests or tokens a second."""
    rows = [row for row in result["rows"] if "error" not in row]
    if result["benchmark"] == "samples":
        figure, (ax,) = new_figure(result, "Samples of one long prompt", height=3)
        names = [f"cascade: {row['cascade']}" for row in rows]
        bars(ax, names, {"output tokens/s": [row["output_per_second"] for row in rows]}, unit="output tokens/s")
        return figure
    mark = " (synthetic lengths)" if result["workload"]["synthetic"] else ""
    figure, (ax,) = new_figure(
        result, f"Requests served: {result['workload']['name']}{mark}", height=2 + 0.4 * len(rows)
    )
    names = [f"{row['name']}, {row['size'] or 'own size'}, {row['requests']} requests" for row in rows]
    bars(ax, names, {"requests/s": [row["requests_per_second"] for row in rows]}, unit="requests/s")
    return figure


def parse() -> argparse.Namespace:
    """Flags, with what depends on others filled in."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, help="Azure's trace, a CSV file with ContextTokens, GeneratedTokens")
    source.add_argument("--lengths", type=Path, help="a CSV file with num_prefill_tokens, num_decode_tokens")
    source.add_argument("--samples", action="store_true", help="instead: 32 samples of one prompt of 8192 tokens")
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--most-prompt", type=int, default=2048, help="prompts are clipped to this")
    parser.add_argument("--most-output", type=int, default=512, help="outputs are clipped to this")
    parser.add_argument("--max-num-seqs", nargs="+", type=int, default=[256])
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=1, help="runs of the engine, each a row")
    parser.add_argument("--profile-steps", type=int, default=0, help="so many steps of one run more under the profiler")
    parser.add_argument(
        "--profile-at",
        type=float,
        default=0.25,
        help="share of the requests that have ended then; once all are admitted, no step has prompts in it",
    )
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=[], help="minutes each; default: none")
    parser.add_argument("--baseline-requests", type=int, default=64)
    parser.add_argument("--reference-sizes", nargs="+", type=int, default=[16, 32], help="rows of its cache")
    parser.add_argument("--generate-sizes", nargs="+", type=int, default=[32, 64], help="rows of a batch")
    parser.add_argument("--generate-batch-sizes", nargs="+", type=int, default=[0], help="most at once; 0: its choice")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.dtype = "bfloat16" if arguments.device.startswith("cuda") else "float32"
    name = "samples" if arguments.samples else "throughput" if arguments.lengths is None else "throughput_lengths"
    arguments.output = output_file(arguments, name)
    if arguments.smoke:
        arguments.model, arguments.requests, arguments.most_prompt, arguments.most_output = "tiny", 10, 60, 12
        arguments.max_num_seqs, arguments.baseline_requests, arguments.max_num_batched_tokens = [4, 8], 6, 256
        arguments.reference_sizes, arguments.generate_sizes, arguments.generate_batch_sizes = [2, 4], [3], [0]
    arguments.sizes = {
        "reference": arguments.reference_sizes,
        "generate": arguments.generate_sizes,
        "generate_batch": arguments.generate_batch_sizes,
    }
    return arguments


def workload_of(arguments: argparse.Namespace) -> Workload:
    """The workload that the flags ask for.

    Raises:
        ValueError: see `read_lengths`.
    """
    limits = {
        "most_prompt": arguments.most_prompt,
        "most_output": arguments.most_output,
        "vocab": SHAPES[arguments.model].vocab,
        "seed": arguments.seed,
    }
    count = arguments.requests
    if arguments.trace is not None:
        is_w1 = (count, arguments.most_prompt, arguments.most_output) == (512, 2048, 512)
        is_w1 = is_w1 and arguments.trace.stem == "AzureLLMInferenceTrace_conv"
        return make_workload(
            "W1" if is_w1 else arguments.trace.stem, read_lengths(arguments.trace, TRACE_COLUMNS, count), **limits
        )
    if arguments.lengths is not None:
        return make_workload(arguments.lengths.stem, read_lengths(arguments.lengths, LENGTHS_COLUMNS, count), **limits)
    means = (24, 6) if arguments.smoke else W1_MEANS
    print("no --trace and no --lengths: lengths are SYNTHETIC (lognormal, with the means of W1)", flush=True)
    lengths = draw_lengths(count, means, arguments.seed)
    return make_workload("lognormal lengths with W1's means", lengths, **limits, synthetic=True)


def main() -> None:
    """Measure, print, write."""
    arguments = parse()
    shape = SHAPES[arguments.model]
    settings = {
        "model": shape.name,
        "dtype": arguments.dtype,
        "block_size": arguments.block_size,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        "gpu_memory_utilization": arguments.gpu_memory_utilization,
        "seed": arguments.seed,
    }
    result: Result = {"environment": environment(arguments.device), "settings": settings}
    if arguments.samples:
        result |= {"benchmark": "samples", "rows": measure_samples(shape, arguments)}
    else:
        try:
            workload = workload_of(arguments)
        except ValueError as error:
            raise SystemExit(f"throughput.py: {error}") from error
        rows: list[dict[str, Any]] = []
        result |= {
            "benchmark": "throughput",
            "workload": {
                "name": workload.name,
                "synthetic": workload.synthetic,
                "requests": len(workload.requests),
                "input_tokens": workload.input_tokens,
                "output_tokens": workload.output_tokens,
            },
            "rows": rows,
        }
        paged = run_paged(shape, workload, arguments)
        others = run_baselines(shape, workload.first(arguments.baseline_requests), arguments)
        for row in itertools.chain(paged, others):
            rows.append(row)
            report(row)
            save(result, arguments.output)  # the baselines take so long that a run may be cut short
    text = tables(result)
    course = None if arguments.samples else course_table(result)
    publish(result, f"{text}\n\n{course}" if course else text, plot(result), arguments.output)


if __name__ == "__main__":
    main()
