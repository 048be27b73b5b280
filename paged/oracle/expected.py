"""How far from what is right a right kernel may be: a bound for every element.

`solve` computes a `Problem` in float64, a head at a time, and bounds what rounding can do. With weights p_j,
final scores s_j, values v_jd and outputs o_d, and unit roundoffs u of a `Profile` (P the weights, acc the sums):

    eta_j = (u_q + u_k + (D + 4) u_acc) scale sum_i |q_i| |k_ji| * f  the product of query and key
          + 4 u_acc (|s_j| + |bias_j| + cap + 1) + exp + tanh |s_j|   what follows it
    |error of o_d| <= u_P max(sum_j p_j |v_jd|, sum_j p_j |v_jd - o_d|)   weights rounded before they meet V
          + sum_j p_j |v_jd - o_d| (e^eta_j - 1) / sum_j p_j e^-eta_j   softmax of scores that are off by eta_j
          + (8 sqrt(n) u_acc + u_split + u_k) sum_j p_j |v_jd|        sums, partials, values
          + (u_out + 4 u_acc (|lse| + 1)) |o_d| + least_out
          + sum of min(p_j, lost) |v_jd| over p_j < least             weights that are subnormal in the dtype of P
    |error of lse| <= log sum_j p_j e^eta_j + 8 sqrt(n) u_acc + 4 u_acc (|lse| + 1)

f is 1, or with a softcap its largest slope within the error of the score, 1 - tanh^2: where the cap is reached, the
score's error is lost; |bias_j| is taken for the farthest key, from whichever end a kernel counts. Splits and sinks are
merged by log-sum-exps, each of which is rounded: hence 4 u_acc (|lse| + 1) |o_d|. The softmax term holds for errors of
any size: where scores are so large that they may be off by 1, it says that rounding may do anything. For sums, sqrt(n)
rather than n is the probabilistic bound (Higham and Mary 2019).

Exact recipes need less room: a weight that is a power of two is not rounded, and sums of +1 and -1 are exact, or if
weights are normalised before (1 / n is rounded) off by n roundings that are all alike. Then

    |error of o_d| <= (u_out + u_P + n u_acc) |o_d| + u_P sum of p_j |v_jd| over the other weights
          + the softmax term + (u_split + u_k) sum_j p_j |v_jd| + 2^-22 max_j |v_jd|

and what is subnormal, as above: less than 2^-14 in float16, where rounding is off by 2^-25; less than 2^-126 in
float32 and bfloat16, where GPUs and vectorised exponentials give 0.

For random numbers the errors of scores are independent, and the log-sum-exp's is at most 6 standard deviations of
theirs, plus (2 sqrt(n) + 8 (|lse| + 1)) u_acc. Not so those of an approximate exp or tanh, which may be off to the same
side for all keys, and count as they are; nor those of a rounded query, which all its keys share: they add up
to RMS u_q scale |q_i| |sum_j p_j k_ji|, independent only over dims. For outputs of 16 bits, `deviation` is what the
error of an element should be on average: 0.4247 u of a number for every rounding, the root mean square when
significands are spread as logarithms are (sqrt(E[1 / m^2] / 3), m from 1 to 2).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paged.oracle.case import EXACT
from paged.oracle.declarations import Roundoffs
from paged.oracle.exact import LN_2, Problem, by_convention, empty_rows, weights_of

RMS = 0.4247
# exp of more is infinite, and nothing is known of the answer long before.
LARGEST_EXPONENT = 700.0
# The products of queries, keys and dims that are held at once.
MOST_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Expected:
    """The right answer and the room around it, float64 throughout.

    Attributes:
        out, bound: [T, Hq, Dv].
        lse, lse_bound: [T, Hq].
        deviation: [T, Hq, Dv] root mean square error that random numbers should give.
        weight: [T, Hq, Dv] sum_j p_j |v_jd|, what an error is measured against.
        concentration: [T, Hq] sum_j p_j^2 over the keys' own shares, one over how many there are in effect.
        empty: [T] rows that see no key.
        problem, roundoffs: what it is the answer to, and where the kernel rounds.
    """

    out: Tensor
    lse: Tensor
    bound: Tensor
    lse_bound: Tensor
    deviation: Tensor
    weight: Tensor
    concentration: Tensor
    empty: Tensor
    problem: Problem
    roundoffs: Roundoffs


def solve(problem: Problem, roundoffs: Roundoffs, *, recipe: str = "random") -> Expected:
    """What is right and how far from it a right kernel may be.

    Args:
        problem: as meant.
        roundoffs: where the kernel rounds.
        recipe: of the numbers; exact ones and random ones need less room than any others.

    Example: three equal scores in float32.
        >>> from paged.oracle.declarations import Profile
        >>> keys, values = torch.zeros(3, 1, 4, dtype=torch.float64), torch.ones(3, 1, 4, dtype=torch.float64)
        >>> problem = Problem((keys[:1],), (keys,), (values,), (2,), torch.tensor([0]), scale=1.0)
        >>> expected = solve(problem, Profile().roundoffs("float32"))
        >>> expected.out[0, 0, 0].item(), bool(expected.bound.max() < 2e-6)
        (1.0, True)
    """
    parts = [_solve_sequence(problem, index, roundoffs, recipe) for index in range(len(problem.queries))]
    out, lse, bound, lse_bound, deviation, weight, concentration = (
        torch.cat(columns) for columns in zip(*parts, strict=True)
    )
    empty = empty_rows(problem)
    out, lse = by_convention(problem, out, lse, empty)
    unit = LN_2 if problem.lse_base == "2" else 1.0
    return Expected(out, lse, bound, lse_bound / unit, deviation, weight, concentration, empty, problem, roundoffs)


def _solve_sequence(
    problem: Problem, index: int, u: Roundoffs, recipe: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything of one sequence's rows, in the order of `solve`."""
    weights, lse, scores = weights_of(problem, index)  # [Hq, Q, n], [Hq, Q], [Hq, Q, n]
    value = problem.values[index][:, problem.kv_heads]  # [n, Hq, Dv]
    n = len(value)
    eta, variance, slope, alike = score_errors(problem, index, u, scores)  # [Hq, Q, n]

    out = torch.einsum("hqn,nhd->qhd", weights, value)
    weight = torch.einsum("hqn,nhd->qhd", weights, value.abs())
    # Weights p_j exp(d_j) over their sum, for any |d_j| <= eta_j; what a sink takes is not off.
    least_sum = 1 - (weights * -torch.expm1(-eta)).sum(dim=2)  # [Hq, Q]
    spread, shaken = _centred(weights, weights * torch.expm1(eta.clamp(max=LARGEST_EXPONENT)), value, out)
    shaken = shaken / least_sum.T[..., None]
    rounded = torch.where(_dyadic(weights), 0.0, weights) if recipe in EXACT else weights
    if recipe in EXACT:
        bound = (u.out + u.weights + max(n, 8 * math.sqrt(n)) * u.acc) * out.abs()
        bound += u.weights * torch.einsum("hqn,nhd->qhd", rounded, value.abs())
        bound += shaken + (u.split + u.keys) * weight
        bound += 2.0**-22 * max(1.0, u.acc * 2**24) * (value.abs().amax(dim=0) if n else 0.0)
    else:
        bound = u.weights * torch.maximum(weight, spread) + shaken
        bound += (8 * math.sqrt(n) * u.acc + u.split + u.keys) * weight + u.out * out.abs()
    bound += torch.einsum("hqn,nhd->qhd", _lost(rounded, u), value.abs()) + u.least_out
    bound += (4 * u.acc * (lse.abs().nan_to_num(posinf=0.0) + 1)).T[..., None] * out.abs()
    squares = torch.einsum("hqn,nhd->qhd", weights**2, value**2)
    turned = weights**2 * variance  # sum_j p_j^2 sigma_j^2 (v_jd - o_d)^2, multiplied out
    moved = torch.einsum("hqn,nhd->qhd", turned, value**2) - 2 * out * torch.einsum("hqn,nhd->qhd", turned, value)
    moved = (moved + out**2 * turned.sum(dim=2).T[..., None]).clamp(min=0)
    deviation = (RMS * (u.weights + u.keys)) ** 2 * squares + (RMS * u.out) ** 2 * out**2 + moved
    deviation = (deviation + (RMS * u.split) ** 2 * (squares + out**2)).sqrt() + u.least_out
    sums = 8 * math.sqrt(n) * u.acc + 4 * u.acc * (lse.abs().nan_to_num(posinf=0.0) + 1)
    # The log-sum-exp is over the keys alone, so a sink takes nothing from their shares.
    shares = weights if problem.sinks is None else weights_of(problem.replace(sinks=None), index)[0]
    lse_bound = torch.logsumexp(shares.log() + eta, dim=2).clamp(min=0.0) + sums if n else sums
    if recipe == "random":
        # A query is rounded once for all its keys, so these errors do not average out: they meet the keys' mean.
        mean_key = torch.einsum("hqn,nhd->qhd", shares * slope, problem.keys[index][:, problem.kv_heads])
        common = (RMS * u.queries * problem.scale * problem.queries[index] * mean_key).square().sum(dim=2).T
        likely = 6 * ((shares**2 * variance).sum(dim=2) + common).sqrt()
        likely += (shares * alike).sum(dim=2) + (2 * math.sqrt(n) + 8 * (lse.abs() + 1)) * u.acc
        lse_bound = torch.minimum(lse_bound, likely)
    return out, lse.T, bound, lse_bound.T, deviation, weight, (shares**2).sum(dim=2).T


