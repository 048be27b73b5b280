"""What the demo says: for a person, and for a program."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from paged.demo.near_tie import Difference
from paged.demo.runs import Figures
from paged.outputs import RequestOutput

ROWS = (
    ("KV bytes (measured)", "{0.kv_bytes:,}"),
    ("most requests at once", "{0.most_at_once}"),
    ("live share of pool, mean of steps", "{0.live_average:.1%}"),
    ("live share at the fullest step", "{0.live_fullest:.1%}"),
    ("steps", "{0.num_steps:,}"),
    ("tokens computed", "{0.num_computed_tokens:,}"),
    ("  of them recomputed", "{0.num_recomputed_tokens:,}"),
    ("gathered K and V, most (modelled)", "{0.gather_scratch_bytes:,}"),
    ("block table bytes", "{0.block_table_bytes:,}"),
    ("output tokens per second", "{0.tokens_per_second:,.0f}"),
    ("seconds", "{0.seconds:.1f}"),
)


def print_report(
    figures: tuple[Figures, Figures],
    differences: Sequence[Difference],
    texts: Sequence[str],
    outputs: Sequence[RequestOutput],
) -> None:
    """A few texts, the verdict on the tokens, and the table: contiguous left, paged right."""
    for i in sorted({0, len(texts) // 2, len(texts) - 1}):
        prompt, answer = _one_line(texts[i]), _one_line(outputs[i].outputs[0].text)
        print(f"\n  {prompt if len(prompt) <= 50 else '...' + prompt[-47:]}")
        print(f"    -> {answer if len(answer) <= 105 else answer[:102] + '...'}")
    print()
    if not differences:
        print(f"tokens: all {figures[0].num_output_tokens:,} are equal")
    for difference in differences:
        print(f"tokens: {difference}")
    print(f"\n  {'':36}{'contiguous':>14}{'paged':>14}")
    for name, form in ROWS:
        left, right = (form.format(column) for column in figures)
        print(f"  {name:36}{left:>14}{right:>14}")
    print()


def as_json(
    seed: int,
    max_model_len: int,
    figures: tuple[Figures, Figures],
    differences: Sequence[Difference],
    texts: Sequence[str],
    outputs: Sequence[RequestOutput],
) -> dict[str, Any]:
    """The same figures, all texts, and the environment."""
    return {
        "seed": seed,
        "max_model_len": max_model_len,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "tokens_equal": not differences,
        "differences": [asdict(difference) for difference in differences],
        "contiguous": asdict(figures[0]),
        "paged": asdict(figures[1]),
        "requests": [
            {"prompt": text, "text": output.outputs[0].text, "finish_reason": output.outputs[0].finish_reason}
            for text, output in zip(texts, outputs, strict=True)
        ],
    }


def _one_line(text: str) -> str:
    return " / ".join(line for line in text.splitlines() if line)
