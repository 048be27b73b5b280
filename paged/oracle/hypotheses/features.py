"""Softcap, ALiBi and sinks: ignored, or in the wrong place, unit or head; and what a masked score becomes."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from paged.oracle.exact import Problem, bias, capped_scores, distances, final_scores, plain_scores, visible
from paged.oracle.hypotheses.alternative import Alternative

# Numbers that stand for minus infinity in somebody's kernel.
SENTINELS = (-1e4, -3e4, -5e4, -65504.0, -1e9)
MOST_SINKS = 8


def ignored(problem: Problem) -> Iterator[Alternative]:
    """Each feature that is there, switched off."""
    for name, letter in (("window", "G"), ("softcap", "H"), ("slopes", "J"), ("sinks", "I")):
        if getattr(problem, name) is not None:
            word = {"slopes": "ALiBi is", "sinks": "sinks are"}.get(name, f"{name} is")
            yield Alternative(f"{word} ignored", letter, None, problem.replace(**{name: None}))


def misplaced(problem: Problem, block_size: int, num_kv_heads: int) -> Iterator[Alternative]:
    """Each feature that is there, slightly wrong.

    Args:
        problem: as it is meant.
        block_size, num_kv_heads: of the case, which slopes and sinks are looked up by.
    """
    yield from _masked_scores(problem)
    if problem.softcap is not None:
        yield from _softcap(problem, problem.softcap)
    if problem.slopes is not None:
        yield from _slopes(problem, problem.slopes, block_size, num_kv_heads)
    if problem.sinks is not None:
        yield from _sinks(problem, problem.sinks)


def _masked_scores(problem: Problem) -> Iterator[Alternative]:
    def with_masked(number: float) -> Callable[[Problem, int], Tensor]:
        return lambda given, index: torch.where(visible(given, index), final_scores(given, index), number)

    def mean_of_blind(given: Problem, index: int) -> Tensor:
        scores = final_scores(given, index)
        return torch.where(scores.isinf().all(dim=2, keepdim=True), 0.0, scores)

    yield Alternative("a masked score is 0, not -inf", "A", None, problem.replace(rule=with_masked(0.0)))
    said = "a row that sees no key gets the mean of all values"
    yield Alternative(said, "K", None, problem.replace(rule=mean_of_blind))
    for number in SENTINELS:
        said = "a masked score is a large finite number, not -inf"
        yield Alternative(said, "L", None, problem.replace(rule=with_masked(number)), key=f"masked {number:g}")
    if problem.softcap is not None:
        said = "softcap comes after the mask: a masked score is -cap, not -inf"
        yield Alternative(said, "H", None, problem.replace(rule=with_masked(-problem.softcap)))


def _softcap(problem: Problem, cap: float) -> Iterator[Alternative]:
    def clamped(given: Problem, index: int) -> Tensor:
        scores = plain_scores(given, index).clamp(-cap, cap) + bias(given, index)
        return torch.where(visible(given, index), scores, -torch.inf)

    def after_bias(given: Problem, index: int) -> Tensor:
        scores = cap * torch.tanh((plain_scores(given, index) + bias(given, index)) / cap)
        return torch.where(visible(given, index), scores, -torch.inf)

    yield Alternative("softcap comes before the scale", "H", None, problem.replace(softcap=cap * problem.scale))
    yield Alternative("softcap cuts off where tanh bends", "H", None, problem.replace(rule=clamped))
    if problem.slopes is not None:
        yield Alternative("ALiBi is added before the softcap", "H", None, problem.replace(rule=after_bias))


def _slopes(problem: Problem, slopes: Tensor, block_size: int, num_kv_heads: int) -> Iterator[Alternative]:
    def within_block(given: Problem, index: int) -> Tensor:
        keys = torch.arange(len(given.keys[index]))
        distance = distances(given, index) + keys - keys % block_size
        scores = capped_scores(given, index) - slopes[:, None, None] * distance
        return torch.where(visible(given, index), scores, -torch.inf)

    yield Alternative("ALiBi has the wrong sign", "J", None, problem.replace(slopes=-slopes))
    by_kv_head = slopes[:num_kv_heads][problem.kv_heads]
    yield Alternative("ALiBi's slopes are taken by KV head", "J", None, problem.replace(slopes=by_kv_head))
    first = slopes[:1].expand_as(slopes)
    yield Alternative("all heads have the first head's ALiBi slope", "J", None, problem.replace(slopes=first))
    yield Alternative("ALiBi is scaled with the scores", "J", None, problem.replace(slopes=slopes * problem.scale))
    said = "ALiBi counts each key's position from the beginning of its block"
    yield Alternative(said, "J", None, problem.replace(rule=within_block))


def _sinks(problem: Problem, sinks: Tensor) -> Iterator[Alternative]:
    for changed, said in (
        (sinks * problem.scale, "sinks are scaled"),
        (sinks[:1].expand_as(sinks), "all heads have the first head's sink"),
        (sinks[problem.kv_heads], "sinks are taken by KV head"),
        (sinks * math.log(2), "sinks are taken to base 2"),
        *((sinks + math.log(times), f"the sink is counted {times} times") for times in range(2, MOST_SINKS + 1)),
    ):
        yield Alternative(said, "I", None, problem.replace(sinks=changed))
