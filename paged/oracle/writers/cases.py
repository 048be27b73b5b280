"""Which cases a writer is tried on: directed ones, drawn ones, and smaller ones of those that fail.

Directed cases are one for each thing that has gone wrong in public: slots of -1, tokens out of order, a block's border,
the pool's last slot, slices of a fused projection, slots that 32 bits cannot count, no token at all. Drawn cases mix.
"""

from collections.abc import Callable, Iterator
from itertools import cycle, product

from hypothesis import strategies as st

from paged.oracle.drawn import integers, lengths
from paged.oracle.writers.case import WriteCapabilities, WriteCase
from paged.oracle.writers.codes import QUANTISED

MOST_STEPS = 120
# Block numbers from here on do not fit into 16 bits; a pool of so many is made if its caches have fewer numbers.
MANY_BLOCKS, MOST_NUMBERS = 1 << 16, 1 << 23
# What makes a case plainer, in the order in which it is tried.
PLAIN: dict[str, object] = {
    "first_block": 1,
    "strides": "dense",
    "inputs": "dense",
    "skips": "none",
    "duplicates": False,
    "extra_rows": 0,
    "slot_dtype": "int64",
    "last_block": False,
    "order": "identity",
    "shuffled_tokens": False,
    "uneven_scales": False,
}


def directed(can: WriteCapabilities, seed: int, rounds: int) -> Iterator[WriteCase]:
    """One case for each thing that goes wrong, with every choice that is declared having its turn.

    Args:
        can: what is declared.
        seed: of the first case; each has the next one.
        rounds: how often the list is gone through, with other choices.

    Example:
        >>> names = {case.skips for case in directed(WriteCapabilities(negative_slots=True), 0, 1)}
        >>> sorted(names)
        ['all', 'between', 'end', 'none']
    """
    dtypes, blocks, slots = cycle(_dtypes(can)), cycle(can.block_sizes), cycle(can.slot_dtypes)
    widths, heads, number = cycle(can.head_dims), cycle((2, 3, 1, 5)), seed

    def case(sequences: Callable[[int], tuple[tuple[int, int], ...]], **features: object) -> WriteCase:
        nonlocal number
        number += 1
        (dtype, kv_dtype), size, width = next(dtypes), next(blocks), next(widths)
        plain: dict[str, object] = {"dtype": dtype, "kv_dtype": kv_dtype, "scales": can.scales, "order": "shuffled"}
        plain |= {"head_dim": width, "value_dim": can.value_dim_for(width), "block_size": size, "seed": number}
        plain |= {"num_kv_heads": next(heads), "slot_dtype": next(slots), "recipe": recipes_of(can, dtype, kv_dtype)[0]}
        features = {"num_kv_heads": plain["num_kv_heads"]} | features
        return WriteCase(sequences=sequences(size), **(plain | features))  # type: ignore[arg-type]

    def ragged(size: int) -> tuple[tuple[int, int], ...]:
        return ((size - 1, 3), (0, 1), (2 * size + 1, size))

    for _ in range(rounds):
        yield case(lambda size: ((0, 1),))
        for dtype, kv_dtype in _dtypes(can):
            for width, recipe in product(can.head_dims, recipes_of(can, dtype, kv_dtype)):
                wide = {"head_dim": width, "value_dim": can.value_dim_for(width)}
                yield case(ragged, dtype=dtype, kv_dtype=kv_dtype, recipe=recipe, **wide)
            if can.scales in ("tensor", "head"):
                yield case(ragged, dtype=dtype, kv_dtype=kv_dtype, recipe="between", uneven_scales=True)
        for size in can.block_sizes:
            yield case(lambda _, size=size: ((0, size + 1), (size, size)), block_size=size)  # type: ignore[misc]
        for order in ("identity", "reversed"):
            yield case(ragged, order=order)
        yield case(ragged, shuffled_tokens=True)
        yield case(lambda size: ((0, size), (size - 2 if size > 1 else 0, 2)), last_block=True)
        yield case(lambda size: ())
        yield from (case(ragged, slot_dtype=dtype) for dtype in can.slot_dtypes)
        for first in (254, MANY_BLOCKS - 2):
            narrow = {"head_dim": min(can.head_dims), "value_dim": can.value_dim_for(min(can.head_dims))}
            if first < MANY_BLOCKS - 2 or affords_many_blocks(can):
                yield case(
                    lambda size: ((0, 4 * size),),
                    first_block=first,
                    num_kv_heads=1,
                    block_size=min(can.block_sizes),
                    **narrow,
                )
        if can.negative_slots:
            yield from (case(ragged, skips=skips, last_block=True) for skips in ("end", "between", "all"))
        if can.duplicate_slots is not None:
            yield case(ragged, duplicates=True)
            yield case(ragged, duplicates=True, shuffled_tokens=True)
        if can.longer_keys:
            yield case(ragged, extra_rows=3)
        if can.strided_inputs:
            yield from (case(ragged, inputs=inputs) for inputs in ("fused", "heads_first"))
        if can.strided_caches:
            yield from (case(ragged, strides=strides) for strides in _strides(can))
            yield case(lambda size: ((size - 1, 2),), strides="far", num_kv_heads=1)


