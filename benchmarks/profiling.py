"""Where time goes in the steps of an engine: the device's kernels, its gaps, and what the host spends on each.

Shared by the scripts that have a `--profile`. The arithmetic is in pure functions over `Span` and `Launch`.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import fixed, markdown, synchronize

from paged import Engine
from paged.model.runner import StepInFlight
from paged.step import Step

# Kernels by what they are for; the first group with a word in the kernel's name takes it.
KERNEL_GROUPS = {
    "attention": ("flex", "attention", "flash", "fmha", "sdpa"),
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "xmma", "splitk", "matmul", "aten::mm", "aten::addmm"),
    "copies between host and device": ("memcpy", "memset"),
    "sampling": ("argmax", "reduce_kernel", "sort", "topk", "softmax", "cumsum", "scan"),
    "gathers and scatters": ("index", "gather", "scatter"),
    "compiled pointwise work and norms": ("triton",),
    "other pointwise work": ("elementwise", "cat", "copy", "aten::"),
}
# Gaps between kernels by their length in microseconds: launches that follow each other; a late launch; a late step.
GAPS = {"under 5 us": 5.0, "5 to 50 us": 50.0, "50 to 500 us": 500.0, "longer": float("inf")}


class Span(NamedTuple):
    """One kernel: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


# ------------------------------------------------------------------------------------------------------------ kernels


@contextmanager
def recorded_spans(device: str, *, host: bool = False) -> Iterator[list[Span]]:
    """A list that holds every kernel of what runs inside, once that has ended; the device is waited for at both ends.

    Args:
        device: on a CPU, the operations without children stand for kernels.
        host: note the host's operations as well, which takes the host longer, so that gaps grow.
    """
    on_gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    if host or not on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CPU)
    spans: list[Span] = []
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        yield spans
        synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans += [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted and (on_gpu or not event.cpu_children) and not is_annotation(event)
    ]


def is_annotation(event: Any) -> bool:
    """Whether an event only names a stretch of others, as torch.compile does for its graphs."""
    marked = getattr(event, "is_user_annotation", False)
    return marked or event.name.startswith(("##", "Torch-Compiled", "ProfilerStep"))


def group_of(kernel: str) -> str:
    """What a kernel is for, by its name.

    >>> group_of("triton_tem_fused_flex_attention_0"), group_of("nvjet_tst_128x8_64x12"), group_of("unheard_of")
    ('attention', 'matrix products', 'others')
    """
    name = kernel.lower()
    return next((group for group, words in KERNEL_GROUPS.items() if any(word in name for word in words)), "others")


def busy_microseconds(spans: Iterable[Span]) -> float:
    """Time in which at least one kernel ran.

    >>> busy_microseconds([Span("a", 0, 4), Span("b", 2, 5), Span("c", 7, 8)])
    6.0
    """
    busy, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return busy


def gap_lengths(spans: Iterable[Span]) -> list[float]:
    """Microseconds of each stretch between the first kernel and the last in which none ran.

    >>> gap_lengths([Span("c", 7, 8), Span("a", 0, 4), Span("inside", 1, 2), Span("b", 4, 5)])
    [2.0]
    """
    ordered = sorted(spans, key=lambda span: span.start)
    gaps, end = [], ordered[0].end if ordered else 0.0
    for span in ordered:
        if span.start > end:
            gaps.append(float(span.start - end))
        end = max(end, span.end)
    return gaps


def sorted_gaps(lengths: Iterable[float]) -> dict[str, dict[str, float]]:
    """How many gaps there are of each kind in GAPS, and their sum.

    >>> sorted_gaps([2.0, 3.0, 5.0, 900.0])["under 5 us"], sorted_gaps([2.0, 3.0, 5.0, 900.0])["longer"]
    ({'count': 2, 'ms': 0.005}, {'count': 1, 'ms': 0.9})
    """
    found: dict[str, dict[str, float]] = {name: {"count": 0, "ms": 0.0} for name in GAPS}
    for length in lengths:
        kind = found[next(name for name, most in GAPS.items() if length < most)]
        kind["count"] += 1
        kind["ms"] += length / 1e3
    return found


