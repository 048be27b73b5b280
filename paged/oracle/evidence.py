"""More calls of a kernel that fails, so that what is said about it rests on more than one case.

A small case is told apart from its neighbours by few numbers, so it is joined by the larger cases it came from, by
both without poison, and by both with random numbers, of which nothing is equal to anything else by accident. And some
faults lie in no case, but between calls: those show when the same call is made again.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paged.oracle.calls import Result
from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities
from paged.oracle.exact import answer
from paged.oracle.explain import Witness
from paged.oracle.hypotheses.places import pool_of, reread
from paged.oracle.inputs import FEW, Inputs, materialise
from paged.oracle.trial import Outcome, Trial

# How often a call is repeated, on its own and after another one.
REPEATED, INTERRUPTED = 7, 2
# Calls of more numbers than this are not repeated.
MOST_NUMBERS = 1 << 22

FICKLE = "the same call gives different results"
STALE = "results depend on the call before"
DEAF = "the result of an earlier call is returned"
OTHER_TABLE = "another block table than the given one is read: an earlier call's, or none"


def witness_of(outcome: Outcome) -> Witness | None:
    """An outcome as a witness; None where there was nothing to judge."""
    if not isinstance(outcome.result, Result) or outcome.expected is None:
        return None
    return Witness(outcome.inputs, outcome.result, outcome.expected, outcome.ok)


def witnesses(trial: Trial, outcome: Outcome, others: Sequence[Outcome]) -> list[Witness]:
    """Calls that an explanation has to agree with, none of them poisoned: the smallest case first.

    Args:
        trial: of the kernel, which is called at most twice for every outcome.
        outcome: of the smallest case that fails.
        others: of larger ones that fail alike.
    """
    known = {one.case: one for one in (outcome, *others)}
    found: dict[Case, Witness] = {}
    for case in (
        *(version for one in known for version in _plain_versions(one)),
        *_mixed_versions(outcome.case, trial.capabilities),
    ):
        made = known.get(case) or (trial(case) if case not in found and trial.affords(case) else None)
        witness = None if made is None else witness_of(made)
        if witness is not None:
            found[case] = witness
    return list(found.values())


def between_calls(trial: Trial, outcome: Outcome, other: Outcome | None) -> tuple[str, str] | None:
    """What goes wrong between calls, and its class; None if equal calls have equal results as far as can be seen.

    Args:
        trial: of the kernel, which is called about ten times.
        outcome: of a case that fails.
        other: of another case, which is called in between.
    """
    first, expected = outcome.result, outcome.expected
    if not isinstance(first, Result) or expected is None or outcome.inputs.key_cache.numel() > MOST_NUMBERS:
        return None
    again = [_called(trial, outcome.inputs) for _ in range(REPEATED)]
    results = [result for result in again if result is not None]
    if any(_apart(results[0], result, expected.bound) for result in results[1:]):
        return FICKLE, "R"
    after = []
    for _ in range(0 if other is None or not trial.affords(other.case) else INTERRUPTED):
        assert other is not None, "there is one"
        trial.caller(other.inputs)
        after.append(_called(trial, outcome.inputs))
    if any(_apart(first, result, expected.bound) for result in [*results, *after] if result is not None):
        return STALE, "R"
    return _without_effect(trial, outcome, first)


def _plain_versions(case: Case) -> Iterator[Case]:
    """The case without poison, and the same with random numbers."""
    yield case.replace(poison="none")
    if case.strides != "far" and case.first_block <= FEW:  # others take their time
        yield case.replace(poison="none", recipe="random", scale=None)


def _mixed_versions(case: Case, can: Capabilities) -> Iterator[Case]:
    """The same with sequences of all kinds, which small cases cannot tell apart."""
    p = case.block_size
    rows = [(1, 2 * p + 3), (5, 3 * p + 1), (3, 3), (1, 1)]
    if can.decode_only:
        rows = [(1, length) for _, length in rows]
    elif can.empty_rows:
        rows.append((3, 1))
    if case.strides != "far" and case.first_block <= FEW:
        yield case.replace(sequences=tuple(rows), poison="none", recipe="random", scale=None, seed=case.seed + 1)


def _called(trial: Trial, inputs: Inputs) -> Result | None:
    result = trial.caller(inputs)
    return result if isinstance(result, Result) else None


def _without_effect(trial: Trial, outcome: Outcome, first: Result) -> tuple[str, str] | None:
    """Whether other numbers, or another table, make no difference where they should."""
    case, expected = outcome.case, outcome.expected
    assert expected is not None, "a result was judged"
    if not first.out.any() or not trial.affords(case.replace(seed=case.seed + 1)):
        return None
    changed = materialise(case.replace(seed=case.seed + 1), trial.conventions, trial.device)
    if _equal(first, _called(trial, changed)) and not torch.equal(answer(changed.problem)[0], expected.out):
        return DEAF, "R"
    pool = pool_of(outcome.inputs)
    used = torch.tensor([case.blocks_of(index) for index in range(len(case.sequences))])
    if pool is None:
        return None
    tried = False
    for tables in _other_tables(outcome.inputs, used, len(pool.keys)):
        turned = reread(outcome.inputs.problem, pool, _rows_of(tables), pool.lengths)
        if turned is None or torch.equal(answer(turned)[0], expected.out):
            continue  # it should make no difference
        tried = True
        moved = tables.to(outcome.inputs.block_tables)
        if not _equal(first, _called(trial, outcome.inputs.replace(block_tables=moved))):
            return None
    return (OTHER_TABLE, "D") if tried else None


def _rows_of(tables: Tensor) -> Callable[[int, int], Tensor]:
    return lambda index, count: tables[index, :count]


def _other_tables(inputs: Inputs, used: Tensor, num_blocks: int) -> Iterator[Tensor]:
    """Tables [B, M] in another order, and with every entry another block."""
    given = inputs.block_tables.cpu().long()
    backwards, others = given.clone(), given.clone()
    for row, count in enumerate(used.tolist()):
        backwards[row, :count] = given[row, :count].flip(0)
        others[row, :count] = given[row, :count] % (num_blocks - 1) + 1
    yield backwards
    yield others


def _apart(one: Result, other: Result, bound: Tensor) -> bool:
    """Whether two results differ by more than rounding can explain."""
    return bool(((one.out.double() - other.out.double()).abs() > 2 * bound).any())


def _equal(one: Result, other: Result | None) -> bool:
    return other is not None and torch.equal(one.out, other.out)
