"""What a step with prompts in it costs, which no CUDA graph holds, and whether the host or the GPU is the limit.

    python benchmarks/mixed_step.py
    python benchmarks/mixed_step.py --profile
    python benchmarks/mixed_step.py --mixes 0x0+1x830 64x1000+2x512

A mix is "decodes x context + prompts x tokens". Its decodes run on and on, and before each step as many prompts are
submitted, each of which wants one token; so with a step planned ahead of the one that runs, as the engine has it, every
step has the same number of both (it is checked). Of each mix:

    ms a step       by the host's clock, from the end of one step to the end of the next; the median, as is what follows
    launch          of that, the host in `ModelRunner.launch`: it only hands work over, no GPU is waited for
    waits           of that, the host in `StepInFlight.result`; next to nothing means that the GPU waits for the host
    submits         of that, the host queueing prompts, which a server spreads over time
    GPU busy        a kernel runs, in steps of their own under the profiler (on a CPU: some operation runs)
    TFLOP/s         of the matrix products (2 for each weight and token; output projection: for each row that samples),
                    over the whole step, and over the time of their kernels alone

The weights are random, the shapes real.
"""

import argparse
import cProfile
import itertools
import pstats
import random
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from common import (
    SHAPES,
    ModelShape,
    Result,
    add_arguments,
    bars,
    environment,
    fixed,
    load_engine,
    markdown,
    new_figure,
    output_file,
    per_cent,
    publish,
    synchronize,
)
from matplotlib.figure import Figure
from products import head_product, layer_products
from profiling import Launch, profile_steps, profile_table, watched

from paged import Engine, RequestOutputKind, SamplingParams
from paged.step import Step

WARM_UP = 4
PROFILED_STEPS = 3
# Tokens that a decode goes on for, and how many of them it has, about, when the clock starts.
LASTING, LEAD = 800, 60
# A step whose GPU is idle for more than this share of it waits for the host.
IDLE = 0.1
# A mean of so many medians is worth a word: something was compiled, or the machine had other work.
UNEVEN = 1.2


@dataclass(frozen=True)
class Mix:
    """What each step has.

    >>> Mix.parse("255x1000+8x830")
    Mix(decodes=255, context=1000, prompts=8, prompt_tokens=830)
    """

    decodes: int
    context: int
    prompts: int
    prompt_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Mix":
        """From "decodes x context + prompts x tokens".

        Raises:
            argparse.ArgumentTypeError: it is something else.
        """
        numbers = re.fullmatch(r"(\d+)x(\d+)\+(\d+)x(\d+)", text)
        if numbers is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not like 255x1000+8x830 (decodes x context + prompts x tokens)"
            )
        mix = cls(*map(int, numbers.groups()))
        if (mix.prompts and mix.prompt_tokens < 2) or not mix.decodes + mix.prompts:
            raise argparse.ArgumentTypeError(f"{text!r} has nobody in it, or prompts of fewer than 2 tokens")
        return mix

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.decodes + self.prompts * self.prompt_tokens

    @property
    def label(self) -> str:
        """As in the tables."""
        parts = [f"{self.decodes} decodes at {self.context:,}"] if self.decodes else []
        if self.prompts:
            parts.append(f"{self.prompts} {'prompt' if self.prompts == 1 else 'prompts'} of {self.prompt_tokens:,}")
        return " + ".join(parts)

    def flop(self, shape: ModelShape) -> int:
        """Of the matrix products of a step; everybody in it samples."""
        layer = sum(product.flop(self.tokens) for product in layer_products(shape, fused=True))
        return shape.layers * layer + head_product(shape).flop(self.decodes + self.prompts)

    def is_in(self, launch: Launch) -> bool:
        """Whether a step was of this mix."""
        return (launch.decodes, launch.prompts, launch.tokens) == (self.decodes, self.prompts, self.tokens)


DEFAULT = [
    "0x0+1x830",
    "0x0+1x4096",
    "0x0+1x8192",
    *(f"255x1000+{count}x830" for count in (1, 2, 4, 8)),
    "255x1000+0x0",
]
SMOKE = ["0x0+1x24", "3x40+2x20", "3x40+0x0"]


