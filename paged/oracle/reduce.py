"""Making a failing case smaller: fewer sequences, shorter, fewer heads, narrower, plainer, in that order.

Values follow from counters, so what is left of a case keeps its numbers, and a fault that one token makes stays.
"""

from collections.abc import Callable, Iterator

from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities

# Cases are tried while they are so many and have so many tokens together: long contexts take their time.
MOST_STEPS, MOST_TOKENS = 150, 1 << 20


def reduce(case: Case, capabilities: Capabilities, fails: Callable[[Case], bool]) -> tuple[Case, int]:
    """The smallest case that can be reached step by step and still fails.

    Args:
        case: which fails.
        capabilities: smaller cases ask for nothing else.
        fails: whether a case fails in the same way.

    Returns:
        The case, and how many cases were tried.

    Example: a fault that needs 20 tokens.
        >>> start = Case(sequences=((1, 83), (3, 17)), num_kv_heads=2, sinks=True)
        >>> small, steps = reduce(start, Capabilities(), lambda c: max(n for _, n in c.sequences) >= 20)
        >>> small.sequences, small.num_kv_heads, small.sinks
        (((1, 20),), 1, False)
    """
    steps, tokens, smaller = 0, 0, True
    while smaller:
        smaller = False
        for candidate in _smaller(case, capabilities):
            if steps == MOST_STEPS or tokens > MOST_TOKENS:
                return case, steps
            steps += 1
            tokens += sum(seq_len for _, seq_len in candidate.sequences)
            if fails(candidate):
                case, smaller = candidate, True
                break
    return case, steps


def _smaller(case: Case, capabilities: Capabilities) -> Iterator[Case]:
    """Cases that are one step smaller, the largest steps first."""
    rows = case.sequences
    if len(rows) > 1:
        yield from (case.replace(sequences=(row,)) for row in rows)
        yield from (case.replace(sequences=rows[:i] + rows[i + 1 :]) for i in range(len(rows)))
    for i, (query_len, seq_len) in enumerate(rows):
        for shorter in _lengths(query_len, seq_len, case.block_size):
            if capabilities.empty_rows or 0 not in shorter:
                yield case.replace(sequences=(*rows[:i], shorter, *rows[i + 1 :]))
    if case.num_kv_heads > 1:
        yield case.replace(num_kv_heads=1)
        yield case.replace(num_kv_heads=case.num_kv_heads - 1)
    for group in sorted(group for group in capabilities.query_groups if group < case.query_group):
        yield case.replace(query_group=group)
    for width in sorted(width for width in capabilities.head_dims if width < case.head_dim):
        yield case.replace(head_dim=width, value_dim=capabilities.value_dim_for(width))
    plain: dict[str, object] = {"poison": "none", "order": "identity", "strides": "dense", "padding": "null"}
    plain |= {"sliced_table": False, "extra_columns": 0, "shared_blocks": 0, "repeat": None, "first_block": 1}
    plain |= {"window": None, "softcap": None, "alibi": False, "sinks": False}
    if case.kv_dtype != "int8":
        plain["kv_scales"] = None
    for name, value in plain.items():
        if getattr(case, name) != value:
            yield case.replace(**{name: value})
    if case.window is not None and case.window > 1:
        yield from (
            case.replace(window=window) for window in (1, case.block_size, case.window - 1) if window < case.window
        )


def _lengths(query_len: int, seq_len: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Shorter (query_len, seq_len), with as many queries as fit."""
    if query_len > 1:
        yield 1, seq_len
        yield query_len - 1, seq_len
        yield 1, max(1, seq_len - query_len + 1)  # the first query's own context
    shorter = {1, block_size, block_size + 1, seq_len // 2, seq_len - block_size, seq_len - 1}
    for length in sorted(length for length in shorter if 0 < length < seq_len):
        yield min(query_len, length), length
