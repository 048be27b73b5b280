"""Judging one result: every element against its bound, every row against its statistics.

Four checks, in the order of what they prove:

    not a number     an element is NaN or infinite and should not be
    exact probe      the recipe's answer is known exactly: off by more than its few roundings
    hard bound       off by more than rounding can do, whatever the numbers are
    log-sum-exp      the same for the second result
    row statistics   random numbers, 16-bit outputs: a row's errors are within the bound, but too large all together

The last one is for what hides below the bounds. The error of each element over its deviation is about normal, so their
mean square over Dv elements is chi-square, and a row is flagged where its chance is below 1e-9 over all rows (quantile
by Wilson and Hilferty 1931). It needs many keys in effect, at least 16, all of them different, for roundings to be
independent.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from paged.oracle.calls import Result
from paged.oracle.case import EXACT, Case
from paged.oracle.declarations import ROUNDOFF, Conventions
from paged.oracle.expected import Expected

NAN, PROBE, BOUND, LSE, STATISTICS = "not a number", "exact probe", "hard bound", "log-sum-exp", "row statistics"
EVIDENCE = {
    NAN: "exact",
    PROBE: "exact",
    BOUND: "proof, given the profile",
    LSE: "proof, given the profile",
    STATISTICS: "statistical, one in 10^9",
}
FEWEST_KEYS = 16


@dataclass(frozen=True)
class Finding:
    """One way in which a result is wrong, where it is worst.

    Attributes:
        check: which check found it.
        row, head, dim: of the element; dim is None for a log-sum-exp or a whole row.
        expected, got, error, allowed: numbers; for row statistics, error and allowed are root mean squares in units of
            what is expected.
        heads, rows: how many heads of this row, and how many rows, are wrong by this check.
    """

    check: str
    row: int
    head: int
    dim: int | None
    expected: float
    got: float
    error: float
    allowed: float
    heads: int
    rows: int


@dataclass(frozen=True)
class Judgement:
    """What the checks say about one result.

    Attributes:
        findings: none if it is right.
        slack: for each check that was made, the largest error as a share of what is allowed.
        undecided: rows for which rounding may do anything, so that no element could be judged.
    """

    findings: tuple[Finding, ...]
    slack: dict[str, float]
    undecided: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def judge(case: Case, result: Result, expected: Expected, conventions: Conventions) -> Judgement:
    """Hold a result against what is expected of it.

    Args:
        case: that was computed.
        result: what the kernel returned.
        expected: the right answer and the room around it.
        conventions: whether rows that see nothing are judged.
    """
    findings, slack = [], {}
    out = result.out.double()
    ignored = expected.empty[:, None, None] & (conventions.empty_out == "any")
    bad, error = _errors(out, expected.out, ignored.expand_as(out))
    if bad.any():
        findings.append(_at_worst(NAN, bad.double(), out, expected.out, error, torch.zeros_like(error)))
    ratio = torch.where(bad, 0.0, error / expected.bound)
    check = PROBE if case.recipe in EXACT else BOUND
    slack[check] = float(ratio.max()) if ratio.numel() else 0.0
    if slack[check] > 1:
        findings.append(_at_worst(check, ratio, out, expected.out, error, expected.bound))
    if result.lse is not None:
        lse_findings, slack[LSE] = _judge_lse(result.lse, expected, conventions)
        findings += lse_findings
    halves = case.dtype in ("float16", "bfloat16")
    if case.recipe == "random" and halves and case.repeat is None and not bad.any():
        row_findings, slack[STATISTICS] = _judge_rows(out, expected, error)
        findings += row_findings
    whole = expected.weight.amax(dim=2)  # [T, Hq]
    decided = (expected.bound.amin(dim=2) < whole / 2) | (whole == 0)
    return Judgement(tuple(findings), slack, int((~decided.any(dim=1)).sum()))


def row_limit(num_dims: int, num_rows: int) -> float:
    """How large a row's root mean square may be, in units of what is expected.

    Example:
        >>> round(row_limit(64, 100), 2), round(row_limit(8, 100), 2)
        (1.64, 3.02)
    """
    z = NormalDist().inv_cdf(1 - 1e-9 / max(1, num_rows))
    spread = 2 / (9 * num_dims)
    return math.sqrt((1 - spread + z * math.sqrt(spread)) ** 3)


def _judge_lse(lse: Tensor, expected: Expected, conventions: Conventions) -> tuple[list[Finding], float]:
    got = lse.double()
    ignored = expected.empty[:, None] & (conventions.empty_lse == "any")
    bad, error = _errors(got, expected.lse, ignored.expand_as(got))
    if bad.any():
        return [_at_worst(NAN, bad.double(), got, expected.lse, error, torch.zeros_like(error))], 0.0
    allowed = expected.lse_bound + ROUNDOFF[str(lse.dtype).removeprefix("torch.")] * expected.lse.abs()
    ratio = torch.where(error == 0, 0.0, error / allowed)
    worst = float(ratio.max()) if ratio.numel() else 0.0
    return ([_at_worst(LSE, ratio, got, expected.lse, error, allowed)] if worst > 1 else []), worst


def _judge_rows(out: Tensor, expected: Expected, error: Tensor) -> tuple[list[Finding], float]:
    # A dim in which nothing may be lost (deviation almost 0) has no statistics.
    ratio = torch.where(expected.deviation > 1e-30, error / expected.deviation, 0.0)
    size = ratio.square().mean(dim=2).sqrt()  # [T, Hq]
    size = torch.where((expected.concentration <= 1 / FEWEST_KEYS) & ~expected.empty[:, None], size, 0.0)
    limit = row_limit(out.shape[2], size.numel())
    worst = float(size.max()) / limit if size.numel() else 0.0
    if worst <= 1:
        return [], worst
    zeros = torch.zeros_like(size)
    return [_at_worst(STATISTICS, size / limit, zeros, zeros, size, zeros + limit)], worst


def _errors(got: Tensor, expected: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Where something is no number and should be (or the other way round), and the error of all else."""
    same = (got == expected) | (got.isnan() & expected.isnan()) | ignored
    bad = ~same & ~(got.isfinite() & expected.isfinite())
    return bad, torch.where(same | bad, 0.0, (got - expected).abs())


def _at_worst(check: str, ratio: Tensor, got: Tensor, expected: Tensor, error: Tensor, allowed: Tensor) -> Finding:
    """A finding at the largest ratio; the first of equal ones."""
    place = [int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape)]
    wrong = (ratio > (0 if check == NAN else 1)).reshape(*ratio.shape[:2], -1).any(dim=2)  # [T, Hq]
    at = tuple(place)
    return Finding(
        check=check,
        row=place[0],
        head=place[1],
        dim=place[2] if len(place) == 3 else None,
        expected=float(expected[at]),
        got=float(got[at]),
        error=float(error[at]),
        allowed=float(allowed[at]),
        heads=int(wrong[place[0]].sum()),
        rows=int(wrong.any(dim=1).sum()),
    )
