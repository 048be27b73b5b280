"""From a failing case to a fault with a name: what is wrong, where, with which token, and what still works.

Four questions are asked of the kernel, each by calling it again: which poisoned region must be clean for it to be
right; what it adds up in a uniform probe of the same geometry; which other attention explains what it returned; and
which neighbouring cases it gets right.
"""

from collections.abc import Iterator, Sequence

from paged.oracle.calls import Result
from paged.oracle.case import EXACT, Case
from paged.oracle.evidence import OTHER_TABLE, between_calls, witnesses
from paged.oracle.explain import explain
from paged.oracle.guard import Mishap
from paged.oracle.inputs import FEW, MUST_MASK, MUST_NOT_READ
from paged.oracle.judge import EVIDENCE, LSE, NAN, Finding
from paged.oracle.naming import PLAIN, Known, name_of
from paged.oracle.picture import picture
from paged.oracle.placement import placement
from paged.oracle.report import Failure
from paged.oracle.rounding import rounding
from paged.oracle.row import row_of, sequence_of
from paged.oracle.syndrome import Syndrome, decode
from paged.oracle.trial import Outcome, Trial

MISHAPS = {
    "raises": "raises an exception",
    "hangs": "hangs",
    "returns": "returns something else",
    "shape": "returns the wrong shape",
    "dtype": "returns the wrong dtype",
    "device": "returns on the wrong device",
    "writes": "writes into its inputs",
    "import": "cannot be imported",
}


def mishap_failure(mishap: Mishap, case: Case | None = None, original: str = "") -> Failure:
    """The failure of a kernel that gave nothing to judge."""
    return Failure(
        fault=MISHAPS[mishap.kind],
        letter="-",
        evidence="exact",
        case=None if case is None else case.to_json(),
        description="" if case is None else case.describe(),
        original=original,
        details=(("what happened", mishap.message),),
    )


def diagnose(trial: Trial, outcome: Outcome, others: Sequence[Outcome] = (), original: str = "") -> Failure:
    """Find out what is wrong in a case that fails.

    Args:
        trial: of the kernel, which is called some twenty times more.
        outcome: of the case, as small as it could be made.
        others: other cases that failed, larger ones: what explains this one must explain them.
        original: about the case it was made from.
    """
    if isinstance(outcome.result, Mishap):
        return mishap_failure(outcome.result, outcome.case, original)
    assert outcome.judgement is not None, "a result was judged"
    probe, syndrome = _probe(trial, outcome)
    passes, fails = _neighbours(trial, outcome)
    known = _known(trial, outcome, others, probe, syndrome, passes)
    name = name_of(known)
    details = [("where", _where(outcome, known.finding)), *_numbers(known.finding), *_causes(known, probe, syndrome)]
    if also := _also(outcome, known.finding):
        details.append(("also", also))
    if passes or fails:  # where no neighbour may be asked for, nothing is known about them
        details.append(("passes with", "; ".join(passes[:4]) or "none of the neighbouring cases"))
    if fails:
        details.append(("fails with", "; ".join(fails[:4])))
    return Failure(
        fault=name.fault,
        letter=name.letter,
        evidence=EVIDENCE[known.finding.check] if syndrome is None else "exact",
        case=outcome.case.to_json(),
        description=outcome.case.describe(),
        original=original,
        details=tuple(details),
        picture=_picture(outcome if probe is None or syndrome is None else probe, known.finding, syndrome),
        declare=name.declare,
    )


def _known(
    trial: Trial,
    outcome: Outcome,
    others: Sequence[Outcome],
    probe: Outcome | None,
    syndrome: Syndrome | None,
    passes: list[str],
) -> Known:
    """All that can be found out: the kernel is called again, and its results are held against hypotheses."""
    assert outcome.judgement is not None, "a result was judged"
    leak = _leak(trial, outcome)
    between = between_calls(trial, outcome, others[-1] if others else None)
    # What changes from call to call bears no witness.
    steady = between is None or between[0] == OTHER_TABLE
    seen = witnesses(trial, outcome, others) if steady else []
    other = explain(seen, trial.profile, trial.conventions)
    if syndrome is not None and syndrome.kind == "zeros":
        # One token alone says little: a row of zeros is what is left of many faults. A larger case may say more.
        syndrome = next((read for one in others if (read := _read(one, trial)) and read.kind != "zeros"), syndrome)
    return Known(
        outcome,
        outcome.judgement.findings[0],
        between if other is None else None,
        other,
        leak,
        placement(seen) if other is None else None,
        syndrome,
        rounding(seen, trial.profile, trial.conventions) if other is None else (),
        passes,
        seen,
        _lse_is_right(outcome),
        outcome.case.recipe != "uniform" and probe is not None and probe.ok,
    )


