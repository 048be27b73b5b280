"""Drawn cases: combinations that nobody thought of, by Hypothesis.

What is drawn are the fields of a `Case`, small integers and names: never a tensor's numbers, which shrink badly and
drift to the edge of what is allowed. The same seed and budget give the same cases, with the same version of Hypothesis.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from paged.oracle.case import CODES, EXACT, Case
from paged.oracle.declarations import Capabilities, Conventions

BASE = 64
Drawn = TypeVar("Drawn")


def integers(lowest: int, highest: int) -> st.SearchStrategy[int]:
    """Integers of a range, drawn digit by digit.

    Hypothesis mixes in the integers from 100 upwards that it reads in the source of the modules that happen to be
    loaded, so that a verdict would depend on the program around it. No digit can be one of those.

    Example:
        >>> search(integers(0, 1000), 300, 0, lambda number: number > 127)
        128
    """
    count = highest - lowest + 1
    num_digits = max(1, math.ceil(math.log(max(2, count), BASE)))
    return st.tuples(*[st.integers(0, min(BASE, count) - 1)] * num_digits).map(
        lambda digits: lowest + sum(digit * BASE**place for place, digit in enumerate(reversed(digits))) % count
    )


def lengths(lowest: int, block_size: int, num_blocks: int) -> st.SearchStrategy[int]:
    """Numbers of tokens: very few, any, and one fewer or more than fill some blocks."""
    borders = st.tuples(st.integers(1, num_blocks), st.integers(-1, 1)).map(lambda at: at[0] * block_size + at[1])
    return st.integers(lowest, 4) | borders.map(lambda n: max(lowest, n)) | integers(1, num_blocks * block_size)


@st.composite
def cases(draw: st.DrawFn, capabilities: Capabilities, conventions: Conventions) -> Case:
    """A case that a kernel with these capabilities must be able to compute; simple ones are small.

    Args:
        draw: Hypothesis' own.
        capabilities: what may be asked for.
        conventions: whether NaN may lie in unused slots.
    """
    can = capabilities

    def one_of(choices: Any) -> Any:
        return draw(st.sampled_from(list(choices)))

    block_size, head_dim, dtype = one_of(can.block_sizes), one_of(can.head_dims), one_of(can.dtypes)
    kv_dtype = one_of(can.kv_dtypes)
    kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
    scaled = can.kv_scales if can.kv_scales and (kv_dtype == "int8" or draw(st.booleans())) else None
    sequences = []
    for _ in range(draw(st.integers(1, 4))):
        seq_len = draw(lengths(0 if can.empty_rows else 1, block_size, 6))
        most = 1 if can.decode_only else min(seq_len, 20)
        sequences.append((draw(st.integers(0 if can.empty_rows else 1, max(1, most))) if seq_len else 1, seq_len))
    few = ("codes",) if kv_dtype in CODES else ()
    recipe = one_of(("random", "uniform", "needle", "pair", "staircase", "large", "negative", *few))
    sinks = can.sinks and recipe not in ("large", "negative") and draw(st.booleans())
    alibi = can.alibi and recipe in ("random", "staircase") and draw(st.booleans())
    softcap = one_of((None, 0.5, 2.0, 30.0)) if can.softcap and recipe not in EXACT else None
    strides = ("dense", "padded", "interleaved") if can.strided_caches and can.value_dims is None else ("dense",)
    poison = "none" if recipe == "uniform" else one_of(("none", "nan", "huge"))
    if conventions.unused_slots == "masked" and poison == "nan":
        poison = "huge"
    return Case(
        sequences=tuple(sequences),
        num_kv_heads=draw(st.integers(1, 3)),
        query_group=one_of(can.query_groups),
        head_dim=head_dim,
        value_dim=can.value_dim_for(head_dim),
        block_size=block_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        table_dtype=one_of(can.table_dtypes),
        recipe=recipe,
        seed=draw(integers(0, (1 << 16) - 1)),
        window=draw(st.none() | lengths(1, block_size, 3)) if can.window else None,
        softcap=softcap,
        alibi=alibi,
        sinks=sinks,
        kv_scales=scaled,
        order=one_of(("identity", "reversed", "shuffled", "interleaved")),
        shared_blocks=draw(st.integers(0, 2)),
        repeat=draw(st.none() | st.integers(1, 3)) if can.repeated_blocks else None,
        extra_columns=draw(st.integers(0, 2)),
        padding=one_of(("null", "negative")) if can.negative_padding else "null",
        strides=one_of(strides),
        sliced_table=can.strided_tables and draw(st.booleans()),
        poison=poison,
    )


def search(strategy: st.SearchStrategy[Drawn], count: int, seed: int, fails: Callable[[Drawn], bool]) -> Drawn | None:
    """Draw until something fails, and let Hypothesis make it smaller.

    Args:
        strategy: what to draw; integers and names, never the numbers of a tensor.
        count: how many are drawn at most.
        seed: the same seed draws the same.
        fails: tries one.

    Returns:
        The smallest one found that fails, or None.

    Example:
        >>> search(st.integers(0, 50), 100, 0, lambda number: number > 17)
        18
    """
    smallest: list[Drawn] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
    )
    @given(strategy)
    def attempt(drawn: Drawn) -> None:
        if fails(drawn):
            smallest[:] = [drawn]
            raise AssertionError

    try:
        attempt()
    except Exception:
        # What fails only now and then makes Hypothesis raise an error of its own; the last failure is what there is.
        if not smallest:
            raise
    return smallest[0] if smallest else None
