"""Quantising by its definition: of all codes that a dtype has, the nearest one.

    code = the code nearest to number / scale; of two equally near the one whose last bit is 0

There is no cast in this file. A dtype with 256 codes is a list of 256 numbers, written down from the meaning of its
bits, and the nearest code is found by looking. So it agrees with a kernel only if both are right.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

# Sign, exponent and mantissa bits, the exponent's bias, and whether the largest exponent is kept for inf and NaN.
FLOATS = {"float8_e4m3fn": (4, 3, 7, False), "float8_e5m2": (5, 2, 15, True)}
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
QUANTISED = tuple(LARGEST)
# A number over a scale that is no power of two may be off by so much of itself before it is rounded: a reciprocal, a
# product and a division that compilers make of a division each err by less than 2^-22 in float32.
QUOTIENT_ERROR = 2.0**-20


class Nearest(NamedTuple):
    """The codes that may be stored: any one between two neighbours in the list of numbers, which mostly are one."""

    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]


def numbers_of(dtype: str) -> tuple[Floats, Codes]:
    """All finite numbers of a dtype in ascending order, each once, and their codes.

    Example: int8 without -128, so that both signs reach equally far.
        >>> [len(numbers_of(dtype)[0]) for dtype in ("float8_e4m3fn", "float8_e5m2", "int8")]
        [253, 247, 255]
    """
    if dtype == "int8":
        whole = np.arange(-127, 128)
        return whole.astype(np.float64), whole.astype(np.int8).view(np.uint8)
    exponent_bits, mantissa_bits, bias, has_infinity = FLOATS[dtype]
    found: dict[float, int] = {}
    for code in range(256):
        magnitude = code & 127
        exponent, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
        if (has_infinity and exponent == (1 << exponent_bits) - 1) or (not has_infinity and magnitude == 127):
            continue  # infinities and NaN
        if exponent == 0:  # subnormal: no hidden 1
            size = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            size = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        found.setdefault(-size if code > 127 else size, code)  # -0.0 == 0.0, and the positive one comes first
    numbers = sorted(found)
    return np.array(numbers), np.array([found[number] for number in numbers], dtype=np.uint8)


def nearest(dtype: str, quotients: Floats, relative_error: float = 0.0, ties: str = "even") -> Nearest:
    """Which codes may be stored for numbers that have been divided by their scale.

    Args:
        dtype: a name of QUANTISED.
        quotients: [...] number / scale, finite.
        relative_error: how far the kernel's own quotient may be off; 0 for a scale that is a power of two.
        ties: "even", or "any" of two codes that are equally near.

    Returns:
        Indices [...] into `numbers_of(dtype)`.

    Example: 3.2 lies between 3.0 and 3.25; 900 is clamped.
        >>> numbers_of("float8_e4m3fn")[0][nearest("float8_e4m3fn", np.array([3.2, 900.0])).low].tolist()
        [3.25, 448.0]
    """
    spread = np.abs(quotients) * relative_error
    return Nearest(_nearest(dtype, quotients - spread, ties, down=True), _nearest(dtype, quotients + spread, ties))


def _nearest(dtype: str, quotients: Floats, ties: str, down: bool = False) -> npt.NDArray[np.int64]:
    numbers, codes = numbers_of(dtype)
    above = np.clip(np.searchsorted(numbers, quotients), 1, len(numbers) - 1)
    below = above - 1
    to_below, to_above = quotients - numbers[below], numbers[above] - quotients
    prefers_below = np.full(above.shape, down) if ties == "any" else (codes[below] & 1) == 0
    return np.where((to_below < to_above) | ((to_below == to_above) & prefers_below), below, above)


def is_nearest(
    dtype: str, codes: Codes, quotients: Floats, relative_error: float = 0.0, ties: str = "even"
) -> npt.NDArray[np.bool_]:
    """Whether what is stored may be stored for these numbers. Either zero stands for 0.

    Args:
        codes: [...] bits of what is stored.
        dtype, quotients, relative_error, ties: as for `nearest`.

    Example: -128 is no less than -127 for a number beyond both, and wrong for -127 itself.
        >>> is_nearest("int8", np.array([128, 128], dtype=np.uint8), np.array([-300.0, -127.0])).tolist()
        [True, False]
    """
    index_of = np.full(256, -1)
    known = numbers_of(dtype)[1]
    index_of[known] = np.arange(len(known))
    if dtype != "int8":
        index_of[128] = index_of[0]
    stored, allowed = index_of[codes], nearest(dtype, quotients, relative_error, ties)
    right = (allowed.low <= stored) & (stored <= allowed.high)
    if dtype == "int8":
        right |= (codes == 128) & (quotients <= -127.5)
    return right


def decoded(dtype: str, codes: Codes) -> Floats:
    """Numbers of codes; NaN for what is no number.

    Example:
        >>> decoded("float8_e4m3fn", np.array([0x38, 0x7F], dtype=np.uint8)).tolist()
        [1.0, nan]
    """
    table = np.full(256, np.nan)
    numbers, known = numbers_of(dtype)
    table[known] = numbers
    table[128] = -128.0 if dtype == "int8" else 0.0
    return np.asarray(table[codes])
