"""What the benchmarks share: shapes of models, clocks, the limit that copying sets, and how results are written down.

A result is a dictionary {"benchmark", "environment", "settings", ...}; each script turns its own into a table with
`tables(result)` and into a picture with `plot(result)`, both pure functions, so that `report.py` prints from the
committed JSON exactly what the script printed when it ran.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paged import LLM, __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# From the Okabe-Ito palette, which colour-blind readers tell apart; hatched as well, so that grey is enough.
COLOURS = ("#0072b2", "#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#d55e00", "#999999")
HATCHES = ("", "////", "....", r"\\\\", "xxxx", "++++", "||||", "----")

Result = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class ModelShape:
    """A decoder of Llama's kind: all that decides how many bytes and operations a token takes.

    Attributes:
        model_type: transformers' name of the architecture, "llama" or "qwen3".
        tied: the embedding table is also the output projection.
    """

    name: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope_theta: float
    max_positions: int
    tied: bool

    def config(self) -> dict[str, Any]:
        """What transformers reads from a config.json. No token ends a sequence: lengths are the workload's."""
        return {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.model_type]],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    @property
    def layer_parameters(self) -> int:
        """Numbers in one decoder layer."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (query + 2 * kv) + query * self.hidden
        norms = 2 * self.hidden + (2 * self.head_dim if self.model_type == "qwen3" else 0)
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def parameters(self) -> int:
        """Numbers in the whole model; a tied table counts once."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + tables + self.hidden

    def weight_bytes_read(self, batch: int, itemsize: int) -> int:
        """Bytes of weights that a decode step of `batch` sequences has to read.

        All but the rows of the embedding table that no token names; the output projection is read whole, also when it
        is the same table.
        """
        projection = self.vocab * self.hidden
        return (self.layers * self.layer_parameters + self.hidden + projection + batch * self.hidden) * itemsize

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's K and V in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


SHAPES = {
    "llama-3-8b": ModelShape(
        name="Llama-3-8B",
        model_type="llama",
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
        vocab=128256,
        rope_theta=500000.0,
        max_positions=131072,
        tied=False,
    ),
    "qwen3-0.6b": ModelShape(
        name="Qwen3-0.6B",
        model_type="qwen3",
        hidden=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate=3072,
        vocab=151936,
        rope_theta=1000000.0,
        max_positions=40960,
        tied=True,
    ),
    "tiny": ModelShape(
        name="tiny",
        model_type="llama",
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=128,
        vocab=256,
        rope_theta=10000.0,
        max_positions=16384,
        tied=False,
    ),
}


def floor_seconds(shape: ModelShape, *, batch: int, context: float, itemsize: int, bytes_per_second: float) -> float:
    """The least time that a decode step can take if it reads weights and live K and V once, at this speed.

    Args:
        shape: of the model.
        batch: sequences, one token each.
        context: tokens that each of them sees, on average.
        itemsize: bytes of a number in weights and cache.
        bytes_per_second: what memory moves, measured.
    """
    kv = batch * context * shape.kv_bytes_per_token(itemsize)
    return (shape.weight_bytes_read(batch, itemsize) + kv) / bytes_per_second


def write_config(shape: ModelShape, folder: Path) -> Path:
    """Put the shape's config.json into a folder, which is then a model without weights."""
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    return folder


def load_engine(shape: ModelShape, **arguments: Any) -> LLM:
    """An LLM of random weights in this shape, without a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        return LLM(
            model=write_config(shape, Path(folder)),
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",
            **arguments,
        )


# ------------------------------------------------------------------------------------------------------------- clocks


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        seconds: the median.
        low, high: the fastest and the slowest.
        clock: "graph" (replays of a CUDA graph), "events" (CUDA events around launches) or "host".
    """

    seconds: float
    low: float
    high: float
    clock: str


def time_calls(calls: Sequence[Callable[[], object]], device: str, *, repeats: int = 20) -> Timing:
    """How long one of some calls takes that differ only in the memory they read.

    Taking turns keeps the GPU's L2 cache from holding what the last call read. On a GPU they are captured in one CUDA
    graph, so that launching them costs nothing, and each measurement is one replay; what cannot be captured is
    launched one by one and takes what that takes.
    """
    if not device.startswith("cuda"):
        for call in calls:
            call()
        return _summary([_host_seconds(lambda: [call() for call in calls]) for _ in range(repeats)], len(calls), "host")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run, clock = graph.replay, "graph"
        run()
    except RuntimeError:
        run, clock = (lambda: [call() for call in calls]), "events"
        run()
    torch.cuda.synchronize()
    return _summary([_event_seconds(run) for _ in range(repeats)], len(calls), clock)


