"""`paged demo`: the same requests through a contiguous cache and through a paged one, on equal KV memory.

The reference engine serves them in static batches from rows of max_model_len slots; paged serves them from blocks, in a
pool of exactly as many bytes, its null and trash block included. Both are greedy and must give the same tokens.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paged.blocks import blocks_for
from paged.config import EngineConfig
from paged.demo.near_tie import compare
from paged.demo.report import as_json, print_report
from paged.demo.runs import PagedRun, contiguous_figures, contiguous_history, paged_figures, paged_history
from paged.demo.workload import describe, make_prompts, read_prompts
from paged.memory.plots import check_picture, side_by_side
from paged.model.loading import load_model
from paged.model.memory_budget import OVERHEAD_BLOCKS
from reference.engine import Prompt, ReferenceEngine

BLOCK_SIZE = 16


@dataclass(frozen=True)
class DemoSettings:
    """What the command line asked for; see `paged demo --help`."""

    model: str = "tiny"
    prompts_file: Path | None = None
    rows: int = 2
    max_model_len: int | None = None
    device: str = "cpu"
    seed: int = 0
    threads: int = 1
    plot: Path | None = None
    as_json: bool = False


def run_demo(settings: DemoSettings) -> int:
    """Run both engines and print what they did.

    Returns:
        0, or 1 if a token differs that is no near tie.

    Raises:
        ValueError: a setting, a prompt or the model cannot be used.
    """
    started = time.perf_counter()
    check_picture(settings.plot)
    for name, value in (("threads", settings.threads), ("rows", settings.rows)):
        if value < 1:
            raise ValueError(f"--{name} {value}: at least 1 is needed")
    # On tensors this small, threads cost more than they bring; and beside other work they wait for one another: with a
    # second process on two cores, the demo was seen to take thirty times as long with two threads as with one.
    torch.set_num_threads(settings.threads)
    texts = read_prompts(settings.prompts_file)
    config = EngineConfig(
        model=settings.model,
        device=settings.device,
        dtype="float32",
        max_model_len=settings.max_model_len,
        block_size=BLOCK_SIZE,
        max_num_seqs=len(texts),
        # The contiguous cache has none either: what is compared is paging alone, even if a user's prompts begin alike.
        # The built-in ones do not, and what a preempted request leaves behind is overwritten before it comes back: with
        # the cache not one token would be found by default, and the picture would only call free blocks cached.
        enable_prefix_caching=False,
    )
    loaded = load_model(config)
    row = loaded.config.max_model_len
    assert row is not None, "filled in when the model was loaded"
    num_slots = settings.rows * row
    prompts = make_prompts(texts, loaded.tokenizer, row, settings.seed)
    check_sizes(settings.rows, row, prompts)
    engine = ReferenceEngine(
        loaded.model, num_rows=settings.rows, max_model_len=row, eos_token_ids=loaded.eos_token_ids
    )
    if not settings.as_json:
        print(
            describe(prompts), f"max_model_len {row}: the contiguous cache has {settings.rows} rows of that", sep="\n"
        )

    contiguous = engine.generate(prompts)
    paged = PagedRun(replace(config, num_gpu_blocks_override=num_slots // BLOCK_SIZE), prompts)

    left, right = contiguous_history(contiguous, num_slots=num_slots, row=row), paged_history(paged)
    figures = contiguous_figures(engine, contiguous, left), paged_figures(paged, right)
    assert figures[0].kv_bytes == figures[1].kv_bytes, "the two pools are measured to be of the same size"
    differences = compare(loaded.model, contiguous.answers, paged.token_ids)
    if settings.plot is not None:
        caption = (
            f"{describe(prompts)}; seed {settings.seed}, model {settings.model}, {figures[1].kv_bytes:,} bytes of KV "
            f"memory each (measured), max_model_len {row}, block size {BLOCK_SIZE}; ramp-up and drain included"
        )
        side_by_side(left, right, caption=caption).savefig(settings.plot)
    if settings.as_json:
        result = as_json(settings.seed, row, figures, differences, texts, paged.outputs)
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print_report(figures, differences, texts, paged.outputs)
        print(f"{time.perf_counter() - started:.1f} s in all, loading included")
        print(f"picture: {settings.plot}" if settings.plot else "add --plot PATH for a picture of both pools")
    return int(any(not difference.near_tie for difference in differences))


def check_sizes(rows: int, row: int, prompts: Sequence[Prompt]) -> None:
    """Find out before the work whether the paged pool can be of the same size and serve everybody.

    Raises:
        ValueError: the slots make no whole blocks, or too few for the longest request.
    """
    num_slots = rows * row
    if num_slots % BLOCK_SIZE:
        raise ValueError(f"--rows {rows} of --max-model-len {row} do not divide into blocks of {BLOCK_SIZE} slots")
    longest = max(len(prompt.token_ids) + prompt.max_tokens - 1 for prompt in prompts)
    num_usable = num_slots // BLOCK_SIZE - OVERHEAD_BLOCKS
    if blocks_for(longest, BLOCK_SIZE) > num_usable:
        raise ValueError(
            f"--rows {rows} of --max-model-len {row} make {num_slots // BLOCK_SIZE} blocks of {BLOCK_SIZE} slots; less "
            f"the null and the trash block that is too few for a request of {longest} tokens; give more rows"
        )