def recipes_of(can: WriteCapabilities, dtype: str, kv_dtype: str) -> tuple[str, ...]:
    """The recipes that make sense for a pair of dtypes, the one that names tokens best first."""
    if kv_dtype in QUANTISED:
        # Only float32 has bits enough to be hardly off the middle of two codes.
        beside = ("beside",) if dtype in ("float32", "float64") else ()
        return ("codes", "ties", *beside, "between", *(() if can.scales == "token" else ("beyond",)))
    return ("numbered", "special") if dtype == kv_dtype else ("numbered",)


def affords_many_blocks(can: WriteCapabilities) -> bool:
    """Whether a pool with block numbers beyond 16 bits is small enough to be compared."""
    return MANY_BLOCKS * min(can.block_sizes) * min(can.head_dims) <= MOST_NUMBERS


@st.composite
def cases(draw: st.DrawFn, can: WriteCapabilities) -> WriteCase:
    """Any case that a writer with these capabilities must get right; simple ones are small."""

    def one_of(choices: tuple[object, ...]) -> object:
        return draw(st.sampled_from(choices))

    dtype, kv_dtype = draw(st.sampled_from(_dtypes(can)))
    size, width = draw(st.sampled_from(can.block_sizes)), draw(st.sampled_from(can.head_dims))
    count = draw(st.integers(0, 4))
    sequences = tuple((draw(integers(0, 3 * size)), draw(lengths(0, size, 2))) for _ in range(count))
    duplicates = can.duplicate_slots is not None and draw(st.booleans())
    features: dict[str, object] = {
        "recipe": one_of(recipes_of(can, dtype, kv_dtype)),
        "uneven_scales": can.scales in ("tensor", "head") and draw(st.booleans()),
        "order": one_of(("identity", "reversed", "shuffled")),
        "shuffled_tokens": draw(st.booleans()),
        "last_block": draw(st.booleans()),
        "skips": one_of(("none", "end", "between")) if can.negative_slots and not duplicates else "none",
        "duplicates": duplicates,
        "extra_rows": draw(st.integers(0, 2)) if can.longer_keys else 0,
        "inputs": one_of(("dense", "fused", "heads_first")) if can.strided_inputs else "dense",
        "strides": one_of(("dense", *_strides(can))) if can.strided_caches else "dense",
        "slot_dtype": one_of(can.slot_dtypes),
        "num_kv_heads": draw(st.integers(1, 4)),
        "seed": draw(integers(0, (1 << 16) - 1)),
    }
    return WriteCase(
        sequences=sequences,
        head_dim=width,
        value_dim=can.value_dim_for(width),
        block_size=size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        scales=can.scales,
        **features,  # type: ignore[arg-type]
    )


def reduce(case: WriteCase, can: WriteCapabilities, fails: Callable[[WriteCase], bool]) -> tuple[WriteCase, int]:
    """The smallest case that can be reached step by step and still fails, and how many were tried.

    Example: a fault that needs three tokens.
        >>> start = WriteCase(sequences=((5, 9), (0, 2)), inputs="fused")
        >>> small, _ = reduce(start, WriteCapabilities(head_dims=(8,)), lambda case: case.num_tokens >= 3)
        >>> small.sequences, small.inputs
        (((0, 3),), 'dense')
    """
    steps, smaller = 0, True
    while smaller and steps < MOST_STEPS:
        smaller = False
        for candidate in _smaller(case, can):
            if steps == MOST_STEPS:
                break
            steps += 1
            if fails(candidate):
                case, smaller = candidate, True
                break
    return case, steps


def _smaller(case: WriteCase, can: WriteCapabilities) -> Iterator[WriteCase]:
    rows = case.sequences
    if len(rows) > 1:
        yield from (case.replace(sequences=(row,)) for row in rows)
        yield from (case.replace(sequences=rows[:i] + rows[i + 1 :]) for i in range(len(rows)))
    for i, (start, count) in enumerate(rows):
        for fewer in sorted({1, count // 2, count - 1}):
            if 0 < fewer < count:
                yield case.replace(sequences=(*rows[:i], (start, fewer), *rows[i + 1 :]))
        if start:
            yield case.replace(sequences=(*rows[:i], (0, count), *rows[i + 1 :]))
            yield case.replace(sequences=(*rows[:i], (start - 1, count), *rows[i + 1 :]))
    yield from (case.replace(**{name: plain}) for name, plain in PLAIN.items() if getattr(case, name) != plain)
    if case.num_kv_heads > 1:
        yield from (case.replace(num_kv_heads=heads) for heads in (1, case.num_kv_heads - 1))
    for width in sorted(width for width in can.head_dims if width < case.head_dim):
        yield case.replace(head_dim=width, value_dim=can.value_dim_for(width))


def _dtypes(can: WriteCapabilities) -> list[tuple[str, str]]:
    pairs = product(can.dtypes, can.kv_dtypes)
    return list(dict.fromkeys((dtype, dtype if kv_dtype == "auto" else kv_dtype) for dtype, kv_dtype in pairs))


def _strides(can: WriteCapabilities) -> tuple[str, ...]:
    """Ways in which a pool can lie; K and V fit into one tensor only if they are equally wide."""
    return ("padded", "heads_first") if can.value_dims is not None else ("padded", "interleaved", "heads_first")
