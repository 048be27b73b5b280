"""What the host does between two decode steps, without a model and without a GPU: microseconds of Python and numpy.

    python benchmarks/host_time.py > benchmarks/results/host_time.md
    python benchmarks/host_time.py --before OTHER_CHECKOUT           the same, beside another one, in turns

The whole engine runs, with steps planned while others are in flight, and so does the runner's `launch`; only the model
is missing, and what stands for its CUDA graphs does nothing. Left out are therefore the copy of a step's small tensor
to the device, the launch of a graph, and pinned memory.

Where nothing else is said, nobody comes or goes while the clock runs. Figures are the lowest of several processes,
because whatever else a machine does only ever adds to them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paged import LLM, SamplingParams, __version__
from paged.batch import Batch, BatchBuilder
from paged.engine import Engine
from paged.model.decode_graphs import Decoded, DecodeGraphs, capture_sizes
from paged.model.flex_inputs import FlexInputsBuilder
from paged.model.pools import Pools
from paged.model.runner import ModelRunner
from paged.model.shared_prefix import PrefixFinder
from paged.sampling_params import RequestOutputKind
from paged.scheduler import Scheduler
from paged.step import Step

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 16
MAX_NUM_SEQS = 256
MAX_MODEL_LEN = 16384
PROMPT_TOKENS = 20
VOCAB_SIZE = 1024  # the tiny model's, whose tokenizer makes the text
TOKEN = 300  # what every step "samples": an ordinary word
BATCHES = (1, 64, 256)
LONG_BATCH = 8
WISHES = {
    "tokens at the end": {"kind": RequestOutputKind.FINAL_ONLY, "text": False},
    "text at the end, as `LLM.generate` wants it": {"kind": RequestOutputKind.FINAL_ONLY, "text": True},
    "new text at each step (DELTA)": {"kind": RequestOutputKind.DELTA, "text": True},
    "all tokens at each step (CUMULATIVE)": {"kind": RequestOutputKind.CUMULATIVE, "text": False},
}


@dataclass(frozen=True)
class Case:
    """A number of sequences, and what their callers want to see.

    Attributes:
        batch: sequences, one token each.
        kind: when outputs are wanted.
        text: whether tokens become text.
        generated: tokens that each has when the clock starts.
        steps: steps that are timed.
    """

    batch: int
    kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    text: bool = False
    generated: int = 100
    steps: int = 160


class NoGraph:
    """Stands for a captured forward pass."""

    def replay(self) -> None:
        """Nothing runs."""


class HostRunner(ModelRunner):
    """The runner's own `launch`, over builders in host memory; every token sampled is the same."""

    def __init__(self) -> None:
        cpu = torch.device("cpu")
        shape = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN, "block_size": BLOCK_SIZE}
        self._builder = BatchBuilder(**shape, vocab_size=VOCAB_SIZE, device=cpu, with_groups=False)
        self._flex = FlexInputsBuilder(**shape, num_kv_heads=8, group=4, windows=[None], device=cpu)
        # Looking for shared prefixes is the host's work too; 64 KiB is a block of 16 tokens of 8 KV heads of 128.
        tables = self._builder.block_tables
        self.pools = Pools([], block_size=BLOCK_SIZE, dtype=torch.float32, device=cpu, in_inference_mode=False)
        self._prefixes = PrefixFinder(tables, block_size=BLOCK_SIZE, group=4, block_bytes=64 * 1024)
        self.num_cascade_steps = 0
        self.attention_form = "flex"
        self.graphs = DecodeGraphs(lambda *_: torch.empty(0), self._flex, self._builder.last_token_ids)
        self.graphs.sizes = capture_sizes(MAX_NUM_SEQS)
        self.graphs._graphs = {(size, False): NoGraph() for size in self.graphs.sizes}
        self.graphs._batch = torch.zeros(5, MAX_NUM_SEQS, dtype=torch.int64)
        sampled = torch.tensor([[TOKEN], [0]]).expand(2, MAX_NUM_SEQS).contiguous()
        self.graphs._decoded = Decoded(torch.zeros(MAX_NUM_SEQS, 1), sampled)

    def _logits(self, step: Step, batch: Batch, first_blocks: np.ndarray | None) -> Tensor:
        """What prompts give: the same token as all the others."""
        logits = torch.zeros(len(batch.sampled), VOCAB_SIZE)
        logits[:, TOKEN] = 1
        return logits


