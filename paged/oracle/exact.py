"""What is right: attention in float64, from the definition.

A `Problem` is attention without blocks: for each sequence its queries, keys and values, as the stored numbers mean
them. Mistakes are problems, too, with one thing changed, so that what a kernel computes can be compared with both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LN_2 = math.log(2.0)


@dataclass(frozen=True)
class Problem:
    """Attention of several sequences, without blocks, as a kernel is meant to compute it.

    Attributes:
        queries: [Q, Hq, D] of each sequence, float64.
        keys, values: [n, Hkv, D] and [n, Hkv, Dv] of each.
        first_positions: where each sequence's first query token sits.
        kv_heads: [Hq] which KV head each query head reads.
        scale, window, softcap: of the contract; the window counts the query itself.
        slopes, sinks: [Hq] or None.
        lse_base, lse_includes_sink, alibi_origin, empty_lse, empty_out: see `Conventions`.
        rule: of a mistake that is tried as an explanation, which final scores [Hq, Q, n] it gives to a sequence's keys;
            None: `final_scores`.
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    first_positions: tuple[int, ...]
    kv_heads: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    lse_base: str = "e"
    lse_includes_sink: bool = False
    alibi_origin: str = "query"
    empty_lse: str = "-inf"
    empty_out: str = "zero"
    rule: "Callable[[Problem, int], Tensor] | None" = None

    def replace(self, **changes: object) -> "Problem":
        """The same problem but for `changes`."""
        return replace(self, **changes)  # type: ignore[arg-type]


def answer(problem: Problem) -> tuple[Tensor, Tensor]:
    """What is right, without bounds: out [T, Hq, Dv] and lse [T, Hq].

    Example: two equal scores, so the mean of the values.
        >>> ones = torch.ones(2, 1, 1, dtype=torch.float64)
        >>> values = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)
        >>> problem = Problem((ones[:1],), (ones,), (values,), (1,), torch.tensor([0]), scale=1.0)
        >>> round(answer(problem)[0].item(), 9)
        2.0
    """
    outs, lses = [], []
    for index in range(len(problem.queries)):
        weights, lse, _ = weights_of(problem, index)
        value = problem.values[index][:, problem.kv_heads]  # [n, Hq, Dv]
        outs.append(torch.einsum("hqn,nhd->qhd", weights, value))
        lses.append(lse.T)
    empty = empty_rows(problem)
    return by_convention(problem, torch.cat(outs), torch.cat(lses), empty)


def final_scores(problem: Problem, index: int, seen: Tensor | None = None) -> Tensor:
    """[Hq, Q, n] scaled, capped, biased, and -inf where a query sees nothing: by the contract, or by `seen` [Q, n]."""
    scores = capped_scores(problem, index) + bias(problem, index)
    return torch.where(visible(problem, index) if seen is None else seen, scores, -torch.inf)


def plain_scores(problem: Problem, index: int) -> Tensor:
    """[Hq, Q, n] products of queries and keys, scaled."""
    query, key = problem.queries[index], problem.keys[index][:, problem.kv_heads]
    return problem.scale * torch.einsum("qhd,nhd->hqn", query, key)


def capped_scores(problem: Problem, index: int) -> Tensor:
    """[Hq, Q, n] the same after the softcap."""
    scores = plain_scores(problem, index)
    return scores if problem.softcap is None else problem.softcap * torch.tanh(scores / problem.softcap)


def distances(problem: Problem, index: int) -> Tensor:
    """[Q, n] how far each key lies before each query."""
    positions = problem.first_positions[index] + torch.arange(len(problem.queries[index]))
    return positions[:, None] - torch.arange(len(problem.keys[index]))


def visible(problem: Problem, index: int) -> Tensor:
    """[Q, n] which keys each query sees."""
    distance = distances(problem, index)
    return distance >= 0 if problem.window is None else (distance >= 0) & (distance < problem.window)


def bias(problem: Problem, index: int) -> Tensor:
    """[Hq, Q, n] what ALiBi adds: slope times (key position - origin)."""
    distance = distances(problem, index).double()
    if problem.slopes is None:
        return torch.zeros(1, 1, 1, dtype=torch.float64)
    if problem.alibi_origin == "last_key":
        distance = (len(problem.keys[index]) - 1 - torch.arange(len(problem.keys[index]))).double().expand_as(distance)
    elif problem.alibi_origin == "first_key":
        distance = -torch.arange(len(problem.keys[index])).double().expand_as(distance)
    return -problem.slopes[:, None, None] * distance


def weights_of(problem: Problem, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [Hq, Q, n] (their sum leaves room for a sink), log-sum-exp of the keys [Hq, Q], scores [Hq, Q, n]."""
    key = problem.keys[index]
    scores = (problem.rule or final_scores)(problem, index)
    if not len(key):
        return scores, scores.new_full(scores.shape[:2], -torch.inf), scores
    lse = torch.logsumexp(scores, dim=2)
    # By softmax and not by exp(scores - lse): with scores in the hundreds the difference has lost three digits.
    sink = torch.full_like(lse, -torch.inf) if problem.sinks is None else problem.sinks[:, None].expand_as(lse)
    weights = torch.softmax(torch.cat([scores, sink[..., None]], dim=2), dim=2)[..., :-1].nan_to_num(nan=0.0)
    return weights, lse, scores.nan_to_num(neginf=0.0)


def empty_rows(problem: Problem) -> Tensor:
    """[T] rows that see no key."""
    rows = []
    for index in range(len(problem.queries)):
        seen = visible(problem, index)
        if problem.rule is not None:
            seen = (problem.rule(problem, index) > -torch.inf).any(dim=0)
        rows.append(~seen.any(dim=1))
    return torch.cat(rows)


def by_convention(problem: Problem, out: Tensor, lse: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """The same answer as this kernel is meant to write it down."""
    if problem.lse_includes_sink and problem.sinks is not None:
        lse = torch.logaddexp(lse, problem.sinks)
    if problem.lse_base == "2":
        lse = lse / LN_2
    empty_lse = {"-inf": -torch.inf, "+inf": torch.inf, "zero": 0.0, "any": torch.nan}[problem.empty_lse]
    if not problem.lse_includes_sink or problem.sinks is None:
        lse = torch.where(empty[:, None], empty_lse, lse)
    empty_out = {"zero": 0.0, "nan": torch.nan, "any": torch.nan}[problem.empty_out]
    return torch.where(empty[:, None, None], empty_out, out), lse
