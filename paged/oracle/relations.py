"""Relations: two calls whose results must agree bit for bit, whatever the kernel's arithmetic.

    again              the same call twice, and once more after another call: a kernel has no memory
    renamed blocks     the same blocks elsewhere in the pool
    unused slots       other numbers where no query looks
    table dtype        int32 and int64 tables, where both are declared
    negated values     V becomes -V, and the output changes its sign and nothing else
    moved powers       keys are halved and the scale is doubled, both exactly
    batch              a sequence alone and in a batch, where the kernel declares that this must not matter

A kernel whose results differ from one call to the next (atomic additions in any order) cannot be held to these; the
report says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paged.oracle.calls import Result
from paged.oracle.case import Case
from paged.oracle.guard import Mishap
from paged.oracle.inputs import Inputs, materialise
from paged.oracle.trial import Trial


@dataclass(frozen=True)
class Broken:
    """A relation that does not hold.

    Attributes:
        relation: its name.
        words: what was changed and what came of it.
        case: of the first call.
    """

    relation: str
    words: str
    case: Case


def relations(trial: Trial, case: Case, other: Case) -> tuple[list[Broken], set[str]]:
    """Try all relations that a case is fit for.

    Args:
        trial: of the kernel.
        case: random numbers, not poisoned.
        other: another case, which is called in between.

    Returns:
        Those that do not hold, and the names of those that were tried.
    """
    inputs = materialise(case, trial.conventions, trial.device)
    first = trial.caller(inputs)
    if isinstance(first, Mishap):
        return [], set()
    again = trial.caller(inputs)
    if isinstance(again, Mishap) or not _equal(first, again):
        return [], {"nondeterministic"}
    broken, tried = [], {"again"}
    trial.caller(materialise(other, trial.conventions, trial.device))
    after = trial.caller(inputs)
    if isinstance(after, Mishap) or not _equal(first, after):
        broken.append(Broken("again", "the same call gives other bits after another call in between", case))
    for name, words, changed, sign in _changes(trial, inputs):
        tried.add(name)
        result = trial.caller(changed)
        if isinstance(result, Mishap):
            broken.append(Broken(name, f"{words}: {result.kind}: {result.message}", case))
        elif not _equal(first, result, sign):
            broken.append(Broken(name, f"{words}, and {_difference(first, result, sign)}", case))
    if trial.capabilities.batch_invariant and trial.max_shapes is None and len(case.sequences) > 1:
        tried.add("batch")
        broken += _alone(trial, inputs, first)
    return broken, tried


def _changes(trial: Trial, inputs: Inputs) -> Iterator[tuple[str, str, Inputs, float]]:
    """Name, words, changed inputs, and the sign that the output must have."""
    case = inputs.case

    def made(changed: Case) -> Inputs | None:
        return materialise(changed, trial.conventions, trial.device) if trial.affords(changed) else None

    for name, words, changed in (
        ("renamed blocks", "the same blocks lie elsewhere in the pool", case.replace(order="reversed", first_block=3)),
        ("renamed blocks", "the same blocks lie elsewhere in the pool", case.replace(order="identity")),
        ("unused slots", "slots that no query sees hold huge numbers", case.replace(poison="huge")),
    ):
        moved = made(changed)
        if moved is not None and changed != case:
            yield name, words, moved, 1.0
    for dtype in trial.capabilities.table_dtypes:
        moved = made(case.replace(table_dtype=dtype))
        if dtype != case.table_dtype and moved is not None:
            yield "table dtype", f"block_tables are {dtype} instead of {case.table_dtype}", moved, 1.0
    negated = inputs.replace(value_cache=_times(inputs.value_cache, -1.0))
    yield "negated values", "all values have changed sign", negated, -1.0
    if case.kv_dtype != "int8":
        halved = inputs.replace(key_cache=_times(inputs.key_cache, 0.5), scale=2 * inputs.scale)
        yield "moved powers", "keys are halved and the scale is doubled", halved, 1.0


def _alone(trial: Trial, inputs: Inputs, together: Result) -> list[Broken]:
    """Each sequence in a batch of its own: its own row of every tensor, the same pool."""
    case, starts = inputs.case, inputs.query_start_loc.tolist()
    for index in range(len(case.sequences)):
        rows = slice(starts[index], starts[index + 1])
        single = inputs.replace(
            case=case.replace(sequences=(case.sequences[index],)),
            query=inputs.query[rows],
            block_tables=inputs.block_tables[index : index + 1],
            seq_lens=inputs.seq_lens[index : index + 1],
            query_start_loc=inputs.query_start_loc[index : index + 2] - starts[index],
        )
        result = trial.caller(single)
        part = Result(together.out[rows], None if together.lse is None else together.lse[rows])
        if isinstance(result, Mishap):
            return [Broken("batch", f"sequence {index} alone: {result.kind}: {result.message}", case)]
        if not _equal(part, result):
            words = f"sequence {index} is computed alone, and {_difference(part, result, 1.0)}"
            return [Broken("batch", words, case)]
    return []


def _times(cache: Tensor, factor: float) -> Tensor:
    """A cache times a power of two or -1, with the strides it had."""
    wide = torch.float64 if cache.dtype == torch.float64 else torch.float32
    changed = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device)
    return changed.copy_((cache.to(wide) * factor).to(cache.dtype))


def _equal(one: Result, other: Result, sign: float = 1.0) -> bool:
    """Bit for bit, but for the sign of zeros."""
    same = torch.equal(one.out.nan_to_num(nan=1e30), (sign * other.out).nan_to_num(nan=1e30))
    if one.lse is None or other.lse is None:
        return same
    return same and torch.equal(one.lse.nan_to_num(nan=1e30), other.lse.nan_to_num(nan=1e30))


def _difference(one: Result, other: Result, sign: float) -> str:
    away = (one.out.double() - sign * other.out.double()).abs().nan_to_num(nan=torch.inf)
    if not away.any():
        return "the log-sum-exp has other bits"
    row, head, dim = (int(i) for i in torch.unravel_index(away.argmax(), away.shape))
    return f"row {row}, head {head}, dim {dim} moves by {away.max():.2e}"