def new_engine() -> Engine:
    """An engine without a model."""
    engine = LLM(model="tiny", device="cpu", async_scheduling=True, max_num_seqs=MAX_NUM_SEQS).engine
    engine.runner = HostRunner()
    engine.max_model_len = MAX_MODEL_LEN
    engine.scheduler = Scheduler(
        num_blocks=80_000, block_size=BLOCK_SIZE, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=16384
    )
    return engine


def steady_seconds(engine: Engine, case: Case) -> list[float]:
    """Seconds of each step in which all of a case's sequences decode."""
    add_requests(engine, case, max_tokens=case.generated + case.steps + 20)
    for _ in range(case.generated):
        engine.step()
    seconds = timed_steps(engine, case.steps)
    for i in range(case.batch):
        engine.abort_request(str(i))
    return seconds


def whole_run(engine: Engine, case: Case) -> float:
    """Microseconds of a step, from the first decode to the last, where texts are made and blocks are let go."""
    add_requests(engine, case, max_tokens=case.steps + 1)
    engine.step()
    seconds = timed_steps(engine, case.steps)
    assert not engine.has_unfinished_requests, "everybody is as long as planned"
    return statistics.mean(seconds) * 1e6


def add_requests(engine: Engine, case: Case, max_tokens: int) -> None:
    """Queue a case's requests."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=case.text, output_kind=case.kind
    )
    for i in range(case.batch):
        # No two begin alike, because blocks found in the prefix cache are not what is measured; and they are of
        # different lengths, so that in each step some sequences begin a block.
        length = PROMPT_TOKENS + i % BLOCK_SIZE
        engine.add_request(str(i), [(i * 7 + k) % VOCAB_SIZE for k in range(length)], params)


def timed_steps(engine: Engine, count: int) -> list[float]:
    """Seconds of each of the next steps."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def split(engine: Engine, case: Case) -> dict[str, float]:
    """Microseconds of each part of a step, with clocks around its calls, which take a few themselves."""
    runner: Any = engine.runner
    clocks: dict[str, list[float]] = {}
    places = [
        (engine.scheduler, "schedule_ahead"),
        (runner._builder, "replay"),
        (runner._flex, "replay"),
        (runner.graphs, "run"),
        (runner, "launch"),
        (engine.scheduler, "update"),
    ]
    for place, name in places:
        clocks[f"{type(place).__name__}.{name}"] = seconds = []
        setattr(place, name, timed(getattr(place, name), seconds))
    whole = steady_seconds(engine, case)
    for place, name in places:
        delattr(place, name)  # the class's own is seen again
    found = {name: quietest(seconds[-case.steps :]) for name, seconds in clocks.items()}
    inside = found["BatchBuilder.replay"] + found["FlexInputsBuilder.replay"] + found["DecodeGraphs.run"]
    step = quietest(whole)
    return {
        "plan the next step": found["Scheduler.schedule_ahead"],
        "launch: block tables and wishes": found["BatchBuilder.replay"],
        "launch: block tables on the device": found["FlexInputsBuilder.replay"],
        "launch: the graph's small tensor": found["DecodeGraphs.run"],
        "launch: the rest": found["HostRunner.launch"] - inside,
        "take tokens in": found["Scheduler.update"],
        "answers and outputs": step
        - found["Scheduler.schedule_ahead"]
        - found["HostRunner.launch"]
        - found["Scheduler.update"],
        "all": step,
    }


