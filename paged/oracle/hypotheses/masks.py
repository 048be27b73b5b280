"""Who sees whom: causal masks and windows whose edges are elsewhere."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from paged.oracle.exact import Problem, distances, visible
from paged.oracle.hypotheses.alternative import Alternative, Sight, seeing

TILES = (2, 4, 8, 16, 32, 64, 128)
# From the queries' positions [Q] to the first key that each of them sees.
LeftEdge = Callable[[Tensor], Tensor]


def masks(problem: Problem, block_size: int) -> Iterator[Alternative]:
    """Masks with one thing wrong.

    Args:
        problem: as it is meant.
        block_size: of the case, which windows are rounded to.
    """
    if problem.window is not None:
        yield from _edges(problem, problem.window)
    yield from _causal(problem)
    if problem.window is not None:
        for said, sight in _windows(problem.window, block_size):
            yield Alternative(said, "G", None, seeing(problem, sight))


def _edges(problem: Problem, window: int) -> Iterator[Alternative]:
    for step, said in ((1, "one token too wide"), (-1, "one token too narrow")):
        if window + step >= 1:
            changed = problem.replace(window=window + step)
            yield Alternative(f"window edge off by one: {said}", "G", None, changed)


def _causal(problem: Problem) -> Iterator[Alternative]:
    for step, said in ((1, "one key too many"), (-1, "one key too few")):
        changed = problem.replace(first_positions=tuple(first + step for first in problem.first_positions))
        if problem.window is not None:
            changed = changed.replace(window=problem.window + step) if problem.window + step >= 1 else changed
        yield Alternative(f"causal edge off by one: {said}", "F", None, changed)
    lasts = tuple(len(key) for key in problem.keys)
    yield Alternative("there is no causal mask", "F", None, problem.replace(first_positions=lasts, window=None))
    longest = max(map(len, problem.queries))
    moved = tuple(len(key) - longest for key in problem.keys)
    said = "queries are aligned with the longest chunk of the batch"
    yield Alternative(said, "F", None, problem.replace(first_positions=moved))
    for tile in TILES:
        if tile // 2 < longest:  # a larger one has nothing new to say
            said = f"the causal mask is made once for every {tile} queries, by the last of them"
            yield Alternative(said, "F", None, seeing(problem, _by_tile(tile, whole=False)))
            said = f"the causal mask is made once for every {tile} positions, by the last of them"
            yield Alternative(said, "F", None, seeing(problem, _by_tile(tile, whole=True)))


def _by_tile(tile: int, *, whole: bool) -> Sight:
    """Queries see as far as the last one of their tile; tiles begin at the chunk's first query or at position 0."""

    def sight(problem: Problem, index: int) -> Tensor:
        first, count = problem.first_positions[index], len(problem.queries[index])
        start = 0 if whole else first
        positions = first + torch.arange(count)
        last = ((positions - start) // tile * tile + start + tile - 1).clamp(max=first + count - 1)
        keys = torch.arange(len(problem.keys[index]))
        seen = keys <= last[:, None]
        return seen if problem.window is None else seen & (keys > positions[:, None] - problem.window)

    return sight


def _windows(window: int, size: int) -> Iterator[tuple[str, Sight]]:
    """Windows that begin elsewhere."""

    def beginning(left: LeftEdge) -> Sight:
        def sight(problem: Problem, index: int) -> Tensor:
            positions = problem.first_positions[index] + torch.arange(len(problem.queries[index]))
            causal = distances(problem, index) >= 0
            if not len(positions):
                return causal
            return causal & (torch.arange(len(problem.keys[index])) >= left(positions)[:, None])

        return sight

    yield (
        "all queries of a chunk see from where the first one does",
        beginning(lambda p: (p[:1] - window + 1).expand_as(p)),
    )
    yield (
        "the window slides with the sequence's last query, not with each query",
        beginning(lambda p: torch.minimum(p[-1:] - window + 1, p)),
    )
    yield (
        "the window begins where its first block does",
        beginning(lambda p: (p - window + 1).clamp(min=0) // size * size),
    )
    yield (
        "the window is counted in whole blocks, back from the query's own",
        beginning(lambda p: (p // size - -(-window // size) + 1).clamp(min=0) * size),
    )
    yield (
        "the window is rounded up to whole blocks",
        beginning(lambda p: p - -(-window // size) * size + 1),
    )
    if window >= size:
        yield (
            "the window is rounded down to whole blocks",
            beginning(lambda p: p - window // size * size + 1),
        )


def whole_tiles(tile: int, block_size: int) -> Sight:
    """Of each block only the slots that fill whole tiles."""

    def sight(problem: Problem, index: int) -> Tensor:
        offsets = torch.arange(len(problem.keys[index])) % block_size
        return visible(problem, index) & (offsets < block_size // tile * tile)

    return sight