def _causes(known: Known, probe: Outcome | None, syndrome: Syndrome | None) -> list[tuple[str, str]]:
    """What is known about the cause, beyond its name: tokens, cases that agree, poison, what is not the cause."""
    said: list[str] = []
    if syndrome is not None:
        among = f" (or one of {syndrome.others} other tokens with this code)" if syndrome.others else ""
        where = "" if probe is None or probe.case == known.outcome.case else ", if all weights are equal"
        said.append(f"{syndrome.words}{among}{where}")
        if known.syndrome is not None and known.syndrome is not syndrome:
            said.append(f"in a larger case: {known.syndrome.words}")
    elif probe is not None and probe.ok and known.outcome.case.recipe != "uniform":
        said.append("with equal weights it is right: each token is counted once")
    if known.other is not None:
        wrong = sum(not witness.ok for witness in known.witnesses)
        right = len(known.witnesses) - wrong
        results = f"{wrong} wrong and {right} right results" if right else f"{wrong} wrong results"
        said.append(f"computed with this mistake, {results} agree in every number")
    if known.leak is not None:
        said.append(f"right as soon as the {known.leak} slots hold ordinary numbers")
    if len(known.roundings) > 1:
        said.append(f"right if {' or '.join(words for words, _ in known.roundings)}")
    return [("cause" if index == 0 else "", words) for index, words in enumerate(said)]


def _leak(trial: Trial, outcome: Outcome) -> str | None:
    """The region whose poison reached the output: the first without which the case passes."""
    case = outcome.case
    if case.poison == "none":
        return None
    regions = MUST_NOT_READ if case.poison == "nan" else MUST_MASK
    for region in regions:
        if trial(case, poisoned=tuple(r for r in regions if r != region)).ok:
            return region
    return "tail, free and hidden" if trial(case.replace(poison="none")).ok else None


def _probe(trial: Trial, outcome: Outcome) -> tuple[Outcome | None, Syndrome | None]:
    """What the kernel adds up when all weights are equal."""
    case = outcome.case
    uniform = case.replace(recipe="uniform", poison="none", softcap=None, alibi=False, scale=None)
    if uniform == case:
        probe = outcome
    elif trial.affords(uniform):
        probe = trial(uniform)
    else:
        return None, None
    if probe.judgement is None or not isinstance(probe.result, Result):
        return None, None
    return probe, _read(probe, trial)


def _read(probe: Outcome, trial: Trial) -> Syndrome | None:
    """The syndrome of a uniform probe's worst row, or None if it is right or cannot be read."""
    case = probe.case
    if probe.judgement is None or not isinstance(probe.result, Result) or case.recipe != "uniform" or case.alibi:
        return None
    wrong = [finding for finding in probe.judgement.findings if finding.check != LSE]
    if not wrong or len(probe.inputs.tokens) * case.block_size * case.value_dim > 1 << 24:
        return None
    row, head = wrong[0].row, wrong[0].head
    roundoffs = trial.profile.roundoffs(case.dtype)
    return decode(probe.inputs, row, head, probe.result.out[row, head], roundoffs.out + roundoffs.weights)


def _neighbours(trial: Trial, outcome: Outcome) -> tuple[list[str], list[str]]:
    """Which cases next to this one pass, and which fail as well."""
    passes: list[str] = []
    fails: list[str] = []
    for words, case in _next_to(outcome.case, trial):
        if trial.affords(case):
            (passes if trial(case).ok else fails).append(words)
    return passes, fails


