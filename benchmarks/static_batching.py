"""Useful tokens per second of the engine and of transformers' `generate` in static batches, on equal KV memory.

    python benchmarks/static_batching.py > benchmarks/results/static_batching.md

64 requests with prompts and outputs of different lengths, the tiny model, float32, one CPU thread. The engine gets a
pool of so many bytes; `generate` gets the largest batch whose contiguous cache fits the same bytes when every row may
reach max_model_len, and smaller ones too, in order of arrival; the best of them counts. A token is useful if the
request asked for it: in a static batch, a row that is done computes on until the longest of its batch is. The rows
"output lengths known" show what `generate` could do if it knew every output's length in advance and batched equal ones:
nobody does, so they do not count. All are run `--rounds` times, by turns, and medians are compared.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM

from paged import LLM, SamplingParams
from paged.model.loading import TINY

MAX_MODEL_LEN = 1024
ROWS = 8  # of the contiguous cache that the bytes are worth
BLOCK_SIZE = 16

Requests = list[tuple[list[int], int]]


def make_requests(count: int, seed: int) -> Requests:
    """Token prompts and output lengths: lognormal, most short and a few long."""
    rng = random.Random(seed)

    def length(median: float, most: int) -> int:
        return max(4, min(most, round(rng.lognormvariate(0, 0.8) * median)))

    return [([rng.randrange(1, 1024) for _ in range(length(60, 500))], length(90, 500)) for _ in range(count)]


def serve_paged(llm: LLM, requests: Requests) -> float:
    """Seconds that the engine takes."""
    started = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True) for _, wanted in requests],
        use_tqdm=False,
    )
    seconds = time.perf_counter() - started
    assert [len(output.outputs[0].token_ids) for output in outputs] == [wanted for _, wanted in requests]
    return seconds


@torch.inference_mode()
def serve_static(model: transformers.PreTrainedModel, requests: Requests, batch_size: int) -> float:
    """Seconds that `generate` takes, left-padded batch after batch."""
    started = time.perf_counter()
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        wanted = max(wanted for _, wanted in batch)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False, pad_token_id=0
        )
        assert out.shape[1] == width + wanted
    return time.perf_counter() - started


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    requests = make_requests(arguments.requests, arguments.seed)
    by_length = sorted(requests, key=lambda request: request[1])
    useful = sum(wanted for _, wanted in requests)

    llm = LLM(
        model="tiny",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=ROWS * MAX_MODEL_LEN // BLOCK_SIZE,
        enable_prefix_caching=False,  # a second round would find the first one's prompts
    )
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    sides: dict[str, Callable[[], float]] = {"paged": lambda: serve_paged(llm, requests)}
    for size in (1, 2, 4, ROWS):
        sides[f"generate, batches of {size}"] = lambda size=size: serve_static(model, requests, size)
        if size > 1:
            sides[f"generate, batches of {size}, output lengths known"] = lambda size=size: serve_static(
                model, by_length, size
            )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, serve in sides.items():
            seconds[name].append(serve())
    rates = {name: useful / statistics.median(times) for name, times in seconds.items()}
    best = max(rate for name, rate in rates.items() if name != "paged" and "known" not in name)

    print(
        f"{len(requests)} requests, {useful:,} useful output tokens, {llm.engine.runner.kv_cache_bytes:,} bytes of KV, "
        f"max_model_len {MAX_MODEL_LEN}, seed {arguments.seed}, {arguments.rounds} rounds, one thread\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}\n"
    )
    print("| what | useful tokens per second | against the best batch |")
    print("| --- | ---: | ---: |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / best:.2f} |")


if __name__ == "__main__":
    main()
