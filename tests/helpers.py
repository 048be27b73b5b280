"""Small things that several tests need: prompts, and an LLM over a tiny random model."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from paged import LLM, RequestOutput


def token_prompts(lengths: list[int], vocab_size: int = 100) -> list[list[int]]:
    """Prompts of the given lengths with varied tokens; no two share a beginning."""
    return [[1 + (i * 31 + j * j * 7 + j * 3) % (vocab_size - 1) for j in range(n)] for i, n in enumerate(lengths)]


def as_prompts(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    """Token ids as `LLM.generate` takes them."""
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    """The sampled tokens of each request."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def load(folder: Path, **arguments: Any) -> LLM:
    """An LLM over a folder without a tokenizer, with neutral sampling defaults; on the CPU unless told otherwise."""
    return LLM(**{"device": "cpu", **arguments}, model=folder, skip_tokenizer_init=True, generation_config="vllm")


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' own greedy tokens, through its own contiguous cache."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
