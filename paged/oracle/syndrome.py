"""Which token was it? Reading a uniform probe's wrong answer.

In a uniform probe all weights are equal and every token's value is a code of +1 and -1, so a row's output, times how
many tokens there are, is the sum of the codes that the kernel added up. A wrong sum differs from the right one by the
codes of the tokens that are missing or too many, and these can be recognised, as a syndrome names the bit that flipped.

Each kind of fault predicts an output:

    one token missing, or a whole block, or a run      (S - v) / (n - 1)
    one too many, or twice                             (S + v) / (n + 1)
    one token, or a block, in another's place          (S - v + w) / n
    the right sum over a wrong count                   S / m
    another KV head's values                           S' / n

The simplest kind that predicts all elements of the row within their rounding is the diagnosis. With few dims several
tokens have the same code; then the first is named, and how many others it might have been.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from paged.oracle.inputs import FREE, LIVE, NULL, TAIL, Inputs
from paged.oracle.recipes import Floats
from paged.oracle.row import Change, Row, codes_of, row_of
from paged.oracle.values import Integers

# What a context may be padded to, besides whole blocks.
TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Syndrome:
    """What was added up.

    Attributes:
        kind: "missing", "extra", "twice", "replaced", "padding", "denominator", "head", or "zeros".
        words: the same in a sentence.
        changes: slots counted wrongly.
        others: how many other explanations of the same kind there are.
    """

    kind: str
    words: str
    changes: tuple[Change, ...] = ()
    others: int = 0


def decode(inputs: Inputs, row: int, head: int, got: torch.Tensor, roundoff: float) -> Syndrome | None:
    """What a kernel added up in one row of a uniform probe.

    Args:
        inputs: of the probe; its recipe is "uniform", and it has no ALiBi, whose weights are not equal.
        row, head: of the output.
        got: [Dv] what the kernel returned there.
        roundoff: of the output and of the weights, together.

    Returns:
        The simplest explanation, or None if there is none.
    """
    seen = row_of(inputs, row, head)
    visible = seen.slots[seen.first : seen.last + 1]
    target = got.double().numpy()
    if not np.isfinite(target).all() or not len(visible):
        return None
    if not target.any():
        return Syndrome("zeros", "the whole row is 0: it was not computed, or not written")
    total, count = seen.codes[visible].sum(axis=0), len(visible)
    for kind, words, sums, counts, changes in _hypotheses(seen, visible, total, count, target):
        denominators = counts + seen.sink
        with np.errstate(divide="ignore", invalid="ignore"):
            predicted = sums / denominators[:, None]
        close = np.abs(predicted - target) <= roundoff * np.abs(predicted) + 2.0**-20
        matches = np.flatnonzero(close.all(axis=1) & (denominators > 0))
        if len(matches):
            best = int(matches[0])
            return Syndrome(kind, words(best), changes(best), len(matches) - 1)
    return None


# A kind of fault: its name, the i-th one in words, its sums [C, Dv] and counts [C], and the slots the i-th one counts.
Hypothesis = tuple[str, Callable[[int], str], Floats, Integers, Callable[[int], tuple[Change, ...]]]
Hypotheses = Iterator[Hypothesis]


def _hypotheses(seen: Row, visible: Integers, total: Floats, count: int, target: Floats) -> Hypotheses:
    """All kinds of faults, simplest first."""
    codes = seen.codes
    often = np.bincount(visible, minlength=len(codes))
    lost = seen.changes
    one = np.ones(count, dtype=np.int64)
    yield (
        "missing",
        lambda i: f"{_token(seen, int(visible[i]))} was not counted",
        total - codes[visible],
        count - one,
        lambda i: lost(visible[i : i + 1], -1),
    )
    # Tokens that the row sees anyway come first: twice is likelier than a stranger with the same code.
    nearby = _nearby(seen, often)
    strangers = np.setdiff1d(np.flatnonzero(often == 0), nearby)
    order = np.concatenate([np.flatnonzero(often), nearby, strangers])
    yield (
        "extra",
        lambda i: _extra_words(seen, int(order[i]), bool(often[order[i]])),
        total + codes[order],
        np.full(len(order), count + 1),
        lambda i: lost(order[i : i + 1], 1),
    )
    yield from _runs(seen, visible, total, count)
    yield from _blocks(seen, visible, total, count)
    yield from _swaps(seen, visible, total, count, target)
    padded = {-(-count // tile) * tile for tile in (seen.inputs.case.block_size, *TILES)} - {count}
    yield _divided(seen, "padding", total, count, np.array(sorted(padded)))
    yield _divided(seen, "denominator", total, count, np.arange(1, 2 * count + len(codes)))
    yield from _heads(seen, visible, count)


def _divided(seen: Row, kind: str, total: Floats, count: int, counts: Integers) -> Hypothesis:
    """The right sum over a wrong count."""
    return (
        kind,
        lambda i: (
            f"the sum of values is right, but was divided by {counts[i] + seen.sink:g} instead of {count + seen.sink:g}"
        ),
        np.broadcast_to(total, (len(counts), len(total))),
        counts,
        lambda i: (),
    )


def _runs(seen: Row, visible: Integers, total: Floats, count: int) -> Hypotheses:
    """The first or last tokens missing, or a run behind the last or before the first one counted as well."""
    if count > 1:
        for name, run in (("last", visible[::-1]), ("first", visible)):
            yield _run(seen, total, count, run[:-1], f"of the {name} tokens it sees, {{}} were not counted, {{}}", -1)
    behind, before = seen.slots[seen.last + 1 :], seen.slots[: seen.first][::-1]
    for name, run in (("behind the last", behind), ("before the first", before)):
        if len(run):
            yield _run(seen, total, count, run, f"{{}} tokens {name} one it sees were counted, {{}}", 1)


def _run(seen: Row, total: Floats, count: int, run: Integers, words: str, times: int) -> Hypothesis:
    """The first one, two, three ... slots of a run, counted once too often or too rarely."""
    return (
        "extra" if times > 0 else "missing",
        lambda i: words.format(i + 1, _span(seen, run[: i + 1])),
        total + times * np.cumsum(seen.codes[run], axis=0),
        count + times * np.arange(1, len(run) + 1),
        lambda i: seen.changes(run[: i + 1], times),
    )


def _blocks(seen: Row, visible: Integers, total: Floats, count: int) -> Hypotheses:
    """A block of the table missing, counted twice, or another physical block read in its place."""
    size = seen.inputs.case.block_size
    positions = np.arange(seen.first, seen.last + 1)
    for block in range(int(positions[0]) // size, int(positions[-1]) // size + 1):
        inside = positions // size == block
        yield from _block(seen, total, count, block, visible[inside], positions[inside] % size)


def _block(seen: Row, total: Floats, count: int, block: int, own: Integers, offsets: Integers) -> Hypotheses:
    size = seen.inputs.case.block_size
    by_block = seen.codes.reshape(-1, size, seen.codes.shape[1])
    part = seen.codes[own].sum(axis=0)
    name = f"block {block} (physical block {own[0] // size})"
    for kind, times, said in (("missing", -1, "was not counted"), ("twice", 1, "was counted twice")):
        yield _whole(seen, kind, f"{name} {said}", total + times * part, count + times * len(own), own, times)
    yield (
        "replaced",
        lambda i: f"physical block {i} was read in the place of {name}",
        total - part + by_block[:, offsets].sum(axis=1),
        np.full(len(by_block), count),
        lambda i: (*seen.changes(own, -1), *seen.changes(i * size + offsets, 1)),
    )


def _whole(seen: Row, kind: str, words: str, total: Floats, count: int, slots: Integers, times: int) -> Hypothesis:
    """One explanation alone: all of these slots."""
    return kind, lambda i: words, total[None], np.array([count]), lambda i: seen.changes(slots, times)


def _swaps(seen: Row, visible: Integers, total: Floats, count: int, target: Floats) -> Hypotheses:
    """One token read in another's place: looked up by the code that it must have, not tried pair by pair."""
    wanted = np.rint(target * (count + seen.sink) - total)
    holders: dict[bytes, int] = {}
    for slot, code in enumerate(seen.codes.astype(np.int8)):
        holders.setdefault(code.tobytes(), slot)
    pairs = [
        (int(slot), holders[key])
        for slot in visible
        if (key := (seen.codes[slot] + wanted).astype(np.int8).tobytes()) in holders and holders[key] != slot
    ]
    if pairs:
        away, there = (np.array(column) for column in zip(*pairs, strict=True))
        yield (
            "replaced",
            lambda i: f"{_token(seen, int(there[i]))} was read in the place of {_token(seen, int(away[i]))}",
            total - seen.codes[away] + seen.codes[there],
            np.full(len(pairs), count),
            lambda i: (*seen.changes(away[i : i + 1], -1), *seen.changes(there[i : i + 1], 1)),
        )


