"""One row of a result: a query token and a head, the keys it sees, where they lie, and what else could be read."""

from dataclasses import dataclass

import numpy as np

from paged.oracle.inputs import NULL, REGIONS, Inputs
from paged.oracle.recipes import Floats, sinks
from paged.oracle.values import CODE_VALUE, Integers, cancelling_signs


@dataclass(frozen=True)
class Change:
    """A slot that was counted as often as it should not have been.

    Attributes:
        block, offset: the physical slot.
        position: in the row's own sequence, or None if it is not one of its tokens.
        region: what the slot is.
        times: how many times it was counted too often; negative: too rarely.
    """

    block: int
    offset: int
    position: int | None
    region: str
    times: int


@dataclass(frozen=True)
class Row:
    """One query token and head, and everything that could have been added up.

    Attributes:
        first, last: positions of the first and the last key it sees.
        slots: [n] where each token of its sequence lies, block * P + offset, up to the end of its last block.
        codes: [N * P, Dv] of every slot for this head.
        sink: what the sink adds to the denominator.
    """

    inputs: Inputs
    sequence: int
    position: int
    head: int
    first: int
    last: int
    slots: Integers
    codes: Floats
    sink: float

    def changes(self, slots: Integers, times: int) -> tuple[Change, ...]:
        """Slots counted wrongly, with their positions."""
        size = self.inputs.case.block_size
        where = {int(slot): position for position, slot in reversed(list(enumerate(self.slots)))}
        regions = self.inputs.regions.reshape(-1)
        return tuple(
            Change(int(s) // size, int(s) % size, where.get(int(s)), REGIONS[regions[s]], times) for s in slots
        )


def sequence_of(inputs: Inputs, row: int) -> tuple[int, int]:
    """Which sequence a row of the output belongs to, and which of its query tokens it is."""
    for sequence, (query_len, _) in enumerate(inputs.case.sequences):
        if row < query_len:
            return sequence, row
        row -= query_len
    raise IndexError(f"there is no such row; the case has {inputs.case.num_queries}")


def row_of(inputs: Inputs, row: int, head: int) -> Row:
    """What a row sees, and the codes of all slots."""
    case, problem = inputs.case, inputs.problem
    sequence, index = sequence_of(inputs, row)
    position = problem.first_positions[sequence] + index
    last = min(position, case.sequences[sequence][1] - 1)
    first = 0 if problem.window is None else max(0, position - problem.window + 1)
    table = inputs.block_tables[sequence].cpu().numpy()[: case.blocks_of(sequence)].astype(np.int64)
    slots = (table[:, None] * case.block_size + np.arange(case.block_size)).reshape(-1)
    codes = codes_of(inputs, int(problem.kv_heads[head]))
    sink = float(np.exp(sinks(case)[head])) if case.sinks else 0.0
    return Row(inputs, sequence, position, head, first, last, slots, codes, sink)


def codes_of(inputs: Inputs, kv_head: int) -> Floats:
    """[N * P, Dv] what a uniform probe's slots mean for one KV head; the null block is zeros."""
    case = inputs.case
    codes = cancelling_signs(case.seed, CODE_VALUE, inputs.tokens, case.num_kv_heads, case.value_dim)
    codes = np.where((inputs.regions == REGIONS.index(NULL))[..., None], 0, codes[:, :, kv_head])
    return codes.reshape(-1, case.value_dim).astype(np.float64)
