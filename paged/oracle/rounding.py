"""Does it round more than it declares? Other profiles, of which one may allow for all that is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from paged.oracle.declarations import ROUNDOFF, Conventions, Profile
from paged.oracle.expected import solve
from paged.oracle.explain import Witness
from paged.oracle.judge import STATISTICS, judge


def rounding(witnesses: Sequence[Witness], profile: Profile, conventions: Conventions) -> list[tuple[str, str]]:
    """Every coarser rounding that would explain all witnesses: in words, and what to declare; the mildest first.

    Args:
        witnesses: calls, among them some that are wrong.
        profile, conventions: as declared.
    """
    failing = [witness for witness in witnesses if not witness.ok]
    if not any(witness.case.recipe == "random" for witness in failing):
        return []  # with large scores a coarse rounding allows for anything
    found: dict[str, tuple[str, str]] = {}
    for said, field, dtype in _coarser(profile, failing[0].case.dtype):
        changed = replace(profile, **{field: dtype})  # type: ignore[arg-type]
        if field not in found and all(_allows(changed, witness, conventions) for witness in (*failing, *witnesses)):
            found[field] = said, f"Profile({field}={dtype!r})"
    return list(found.values())


def _coarser(profile: Profile, query_dtype: str) -> Iterator[tuple[str, str, str]]:
    """Words, field and dtype of profiles that round in one more place, or to fewer bits; the mildest first."""
    own = profile.roundoffs(query_dtype)
    for said, field, now, dtypes in (
        ("weights", "p_dtype", own.weights, ("bfloat16", "float8_e4m3fn")),
        ("queries times scale", "q_prescale_dtype", own.queries, ("float16", "bfloat16")),
        ("partial outputs", "split_dtype", own.split, ("float16", "bfloat16")),
        ("keys, queries and values", "operand_dtype", own.keys, ("tfloat32", "bfloat16")),
        ("sums", "acc_dtype", own.acc, ("float16", "bfloat16")),
    ):
        for dtype in dtypes:
            if ROUNDOFF[dtype] > now:
                yield f"{said} were rounded to {dtype}", field, dtype


def _allows(profile: Profile, witness: Witness, conventions: Conventions) -> bool:
    """Whether a result is right by a profile that still decides something about it.

    Row statistics know nothing of how sums are rounded, so with an accumulator that is declared they have no say.
    """
    case = witness.case
    roundoffs = profile.roundoffs(case.dtype)
    expected = solve(witness.inputs.problem, roundoffs, recipe=case.recipe)
    judgement = judge(case, witness.result, expected, conventions)
    findings = [one for one in judgement.findings if one.check != STATISTICS or profile.acc_dtype == "auto"]
    return not findings and not judgement.undecided
