"""The numbers that a writer is given: no two alike where the dtype has room, and near all that quantising gets wrong.

Unscaled numbers are "numbered", so that an element in a wrong place says where it comes from, or "special": zeros of
both signs, infinities, NaN and subnormals, which a copy must not touch. What is quantised is made backwards, as a
quotient times a scale: a code exactly, midway between two, anything between them, or beyond the last one.
"""

import numpy as np
import numpy.typing as npt
import torch

from paged.oracle.values import KEY, VALUE, random_bits, random_values
from paged.oracle.writers.case import WriteCase
from paged.oracle.writers.codes import LARGEST, Floats, numbers_of

# The smallest normal number's bits, and how many normal numbers of one sign there are.
NORMAL = {"float16": (0x0400, 0x7800), "bfloat16": (0x0080, 0x7F00)}
SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 2.0**-24, -(2.0**-133), 1.0)


def numbers_for(case: WriteCase, rows: int) -> tuple[Floats, Floats]:
    """Keys [rows, Hkv, D] and values [rows, Hkv, Dv]; quantised ones are quotients times the scale that divides them.

    Example: the key of the first token and head, and its value.
        >>> keys, values = numbers_for(WriteCase(sequences=((0, 2),), num_kv_heads=1, head_dim=3, value_dim=2), 2)
        >>> keys[0].tolist(), values[0].tolist()
        ([[1.0, -2.0, 3.0]], [[7.0, -8.0]])
    """
    widths = (case.head_dim, case.value_dim)
    if not case.quantised:
        if case.recipe == "special":
            return _pick(case, KEY, rows, widths[0], SPECIAL), _pick(case, VALUE, rows, widths[1], SPECIAL)
        numbered = _numbered(case, rows)
        return numbered or (_random(case, KEY, rows, widths[0]), _random(case, VALUE, rows, widths[1]))
    scales = scales_for(case)
    both = []
    for tensor, width, scale in zip((KEY, VALUE), widths, scales, strict=True):
        numbers = _quotients(case, tensor, rows, width)
        if case.scales == "token":
            numbers = _with_a_largest(case, numbers)
        both.append(numbers * scale[:, None])
    return both[0], both[1]


def _numbered(case: WriteCase, rows: int) -> tuple[Floats, Floats] | None:
    """No two alike, so that an element in a wrong place can be recognised; None if the dtype has too few numbers."""
    shapes = [(rows, case.num_kv_heads, width) for width in (case.head_dim, case.value_dim)]
    counts = [int(np.prod(shape)) for shape in shapes]
    index = np.arange(sum(counts))
    if case.dtype in NORMAL:
        first, room = NORMAL[case.dtype]
        if len(index) > 2 * room:
            return None
        # Small and large in turn, so that neighbours are far apart; then the same with the other sign.
        stride = 257
        pattern = first + index * stride % room + (index // room) * 0x8000
        tensor = torch.from_numpy(pattern.astype(np.uint16).view(np.int16)).view(getattr(torch, case.dtype))
        numbers = tensor.double().numpy()
    else:
        numbers = (index + 1.0) * np.where(index % 2, -1, 1)
    return numbers[: counts[0]].reshape(shapes[0]), numbers[counts[0] :].reshape(shapes[1])


def _random(case: WriteCase, tensor: int, rows: int, width: int) -> Floats:
    return random_values(case.seed, tensor, np.arange(rows), case.num_kv_heads, width, case.dtype)


def _pick(case: WriteCase, tensor: int, rows: int, width: int, choices: npt.ArrayLike) -> Floats:
    """One of the choices for each element, by its random bits."""
    chosen = np.asarray(choices, dtype=np.float64)
    drawn = random_bits(case.seed, tensor, np.arange(rows), case.num_kv_heads, width) >> np.uint64(20)
    return np.asarray(chosen[(drawn % np.uint64(len(chosen))).astype(np.int64)])


def _quotients(case: WriteCase, tensor: int, rows: int, width: int) -> Floats:
    """What number / scale is to be."""
    numbers, _ = numbers_of(case.kv_dtype)
    # Few enough bits for any dtype of a key, and far enough from the end of float16.
    usable = numbers[(np.abs(numbers) < 2.0**12) & ((np.abs(numbers) >= 2.0**-6) | (numbers == 0))]
    if case.recipe == "ties":
        return _pick(case, tensor, rows, width, (usable[:-1] + usable[1:]) / 2)
    if case.recipe == "beside":  # rounding to something between first makes a tie of it, and then goes the wrong way
        middles = (usable[:-1] + usable[1:]) / 2
        beside = np.concatenate([middles * (1 + 2.0**-18), middles * (1 - 2.0**-18)])
        return _pick(case, tensor, rows, width, beside)
    if case.recipe == "between":
        return _random(case, tensor, rows, width) * (40.0 if case.kv_dtype == "int8" else 1.0)
    if case.recipe == "beyond":
        largest = min(LARGEST[case.kv_dtype], 4096.0)
        return _pick(case, tensor, rows, width, largest * np.array([-8.0, -1.25, -0.5, 0.25, 1.0, 1.5, 4.0]))
    return _pick(case, tensor, rows, width, usable)


def _with_a_largest(case: WriteCase, numbers: Floats) -> Floats:
    """Vectors whose largest number is 127 times a power of two that differs by token and head.

    So the scale that follows from it is a power of two and every code is known bit for bit. "between" has vectors of
    all sizes instead, and the first one is all zeros.
    """
    if case.recipe == "between":
        numbers[:1, :1] = 0.0
        return numbers
    token, head = np.meshgrid(np.arange(len(numbers)), np.arange(case.num_kv_heads), indexing="ij")
    numbers = np.clip(numbers, -126.5, 126.5)
    numbers[token, head, (token + head) % numbers.shape[2]] = np.where((token + head) % 2, -127.0, 127.0)
    return np.asarray(numbers * (2.0 ** ((token * 5 + head * 3) % 7 - 3))[..., None])


def scales_for(case: WriteCase) -> tuple[Floats, Floats]:
    """k_scale and v_scale of each head [Hkv], as float32 holds them: neither is 1, nor the other's."""
    heads = np.arange(case.num_kv_heads)
    if case.scales == "head":
        keys, values = 2.0 ** (heads % 4 - 3), 2.0 ** (1 - heads % 3)
    elif case.scales == "tensor":
        keys, values = np.full(len(heads), 0.25), np.full(len(heads), 2.0)
    else:
        return np.ones(len(heads)), np.ones(len(heads))
    if case.uneven_scales:
        keys, values = keys * 1.1, values * 0.7
    return keys.astype(np.float32).astype(np.float64), values.astype(np.float32).astype(np.float64)
