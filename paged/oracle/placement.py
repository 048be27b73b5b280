"""Which rows are wrong, and what stands in them: zeros, another row's answer, another head's log-sum-exp.

A pattern is claimed only if it is that of every wrong row of every case at hand, and of no row that is right.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from paged.oracle.explain import Witness

TILES = (2, 4, 8, 16, 32, 64, 128)
# More rows than this are not looked for among one another.
MOST_ROWS = 512
# A name and a class.
Found = tuple[str, str]


def placement(witnesses: Sequence[Witness]) -> Found | None:
    """The pattern of the rows that are wrong, or None where there is none that fits all witnesses."""
    failing = [witness for witness in witnesses if not witness.ok]
    if not failing:
        return None
    if all(_is_zero(witness)[_is_wrong(witness)].all() for witness in failing) and _is_wrong(failing[0]).any():
        return _zeros(witnesses)
    if all(_is_elsewhere(witness) for witness in failing):
        return "results are written to other sequences' rows", "K"
    return _log_sum_exps(failing)


def _is_wrong(witness: Witness) -> Tensor:
    """[T, Hq] rows with an element outside of its bound."""
    error = (witness.result.out.double() - witness.expected.out).abs()
    return ~(error <= witness.expected.bound).all(dim=2) & ~witness.expected.out.isnan().any(dim=2)


def _is_zero(witness: Witness) -> Tensor:
    """[T, Hq] rows of zeros."""
    return (witness.result.out == 0).all(dim=2)


def _zeros(witnesses: Sequence[Witness]) -> Found | None:
    """Which rows are zeros, in words."""
    patterns = [dict(_patterns(witness)) for witness in witnesses]
    for found in patterns[0]:
        if all(
            found in pattern and _fits(witness, pattern[found])
            for witness, pattern in zip(witnesses, patterns, strict=True)
        ):
            return found
    return None


def _fits(witness: Witness, rows: Tensor) -> bool:
    """Whether the rows that are wrong are these, but for those whose right answer is zeros as well."""
    blank = (witness.expected.out.abs() <= witness.expected.bound).all(dim=2)
    return bool((_is_wrong(witness) == rows)[~blank].all())


def _patterns(witness: Witness) -> Iterator[tuple[Found, Tensor]]:
    """Names of rows, and the rows [T, Hq]; the simplest first."""
    case = witness.case
    shape = (case.num_queries, case.num_heads)
    sequence = torch.cat([torch.full((count,), index) for index, (count, _) in enumerate(case.sequences)])
    place = torch.cat([torch.arange(count) for count, _ in case.sequences])
    count = torch.cat([torch.full((count,), count) for count, _ in case.sequences])
    member = torch.arange(case.num_heads) % case.query_group
    yield ("the output is 0 everywhere", "R"), torch.ones(shape, dtype=torch.bool)
    yield ("only the first sequence's rows are written", "K"), (sequence > 0)[:, None].expand(shape)
    yield ("rows of decodes are 0", "K"), (count == 1)[:, None].expand(shape)
    yield ("rows of chunks are 0", "K"), (count > 1)[:, None].expand(shape)
    for first in (1, 2, 4, 8, 16, 32):
        said = f"of the query heads that share a KV head only the first {first} are computed"
        yield (said, "M"), (member >= first)[None].expand(shape)
    for tile in TILES:
        said = f"of a chunk's queries only whole tiles of {tile} are written"
        yield (said, "C"), ((count > tile) & (place >= count // tile * tile))[:, None].expand(shape)
    yield (
        ("the last query of a chunk is never written", "C"),
        ((count > 1) & (place == count - 1))[:, None].expand(shape),
    )


def _is_elsewhere(witness: Witness) -> bool:
    """Whether every wrong row is another sequence's right answer, or zeros, and there is one that is not zeros."""
    out, right, bound = witness.result.out.double(), witness.expected.out, witness.expected.bound
    sequence = torch.cat([torch.full((count,), index) for index, (count, _) in enumerate(witness.case.sequences)])
    wrong, moved = _is_wrong(witness).any(dim=1), False
    if len(out) > MOST_ROWS or not wrong.any():
        return False
    for row in torch.arange(len(out))[wrong].tolist():
        if not out[row].any():
            continue
        same = ((out[row] - right).abs() <= bound).flatten(1).all(dim=1) & (sequence != sequence[row])
        if not same.any():
            return False
        moved = True
    return moved


def _log_sum_exps(failing: Sequence[Witness]) -> Found | None:
    """What the log-sum-exp is, where only it is wrong."""
    if any(_is_wrong(witness).any() or witness.result.lse is None for witness in failing):
        return None
    if all(_of_other_heads(witness) for witness in failing):
        return "the log-sum-exp is another head's", "K"
    for dtype in (torch.bfloat16, torch.float16):
        if all(_is_rounded(witness, dtype) for witness in failing):
            return f"the log-sum-exp is rounded to {str(dtype).removeprefix('torch.')}", "K"
    return None


def _of_other_heads(witness: Witness) -> bool:
    assert witness.result.lse is not None, "it is there"
    got, right, bound = witness.result.lse.double(), witness.expected.lse, witness.expected.lse_bound
    same = ((got[:, :, None] - right[:, None, :]).abs() <= bound[:, None, :] + 1e-9) | (
        got[:, :, None] == right[:, None, :]
    )
    return bool(same.any(dim=2).all())


def _is_rounded(witness: Witness, dtype: torch.dtype) -> bool:
    """Whether all numbers are some that a dtype holds, and as near to what is right as it allows."""
    assert witness.result.lse is not None, "it is there"
    got, right = witness.result.lse, witness.expected.lse
    near = (got.double() - right).abs() <= torch.finfo(dtype).eps * right.abs() + witness.expected.lse_bound
    return bool((torch.equal(got.to(dtype).to(got.dtype), got)) and bool((near | (got == right)).all()))
