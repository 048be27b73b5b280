"""Judging one result: every element against its bound, every row against its statistics.

Four checks, in the order of what they prove:

    not a number     an element is NaN or infinite and should not be
    exact probe      the recipe's answer is known exactly: off by more than its few roundings
    hard bound       off by more than rounding can do, whatever the numbers are
    log-sum-exp      the same for the second result
    row statistics   random numbers, 16-bit outputs: a row's errors are within the bound, but too large all together

The last one is for what hides below the bounds; paged/oracle/row_statistics.py has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from paged.oracle.calls import Result
from paged.oracle.case import EXACT, Case
from paged.oracle.declarations import ROUNDOFF, Conventions
from paged.oracle.expected import Expected
from paged.oracle.row_statistics import unlikely_rows

NAN, PROBE, BOUND, LSE, STATISTICS = "not a number", "exact probe", "hard bound", "log-sum-exp", "row statistics"
EVIDENCE = {
    NAN: "exact",
    PROBE: "exact",
    BOUND: "proof, given the profile",
    LSE: "proof, given the profile",
    STATISTICS: "statistical, one in 10^9",
}


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
        row_findings, slack[STATISTICS] = _judge_rows(expected, error)
        findings += row_findings
    whole = expected.weight.amax(dim=2)  # [T, Hq]
    decided = (expected.bound.amin(dim=2) < whole / 2) | (whole == 0)
    return Judgement(tuple(findings), slack, int((~decided.any(dim=1)).sum()))


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


def _judge_rows(expected: Expected, error: Tensor) -> tuple[list[Finding], float]:
    rows, share = unlikely_rows(expected, error)
    if not rows:
        return [], share
    worst = rows[0]
    heads = sum(other.row == worst.row for other in rows)
    num_rows = len({other.row for other in rows})
    at = (STATISTICS, worst.row, worst.head, None)
    return [Finding(*at, 0.0, 0.0, error=worst.size, allowed=worst.limit, heads=heads, rows=num_rows)], share


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