def _event_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _host_seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _summary(seconds: list[float], num_calls: int, clock: str) -> Timing:
    each = sorted(value / num_calls for value in seconds)
    return Timing(statistics.median(each), each[0], each[-1], clock)


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy within the device's memory moves, read and written: the limit for what only reads.

    Each copy is launched by itself: in a CUDA graph it would be left to the copy engines, which are slower than a
    kernel that copies. The first ones do not count, because an idle GPU has to wake up.
    """
    num_bytes = 2**31 if device.startswith("cuda") else 2**25
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds_of = _event_seconds if device.startswith("cuda") else _host_seconds
    seconds = [seconds_of(lambda: target.copy_(source)) for _ in range(60)]
    return 2 * num_bytes / statistics.median(seconds[20:])


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def free_memory(device: str) -> int:
    """Let go of what nobody holds any more: objects, compiled code, cached memory. Returns the bytes still in use."""
    torch._dynamo.reset()
    gc.collect()
    if not device.startswith("cuda"):
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: str) -> int | None:
    """Most bytes that tensors took since `free_memory`; None where nobody counts."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def module_if_there(name: str) -> Any | None:
    """A module, or None if it, or something that it needs, is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# -------------------------------------------------------------------------------------------------------- environment


def environment(device: str) -> dict[str, Any]:
    """Where and on what a result was measured."""
    found: dict[str, Any] = {
        "device": device,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "paged": __version__,
        # A copy of the files without their history may name the commit that they are.
        "commit": os.environ.get("PAGED_COMMIT") or _output_of("git", "rev-parse", "--short=12", "HEAD"),
        "command": command_line(sys.argv),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": driver.splitlines()[0] if driver else None,
        }
    return found


def command_line(arguments: Sequence[str]) -> str:
    """The command as another machine would type it: of a path outside the repository only the file's name."""
    words = []
    for word in arguments:
        name, equals, value = word.rpartition("=")
        path = Path(value)
        if path.is_absolute():
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        words.append(name + equals + value)
    return shlex.join(["python", *words])


def _output_of(*command: str) -> str | None:
    """What a program prints, None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def describe(found: dict[str, Any]) -> str:
    """An environment in one line."""
    parts = [found.get("gpu") or f"{found['machine']}, {found['cpus']} cores", f"torch {found['torch']}"]
    if found.get("driver"):
        parts.append(f"driver {found['driver']}")
    parts += [f"transformers {found['transformers']}", f"Python {found['python']}", f"paged {found['paged']}"]
    if found.get("commit"):
        parts.append(f"commit {found['commit']}")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------------------ results


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table: the first column to the left, numbers to the right; what was not measured is a dash."""
    lines = [list(headers), ["---"] + ["---:"] * (len(headers) - 1)]
    for row in rows:
        assert len(row) == len(headers), f"{len(headers)} columns and a row of {len(row)}: {row}"
        lines.append(["-" if cell is None else str(cell) for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fixed(value: float | None, digits: int = 1) -> str | None:
    """A number with so many digits behind the point, None as it is."""
    return None if value is None else f"{value:,.{digits}f}"


def per_cent(share: float | None) -> str | None:
    """A share as the reader wants it, None as it is."""
    return None if share is None else f"{100 * share:.0f} %"


def gib(num_bytes: int | None) -> str | None:
    """Bytes in GiB, None as it is."""
    return None if num_bytes is None else f"{num_bytes / 2**30:.1f}"


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else 'no message'}"


def bars(ax: Axes, groups: Sequence[str], series: dict[str, Sequence[float | None]], *, unit: str) -> list[Any]:
    """Horizontal bars, one group below the other, each series in a colour and hatch of its own, from zero.

    Args:
        ax: where to draw.
        groups: names, from the top.
        series: for each name, a value for each group; None leaves the bar out.
        unit: of the values.

    Returns:
        The bars of each series.
    """
    height = 0.8 / max(1, len(series))
    artists = []
    for number, (name, values) in enumerate(series.items()):
        places = [group + 0.4 - height * (number + 0.5) for group in range(len(groups), 0, -1)]
        drawn = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        artists.append(
            ax.barh(
                [place for place, _ in drawn],
                [value for _, value in drawn],
                height,
                label=name,
                color=COLOURS[number % len(COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
                linewidth=0.5,
            )
        )
    ax.set_yticks(range(len(groups), 0, -1), groups, fontsize=8)
    ax.set_xlabel(unit)  # bars keep the axis at zero
    ax.spines[["top", "right"]].set_visible(False)
    return artists


def new_figure(result: Result, title: str, *, panels: int = 1, height: float = 4.5) -> tuple[Figure, list[Axes]]:
    """A figure that says on it what was measured, with what command and where.

    Args:
        result: whose environment is printed.
        title: the message.
        panels: axes side by side.
        height: inches.
    """
    figure = Figure(figsize=(max(8.0, 5.0 * panels), height), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    caption = f"{describe(result['environment'])}\n{result['environment']['command']}"
    figure.supxlabel(caption, fontsize=6, color="#4d4d4d", x=0.01, ha="left", wrap=True)
    return figure, list(axes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every benchmark has."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs; figures mean nothing")
    parser.add_argument("--output", type=Path, help="JSON, the plot beside it; default: benchmarks/results/")


def output_file(arguments: argparse.Namespace, name: str) -> Path:
    """Where the result goes: what was asked for, or its place; figures that mean nothing never overwrite others."""
    folder = ROOT / "build" / "benchmarks" if arguments.smoke else RESULTS
    return arguments.output or folder / f"{name}.json"


def save(result: Result, output: Path) -> None:
    """Write the JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def publish(result: Result, table: str, figure: Figure, output: Path) -> None:
    """Print the table, write the JSON and, beside it, the picture."""
    print(f"\n{table}\n\n{describe(result['environment'])}\n{result['environment']['command']}")
    save(result, output)
    figure.savefig(output.with_suffix(".png"))
    print(f"written: {output.name}, {output.with_suffix('.png').name}")


def run_in_new_process(script: str, arguments: Sequence[str], **variables: str) -> dict[str, Any]:
    """Run a script with a clean memory; its last line of output is a JSON object, or {"error": ...} if it failed."""
    command = [sys.executable, str(Path(__file__).resolve().parent / script), *arguments]
    folders = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        return {"error": said[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def in_batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Items in batches of `size`, in order; the last may be smaller."""
    return [items[first : first + size] for first in range(0, len(items), size)]