class ScoreErrors(NamedTuple):
    """How far scores may be off: [Hq, Q, n] each.

    Attributes:
        eta: at most.
        variance: of what is independent from key to key.
        slope: of the cap, 1 without one.
        alike: at most, of what an approximate function may do alike to all keys.
    """

    eta: Tensor
    variance: Tensor
    slope: Tensor
    alike: Tensor


def score_errors(problem: Problem, index: int, u: Roundoffs, scores: Tensor) -> ScoreErrors:
    """How far the scores of a sequence may be off.

    Args:
        problem, index: which sequence of it.
        u: where the kernel rounds.
        scores: [Hq, Q, n] as `weights_of` gives them.
    """
    query, key = problem.queries[index], problem.keys[index][:, problem.kv_heads]
    terms = key.shape[2] + 4
    product = problem.scale * torch.einsum("qhd,nhd->hqn", query.abs(), key.abs())
    eta = (u.queries + u.keys + terms * u.acc) * product
    farthest = 0.0 if problem.slopes is None else problem.slopes.abs()[:, None, None] * key.shape[0]
    after, slope = 4 * u.acc * (scores.abs() + farthest + 1), torch.ones((), dtype=eta.dtype)
    alike = torch.full((), u.exp, dtype=eta.dtype)
    if problem.softcap is not None:
        plain = problem.scale * torch.einsum("qhd,nhd->hqn", query, key)
        slope = 1 - torch.tanh((plain.abs() - eta).clamp(min=0) / problem.softcap) ** 2
        capped = problem.softcap * torch.tanh(plain / problem.softcap)
        after = after + 4 * u.acc * problem.softcap
        alike = alike + u.tanh * capped.abs()
    relative = ((RMS * (u.queries + u.keys)) ** 2 + terms * u.acc**2) * problem.scale**2
    variance = relative * torch.einsum("qhd,nhd->hqn", query**2, key**2)
    variance = variance * slope**2 + (after + alike) ** 2
    return ScoreErrors(eta * slope + after + alike, variance, slope, alike)