class Feeder:
    """Keeps an engine in steps of a mix.

    Args:
        engine: with nobody in it.
        vocab: token ids to draw from.
        seed: of the token ids.

    Attributes:
        submit_seconds: spent on submitting prompts so far.
    """

    def __init__(self, engine: Engine, vocab: int, seed: int) -> None:
        self.engine = engine
        self.submit_seconds = 0.0
        self._vocab = vocab
        self._rng = random.Random(seed)
        self._names = map(str, itertools.count())
        self._decodes: list[str] = []
        self._context = 0

    def begin(self, mix: Mix) -> None:
        """Have the mix's decodes running, those that run already if they suit, and nobody's prompt left.

        Raises:
            RuntimeError: they do not fit.
        """
        if (len(self._decodes), self._context) != (mix.decodes, mix.context):
            self.end()
            prompt = self._draw(max(2, mix.context - LEAD))
            self._decodes = [self._submit(prompt, LASTING) for _ in range(mix.decodes)]
            self._context = mix.context
        scheduler = self.engine.scheduler
        while any(
            request.sequences[0].num_computed_tokens < len(request.prompt_token_ids)
            for request in (*scheduler.waiting, *scheduler.running)
        ):
            self.engine.step()
            if len(scheduler.running) + len(scheduler.waiting) < mix.decodes:
                raise RuntimeError(f"the decodes of {mix.label} never ran at once (see the log)")

    def end(self) -> None:
        """Have nobody left."""
        for name in self._decodes:
            self.engine.abort_request(name)
        self._decodes = []
        while self.engine.has_unfinished_requests:
            self.engine.step()

    @contextmanager
    def feeding(self, mix: Mix) -> Iterator[None]:
        """Inside, `engine.step` submits the prompts of a step before it brings one to its end."""
        step = self.engine.step
        # Drawn before, and the same for every step: what a token is does not change what it takes.
        prompts = [self._draw(mix.prompt_tokens) for _ in range(mix.prompts)]

        def fed() -> Any:
            started = time.perf_counter()
            for prompt in prompts:
                self._submit(prompt, 1)
            self.submit_seconds += time.perf_counter() - started
            return step()

        with mock.patch.object(self.engine, "step", fed):
            yield

    @property
    def mean_context(self) -> float | None:
        """Of the decodes."""
        names = set(self._decodes)
        running = [request for request in self.engine.scheduler.running if request.request_id in names]
        return statistics.mean(request.sequences[0].num_computed_tokens for request in running) if running else None

    def _draw(self, num_tokens: int) -> list[int]:
        return self._rng.choices(range(self._vocab), k=num_tokens)

    def _submit(self, prompt: list[int], max_tokens: int) -> str:
        name = next(self._names)
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(name, prompt, params)
        return name


def measure(feeder: Feeder, shape: ModelShape, mix: Mix, steps: int, device: str, *, profile: bool) -> dict[str, Any]:
    """One row: a mix in steady state."""
    row: dict[str, Any] = {"mix": asdict(mix), "label": mix.label, "tokens": mix.tokens, "steps": steps}
    engine = feeder.engine
    feeder.begin(mix)
    with feeder.feeding(mix):
        with watched(engine) as launches:
            for _ in range(WARM_UP):
                engine.step()
            first, overlapped, submitted = len(launches), engine.num_overlapped_steps, feeder.submit_seconds
            marks = [time.perf_counter()]
            for _ in range(steps):
                engine.step()
                marks.append(time.perf_counter())
        timed = launches[first:]
        row["context"] = feeder.mean_context
        row["overlapped_steps"] = engine.num_overlapped_steps - overlapped
        others = [launch for launch in timed if not mix.is_in(launch)]
        if others or len(timed) != steps:
            seen = f"{others[0].decodes} decodes, {others[0].prompts} prompts" if others else "no steps"
            return row | {"error": f"{len(others)} of {len(timed)} steps were of another mix, such as {seen}"}
        row["mean_seconds"] = (marks[-1] - marks[0]) / steps
        row["seconds"] = statistics.median(after - before for before, after in itertools.pairwise(marks))
        row["launch_seconds"] = statistics.median(launch.launch_seconds for launch in timed)
        row["wait_seconds"] = statistics.median(launch.wait_seconds for launch in timed)
        row["submit_seconds"] = (feeder.submit_seconds - submitted) / steps
        row["tokens_per_second"] = mix.tokens / row["seconds"]
        row["tflop_per_s"] = mix.flop(shape) / row["seconds"] / 1e12
        found = profile_steps(engine, device, PROFILED_STEPS)
        row["busy_seconds"] = found["busy_ms"] / 1e3
        products = found["groups_ms"].get("matrix products")
        row["product_tflop_per_s"] = mix.flop(shape) / products / 1e9 if products else None
        if profile:
            row["profile"] = found
            row["host_functions"] = host_functions(engine, PROFILED_STEPS)
    return row