def summarise(spans: list[Span], steps: int, *, groups: int = 5) -> dict[str, Any]:
    """Milliseconds a step: the largest groups, all kernels, and waiting between them under the profiler."""
    sums: dict[str, float] = {}
    for span in spans:
        name = group_of(span.name)
        sums[name] = sums.get(name, 0.0) + span.end - span.start
    busy = busy_microseconds(spans)
    window = max((span.end for span in spans), default=0.0) - min((span.start for span in spans), default=0.0)
    largest = sorted(sums.items(), key=lambda group: -group[1])[:groups]
    return {
        "groups_ms": {name: microseconds / steps / 1e3 for name, microseconds in largest},
        "busy_ms": busy / steps / 1e3,
        "idle_ms": (window - busy) / steps / 1e3,
        "kernels": len(spans) / steps,
    }


def largest_kernels(spans: Iterable[Span], steps: int, count: int) -> list[dict[str, Any]]:
    """The kernels that take most, by name: milliseconds and calls a step."""
    found: dict[str, list[float]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span.end - span.start)
    largest = sorted(found.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {"name": name, "group": group_of(name), "ms": sum(times) / steps / 1e3, "calls": len(times) / steps}
        for name, times in largest
    ]


# -------------------------------------------------------------------------------------------------------------- steps


@dataclass(slots=True)
class Launch:
    """A step as the host saw it.

    Attributes:
        decodes: rows of one token.
        prompts: rows of more.
        tokens: that it computes.
        is_graph: it was one CUDA graph (see `is_graph`).
        launch_seconds: until `ModelRunner.launch` returned, which waits for nothing on a GPU.
        wait_seconds: in `StepInFlight.result`, which waits for the GPU; if that is next to nothing in every step, the
            host is what everybody waits for.
        wall_seconds: of the `Engine.step` that ended it, in which the one behind it was launched: where the host is the
            limit, that launch is what shows here.
    """

    decodes: int
    prompts: int
    tokens: int
    is_graph: bool
    launch_seconds: float
    wait_seconds: float = 0.0
    wall_seconds: float = 0.0


def contents(step: Step) -> tuple[int, int, int]:
    """(rows of one token, rows of more, tokens) of a step.

    Rows of one token come first, so this looks at the others only: a step of hundreds of decodes costs nothing.
    """
    prompts = tokens = 0
    for row in reversed(step.rows):
        if len(row.token_ids) == 1:
            break
        prompts += 1
        tokens += len(row.token_ids)
    decodes = len(step.rows) - prompts
    return decodes, prompts, decodes + tokens


def is_graph(engine: Engine, decodes: int, prompts: int) -> bool:
    """Whether a step of plain greedy requests is run as a CUDA graph: decodes alone, no more than were captured."""
    graphs = engine.runner.graphs
    return graphs is not None and prompts == 0 and bool(graphs.sizes) and decodes <= graphs.sizes[-1]


def num_graph_steps(engine: Engine) -> int | None:
    """Steps that were CUDA graphs so far, as the runner counts them; None if it does not."""
    for owner in (engine.runner, engine.runner.graphs):
        count = getattr(owner, "num_graph_steps", None)
        if count is not None:
            return int(count)
    return None


@contextmanager
def watched(engine: Engine) -> Iterator[list[Launch]]:
    """A list that grows by a Launch with every step that the engine ends.

    `Engine.step` ends steps in the order in which it launched them, one at each call; a step that was launched before
    this began has no entry, and one that has not ended when this ends has none either.
    """
    ended: list[Launch] = []
    flights: dict[int, Launch] = {}
    launch, result, step = engine.runner.launch, StepInFlight.result, engine.step

    def timed_launch(plan: Step) -> StepInFlight:
        started = time.perf_counter()
        flight = launch(plan)
        seconds = time.perf_counter() - started
        decodes, prompts, tokens = contents(plan)
        found = Launch(decodes, prompts, tokens, is_graph(engine, decodes, prompts), seconds)
        flights[id(flight)] = found
        return flight

    def timed_result(flight: StepInFlight) -> Any:
        started = time.perf_counter()
        found = result(flight)
        noted = flights.pop(id(flight), None)
        if noted is not None:
            noted.wait_seconds = time.perf_counter() - started
            ended.append(noted)
        return found

    def timed_step() -> Any:
        before, started = len(ended), time.perf_counter()
        outputs = step()
        if len(ended) > before:
            ended[-1].wall_seconds = time.perf_counter() - started
        return outputs

    with (
        mock.patch.object(engine.runner, "launch", timed_launch),
        mock.patch.object(StepInFlight, "result", timed_result),
        mock.patch.object(engine, "step", timed_step),
    ):
        yield ended


