"""Does it round more than it declares? Other profiles, of which one may allow for all that is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from paged.oracle.declarations import ROUNDOFF, Conventions, Profile
from paged.oracle.expected import solve
from paged.oracle.explain import Witness
from paged.oracle.judge import STATISTICS, judge


def rounding(witnesses: Sequence[Witness], profile: Profile, conventions: Conventions) -> tuple[str, str] | None:
    """The mildest rounding that would explain all witnesses, in words, and what to declare; None if there is none.

    Args:
        witnesses: calls, among them some that are wrong.
        profile, conventions: as declared.
    """
    failing = [witness for witness in witnesses if not witness.ok]
    if not any(witness.case.recipe == "random" for witness in failing):
        return None  # with large scores a coarse rounding allows for anything
    for said, field, dtype in _coarser(profile, failing[0].case.dtype):
        changed = replace(profile, **{field: dtype})  # type: ignore[arg-type]
        if all(_allows(changed, witness, conventions) for witness in (*failing, *witnesses)):
            return said, f"Profile({field}={dtype!r})"
    return None


def _coarser(profile: Profile, query_dtype: str) -> Iterator[tuple[str, str, str]]:
    """Words, field and dtype of profiles that round in one more place, or to fewer bits; the mildest first."""
    own = profile.roundoffs(query_dtype)
    for said, field, now, dtypes in (
        ("queries times scale are rounded", "q_prescale_dtype", own.queries, ("float16", "bfloat16")),
        ("keys, queries and values are rounded", "operand_dtype", own.keys, ("tfloat32", "bfloat16")),
        ("partial outputs are rounded", "split_dtype", own.split, ("float16", "bfloat16")),
        ("weights are rounded", "p_dtype", own.weights, ("bfloat16", "float8_e4m3fn")),
        ("sums are kept in 16 bits:", "acc_dtype", own.acc, ("float16", "bfloat16")),
    ):
        for dtype in dtypes:
            if ROUNDOFF[dtype] > now:
                words = f"{said} {dtype}" if field == "acc_dtype" else f"{said} to {dtype}"
                yield f"rounds more than is declared, as if {words}", field, dtype


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
