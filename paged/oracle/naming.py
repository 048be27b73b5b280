"""The name of a fault: the most telling of all that is known about it.

between calls      the same call gives something else
an explanation     another attention agrees with every case at hand
a leak             the case passes as soon as a region of the pool is clean
a neighbour        the case passes with one thing made plain
a pattern          which rows are wrong, and what stands in them
a token            which was counted too often, too rarely, or in another's place
a rounding         the case passes with another profile
a symptom          numbers that are none, large scores, or just wrong ones
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from paged.oracle.explain import Witness
from paged.oracle.hypotheses.alternative import Alternative
from paged.oracle.judge import LSE, NAN, Finding
from paged.oracle.recipes import NEEDLES
from paged.oracle.syndrome import Syndrome
from paged.oracle.trial import Outcome

# What a passing neighbour says about the fault, where nothing else explains it: the field that was made plain.
PLAIN = {
    "strides": ("dense", "wrong for caches whose blocks do not lie one behind another", "E"),
    "first_block": (1, "wrong for large block numbers", "B"),
    "repeat": (None, "wrong where a block occurs twice in a table", "D"),
    "padding": ("null", "wrong where padding entries of a table are -1", "D"),
    "sliced_table": (False, "wrong where the table is a slice of a wider one", "D"),
    "extra_columns": (0, "wrong where a table is wider than its longest sequence needs", "D"),
    "table_dtype": ("int32", "wrong for tables of int64", "B"),
    "order": ("identity", "wrong where blocks do not lie in order", "D"),
    "shared_blocks": (0, "wrong where sequences share blocks", "D"),
    "kv_scales": (None, "wrong with scales of keys and values", "O"),
    "window": (None, "wrong with a window", "G"),
    "softcap": (None, "wrong with a softcap", "H"),
    "alibi": (False, "wrong with ALiBi", "J"),
    "sinks": (False, "wrong with sinks", "I"),
}
KINDS = {
    "missing": ("tokens are not counted", "C"),
    "extra": ("tokens are counted that should not be", "C"),
    "twice": ("tokens are counted twice", "K"),
    "replaced": ("other tokens are read", "D"),
    "denominator": ("the weights are divided by the wrong sum", "K"),
    "head": ("another head's values are read", "M"),
    "padding": ("unused slots count in the sum of the weights", "A"),
    "zeros": ("rows are 0", "K"),
}


@dataclass(frozen=True)
class Name:
    """A fault's name, its class, and what would have to be declared if it is a convention."""

    fault: str
    letter: str
    declare: str | None = None


@dataclass(frozen=True)
class Known:
    """All that is known about a failure; each None or empty where nothing is.

    Attributes:
        outcome: of the smallest case, whose worst finding is `finding`.
        between: what goes wrong between calls, and its class.
        other: another attention that agrees with all witnesses.
        leak: the region whose poison reached the output.
        pattern: of the rows that are wrong, and its class.
        syndrome: what was added up in a uniform probe.
        roundings: coarser roundings that would allow for everything, and what to declare.
        passes: neighbouring cases that pass.
        witnesses: cases without poison that were tried besides.
        lse_is_right: whether a log-sum-exp was returned and is right.
        probe_is_right: whether a uniform probe of the same geometry passes.
    """

    outcome: Outcome
    finding: Finding
    between: tuple[str, str] | None = None
    other: Alternative | None = None
    leak: str | None = None
    pattern: tuple[str, str] | None = None
    syndrome: Syndrome | None = None
    roundings: Sequence[tuple[str, str]] = ()
    passes: Sequence[str] = ()
    witnesses: Sequence[Witness] = ()
    lse_is_right: bool = False
    probe_is_right: bool = False


def name_of(known: Known) -> Name:
    """What to call a fault."""
    case, finding = known.outcome.case, known.finding
    if known.between is not None:
        return Name(*known.between)
    if known.other is not None:
        return Name(known.other.fault, known.other.letter, known.other.declare)
    if known.leak is not None and all(witness.ok for witness in known.witnesses):
        return Name(f"{'reads' if case.poison == 'nan' else 'does not mask'} {known.leak} slots", "A")
    if case.strides == "far" and "strides dense" in known.passes:
        return Name("wrong beyond 2^31 numbers or 2^32 bytes", "B")
    for field, (plain, words, letter) in PLAIN.items():
        if getattr(case, field) != plain and f"{field} {plain}" in known.passes:
            return Name(words, letter)
    if known.pattern is not None and not _moderate_scores_are_right(known):
        return Name(*known.pattern)
    if known.syndrome is not None:
        return Name(*KINDS[known.syndrome.kind])
    if finding.check == NAN:
        return _not_a_number(known)
    if known.roundings:
        said, declare = known.roundings[0]
        if len(known.roundings) > 1:
            return Name("rounds more than is declared", "L")
        return Name(f"rounds more than is declared, as if {said}", "L", declare)
    if finding.check == LSE:
        return Name("the log-sum-exp is wrong, the output is right", "K")
    if case.recipe == "codes" and _has_large_scores(known):
        return Name(f"some numbers of {case.kv_dtype} are read wrong", "O")
    if _has_large_scores(known):
        return Name("wrong where scores are large", "L")
    if known.lse_is_right:
        return Name("values are read wrong, as many tokens as there are", "E")
    if known.probe_is_right:
        return Name("the weights are wrong, values are read right", "E")
    return Name("wrong numbers", "-")


def _has_large_scores(known: Known) -> bool:
    """Whether it takes large scores: needles are two hundred ahead of other keys."""
    recipe = known.outcome.case.recipe
    moderate = all(witness.ok for witness in known.witnesses if witness.case.recipe == "random")
    return recipe in ("large", "negative") or (recipe in NEEDLES and moderate)


def _moderate_scores_are_right(known: Known) -> bool:
    """Whether the same cases were tried with random numbers and pass, so that which rows are wrong says little."""
    random = [witness.ok for witness in known.witnesses if witness.case.recipe == "random"]
    return known.outcome.case.recipe in ("large", "negative") and bool(random) and all(random)


def _not_a_number(known: Known) -> Name:
    """Something is no number and should be, or the other way round."""
    finding = known.finding
    if isfinite(finding.got):
        what = "log-sum-exp" if finding.dim is None else "output"
        return Name(f"the {what} of a row that sees no key is {finding.got:.3g}, not {finding.expected:g}", "K")
    where = " where scores are large" if _has_large_scores(known) else ""
    return Name(f"returns NaN or infinities{where}", "L")