def host_functions(engine: Engine, steps: int, count: int = 15) -> dict[str, list[dict[str, Any]]]:
    """Python functions in which launching spends its time, under cProfile, which makes everything slower.

    Returns:
        "own": those with most time of their own; "paged": this package's, with what they call.
    """
    profiler, launch = cProfile.Profile(), engine.runner.launch

    def profiled(step: Step) -> Any:
        return profiler.runcall(launch, step)

    with mock.patch.object(engine.runner, "launch", profiled):
        for _ in range(steps):
            engine.step()
    return summarise_functions(pstats.Stats(profiler).stats, steps, count)  # type: ignore[attr-defined]


def summarise_functions(stats: dict[Any, Any], steps: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """The largest of cProfile's entries {(file, line, name): (_, calls, own seconds, all seconds, _)}."""
    found = [
        {
            "name": function_name(file, name),
            "calls": calls / steps,
            "own_ms": own / steps * 1e3,
            "all_ms": everything / steps * 1e3,
            "is_paged": "paged" in Path(file).parts[:-1],
        }
        for (file, _, name), (_, calls, own, everything, _) in stats.items()
    ]
    return {
        "own": sorted(found, key=lambda entry: -entry["own_ms"])[:count],
        "paged": sorted((f for f in found if f["is_paged"]), key=lambda entry: -entry["all_ms"])[:count],
    }


def function_name(file: str, name: str) -> str:
    """Enough of a path to know the function by, and nothing of the machine's folders.

    >>> function_name("/usr/lib/python3/site-packages/torch/nn/modules/module.py", "_call_impl")
    'modules/module.py: _call_impl'
    >>> function_name("~", "<built-in method torch.empty>")
    '<built-in method torch.empty>'
    """
    name = re.sub(r" at 0x[0-9a-f]+", "", name)
    return name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}: {name}"


def limit(row: dict[str, Any]) -> str:
    """Who is waited for.

    >>> limit({"busy_seconds": 0.95, "seconds": 1.0}), limit({"busy_seconds": 0.5, "seconds": 1.0})
    ('GPU', 'host')
    """
    return "GPU" if row["busy_seconds"] >= (1 - IDLE) * row["seconds"] else "host"


def tables(result: Result) -> str:
    """The mixes, and below them the profiles if there are any."""
    lines: list[list[str | None]] = []
    for row in result["rows"]:
        if "error" in row:
            lines.append([f"{row['label']}: {row['error']}", *[None] * 9])
            continue
        milliseconds = (row[f"{name}_seconds"] * 1e3 for name in ("launch", "wait", "submit", "busy"))
        lines.append(
            [
                row["label"],
                fixed(row["seconds"] * 1e3, 2),
                *(fixed(value, 2) for value in milliseconds),
                per_cent(row["busy_seconds"] / row["seconds"]),
                limit(row),
                fixed(row["tokens_per_second"], 0),
                f"{fixed(row['tflop_per_s'], 0)} / {fixed(row['product_tflop_per_s'], 0) or '-'}",
            ]
        )
    headers = ["ms a step", "launch", "waits", "submits", "GPU busy", "busy", "limit", "tokens/s"]
    model = result["settings"]["model"]
    text = markdown([f"{model}: steps of", *headers, "TFLOP/s: step / products"], lines)
    uneven = [
        f"- {row['label']}: the mean is {row['mean_seconds'] * 1e3:,.2f} ms; some steps took much longer"
        for row in result["rows"]
        if "error" not in row and row["mean_seconds"] > UNEVEN * row["seconds"]
    ]
    text += "\n\n" + "\n".join(uneven) if uneven else ""
    for row in result["rows"]:
        if "profile" in row:
            text += (
                f"\n\n{row['label']}:\n\n{profile_table(row['profile'])}\n\n{functions_table(row['host_functions'])}"
            )
    return text