def _centred(weights: Tensor, shaken: Tensor, value: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j w_j |v_jd - o_d| for two sets of weights [Hq, Q, n], each [Q, Hq, Dv]; some queries at a time."""
    spread, moved = torch.zeros_like(out), torch.zeros_like(out)
    step = max(1, MOST_NUMBERS // max(1, value.shape[0] * value.shape[2]))
    for head in range(out.shape[1]):
        for first in range(0, out.shape[0], step):
            rows = slice(first, first + step)
            distance = (value[:, head] - out[rows, head, None]).abs()  # [q, n, Dv]
            both = torch.stack([weights[head, rows], shaken[head, rows]], dim=1)  # [q, 2, n]
            spread[rows, head], moved[rows, head] = (both @ distance).unbind(dim=1)
    return spread, moved


def _lost(weights: Tensor, u: Roundoffs) -> Tensor:
    """[Hq, Q, n] how much of each weight may be lost because it is subnormal in the dtype of P."""
    below, error = u.small_weights
    if u.weights > 2.0**-8 and weights.shape[2]:
        # 8 bits hold weights as shares of their row's largest: of a sum of many they would hold nothing.
        top = weights.amax(dim=2, keepdim=True)
        return torch.where(weights < below * top, torch.minimum(weights, error * top), 0.0)
    return torch.where(weights < below, weights.clamp(max=error), 0.0)


def _dyadic(weights: Tensor) -> Tensor:
    """Where a weight is a power of two of its row's largest, or nothing: no dtype has to round it."""
    exponent = torch.log2(weights / weights.amax(dim=2, keepdim=True)) if weights.shape[2] else weights
    return (weights == 0) | ((exponent - exponent.round()).abs() < 1e-4)
