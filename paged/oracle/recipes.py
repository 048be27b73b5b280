"""Recipes: what the numbers of a case are.

`random` numbers look like a model's and try everything at once, but among thousands of tokens one more or less hides
in the rounding. So other recipes choose numbers whose right answer is known exactly, however long the sequence is:

    uniform    queries are 0, so all weights are equal; values are codes of +1 and -1: the output counts tokens
    needle     keys are codes and a query is one key's code, far ahead of all others: the output is that token's value
    pair       a query is the sum of two keys' codes, which tie: the output is the mean of two values
    staircase  scores are whole multiples of -ln 2: weights are powers of two
    codes      a needle again, among values that are all the numbers a cache of 8 bits can hold

And two drive scores to where arithmetic is hard: `large` (a range of hundreds in a row: exp overflows without the
maximum), `negative` (all scores below -50,000: sentinels that should be -inf win).

Stored numbers are what a cache holds; times the scale (where a case has scales) they are what is meant. Exact recipes
have scales that are powers of two, so that what is meant is still +1 and -1.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from paged.oracle.case import EXACT, Case
from paged.oracle.values import (
    CODE_KEY,
    CODE_VALUE,
    K_SCALE,
    KEY,
    QUERY,
    TARGET,
    V_SCALE,
    VALUE,
    Integers,
    cancelling_signs,
    random_bits,
    random_integers,
    random_signs,
    random_values,
)
from paged.oracle.writers.codes import numbers_of

Floats = npt.NDArray[np.float64]

# Sequences have tokens of their own, 2^24 each: sequence i, position p is token (i + 1) * 2^24 + p. Blocks that belong
# to nobody count as positions of one more sequence.
STREAM = 1 << 24
NOBODY = 1 << 14

LN_2 = math.log(2.0)
# Recipes in which a query is a key's code.
NEEDLES = ("needle", "pair", "codes")


def token_of(sequence: Any, position: Any) -> Any:
    """The number of a token, which its values follow from; both may be arrays."""
    return (sequence + 1) * STREAM + position


def score_scale(case: Case) -> float:
    """The scale of the scores: never 1 / sqrt(D), which a kernel may have taken for granted.

    Example: scores of random numbers of 64 dims then vary by 1.
        >>> score_scale(Case(sequences=((1, 1),))), score_scale(Case(sequences=((1, 1),), recipe="needle"))
        (0.09375, 0.125)
    """
    if case.scale is not None:
        return case.scale
    if case.recipe == "staircase":
        return LN_2
    if case.recipe in EXACT:
        return 0.125
    if case.recipe == "negative":
        return 2.0**17 / case.head_dim
    plain = round(768 / math.sqrt(case.head_dim)) / 1024
    return plain * 64 if case.recipe == "large" else plain


def peak(case: Case) -> float:
    """How far a needle's score is ahead of one that has nothing to do with it."""
    return score_scale(case) * _amplitude(case) * case.head_dim


def stored_keys(case: Case, tokens: Integers) -> Floats:
    """[..., Hkv, D] what a key cache holds for some tokens."""
    heads, dims = case.num_kv_heads, case.head_dim
    if case.recipe in NEEDLES:
        return _in_units(case, random_signs(case.seed, CODE_KEY, tokens, heads, dims), K_SCALE, tokens)
    if case.recipe == "staircase":
        steps = np.zeros((*tokens.shape, heads, dims), dtype=np.int64)
        steps[..., 0] = -(random_bits(case.seed, CODE_KEY, tokens, heads, 1)[..., 0] >> np.uint64(61)).astype(np.int64)
        return _in_units(case, steps, K_SCALE, tokens)
    numbers = _random(case, KEY, tokens)
    return -np.abs(numbers) if case.recipe == "negative" else numbers


