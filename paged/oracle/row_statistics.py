"""Row statistics: errors that are each within their bound, but too large all together.

For random numbers the error of an element over its deviation is about normal, so that the mean square of a row's Dv
elements is chi-square over Dv, and a row is flagged where its chance is below 1e-9 over all rows of a case (quantile by
Wilson and Hilferty 1931). It needs many keys in effect, at least 16, all of them different.

Were the errors of a row independent, Dv would be their number. They are not quite: one rounded weight moves all
elements of its row, and so does one rounded number of the query. A row that is too large for Dv independent errors
is therefore asked again, with the covariance that these roundings have. Its largest eigenvalue, of elements in units of
their deviation, says how many independent errors would spread as far at least: Dv over that eigenvalue. (The sum of
squares of normal numbers with several variances exceeds a large limit less often than if the largest variance stood
for all of the same sum: Bock, Diaconis, Huffer and Perlman 1987.)
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from paged.oracle.exact import weights_of
from paged.oracle.expected import RMS, Expected, score_errors

FEWEST_KEYS = 16


class Row(NamedTuple):
    """A row of a head that is unlikely: root mean squares of its errors, in units of what is expected."""

    row: int
    head: int
    size: float
    limit: float


def row_limit(num_dims: float, num_rows: int) -> float:
    """How large a row's root mean square may be, in units of what is expected.

    Args:
        num_dims: how many independent errors it has.
        num_rows: how many rows are looked at.

    Example:
        >>> round(row_limit(64, 100), 2), round(row_limit(8, 100), 2)
        (1.64, 3.02)
    """
    z = NormalDist().inv_cdf(1 - 1e-9 / max(1, num_rows))
    spread = 2 / (9 * num_dims)
    return math.sqrt((1 - spread + z * math.sqrt(spread)) ** 3)


def unlikely_rows(expected: Expected, error: Tensor) -> tuple[list[Row], float]:
    """Rows whose errors are too large all together, the worst one first.

    Args:
        expected: what was right.
        error: [T, Hq, Dv] how far each element is from it.

    Returns:
        The rows, and the largest size as a share of its limit. Where one is too large, all that are larger than its
        limit count, without being asked for their own.
    """
    # A dim in which nothing may be lost (deviation almost 0) has no statistics.
    ratio = torch.where(expected.deviation > 1e-30, error / expected.deviation, 0.0)
    size = ratio.square().mean(dim=2).sqrt()  # [T, Hq]
    size = torch.where((expected.concentration <= 1 / FEWEST_KEYS) & ~expected.empty[:, None], size, 0.0)
    limit = row_limit(error.shape[2], size.numel())
    order = size.flatten().argsort(descending=True, stable=True).tolist()
    places = [divmod(place, size.shape[1]) for place in order]
    share = 0.0
    for row, head in places:
        if size[row, head] <= limit:
            return [], max(share, float(size[row, head]) / limit)
        deviation, num_dims = spread(expected, row, head)
        own_size = float((error[row, head] / deviation).square().mean().sqrt())
        own_limit = row_limit(num_dims, size.numel())
        share = max(share, own_size / own_limit)
        if own_size > own_limit:
            others = [Row(r, h, float(size[r, h]), own_limit) for r, h in places if (r, h) != (row, head)]
            return [Row(row, head, own_size, own_limit), *(other for other in others if other.size > own_limit)], share
    return [], share


def spread(expected: Expected, row: int, head: int) -> tuple[Tensor, float]:
    """The deviation [Dv] of a row's errors, and how many independent errors would spread as far.

    Args:
        expected: what was right.
        row, head: of it.
    """
    problem, u = expected.problem, expected.roundoffs
    sequence, query = _query_of([len(queries) for queries in problem.queries], row)
    weight = weights_of(problem, sequence)[0][head, query]  # [n]
    out = expected.out[row, head]
    key = problem.keys[sequence][:, problem.kv_heads[head]]  # [n, D]
    value = problem.values[sequence][:, problem.kv_heads[head]]  # [n, Dv]
    errors = score_errors(problem, sequence, u.without_queries(), weights_of(problem, sequence)[2])
    moved = weight[:, None] * (value - out)  # what one unit of a score's error does
    # One row for each rounding that moves several elements.
    weights = RMS * u.weights * weight[:, None] * value
    scores = errors.variance[head, query].sqrt()[:, None] * moved
    keys_seen = key * errors.slope.expand_as(errors.variance)[head, query, :, None]
    queries = RMS * u.queries * problem.scale * problem.queries[sequence][query, head][:, None] * (keys_seen.T @ moved)
    shared = torch.cat([weights, scores, queries])  # [n + n + D, Dv]
    squares = (weight[:, None] * value).square().sum(dim=0)
    alone = (RMS * u.out * out) ** 2 + (RMS * u.keys) ** 2 * squares + (RMS * u.split) ** 2 * (squares + out**2)
    deviation = (shared.square().sum(dim=0) + alone).sqrt().clamp(min=1e-300)
    covariance = (shared / deviation).T @ (shared / deviation) + torch.diag(alone / deviation**2)
    return deviation, len(out) / max(1.0, _largest_eigenvalue(covariance))


def _largest_eigenvalue(matrix: Tensor) -> float:
    """Of a symmetric one without negative eigenvalues: at most that, by the trace of its 64th power.

    Example: a hundredth more than the largest, which is there twice.
        >>> round(_largest_eigenvalue(torch.diag(torch.tensor([2.0, 2.0, 1.0]))), 2)
        2.02
    """
    size = float(matrix.trace())
    power = matrix / size
    for _ in range(6):
        power = power @ power
    return size * math.pow(float(power.trace()), 1 / 64)


def _query_of(lengths: list[int], row: int) -> tuple[int, int]:
    """Which sequence a row of the batch belongs to, and which of its queries it is."""
    sequence = 0
    while row >= lengths[sequence]:
        row -= lengths[sequence]
        sequence += 1
    return sequence, row
