"""`paged simulate`: a trace through the paged scheduler and through contiguous pools of its size, without a model."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from paged.memory.plots import check_picture
from paged.traces.baselines import ContiguousSettings, serve
from paged.traces.cost import StepCost, load_cost
from paged.traces.formats import load
from paged.traces.plots import latency_against_rate, shares_of_policies
from paged.traces.records import Simulation
from paged.traces.sharegpt import file_tokenizer
from paged.traces.simulate import PagedSettings, simulate
from paged.traces.synthetic import ALPACA, MAX_MODEL_LEN, SHAREGPT, like, with_rate, with_system_prompts
from paged.traces.trace import Trace, TraceError
from reference.contiguous import POLICIES

DRAWN = {"sharegpt-like": SHAREGPT, "alpaca-like": ALPACA}
DRAWN_REQUESTS = 1000
# About the 12 GB that the paper's A100 has left for OPT-13B: 15.7k tokens.
DEFAULT_SLOTS = 15_696
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
ROWS = (
    ("requests done, refused", "{num_requests:,}, {num_refused:,}"),
    ("steps", "{num_steps:,}"),
    ("  of them with a queue", "{steps_with_queue:,}"),
    ("simulated seconds", "{seconds:,.1f}"),
    ("output tokens per second", "{output_tokens_per_second:,.0f}"),
    ("most requests at once", "{most_running:,}"),
    ("mean share: token states", "{mean_shares[tokens]:.1%}"),
    ("  reserved (will be used)", "{mean_shares[reserved]:.1%}"),
    ("  internal (never used)", "{mean_shares[internal]:.1%}"),
    ("  external (gap too small)", "{mean_shares[external]:.1%}"),
    ("  cached, free, overhead", "{not_held:.1%}"),
    ("token states at the fullest step", "{shares_at_fullest[tokens]:.1%}"),
    ("tokens computed", "{num_computed_tokens:,}"),
    ("  of them recomputed", "{num_recomputed_tokens:,}"),
    ("  found in the prefix cache", "{num_cached_tokens:,}"),
    ("preemptions", "{num_preemptions:,}"),
    ("tokens copied to grow", "{num_copied_tokens:,}"),
    ("first token, ms, median and p99", "{ttft_ms[p50]:,.0f}, {ttft_ms[p99]:,.0f}"),
    ("normalised latency, ms a token", "{normalised_latency_ms:,.1f}"),
)


@dataclass(frozen=True)
class SimulateSettings:
    """What the command line asked for; see `paged simulate --help`."""

    trace: str
    format: str = "auto"
    tokenizer: Path | None = None
    multi_turn: bool = False
    skip_bad: bool = False
    first: int | None = None
    thin: float | None = None
    time_scale: float | None = None
    max_prompt: int | None = None
    max_model_len: int | None = None
    samples: int = 1
    system_prompt: int | None = None
    rates: tuple[float, ...] = ()
    burstiness: float = 1.0
    policies: tuple[str, ...] = ("paged",)
    batching: str = "iteration"
    allocator: str = "first-fit"
    blocks: int | None = None
    memory: str | None = None
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    prefix_caching: bool | None = None
    cost: str = "h200-llama-3-8b"
    seed: int = 0
    as_json: bool = False
    plot: Path | None = None


def run_simulate(settings: SimulateSettings) -> int:
    """Simulate and print.

    Returns:
        0.

    Raises:
        ValueError: a setting, the trace or one of its rows cannot be used.
    """
    check_picture(settings.plot)
    cost = load_cost(settings.cost)
    trace = make_trace(settings)
    num_blocks = _num_blocks(settings, cost)
    longest = settings.max_model_len or max(trace.longest, MAX_MODEL_LEN if settings.trace in DRAWN else 0)
    runs: list[tuple[float | None, Simulation]] = []
    for rate in settings.rates or (None,):
        moved = trace
        if rate is not None:
            moved = with_rate(trace, rate, seed=settings.seed, burstiness=settings.burstiness)
        for policy in settings.policies:
            runs.append((rate, _run(moved, policy, settings, cost, num_blocks, longest)))
    if settings.as_json:
        result = {
            "trace": trace.describe(),
            "notes": trace.notes,
            "seed": settings.seed,
            "cost": cost.name,
            "runs": [{"rate": _rate_for_json(rate), **run.summary()} for rate, run in runs],
        }
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print_report(runs, trace, cost)
    if settings.plot is not None:
        _picture(runs, settings, cost).savefig(settings.plot)
    return 0


def make_trace(settings: SimulateSettings) -> Trace:
    """The workload that was asked for: a file, or one that is drawn.

    Raises:
        TraceError: it cannot be used.
    """
    if settings.trace in DRAWN:
        count = DRAWN_REQUESTS if settings.first is None else settings.first
        trace = like(DRAWN[settings.trace], count, seed=settings.seed)
    else:
        if not Path(settings.trace).is_file():
            raise TraceError(f"there is no file {settings.trace}; workloads that are drawn: {', '.join(DRAWN)}")
        tokenize = None if settings.tokenizer is None else file_tokenizer(settings.tokenizer)
        trace = load(
            settings.trace,
            settings.format,
            skip_bad=settings.skip_bad,
            tokenize=tokenize,
            multi_turn=settings.multi_turn,
        )
        trace = trace if settings.first is None else trace.first(settings.first)
    if settings.thin is not None:
        trace = trace.thinned(settings.thin, seed=settings.seed)
    if settings.time_scale is not None:
        trace = trace.scaled(settings.time_scale)
    trace = trace.clipped(max_prompt=settings.max_prompt)
    if settings.system_prompt is not None:
        trace = with_system_prompts(trace, settings.system_prompt, seed=settings.seed)
    trace = trace.clipped(max_total=settings.max_model_len)
    return trace if settings.samples == 1 else trace.with_samples(settings.samples)


def bytes_of(text: str) -> int:
    """Bytes of a size as people write it.

    Raises:
        TraceError: it is none.

    Example:
        >>> bytes_of("1.5GiB"), bytes_of("12 GB"), bytes_of("4096")
        (1610612736, 12000000000, 4096)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS:
        raise TraceError(f"{text!r} is no size; write 24GiB, 12GB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _num_blocks(settings: SimulateSettings, cost: StepCost) -> int:
    """Blocks of the pool, from whichever size was given."""
    if settings.block_size < 1:
        raise TraceError(f"--block-size {settings.block_size}: at least 1 is needed")
    if settings.blocks is not None:
        return settings.blocks
    if settings.memory is None:
        return DEFAULT_SLOTS // settings.block_size
    if cost.kv_bytes_per_token is None:
        raise TraceError(
            f"--memory needs to know the bytes of a token, and cost {cost.name} does not say; use --blocks"
        )
    return bytes_of(settings.memory) // (cost.kv_bytes_per_token * settings.block_size)


def _run(
    trace: Trace, policy: str, settings: SimulateSettings, cost: StepCost, num_blocks: int, max_model_len: int
) -> Simulation:
    limits: dict[str, Any] = {
        "max_model_len": max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
    }
    if policy == "paged":
        paged = PagedSettings(
            num_blocks=num_blocks,
            block_size=settings.block_size,
            enable_prefix_caching=settings.prefix_caching,
            **limits,
        )
        return simulate(trace, paged, cost, progress=True)
    if policy not in POLICIES:
        raise TraceError(f"there is no policy {policy!r}; there are: paged, {', '.join(POLICIES)}")
    contiguous = ContiguousSettings(
        num_slots=num_blocks * settings.block_size,  # the null and the trash block of the paged pool included
        policy=policy,
        batching=settings.batching,
        allocator="first-fit" if policy == "grow" else settings.allocator,
        **limits,
    )
    return serve(trace, contiguous, cost, progress=True)


def _print_report(runs: list[tuple[float | None, Simulation]], trace: Trace, cost: StepCost) -> None:
    """A table for each rate, with a column for each policy."""
    print(trace.describe(), *(f"  {note}" for note in trace.notes), sep="\n")
    size = runs[0][1].num_slots
    print(f"pool of {size:,} slots; time of a step: {cost.name}; mean shares are over the steps with a queue, if any")
    for rate in dict.fromkeys(rate for rate, _ in runs):
        print("" if rate is None else f"\n{'all at once' if rate == math.inf else f'{rate:g} requests a second'}")
        columns = [run.summary() for at, run in runs if at == rate]
        for column in columns:
            shares = column["mean_shares"]
            column["not_held"] = shares["cached"] + shares["free"] + shares["overhead"]
        print(f"{'':36s}" + "".join(f"{column['policy']:>18s}" for column in columns))
        for label, pattern in ROWS:
            print(f"{label:36s}" + "".join(f"{pattern.format(**column):>18s}" for column in columns))


def _picture(runs: list[tuple[float | None, Simulation]], settings: SimulateSettings, cost: StepCost) -> Figure:
    """Latency against rate if there are several rates, else the shares of the pool."""
    caption = f"{runs[0][1].trace}; {runs[0][1].num_slots:,} slots; seed {settings.seed}; time of a step: {cost.name}"
    rates = [rate for rate in dict.fromkeys(rate for rate, _ in runs) if rate is not None and rate < math.inf]
    if len(rates) < 2:
        return shares_of_policies([run for _, run in runs], caption=caption)
    curves: dict[str, list[tuple[float, float]]] = {}
    for rate, run in sorted(runs, key=lambda pair: pair[0] or 0):
        if rate in rates and rate is not None:
            curves.setdefault(run.policy, []).append((rate, float(run.requests.normalised_latency.mean())))
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    latency_against_rate(figure.subplots(), curves)
    figure.suptitle(caption, fontsize=8, color="#4d4d4d", x=0.01, ha="left")
    return figure


def _rate_for_json(rate: float | None) -> float | str | None:
    return "inf" if rate == math.inf else rate