def stored_values(case: Case, tokens: Integers) -> Floats:
    """[..., Hkv, Dv] what a value cache holds for some tokens."""
    heads, dims = case.num_kv_heads, case.value_dim
    if case.recipe == "uniform":
        return _in_units(case, cancelling_signs(case.seed, CODE_VALUE, tokens, heads, dims), V_SCALE, tokens)
    if case.recipe == "codes":
        codes = _all_codes(case.kv_dtype)
        drawn = random_bits(case.seed, CODE_VALUE, tokens, heads, dims) % np.uint64(len(codes))
        return np.asarray(codes[drawn.astype(np.int64)], dtype=np.float64)
    if case.recipe in EXACT:
        return _in_units(case, random_signs(case.seed, CODE_VALUE, tokens, heads, dims), V_SCALE, tokens)
    return _random(case, VALUE, tokens)


def kv_scale(case: Case, which: int, tokens: Integers) -> Floats | None:
    """The scales that stored numbers are multiplied with.

    Args:
        case: with kv_scales "tensor", "head" or "token", or None.
        which: K_SCALE or V_SCALE; the two never agree.
        tokens: [...], of which scales are wanted if each has its own.

    Returns:
        A single number [], [Hkv], or [..., Hkv]; None where the case has no scales.

    Example: two KV heads.
        >>> case = Case(sequences=((1, 1),), num_kv_heads=2, kv_scales="head")
        >>> kv_scale(case, K_SCALE, np.array([0])).tolist(), kv_scale(case, V_SCALE, np.array([0])).tolist()
        ([0.375, 0.5], [0.875, 1.125])
    """
    exact, is_value = case.recipe in EXACT, which == V_SCALE
    if case.kv_scales is None:
        return None
    heads = np.arange(case.num_kv_heads)
    if case.kv_scales == "tensor":
        scale = np.array((0.25 if is_value else 0.5) if exact else (0.375 if is_value else 0.75))
    elif case.kv_scales == "head":
        scale = 0.5 ** ((heads + is_value) % 3) if exact else (3 + 4 * is_value + heads * (1 + is_value)) / 8
    else:
        bits = random_bits(case.seed, which, tokens, case.num_kv_heads, 1)[..., 0]
        scale = 0.5 ** (bits % np.uint64(3)) if exact else (4 + (bits % np.uint64(8))) / 8
    if case.kv_dtype == "int8":
        scale = scale / (4 if exact else 32)
    return np.asarray(scale, dtype=np.float64)


def queries(case: Case, sequence: int, first_position: int, window: int | None) -> Floats:
    """[Q, Hq, D] of one sequence's query tokens.

    Args:
        sequence: which.
        first_position: of its first query token; numbers follow positions, so a chunk's are those of decodes.
        window: how many keys a query sees, itself included, or None: needles lie where they are seen.
    """
    query_len, _ = case.sequences[sequence]
    positions = first_position + np.arange(query_len)
    tokens = token_of(sequence, np.maximum(positions, 0))
    shape = (query_len, case.num_heads, case.head_dim)
    if case.recipe == "uniform":
        return np.zeros(shape)
    if case.recipe == "staircase":
        numbers = random_signs(case.seed, QUERY, tokens, case.num_heads, case.head_dim).astype(np.float64)
        numbers[..., 0] = 1.0
        return numbers
    if case.recipe in NEEDLES:
        one = _codes_of_targets(case, sequence, positions, window, draw=0)
        other = _codes_of_targets(case, sequence, positions, window, draw=1) if case.recipe == "pair" else 0
        return np.asarray(_amplitude(case) * (one + other), dtype=np.float64)
    numbers = random_values(case.seed, QUERY, tokens, case.num_heads, case.head_dim, case.dtype)
    return np.abs(numbers) if case.recipe == "negative" else numbers