def quietest(seconds: list[float]) -> float:
    """Microseconds of a step: means over as many steps as a block has tokens, of which the lowest counts.

    In so many steps every sequence begins one block. Whatever else the machine does only ever adds to a mean.
    """
    means = [statistics.mean(seconds[i : i + BLOCK_SIZE]) for i in range(0, len(seconds) - BLOCK_SIZE + 1, BLOCK_SIZE)]
    return min(means) * 1e6


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which notes how long each call takes."""

    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        found = function(*arguments)
        seconds.append(time.perf_counter() - started)
        return found

    return call


def measure(*, smoke: bool) -> dict[str, float]:
    """Every figure of this process, by "table | row | column"."""
    engine, found = new_engine(), {}
    steps = 2 * BLOCK_SIZE if smoke else 10 * BLOCK_SIZE
    short, long = (20, 100) if smoke else (100, 10_000)
    for batch in BATCHES:
        for part, value in split(engine, Case(batch, generated=short, steps=steps)).items():
            found[f"parts | {part} | {batch}"] = value
        for name, wishes in WISHES.items():
            case = Case(batch, generated=short, steps=steps, **wishes)
            found[f"wishes | {name} | {batch}"] = quietest(steady_seconds(engine, case))
        case = Case(batch, steps=2 * steps, text=True)
        found[f"wishes | a whole run with text at the end | {batch}"] = whole_run(engine, case)
    for name, wishes in WISHES.items():
        for generated in (short, long):
            case = Case(LONG_BATCH, generated=generated, steps=steps, **wishes)
            found[f"lengths | {name} | {generated}"] = quietest(steady_seconds(engine, case))
    return found


def measured_in(checkout: Path, *, smoke: bool) -> dict[str, float]:
    """The figures of a checkout, from a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--json", *(["--smoke"] if smoke else [])]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def lowest(runs: list[dict[str, float]]) -> dict[str, float]:
    """The lowest of each figure."""
    return {name: min(run[name] for run in runs) for name in runs[0]}


def table(title: str, corner: str, found: dict[str, float], before: dict[str, float] | None) -> str:
    """One of the tables; with another checkout's figures in front, and how much they were larger."""
    cells: dict[str, dict[str, str]] = {}
    for name, value in found.items():
        which, row, column = name.split(" | ")
        if which == title:
            cell = f"{value:,.0f}"
            if before is not None:
                cell = f"{before[name]:,.0f} → {cell}"
                if value >= 5:  # of less than that a ratio is noise
                    cell += f" ({before[name] / value:.1f})"
            cells.setdefault(row, {})[column] = cell
    columns = list(next(iter(cells.values())))
    lines = [[corner, *(f"{int(column):,}" for column in columns)], ["---"] + ["---:"] * len(columns)]
    lines += [[row, *values.values()] for row, values in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each checkout")
    parser.add_argument("--smoke", action="store_true", help="few steps, to see that it runs; figures mean nothing")
    parser.add_argument("--json", action="store_true", help="print this process's figures and nothing else")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(smoke=arguments.smoke)))
        return
    here, other = [], []
    for _ in range(arguments.rounds):
        if arguments.before:
            other.append(measured_in(arguments.before.resolve(), smoke=arguments.smoke))
        here.append(measured_in(ROOT, smoke=arguments.smoke))
    found, before = lowest(here), lowest(other) if other else None
    print(f"paged {__version__}, Python {platform.python_version()}, {platform.machine()}, no model\n")
    print("Microseconds a step" + ("" if before is None else ", before → after (ratio)") + ". Its parts, by batch:\n")
    print(table("parts", "part", found, before))
    print("\nA step, by batch, for callers who want:\n")
    print(table("wishes", "what", found, before))
    print(f"\nA step of {LONG_BATCH} sequences, by tokens that each has generated:\n")
    print(table("lengths", "what", found, before))


if __name__ == "__main__":
    main()
