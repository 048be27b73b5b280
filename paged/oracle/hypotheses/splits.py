"""Contexts that are attended to in parts: parts that overlap, are lost, or weigh the wrong amount.

A part's output weighs exp of its log-sum-exp L; where it weighs exp(f(L)) instead, that is as if f(L) - L were added to
the scores of its keys.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from paged.oracle.exact import Problem, final_scores
from paged.oracle.hypotheses.alternative import Alternative

# How many parts, or how many keys there are in a part.
NUMBERS, SIZES = (2, 3, 4, 5, 6, 7, 8, 16, 32), (64, 128, 256, 512)

# From how many keys there are to the size of a part and the number of parts.
Cut = Callable[[int], tuple[int, int]]
Rule = Callable[[Problem, int], Tensor]
# From parts' log-sum-exps [S, Hq, Q] to what they weigh, as logarithms.
Weighing = Callable[[Tensor], Tensor]


def splits(problem: Problem) -> Iterator[Alternative]:
    """Every mistake with parts, for each number and each size of them."""
    longest = max(map(len, problem.keys))
    for said, cut in (
        *((f"in {number} parts", _equal(number)) for number in NUMBERS),
        *((f"in parts of {size} keys", _fixed(size)) for size in SIZES if size < longest),
    ):
        for fault, rule in (
            ("the last part is lost", _lost(cut)),
            ("parts overlap in one key", _border(cut, math.log(2.0))),
            ("the last key of each part but the last is lost", _border(cut, -math.inf)),
            ("all parts weigh the same", _merged(cut, torch.zeros_like)),
            (
                "parts are merged by powers of 2 of natural log-sum-exps",
                _merged(cut, lambda lses: lses * math.log(2.0)),
            ),
            (
                "parts are merged by powers of e of log-sum-exps to base 2",
                _merged(cut, lambda lses: lses / math.log(2.0)),
            ),
            (
                "parts are not rescaled when a later one has larger scores",
                _merged(cut, lambda lses: torch.minimum(lses, lses[:1])),
            ),
        ):
            yield Alternative(f"contexts are attended to {said}, and {fault}", "K", None, problem.replace(rule=rule))


def _equal(number: int) -> Cut:
    return lambda count: (max(1, math.ceil(count / number)), number)


def _fixed(size: int) -> Cut:
    return lambda count: (size, math.ceil(count / size))


def _lost(cut: Cut) -> Rule:
    def rule(problem: Problem, index: int) -> Tensor:
        scores = final_scores(problem, index)
        keys = torch.arange(scores.shape[2])
        parts = keys // cut(len(keys))[0]
        used = parts[(scores > -torch.inf).flatten(0, 1).any(dim=0)]
        last = int(used.max()) if len(used) else 0
        return torch.where((parts == last) & (last > 0), -torch.inf, scores)

    return rule


def _border(cut: Cut, added: float) -> Rule:
    """Something is added to the scores of the last key of each part that has a part behind it, be it empty."""

    def rule(problem: Problem, index: int) -> Tensor:
        scores = final_scores(problem, index)
        behind = torch.arange(scores.shape[2]) + 1
        size, number = cut(len(behind))
        return torch.where((behind % size == 0) & (behind // size < number), scores + added, scores)

    return rule


def _merged(cut: Cut, weigh: Weighing) -> Rule:
    def rule(problem: Problem, index: int) -> Tensor:
        scores = final_scores(problem, index)
        count = scores.shape[2]
        size, _ = cut(count)
        if count <= size:
            return scores
        parts = torch.nn.functional.pad(scores, (0, -count % size), value=-torch.inf)
        parts = parts.reshape(*scores.shape[:2], parts.shape[2] // size, size)
        lses = parts.logsumexp(dim=3).permute(2, 0, 1)  # [S, Hq, Q]
        added = torch.where(lses > -torch.inf, weigh(lses) - lses, 0.0).nan_to_num(nan=0.0)
        return scores + added.permute(1, 2, 0).repeat_interleave(size, dim=2)[..., :count]

    return rule