def targets(case: Case, sequence: int, positions: Integers, window: int | None, draw: int) -> Integers:
    """[Q, Hq] positions of the needles: the first and the last key seen, the first of a block, or any.

    Args:
        case, sequence: whose.
        positions: [Q] of the query tokens.
        window: as for `queries`.
        draw: 0, or 1 for the second of a pair.
    """
    last = np.minimum(positions, case.sequences[sequence][1] - 1)[:, None].clip(min=0)
    first = np.zeros_like(last) if window is None else (positions[:, None] - window + 1).clip(min=0)
    first = np.minimum(first, last)
    bits = random_bits(case.seed, TARGET, token_of(sequence, positions.clip(min=0)), case.num_heads, 2)[..., draw]
    anywhere = first + (bits >> np.uint64(8)).astype(np.int64) % (last - first + 1)
    block_start = (anywhere // case.block_size * case.block_size).clip(min=first)
    choices = np.stack([*np.broadcast_arrays(first, last, block_start, anywhere)])
    return np.asarray(np.take_along_axis(choices, (bits % np.uint64(4)).astype(np.int64)[None], axis=0)[0])


def slopes(case: Case) -> Floats:
    """[Hq] of ALiBi: all different, so that a KV head's is not a query head's; among random numbers all keys count."""
    steps = np.arange(1, case.num_heads + 1)
    if case.recipe == "staircase":
        return np.asarray(steps * LN_2, dtype=np.float64)
    longest = max(n for _, n in case.sequences)
    reach = longest // 64 if case.recipe in NEEDLES else longest // 8
    return np.asarray(steps / (case.num_heads * max(4, reach)), dtype=np.float64)


def sinks(case: Case) -> Floats:
    """[Hq] logits about as large as all keys together, so that a sink takes between a fifth and four fifths."""
    longest = max(1, max(min(n, case.window or n) for _, n in case.sequences))
    heads = np.arange(case.num_heads)
    whole = peak(case) if case.recipe in NEEDLES else LN_2 * round(math.log2(longest))
    return np.asarray(whole + LN_2 * (heads % 3 - 1), dtype=np.float64)


def _all_codes(dtype: str) -> Floats:
    """Every finite number that a cache of few bits can hold."""
    if dtype == "int8":
        return np.arange(-128, 128, dtype=np.float64)
    return numbers_of(dtype)[0]


def _amplitude(case: Case) -> float:
    """Of a needle's query, a power of two: two unrelated codes are then at least a hundred apart, as a rule."""
    return 2.0 ** math.ceil(math.log2(200 / (score_scale(case) * case.head_dim)))


def _codes_of_targets(case: Case, sequence: int, positions: Integers, window: int | None, draw: int) -> Integers:
    at = targets(case, sequence, positions, window, draw)  # [Q, Hq]
    # A token's number is its owner's: shared and repeated blocks hold the first one's tokens.
    tokens = owners(case, sequence, at)
    codes = random_signs(case.seed, CODE_KEY, tokens, case.num_kv_heads, case.head_dim)  # [Q, Hq, Hkv, D]
    heads = np.arange(case.num_heads)
    return codes[:, heads, heads // case.query_group]


def owners(case: Case, sequence: int, positions: Integers) -> Integers:
    """Numbers of the tokens that lie at some positions of a sequence: not its own where blocks are shared or repeat.

    Example: a ring of two blocks of four: position 9 holds what position 1 does.
        >>> owners(Case(sequences=((1, 10),), block_size=4, repeat=2), 0, np.array([1, 9])) - STREAM
        array([1, 1])
    """
    blocks, offsets = positions // case.block_size, positions % case.block_size
    if case.repeat is not None:
        blocks = blocks % case.repeat
    shared = min(case.shared_blocks, case.sequences[0][1] // case.block_size)
    shared = min(shared, case.sequences[sequence][1] // case.block_size)
    whose = np.where(blocks < shared, 0, sequence)
    return np.asarray(token_of(whose, blocks * case.block_size + offsets), dtype=np.int64)


def _random(case: Case, tensor: int, tokens: Integers) -> Floats:
    heads, dims = case.num_kv_heads, case.head_dim if tensor == KEY else case.value_dim
    if case.kv_dtype == "int8":
        return random_integers(case.seed, tensor, tokens, heads, dims, "int8").astype(np.float64)
    return random_values(case.seed, tensor, tokens, heads, dims, case.kv_dtype)


def _in_units(case: Case, meant: Integers, which: int, tokens: Integers) -> Floats:
    """What has to be stored so that `meant` is what it stands for."""
    scale = kv_scale(case, which, tokens)
    return meant.astype(np.float64) if scale is None else meant / scale[..., None]