def functions_table(functions: dict[str, list[dict[str, Any]]]) -> str:
    """`host_functions` for readers."""
    parts = []
    for title, key in (("own", "launching, under cProfile: own time"), ("paged", "this package's, with all they call")):
        lines = [
            [
                f"`{entry['name'][:70]}`".replace("|", "/"),
                fixed(entry["calls"], 0),
                fixed(entry["own_ms"], 3),
                fixed(entry["all_ms"], 3),
            ]
            for entry in functions[title]
        ]
        parts.append(markdown([key, "calls a step", "own, ms a step", "all, ms a step"], lines))
    return "\n\n".join(parts)


def plot(result: Result) -> Figure:
    """A step, what the host spends on launching it, and what the GPU needs for it."""
    rows = [row for row in result["rows"] if "error" not in row]
    figure, (ax,) = new_figure(
        result, f"Steps with prompts, {result['settings']['model']}: host and GPU", height=2 + 0.4 * len(rows)
    )
    names = {"step": "seconds", "host: launch": "launch_seconds", "GPU busy": "busy_seconds"}
    series = {name: [row[key] * 1e3 for row in rows] for name, key in names.items()}
    bars(ax, [row["label"] for row in rows], series, unit="ms")
    ax.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--mixes", nargs="+", type=Mix.parse, default=[Mix.parse(text) for text in DEFAULT])
    parser.add_argument("--steps", type=int, default=16, help="steps of each mix that are timed")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="and the largest kernels and host functions")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.smoke:
        arguments.model, arguments.mixes, arguments.steps = "tiny", [Mix.parse(text) for text in SMOKE], 5
    shape, mixes = SHAPES[arguments.model], arguments.mixes
    most_decodes = max(mix.decodes for mix in mixes)
    started = time.perf_counter()
    llm = load_engine(
        shape,
        device=device,
        dtype="bfloat16" if device.startswith("cuda") else "float32",
        max_model_len=max(max(mix.context + LASTING if mix.decodes else 0, mix.prompt_tokens) for mix in mixes) + 8,
        # The prompts of one step are still there while the next one is planned.
        max_num_seqs=max(mix.decodes + 2 * mix.prompts for mix in mixes),
        max_num_batched_tokens=max(mix.tokens + 2 * mix.prompts for mix in mixes),
        block_size=arguments.block_size,
        enable_prefix_caching=False,
        async_scheduling=True,
        cudagraph_capture_sizes=(most_decodes,) if most_decodes else (),
    )
    print(f"{shape.name}: engine ready after {time.perf_counter() - started:.0f} s", flush=True)
    feeder = Feeder(llm.engine, shape.vocab, arguments.seed)
    rows = []
    for mix in mixes:
        row = measure(feeder, shape, mix, arguments.steps, device, profile=arguments.profile)
        said = row.get("error")
        if said is None:
            busy, launch = row["busy_seconds"] * 1e3, row["launch_seconds"] * 1e3
            said = f"{row['seconds'] * 1e3:.2f} ms, GPU busy {busy:.2f}, launch {launch:.2f}: {limit(row)}"
        print(f"{mix.label}: {said}", flush=True)
        rows.append(row)
    feeder.end()
    synchronize(device)
    result = {
        "benchmark": "mixed_step",
        "environment": environment(device),
        "settings": {
            "model": shape.name,
            "steps": arguments.steps,
            "block_size": arguments.block_size,
            "seed": arguments.seed,
        },
        "start_up_seconds": getattr(llm.engine.runner, "start_up_seconds", None),
        "rows": rows,
    }
    publish(result, tables(result), plot(result), output_file(arguments, "mixed_step"))


if __name__ == "__main__":
    main()
