"""Directed cases: what bugs have been found by, again and again, for every kernel and in the order of how simple it is.

Lengths around the borders of blocks, tables in every order, every feature at values where it matters, poison, long
contexts. Shapes and dtypes take turns over these, so that each that is declared is met. Which thread asked for what is
in the mutants of paged/oracle/mutants/, one for each kind of bug.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from paged.oracle.case import CODES, Case
from paged.oracle.declarations import Capabilities, Conventions

Sequences = tuple[tuple[int, int], ...]

# How long a context is in which one wrong token is to be found.
LONG = 8192
# A context that needs more than 32 parts of 1,024 tokens, and positions that signed 16 bits do not hold.
LONGEST = 33 * 1024
# A block number that 16 bits do not hold.
WIDE = 65_535
# Sizes that rows, heads, queries and lengths are cut into.
TILES = (128, 256, 512, 1024, 2048)


@dataclass
class Turns:
    """Shapes and dtypes that take turns.

    Attributes:
        capabilities: whose choices they are.
        conventions: whether NaN may lie in unused slots.
        seed: of the first case; every case has the next one.
    """

    capabilities: Capabilities
    conventions: Conventions
    seed: int = 0
    _turns: dict[str, Iterator[Any]] = field(init=False)

    def __post_init__(self) -> None:
        can = self.capabilities
        scaled = [dtype for dtype in can.kv_dtypes if dtype in ("float8_e4m3fn", "float8_e5m2", "int8")]
        self._turns = {
            "dtype": cycle(can.dtypes),
            "kv_dtype": cycle(can.kv_dtypes),
            "scaled": cycle(scaled or can.kv_dtypes),
            "head_dim": cycle(can.head_dims),
            "query_group": cycle(can.query_groups),
            "block_size": cycle(can.block_sizes),
            "table_dtype": cycle(can.table_dtypes),
            "num_kv_heads": cycle((2, 1, 3)),
            "order": cycle(("shuffled", "reversed", "interleaved", "shuffled", "identity")),
        }

    def next_block_size(self) -> int:
        """P of the next case, which its lengths follow."""
        return int(next(self._turns["block_size"]))

    def case(self, block_size: int, sequences: Iterable[tuple[int, int]], **fixed: Any) -> Case:
        """The next case: what is not fixed takes its turn."""
        can = self.capabilities
        self.seed += 1
        chosen = {
            name: next(self._turns[name])
            for name in ("dtype", "query_group", "table_dtype", "num_kv_heads", "order", "head_dim")
        }
        kv_dtype = next(self._turns["scaled" if fixed.get("kv_scales") else "kv_dtype"])
        kv_dtype = chosen["dtype"] if kv_dtype == "auto" else kv_dtype
        if kv_dtype == "int8":
            fixed.setdefault("kv_scales", can.kv_scales)
        if can.decode_only:
            sequences = [(min(query_len, 1), seq_len) for query_len, seq_len in sequences]
        if fixed.get("poison") == "nan" and self.conventions.unused_slots == "masked":
            fixed["poison"] = "huge"
        chosen |= {"value_dim": can.value_dim_for(fixed.get("head_dim", chosen["head_dim"])), "kv_dtype": kv_dtype}
        return Case(sequences=tuple(sequences), block_size=block_size, seed=self.seed, **chosen | fixed)


def directed(turns: Turns, rounds: int) -> Iterator[Case]:
    """All directed cases, simplest first.

    Args:
        turns: what takes turns.
        rounds: how often; each time shapes and dtypes meet other cases.
    """
    for _ in range(rounds):
        yield from _lengths(turns)
        yield from _tables(turns)
        yield from _windows(turns)
        yield from _features(turns)
        yield from _ranges(turns)
        yield from _declared(turns)
        yield from _many(turns)
        yield from _long(turns)


def decodes(block_size: int) -> Sequences:
    """A decode at every length around a border of a block.

    Example:
        >>> decodes(16)
        ((1, 1), (1, 15), (1, 16), (1, 17), (1, 32), (1, 33), (1, 83))
    """
    p = block_size
    lengths = dict.fromkeys(max(1, n) for n in (1, p - 1, p, p + 1, 2 * p, 2 * p + 1, 5 * p + 3))
    return tuple((1, n) for n in lengths)


def mixed(block_size: int) -> Sequences:
    """Decodes, chunks behind a context and whole prompts in one batch."""
    p = block_size
    return ((1, 2 * p + 1), (min(p, 16) + 3, 2 * p + 5), (min(p + 1, 40),) * 2, (1, 1), (2, 3 * p))


def _lengths(turns: Turns) -> Iterator[Case]:
    for recipe, poison in (
        ("uniform", "none"),
        ("needle", "nan"),
        ("random", "nan"),
        ("random", "huge"),
        ("pair", "huge"),
        ("staircase", "nan"),
    ):
        for shape in (decodes, mixed):
            p = turns.next_block_size()
            yield turns.case(p, shape(p), recipe=recipe, poison=poison)
    for _ in turns.capabilities.block_sizes:
        p = turns.next_block_size()
        yield turns.case(p, [(1, 2 * p)], recipe="uniform")
        yield turns.case(p, [(p // 2 + 2, 2 * p + 1)], recipe="uniform")


def _tables(turns: Turns) -> Iterator[Case]:
    for order in ("identity", "reversed", "shuffled", "interleaved"):
        p = turns.next_block_size()
        yield turns.case(p, [(1, 4 * p - 1), (1, 3 * p), (3, 2 * p + 1)], recipe="uniform", order=order)
    for recipe in ("uniform", "random"):
        p = turns.next_block_size()
        rows = [(1, 3 * p + 1), (2, 4 * p - 1), (1, 2 * p + 2), (1, p - 1 or 1)]
        yield turns.case(p, rows, recipe=recipe, shared_blocks=2)
        yield turns.case(p, rows[::-1], recipe=recipe, extra_columns=3, poison="nan")
    # So many blocks take memory, which has to be small ones, then.
    p, width = min(turns.capabilities.block_sizes), min(turns.capabilities.head_dims)
    narrow = {"num_kv_heads": 1, "query_group": min(turns.capabilities.query_groups), "head_dim": width}
    yield turns.case(p, [(1, 2 * p + 1), (1, p)], recipe="uniform", first_block=WIDE, **narrow)
    # Two of everything: sizes that can be taken for one another.
    yield turns.case(p, [(1, p + 1), (1, p)], recipe="needle", num_kv_heads=2, order="identity")


def _windows(turns: Turns) -> Iterator[Case]:
    if not turns.capabilities.window:
        return
    for size in ("1", "2", "p - 1", "p", "p + 1", "n - 1", "n", "n + 1", "2p"):
        p = turns.next_block_size()
        n = 2 * p + 3
        window = {"1": 1, "2": 2, "p - 1": p - 1, "p": p, "p + 1": p + 1, "n - 1": n - 1, "n": n, "n + 1": n + 1}
        wide = max(1, window.get(size, 2 * p))
        rows = [(1, n), (5, 4 * p), (1, 1), (min(p, 16) + 2, 3 * p + 1)]
        yield turns.case(p, rows, recipe="uniform", window=wide)
        yield turns.case(p, rows, recipe="random", window=wide, poison="huge")
    p = turns.next_block_size()
    yield turns.case(p, [(1, 4 * p + 1), (3, 3 * p)], recipe="needle", window=p + 2, poison="huge")
    yield turns.case(p, [(1, 40 * p + 1)], recipe="random", window=p + 1, poison="huge")


def _features(turns: Turns) -> Iterator[Case]:
    can = turns.capabilities
    windows = (None, 9) if can.window else (None,)
    for window in windows:
        p = turns.next_block_size()
        rows = [(1, 2 * p + 3), (4, 3 * p - 1), (1, 5 * p)]
        if can.softcap:
            for recipe, cap in (("random", 0.5), ("random", 2.0), ("large", 30.0), ("negative", 2.0), ("large", 2.0)):
                yield turns.case(p, rows, recipe=recipe, softcap=cap, window=window, poison="huge")
        if can.alibi:
            for recipe in ("random", "staircase"):
                yield turns.case(p, rows, recipe=recipe, alibi=True, window=window, num_kv_heads=2)
        if can.sinks:
            for recipe in ("uniform", "random", "staircase", "needle"):
                yield turns.case(p, rows, recipe=recipe, sinks=True, window=window, num_kv_heads=2)
            yield turns.case(p, [(1, 33 * p + 1)], recipe="random", sinks=True, window=window)
        if can.kv_scales is not None:
            for recipe in ("uniform", "needle", "random", "staircase"):
                more = {"kv_scales": can.kv_scales, "num_kv_heads": 2, "window": window}
                yield turns.case(p, rows, recipe=recipe, poison="nan", **more)
        for dtype in CODES if window is None else ():
            if dtype in can.kv_dtypes:
                long = [*rows, (1, 9 * p)]
                yield turns.case(p, long, recipe="codes", kv_dtype=dtype, kv_scales=can.kv_scales)
        together: dict[str, Any] = {"softcap": 4.0 if can.softcap else None, "alibi": can.alibi, "sinks": can.sinks}
        yield turns.case(p, rows, recipe="random", kv_scales=can.kv_scales, window=window, **together)


def _ranges(turns: Turns) -> Iterator[Case]:
    for recipe in ("large", "negative"):
        for shape in (decodes, mixed):
            p = turns.next_block_size()
            yield turns.case(p, shape(p), recipe=recipe)
    p = turns.next_block_size()
    yield turns.case(p, [(1, 9 * p + 1), (1, 2)], recipe="large", poison="huge")


def _declared(turns: Turns) -> Iterator[Case]:
    can = turns.capabilities
    p = turns.next_block_size()
    if can.empty_rows:
        for recipe in ("uniform", "random"):
            late = (2, 0) if can.decode_only else (3, 1)  # queries that see no key, before one that does
            yield turns.case(p, [(1, p + 1), (1, 0), (1, 5)], recipe=recipe, poison="nan")
            yield turns.case(p, [(0, p), late, (1, p), (0, 0)], recipe=recipe, sinks=can.sinks)
    if can.negative_padding:
        yield turns.case(p, [(1, 3 * p), (1, p + 1), (1, 1)], recipe="uniform", padding="negative", extra_columns=2)
        yield turns.case(p, [(1, p), (2, 2 * p + 1)], recipe="random", padding="negative", poison="nan")
    if can.repeated_blocks:
        yield turns.case(p, [(1, 4 * p + 2), (1, 3 * p)], recipe="uniform", repeat=2)
        yield turns.case(p, [(1, 4 * p + 2), (2, 3 * p)], recipe="random", repeat=2)
    if can.strided_tables:
        for recipe in ("uniform", "random"):
            rows = [(1, 3 * p), (2, 2 * p + 1), (1, p - 1 or 1)]
            yield turns.case(p, rows, recipe=recipe, sliced_table=True, extra_columns=1)
    if can.strided_caches:
        equal = can.value_dims is None
        for strides in ("padded", "interleaved") if equal else ("padded",):
            for recipe in ("uniform", "random"):
                yield turns.case(p, [(1, 3 * p), (2, 2 * p + 1), (1, p - 1 or 1)], recipe=recipe, strides=strides)
        narrow = {"num_kv_heads": 1, "query_group": min(can.query_groups)}
        yield turns.case(p, [(1, 2 * p + 1)], recipe="uniform", strides="far", order="identity", **narrow)
    yield turns.case(p, [(1, 7)], recipe="random", query_group=max(can.query_groups), num_kv_heads=1)


def _many(turns: Turns) -> Iterator[Case]:
    """More sequences, heads and queries than fit into a warp, a tile, or a buffer that was large enough so far."""
    can = turns.capabilities
    p, group, width = min(can.block_sizes), max(can.query_groups), min(can.head_dims)
    small = {"num_kv_heads": 1, "query_group": min(can.query_groups), "head_dim": width}
    yield turns.case(p, [(1, 1 + 7 * i % (2 * p + 1)) for i in range(2 * 64 + 3)], recipe="uniform", **small)
    for recipe in ("needle", "random"):
        heads = {"num_kv_heads": max(3, -(-70 // group)), "query_group": group, "head_dim": width}
        yield turns.case(p, [(1, p + 1), (3, 2 * p)], recipe=recipe, **heads)
    if not can.decode_only:
        chunks = [(270, 270 + p + 3), (1, 5), (140, 150)]
        for window in (None, 130) if can.window else (None,):
            for recipe, poison in (("uniform", "none"), ("random", "huge")):
                yield turns.case(p, chunks, recipe=recipe, poison=poison, window=window, **small)


def _long(turns: Turns) -> Iterator[Case]:
    can = turns.capabilities
    heads = {"num_kv_heads": 1, "query_group": min(can.query_groups)}
    for recipe, n, poison in (
        ("uniform", LONG, "none"),
        ("uniform", LONGEST + 5, "none"),
        ("needle", LONG + 3, "nan"),
        ("random", LONG // 4 + 1, "nan"),
        ("random", LONG + 5, "huge"),
    ):
        p = turns.next_block_size()
        yield turns.case(p, [(1, n), (1, n // 3)] if n == LONG else [(1, n)], recipe=recipe, poison=poison, **heads)
    p, width = turns.next_block_size(), min(can.head_dims)
    tiles = [(1, size + step) for size in TILES for step in (-1, 0, 1)]
    yield turns.case(p, tiles, recipe="uniform", head_dim=width, **heads)
    # Every feature where a context is long enough for a kernel to go another way.
    features: list[dict[str, Any]] = [{"window": 601}] if can.window else []
    features += [{"softcap": 2.0}] if can.softcap else []
    features += [{"alibi": True}] if can.alibi else []
    features += [{"sinks": True}] if can.sinks else []
    features += [{"kv_scales": can.kv_scales}] if can.kv_scales is not None else []
    for feature in features:
        p = turns.next_block_size()
        rows = [(1, 1545), (3, 700)]
        yield turns.case(p, rows, recipe="random", poison="huge", head_dim=width, **heads, **feature)
        if "window" in feature:
            yield turns.case(p, rows, recipe="uniform", head_dim=width, **heads, **feature)
        if "alibi" in feature:  # many pairs of keys, some of them far away and near to each other
            rows = [(1, 1545), (1, 1290), (1, 1030), (3, 1100)]
            yield turns.case(p, rows, recipe="pair", head_dim=width, query_group=max(can.query_groups), **feature)
