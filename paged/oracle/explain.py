"""Which mistake is it? Other attentions, each with one thing wrong, of which one may be what the kernel computes.

A kernel that fails is compared with all of these as it was with the right answer: by bounds. One small case is
explained by many mistakes, several by one: who counts a token too many in a decode may have another window, no window,
or windows that begin at blocks. So an explanation must hold on every case at hand, those that the kernel gets right
included, and on every element of them. If it is no mistake but a convention that was not declared, the report says
which declaration would make it right.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paged.oracle.calls import Result
from paged.oracle.case import Case
from paged.oracle.declarations import Conventions, Profile
from paged.oracle.exact import Problem, answer
from paged.oracle.expected import Expected, solve
from paged.oracle.hypotheses.alternative import Alternative
from paged.oracle.hypotheses.conventions import undeclared
from paged.oracle.hypotheses.features import ignored, misplaced
from paged.oracle.hypotheses.heads import scales_of_scores, sharing, widths
from paged.oracle.hypotheses.masks import masks
from paged.oracle.hypotheses.places import places
from paged.oracle.hypotheses.quantised import quantised, without_scales
from paged.oracle.hypotheses.splits import splits
from paged.oracle.inputs import Inputs
from paged.oracle.judge import LSE, judge

# Contexts up to this long are nobody's idea of a long one.
SHORT = 256
# Whatever explains a case is computed for every token of it, some hundred times.
LONGEST_EXPLAINED = 1 << 14


@dataclass(frozen=True)
class Scope:
    """Which sequences a mistake is confined to: by the number, query_len and seq_len of each."""

    words: str
    holds: Callable[[int, int, int], bool]


EVERYWHERE = Scope("", lambda index, query_len, seq_len: True)
DECODES = Scope(", in decodes only", lambda index, query_len, seq_len: query_len == 1)
CHUNKS = Scope(", in chunks of queries only", lambda index, query_len, seq_len: query_len > 1)
LATER = Scope(", in all sequences but the first", lambda index, query_len, seq_len: index > 0)


@dataclass(frozen=True)
class Witness:
    """A call that an explanation must agree with.

    Attributes:
        inputs, result: of the call.
        expected: what is right.
        ok: whether the kernel was.
    """

    inputs: Inputs
    result: Result
    expected: Expected
    ok: bool

    @property
    def case(self) -> Case:
        """That was tried."""
        return self.inputs.case


def explain(witnesses: Sequence[Witness], profile: Profile, conventions: Conventions) -> Alternative | None:
    """The first alternative that agrees with all witnesses, or None.

    What a case cannot tell from what is right, or does not have, is no evidence either way if the kernel is right
    there, and evidence against it if it is not.

    Args:
        witnesses: calls, the most telling failure first.
        profile, conventions: as declared.

    Returns:
        The alternative; its fault says so if it is confined to some sequences.
    """
    failing = [witness for witness in witnesses if not witness.ok]
    if not failing or max(seq_len for _, seq_len in failing[0].case.sequences) > LONGEST_EXPLAINED:
        return None
    others = [witness for witness in witnesses if witness is not failing[0]]
    tried: list[tuple[Alternative, Tensor, Tensor]] | None = None
    for scope in (EVERYWHERE, DECODES, CHUNKS, LATER, *_long_contexts(failing)):
        rows = rows_of(failing[0].case, scope)
        if scope is not EVERYWHERE and (not rows.any() or all(rows_of(w.case, scope).all() for w in witnesses)):
            continue  # nothing new to say
        if tried is None:
            tried = [(one, *answer(one.problem)) for one in alternatives(failing[0].inputs, conventions)]
        for alternative, out, lse in tried:
            if not _agrees(alternative, out, lse, rows, failing[0], profile, conventions):
                continue
            if all(_agrees_elsewhere(alternative.name, scope, other, profile, conventions) for other in others):
                return dataclasses.replace(alternative, fault=alternative.fault + scope.words)
    return None


def _long_contexts(failing: Sequence[Witness]) -> list[Scope]:
    """Contexts at least as long as the shortest that fails, if that is a long one."""
    shortest = min(max(seq_len for _, seq_len in witness.case.sequences) for witness in failing)
    if shortest <= SHORT:
        return []
    return [Scope(f", in contexts of {shortest} keys or more", lambda index, query_len, seq_len: seq_len >= shortest)]


def rows_of(case: Case, scope: Scope) -> Tensor:
    """[T] which query tokens a mistake confined to `scope` can change.

    Example:
        >>> rows_of(Case(sequences=((1, 5), (2, 7))), CHUNKS).tolist()
        [False, True, True]
    """
    inside = [scope.holds(index, *lengths) for index, lengths in enumerate(case.sequences)]
    counts = torch.tensor([query_len for query_len, _ in case.sequences])
    return torch.tensor(inside).repeat_interleave(counts)


def alternatives(inputs: Inputs, conventions: Conventions) -> Iterator[Alternative]:
    """Everything that is tried, conventions first, then what is simplest."""
    problem, case = inputs.problem, inputs.case
    yield from undeclared(problem, conventions)
    yield from ignored(problem)
    yield from masks(problem, case.block_size)
    yield from misplaced(problem, case.block_size, case.num_kv_heads)
    yield from scales_of_scores(problem, case)
    yield from sharing(problem, case)
    yield from widths(problem, case)
    yield from quantised(inputs)
    yield from places(inputs)
    yield from splits(problem)


def _agrees_elsewhere(name: str, scope: Scope, witness: Witness, profile: Profile, conventions: Conventions) -> bool:
    """Whether an alternative, by its name, agrees with another witness, too."""
    rows = rows_of(witness.case, scope)
    for alternative in alternatives(witness.inputs, conventions):
        if alternative.name == name:
            return _agrees(alternative, *answer(alternative.problem), rows, witness, profile, conventions)
    return witness.ok


def _agrees(
    alternative: Alternative,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    witness: Witness,
    profile: Profile,
    conventions: Conventions,
) -> bool:
    """Whether every element of a result is as an alternative has it in its rows, and right in all others."""
    result, right = witness.result, witness.expected
    out = torch.where(rows[:, None, None], out, right.out)
    lse = torch.where(rows[:, None], lse, right.lse)
    if _same(out, right.out) and (result.lse is None or _same(lse, right.lse)):
        return witness.ok
    # The bound is dear, so first a look from afar: nothing is explained that is off by a tenth.
    far = (result.out.double() - out).abs() > 0.1 * (1 + out.abs())
    if far.any() or bool((result.out.isnan() & ~out.isnan()).any()):
        return False
    case = witness.case
    expected = solve(alternative.problem, profile.roundoffs(case.dtype), recipe=case.recipe)
    mixed = _mixed(expected, right, rows)
    found = judge(case, result, mixed, conventions).findings
    if found and all(finding.check == LSE for finding in found) and not _same(out, right.out):
        # What goes wrong after the log-sum-exp was taken leaves it right.
        mixed = dataclasses.replace(mixed, lse=right.lse, lse_bound=right.lse_bound)
        found = judge(case, result, mixed, conventions).findings
    return not found


def _mixed(expected: Expected, right: Expected, rows: Tensor) -> Expected:
    """One answer in some rows, and what is right in all others."""
    chosen = {}
    for field in dataclasses.fields(Expected):
        one, other = getattr(expected, field.name), getattr(right, field.name)
        if isinstance(one, Tensor):
            chosen[field.name] = torch.where(rows.reshape(-1, *[1] * (one.dim() - 1)), one, other)
    # Row statistics are of the problem that was solved.
    chosen["concentration"] = torch.where(rows[:, None], expected.concentration, 1.0)
    return dataclasses.replace(expected, **chosen)  # type: ignore[arg-type]


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(one, other, rtol=1e-9, atol=1e-12, equal_nan=True).all())


def without(inputs: Inputs, feature: str) -> Problem | None:
    """What would be right if a feature were switched off: window, softcap, alibi, sinks or kv_scales.

    Returns:
        The problem without it, or None where the case does not have it.
    """
    name = {"alibi": "slopes"}.get(feature, feature)
    if name == "kv_scales":
        return without_scales(inputs)
    return None if getattr(inputs.problem, name) is None else inputs.problem.replace(**{name: None})
