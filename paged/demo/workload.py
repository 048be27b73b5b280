"""What the demo asks for: texts, and how long an answer each wants."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paged.demo.prompts import PROMPTS
from reference.engine import Prompt

MOST_TOKENS = 320


def read_prompts(file: Path | None) -> Sequence[str]:
    """The prompts of a file, one a line, or the ones built in.

    Raises:
        ValueError: the file cannot be read as text or holds no prompt.
    """
    if file is None:
        return PROMPTS
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {file} cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"--prompts {file} holds no prompt; write one a line")
    return lines


def make_prompts(texts: Sequence[str], tokenizer: Any, max_model_len: int, seed: int) -> list[Prompt]:
    """Requests that want answers of different lengths: lognormal, most short and a few long, as in real traffic.

    Raises:
        ValueError: a prompt leaves no room for an answer.
    """
    rng = random.Random(seed)
    prompts = []
    for i, text in enumerate(texts):
        token_ids = tuple(tokenizer(text)["input_ids"])
        room = max_model_len - len(token_ids)
        if room < 1:
            raise ValueError(f"prompt {i + 1} has {len(token_ids)} tokens and max_model_len is {max_model_len}")
        wanted = min(max(8, round(rng.lognormvariate(4.4, 0.6))), MOST_TOKENS)
        prompts.append(Prompt(str(i), token_ids, max_tokens=min(wanted, room)))
    return prompts


def describe(prompts: Sequence[Prompt]) -> str:
    """One line on a workload."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    wanted = [prompt.max_tokens for prompt in prompts]
    return (
        f"{len(prompts)} requests, prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"up to {min(wanted)} to {max(wanted)} tokens wanted"
    )
