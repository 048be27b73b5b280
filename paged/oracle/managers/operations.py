"""Lists of operations on a block manager: small integers and names, so that they can be drawn and made smaller.

An operation says what to do with which sequence, by number: "the second of those that are there". So any part of a list
is a list that can be run as well, and the words of a report come from running it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import strategies as st

from paged.oracle.managers.protocol import ManagerCapabilities

KINDS = ("allocate", "append", "fork", "free", "free again", "drop")
# What an allocation's tokens are: new ones; all the same one; an earlier sequence's beginning and new ones; an earlier
# sequence's exactly; or an earlier sequence's with the first token changed.
TOKENS = ("new", "same", "beginning", "again", "changed")
MOST_STEPS = 400


class Operation(NamedTuple):
    """One call of a manager.

    Attributes:
        kind: one of KINDS.
        which: the sequence, counted among those that are there, modulo their number; of allocations the earlier one
            whose tokens are used.
        num_tokens: how many.
        tokens: of allocations, one of TOKENS.
    """

    kind: str
    which: int = 0
    num_tokens: int = 1
    tokens: str = "new"


@dataclass(frozen=True)
class ManagerCase:
    """A pool and what is done with it.

    Attributes:
        num_blocks: of the pool, reserved ones included.
        block_size: P.
        operations: one after another.

    Example:
        >>> case = ManagerCase(6, 4, (Operation("allocate", num_tokens=5), Operation("fork")))
        >>> ManagerCase.from_json(case.to_json()) == case
        True
    """

    num_blocks: int
    block_size: int
    operations: tuple[Operation, ...] = ()

    def replace(self, **changes: object) -> "ManagerCase":
        """The same case but for `changes`."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ManagerCase":
        """The case that `to_json` wrote."""
        read = json.loads(text)
        operations = tuple(Operation(*operation) for operation in read["operations"])
        return cls(read["num_blocks"], read["block_size"], operations)


def kinds_of(can: ManagerCapabilities) -> tuple[str, ...]:
    """Operations that a manager has."""
    missing = {"fork": not can.fork, "drop": not can.window}
    return tuple(kind for kind in KINDS if not missing.get(kind, False))


def cases(can: ManagerCapabilities) -> st.SearchStrategy[ManagerCase]:
    """Any list of operations over a pool of a few blocks, which so runs out and comes back often."""
    tokens = TOKENS if can.prefix_caching else ("new",)
    kinds = (*kinds_of(can), "allocate", "append", "free")  # these more often
    operation = st.builds(
        Operation, st.sampled_from(kinds), st.integers(0, 5), st.integers(1, 13), st.sampled_from(tokens)
    )
    usable = st.integers(2, 9)
    return st.builds(
        lambda blocks, size, operations: ManagerCase(blocks + len(can.reserved), size, tuple(operations)),
        usable,
        st.sampled_from(can.block_sizes),
        st.lists(operation, min_size=1, max_size=24),
    )


def directed(can: ManagerCapabilities) -> Iterator[ManagerCase]:
    """Lists that have broken managers in public, for every block size; chance finds most of them, these for certain."""
    for size in can.block_sizes:
        for operations in _stories(size, can):
            for usable in (3, 8):
                yield ManagerCase(usable + len(can.reserved), size, operations)


def _stories(size: int, can: ManagerCapabilities) -> Iterator[tuple[Operation, ...]]:
    new, partial = Operation("allocate", num_tokens=2 * size), Operation("allocate", num_tokens=size + 1)
    yield from ((Operation("allocate", num_tokens=count),) for count in (size - 1, size, size + 1) if count)
    yield new, Operation("append"), Operation("append", num_tokens=size), Operation("free")
    yield partial, Operation("free"), Operation("free again"), new
    yield Operation("allocate", num_tokens=3 * size), Operation("append", num_tokens=20 * size), Operation("append")
    if can.fork:
        fork = Operation("fork")
        yield partial, fork, Operation("append", 0), Operation("append", 1), Operation("free", 0), Operation("free", 0)
        yield partial, fork, Operation("free", 0), new, Operation("append", 0)
        yield new, fork, fork, Operation("append", 2), Operation("free", 1), Operation("append", 0, size)
    if can.window:
        drop = Operation("drop", 0, size)
        yield new, drop, Operation("append", 0, size), Operation("free")
        if can.fork:
            yield new, Operation("fork"), drop, Operation("free", 0), new, Operation("free", 0)
    if can.prefix_caching:
        again, changed = Operation("allocate", 0, 2 * size + 1, "again"), Operation("allocate", 0, 2 * size, "changed")
        first = Operation("allocate", num_tokens=2 * size + 1)
        yield first, again, Operation("free", 0), Operation("append"), Operation("free", 0), again
        yield first, changed, Operation("free", 0), again
        yield first, Operation("free"), Operation("allocate", num_tokens=3 * size), again
        yield (
            first,
            Operation("free"),
            again,
            Operation("allocate", num_tokens=size),
            Operation("allocate", num_tokens=size),
        )
        same = Operation("allocate", num_tokens=3 * size, tokens="same")
        yield same, Operation("append", 0, 1), Operation("allocate", 0, 2 * size, "beginning"), Operation("free"), same
        two = Operation("allocate", num_tokens=size + 1)
        yield two, two, Operation("free"), Operation("free"), Operation("allocate"), Operation("allocate")
        if can.window:
            long = Operation("allocate", num_tokens=3 * size)
            yield long, Operation("drop", 0, size), Operation("allocate", num_tokens=size), Operation("append", 0, 1)
        short = Operation("allocate", num_tokens=size)
        yield short, Operation("free"), short, Operation("free"), short, Operation("allocate", 0, size + 1, "again")


def reduce(case: ManagerCase, fails: Callable[[ManagerCase], bool]) -> tuple[ManagerCase, int]:
    """The smallest list that can be reached step by step and still fails, and how many were tried.

    Example: a fault that needs a fork.
        >>> start = ManagerCase(6, 4, (Operation("allocate", num_tokens=9), Operation("fork"), Operation("free")))
        >>> reduce(start, lambda case: any(kind == "fork" for kind, *_ in case.operations))[0].operations
        (Operation(kind='fork', which=0, num_tokens=1, tokens='new'),)
    """
    steps, smaller = 0, True
    while smaller and steps < MOST_STEPS:
        smaller = False
        for candidate in _smaller(case):
            if steps == MOST_STEPS:
                break
            steps += 1
            if fails(candidate):
                case, smaller = candidate, True
                break
    return case, steps


def _smaller(case: ManagerCase) -> Iterator[ManagerCase]:
    """Lists that are one step smaller: without an operation, with an earlier sequence, fewer or plainer tokens."""
    operations = case.operations
    for i in range(len(operations) - 1, -1, -1):
        yield case.replace(operations=operations[:i] + operations[i + 1 :])
    for i, operation in enumerate(operations):
        plainer = [operation._replace(which=which) for which in range(operation.which)]
        plainer += [
            operation._replace(num_tokens=count)
            for count in sorted({1, case.block_size, case.block_size + 1, operation.num_tokens - 1})
            if 0 < count < operation.num_tokens
        ]
        if operation.tokens != "new":
            plainer.append(operation._replace(tokens="new"))
        yield from (case.replace(operations=(*operations[:i], one, *operations[i + 1 :])) for one in plainer)