def _heads(seen: Row, visible: Integers, count: int) -> Hypotheses:
    """The right tokens, but another KV head's values."""
    own = int(seen.inputs.problem.kv_heads[seen.head])
    others = [head for head in range(seen.inputs.case.num_kv_heads) if head != own]
    if others:
        sums = np.stack([codes_of(seen.inputs, head)[visible].sum(axis=0) for head in others])
        yield (
            "head",
            lambda i: f"the values are KV head {others[i]}'s; query head {seen.head} reads KV head {own}",
            sums,
            np.full(len(others), count),
            lambda i: (),
        )


def _nearby(seen: Row, often: Integers) -> Integers:
    """Slots of the row's own sequence that it does not see, nearest first: likelier than anybody else's."""
    outside = np.array([slot for slot in seen.slots if not often[slot]], dtype=np.int64)
    where = {int(slot): position for position, slot in enumerate(seen.slots)}
    away = [min(abs(where[int(s)] - seen.first), abs(where[int(s)] - seen.last)) for s in outside]
    return outside[np.argsort(away, kind="stable")] if len(outside) else outside


def _token(seen: Row, slot: int) -> str:
    """A slot in words, logical and physical.

    For example "token 16 (block 1, slot 0, physical block 7)".
    """
    size = seen.inputs.case.block_size
    change = seen.changes(np.array([slot]), 0)[0]
    if change.position is None:
        whose = {FREE: "a free block", NULL: "the null block", TAIL: "an unused slot of another sequence"}
        owner = whose.get(change.region, "another sequence")
        return f"slot {change.offset} of physical block {change.block}, {owner}"
    place = f"block {change.position // size}, slot {change.offset}, physical block {change.block}"
    unused = "unused slot" if change.region == TAIL else "token"
    return f"{unused} {change.position} ({place})"


def _extra_words(seen: Row, slot: int, own: bool) -> str:
    if own:
        return f"{_token(seen, slot)} was counted twice"
    change = seen.changes(np.array([slot]), 0)[0]
    why = f"the row sees {seen.first} to {seen.last}"
    if change.position is not None and change.region in (LIVE, "hidden") and change.position > seen.last:
        why = f"it lies after the query, at {seen.position}"
    return f"{_token(seen, slot)} was counted once, must be 0 times: {why}"


def _span(seen: Row, slots: Integers) -> str:
    """Where a run of a sequence's own tokens lies."""
    positions = sorted(change.position for change in seen.changes(slots, 0) if change.position is not None)
    return f"tokens {positions[0]} to {positions[-1]}" if len(positions) > 1 else f"token {positions[0]}"
