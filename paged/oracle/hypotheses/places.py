"""Which slots are read: sequences of another length, tables that are walked in another way, caches of another layout.

These look into the pool that the kernel was given, and gather keys and values from where a mistake would find them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paged.oracle.exact import Problem
from paged.oracle.hypotheses.alternative import Alternative, seeing
from paged.oracle.hypotheses.masks import whole_tiles
from paged.oracle.inputs import FEW, Inputs

LIMITS = tuple(1 << power for power in range(8, 15))
COLUMNS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Pool:
    """What a kernel was given, on the CPU, in float64 and times its scales.

    Attributes:
        keys, values: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        tables: [B, M].
        lengths: of the sequences.
        size: P.
    """

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: tuple[int, ...]
    size: int


def places(inputs: Inputs) -> Iterator[Alternative]:
    """Everything that would read other slots."""
    pool = pool_of(inputs)
    if pool is None:
        return
    yield from _lengths(inputs, pool)
    yield from _tables(inputs, pool)
    yield from _layouts(inputs, pool)


def pool_of(inputs: Inputs) -> Pool | None:
    """The pool, or None where it is too large or its numbers have scales of their own."""
    case = inputs.case
    if case.kv_scales == "token" or case.strides == "far" or case.first_block > FEW:
        return None
    caches = []
    for cache, scale in ((inputs.key_cache, inputs.k_scale), (inputs.value_cache, inputs.v_scale)):
        numbers = cache.cpu().double()
        caches.append(numbers if scale is None else numbers * torch.as_tensor(scale).cpu().double()[..., None])
    lengths = tuple(seq_len for _, seq_len in case.sequences)
    return Pool(caches[0], caches[1], inputs.block_tables.cpu().long(), lengths, case.block_size)


def reread(
    problem: Problem, pool: Pool, blocks: Callable[[int, int], Tensor], counts: tuple[int, ...], shift: int = 0
) -> Problem | None:
    """A problem whose keys and values come from other slots.

    Args:
        problem: as it is meant.
        pool: to gather from.
        blocks: of sequence i and so many blocks, which physical ones.
        counts: how many keys each sequence has; queries stay its last ones if there are more than there should be.
        shift: how many more keys every query sees, at least.

    Returns:
        The problem, or None if blocks are named that the pool does not have.
    """
    keys, values, firsts = [], [], []
    for index, count in enumerate(counts):
        found = blocks(index, -(-count // pool.size))
        if len(found) * pool.size < count or (
            len(found) and not 0 <= int(found.min()) <= int(found.max()) < len(pool.keys)
        ):
            return None
        keys.append(pool.keys[found].flatten(0, 1)[:count])
        values.append(pool.values[found].flatten(0, 1)[:count])
        firsts.append(problem.first_positions[index] + max(shift, count - pool.lengths[index]))
    return problem.replace(keys=tuple(keys), values=tuple(values), first_positions=tuple(firsts))


def _lengths(inputs: Inputs, pool: Pool) -> Iterator[Alternative]:
    size, lengths, problem = pool.size, pool.lengths, inputs.problem
    width = pool.tables.shape[1] * size

    def row(index: int, count: int) -> Tensor:
        return pool.tables[index, :count]

    whole = tuple(-(-n // size) * size for n in lengths)
    candidates: list[tuple[str, tuple[int, ...]]] = [
        ("the last key of a sequence is never seen", tuple(max(1, n - 1) if n else 0 for n in lengths)),
        ("the slot behind the last token is a key like any other", tuple(min(n + 1, width) for n in lengths)),
        ("a last block's capacity is taken for its length", whole),
        (
            "a last block that is full is not read, unless it is the only one",
            tuple(n - size if n > size and not n % size else n for n in lengths),
        ),
        ("a last block that is full is taken for empty", tuple(n if n % size else max(0, n - size) for n in lengths)),
        (
            "lengths that are multiples of the block size get a block too many",
            tuple(n if n % size or not n else min(n + size, width) for n in lengths),
        ),
        ("only whole blocks are read", tuple(n // size * size for n in lengths)),
        ("every sequence is taken to be as long as the longest", tuple(max(lengths) for _ in lengths)),
        ("no sequence has more keys than the first one", tuple(min(n, lengths[0]) for n in lengths)),
        *((f"no more than {limit} keys are read", tuple(min(n, limit) for n in lengths)) for limit in LIMITS),
    ]
    for said, counts in candidates:
        changed = None if counts == lengths else reread(problem, pool, row, counts)
        if changed is not None:
            yield Alternative(said, "C", None, changed)
    changed = reread(problem, pool, row, tuple(min(n + 1, width) for n in lengths), shift=1)
    if changed is not None:
        yield Alternative("every query sees one key more, and the last one the slot behind it", "C", None, changed)
    for tile in (16, 32, 64, 128):
        if tile < size and size % tile:
            said = f"of each block only whole tiles of {tile} slots are read"
            yield Alternative(said, "C", None, seeing(problem, whole_tiles(tile, size)))


def _tables(inputs: Inputs, pool: Pool) -> Iterator[Alternative]:
    """Tables that are not read as they should be."""
    tables, lengths, size = pool.tables, pool.lengths, pool.size
    before = [sum(-(-n // size) for n in lengths[:index]) for index in range(len(lengths))]
    needed = max(1, -(-max(lengths) // size))

    def columns(wrapped: int) -> Callable[[int, int], Tensor]:
        return lambda i, count: tables[i, torch.arange(count) % wrapped]

    ways: list[tuple[str, Callable[[int, int], Tensor]]] = [
        ("blocks are taken to lie one behind another", lambda i, n: (tables[i, :1] + torch.arange(n)) % len(pool.keys)),
        (
            "the table is not read: sequences are taken to fill the pool in order",
            lambda i, n: 1 + before[i] + torch.arange(n),
        ),
        ("every sequence reads the first one's row of the table", lambda i, n: tables[0, :n]),
        ("a row of the table is read backwards", lambda i, n: tables[i, :n].flip(0)),
        ("a row is taken to be as wide as the longest sequence needs", lambda i, n: tables.flatten()[i * needed :][:n]),
        ("rows of the table are taken in reverse order", lambda i, n: tables[len(tables) - 1 - i, :n]),
        ("columns of the table are read one further on", lambda i, n: tables[i, 1 : n + 1]),
        *((f"columns of the table wrap around after {wide}", columns(wide)) for wide in COLUMNS if wide < needed),
    ]
    for said, blocks in ways:
        changed = reread(inputs.problem, pool, blocks, lengths)
        if changed is not None:
            yield Alternative(said, "D", None, changed)
    for small in (16, 32, 64):
        if size > small and size % small == 0:
            said = f"the table is read as if blocks had {small} tokens"
            changed = reread(inputs.problem, pool, _as_small(tables, size // small), lengths)
            if changed is not None:
                yield Alternative(said, "D", None, changed)
    slots = [tables[i, : -(-n // size)][:, None] + torch.arange(size) for i, n in enumerate(lengths)]
    gathered = inputs.problem.replace(
        keys=tuple(pool.keys.flatten(0, 1)[s.flatten()[:n]] for s, n in zip(slots, lengths, strict=True)),
        values=tuple(pool.values.flatten(0, 1)[s.flatten()[:n]] for s, n in zip(slots, lengths, strict=True)),
    )
    yield Alternative("entries of the table are taken for slots, not for blocks", "D", None, gathered)


def _as_small(tables: Tensor, ratio: int) -> Callable[[int, int], Tensor]:
    """Every entry stands for `ratio` logical blocks."""
    return lambda i, count: tables[i, : -(-count // ratio)].repeat_interleave(ratio)[:count]


def _layouts(inputs: Inputs, pool: Pool) -> Iterator[Alternative]:
    """Caches whose axes are in another order."""

    def heads_first(cache: Tensor) -> Tensor:
        blocks, size, heads, width = cache.shape
        return cache.reshape(blocks, heads, size, width).transpose(1, 2)

    def width_first(cache: Tensor) -> Tensor:
        blocks, size, heads, width = cache.shape
        return cache.transpose(1, 2).reshape(blocks, heads, width, size).permute(0, 3, 1, 2)

    for said, turned in (
        ("[N, P, Hkv, D] is read as [N, Hkv, P, D]", heads_first),
        ("blocks of [P, D] numbers are read as [D, P]", width_first),
    ):
        for which in ("", "of keys, ", "of values, "):
            keys = pool.keys if which == "of values, " else turned(pool.keys)
            values = pool.values if which == "of keys, " else turned(pool.values)
            other = Pool(keys, values, pool.tables, pool.lengths, pool.size)
            changed = reread(inputs.problem, other, lambda i, n: pool.tables[i, :n], pool.lengths)
            if changed is not None:
                yield Alternative(f"{which}{said}", "E", None, changed)