def _next_to(case: Case, trial: Trial) -> Iterator[tuple[str, Case]]:
    can = trial.capabilities
    for field, (plain, _, _) in PLAIN.items():
        if getattr(case, field) != plain and not (field == "kv_scales" and case.kv_dtype == "int8"):
            yield f"{field} {plain}", case.replace(**{field: plain})
    if case.strides == "far" or case.first_block > FEW:
        return  # any other width or length may take more memory than there is
    if case.window is not None:
        for window in (case.window - 1, case.window + 1):
            if window > 0:
                yield f"window {window}", case.replace(window=window)
    query_len, seq_len = case.sequences[0]
    for length in dict.fromkeys((seq_len - 1, seq_len + 1, -(-seq_len // case.block_size) * case.block_size)):
        if length >= max(1, query_len) and length != seq_len:
            yield f"seq_len {length}", case.replace(sequences=((query_len, length), *case.sequences[1:]))
    if query_len > 1:
        yield "query_len 1", case.replace(sequences=((1, seq_len), *case.sequences[1:]))
    elif query_len == 1 < seq_len and not can.decode_only:
        yield "query_len 2", case.replace(sequences=((2, seq_len), *case.sequences[1:]))
    for field, choices in (
        ("block_size", can.block_sizes),
        ("head_dim", can.head_dims),
        ("query_group", can.query_groups),
        ("num_kv_heads", (1, 2)),
    ):
        for choice in [choice for choice in choices if choice != getattr(case, field)][:2]:
            more = {"value_dim": can.value_dim_for(choice)} if field == "head_dim" else {}
            yield f"{field} {choice}", case.replace(**{field: choice}, **more)
    if case.recipe not in EXACT and not (case.alibi or case.softcap):
        yield "recipe needle", case.replace(recipe="needle", scale=None)


def _where(outcome: Outcome, finding: Finding) -> str:
    """Logical coordinates of the worst element."""
    sequence, index = sequence_of(outcome.inputs, finding.row)
    position = outcome.inputs.problem.first_positions[sequence] + index
    dim = "" if finding.dim is None else f", dim {finding.dim}"
    what = "log-sum-exp of " if finding.check == LSE else ""
    return f"{what}sequence {sequence}, query row {index} (position {position}), head {finding.head}{dim}"


def _numbers(finding: Finding) -> list[tuple[str, str]]:
    if finding.check == NAN:
        return [("expected", f"{finding.expected:+.7g}   got {finding.got:+.7g}")]
    if finding.dim is None and finding.check != LSE:
        return [
            ("expected", f"errors of at most {finding.allowed:.2f} times their deviation   got {finding.error:.2f}")
        ]
    times = f"= {finding.error / finding.allowed:.1f} x allowed {finding.allowed:.1e} ({finding.check})"
    return [("expected", f"{finding.expected:+.7g}   got {finding.got:+.7g}   error {finding.error:.1e} {times}")]


def _also(outcome: Outcome, finding: Finding) -> str:
    """How many rows and heads, and what the other checks say."""
    assert outcome.judgement is not None, "a result was judged"
    case = outcome.case
    words = [f"{finding.heads} of {case.num_heads} heads of this row"] if case.num_heads > 1 else []
    words += [f"{finding.rows} of {case.num_queries} rows"] if case.num_queries > 1 else []
    others = [other for other in outcome.judgement.findings if other.check != finding.check]
    words += [f"{other.check} {other.error / other.allowed:.1f} x allowed" for other in others if other.allowed]
    if _lse_is_right(outcome):
        words.append("the log-sum-exp is right, so keys are; look at the values")
    return "; ".join(words)


def _lse_is_right(outcome: Outcome) -> bool:
    """Whether a log-sum-exp was returned and is right: then keys are, or where all weights are equal their number."""
    assert outcome.judgement is not None, "a result was judged"
    has_lse = isinstance(outcome.result, Result) and outcome.result.lse is not None
    return has_lse and not any(finding.check in (LSE, NAN) for finding in outcome.judgement.findings)


def _picture(outcome: Outcome, finding: Finding, syndrome: Syndrome | None) -> tuple[str, ...]:
    if outcome.judgement is None:
        return ()
    # A probe has findings of its own; its picture is of its own worst row.
    wrong = [own for own in outcome.judgement.findings if own.check != LSE] or [finding]
    row = row_of(outcome.inputs, wrong[0].row, wrong[0].head)
    if row.last < row.first or len(outcome.inputs.tokens) > 1 << 14 or syndrome is None or not syndrome.changes:
        return ()  # nothing to see
    return picture(row, syndrome.changes)