def by_kind(launches: Sequence[Launch]) -> dict[str, dict[str, float]]:
    """Steps that were CUDA graphs, other decodes, and steps with prompts: how many, and their means and sums.

    >>> steps = [Launch(2, 0, 2, True, 0.1, 0.2, 1.0), Launch(2, 1, 9, False, 0.5, 0.0, 3.0)]
    >>> by_kind([*steps, Launch(4, 0, 4, True, 0.3, 0.4, 3.0)])["graphs"]
    {'steps': 2, 'tokens': 3.0, 'seconds': 4.0, 'wall_ms': 2000.0, 'launch_ms': 200.0, 'wait_ms': 300.0}
    """
    kinds: dict[str, list[Launch]] = {}
    for found in launches:
        kind = "with prompts" if found.prompts else "graphs" if found.is_graph else "decodes, no graph"
        kinds.setdefault(kind, []).append(found)

    def mean(values: Iterable[float], count: int) -> float:
        return round(sum(values) / count, 9)

    return {
        kind: {
            "steps": len(members),
            "tokens": mean((m.tokens for m in members), len(members)),
            "seconds": sum(m.wall_seconds for m in members),
            "wall_ms": mean((m.wall_seconds * 1e3 for m in members), len(members)),
            "launch_ms": mean((m.launch_seconds * 1e3 for m in members), len(members)),
            "wait_ms": mean((m.wait_seconds * 1e3 for m in members), len(members)),
        }
        for kind, members in kinds.items()
    }


def kinds_table(kinds: dict[str, dict[str, float]]) -> str:
    """`by_kind` for readers."""
    lines = [
        [
            name,
            kind["steps"],
            fixed(kind["tokens"], 0),
            fixed(kind["seconds"], 2),
            fixed(kind["wall_ms"], 2),
            fixed(kind["launch_ms"], 2),
            fixed(kind["wait_ms"], 2),
        ]
        for name, kind in kinds.items()
    ]
    headers = ["steps", "number", "mean tokens", "seconds", "ms a step", "host: launch, ms", "host: waits, ms"]
    return markdown(headers, lines)


# --------------------------------------------------------------------------------------------------------- many steps


def profile_steps(engine: Engine, device: str, steps: int) -> dict[str, Any]:
    """So many steps under the profiler: what the device does, how long it does nothing, and what the steps were."""
    with watched(engine) as launches, recorded_spans(device) as spans:
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        synchronize(device)
        wall = time.perf_counter() - started
    # The step that was in flight at the start ran before; the one that is in flight at the end runs inside.
    gaps = gap_lengths(spans)
    found = summarise(spans, steps, groups=len(KERNEL_GROUPS) + 1)
    window = (found["busy_ms"] + found["idle_ms"]) * steps
    return found | {
        "steps": steps,
        "wall_ms": wall / steps * 1e3,
        "busy_share": found["busy_ms"] * steps / window if window else None,
        "gaps": sorted_gaps(gaps),
        "longest_gaps_us": sorted(gaps, reverse=True)[:5],
        "largest": largest_kernels(spans, steps, 12),
        "kinds": by_kind(launches),
    }


def profile_table(profile: dict[str, Any], *, kernels: bool = True) -> str:
    """`profile_steps` for readers."""
    costs = [[name, fixed(value, 3)] for name, value in profile["groups_ms"].items()]
    costs.append(["all kernels, overlaps counted once", fixed(profile["busy_ms"], 3)])
    costs += [
        [f"no kernel runs, {name}: {gap['count'] / profile['steps']:.1f} times", fixed(gap["ms"] / profile["steps"], 3)]
        for name, gap in profile["gaps"].items()
        if gap["count"]
    ]
    costs.append(["wall time, profiled", fixed(profile["wall_ms"], 3)])
    share = profile["busy_share"]
    title = f"{profile['steps']} steps, {profile['kernels']:.0f} kernels a step"
    title += "" if share is None else f", a kernel runs {100 * share:.1f} % of the time"
    text = markdown([title, "ms a step"], costs)
    return f"{text}\n\n{kernels_table(profile['largest'])}" if kernels else text


def kernels_table(largest: list[dict[str, Any]]) -> str:
    """`largest_kernels` for readers."""
    lines = [
        [f"`{found['name'][:70]}`".replace("|", "/"), fixed(found["calls"]), fixed(found["ms"], 3)] for found in largest
    ]
    return markdown(["kernel", "calls a step", "ms a step"], lines)
