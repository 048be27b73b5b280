"""K and V in one byte a number: codes, and the scales that turn them back into numbers.

    write:  code = number / scale, rounded to the nearest code, ties to even          read:  number = code * scale

**fp8** (e4m3: a sign, four bits of exponent, three of mantissa; the largest is 448) is floating point. A number is
rounded relative to its own size, whatever the scale, which only has to put the numbers into range. So one scale for a
whole layer, or one for each KV head, is enough; both are fixed at start (paged/model/calibration.py).

**int8** (-127 to 127) is fixed point: its error is half a scale, for the smallest number as for the largest. So each
vector, that is each token and head, brings a scale of its own, its largest number over 127, kept beside the codes.

How far a number can be from what is read for it:

    fp8    max(2^-4 * |number|, 2^-10 * scale)    up to 448 * scale, and clamped to that beyond
    int8   (1/2 + 2^-13) * scale

The fp8 scales are powers of two, so dividing and multiplying by them is exact, and rounding to three bits of mantissa
is all the error there is: half a unit in the last place, which below 2^-6 stays 2^-9. For int8, dividing by 127 and by
the scale and multiplying by the scale each err by at most 2^-22 of a number of up to 127 scales (two units in the last
place, which is what compiled code on a GPU may take for a division): together less than 2^-13 of a scale beside the
half.

What is not a finite number comes back as NaN, never as a number that could be believed.
"""

import torch
from torch import Tensor

FP8_MAX = 448.0
INT8_MAX = 127.0
# How much larger than anything seen at start a number may be before it is clamped. It costs nothing: e4m3 keeps its
# relative precision down to 2^-6 of the scale, so with this, too, down to a 28,000th of the largest number seen.
FP8_HEADROOM = 2.0


def stored_dtype(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a pool, by the setting's name.

    It says all that the pool has to know: int8 comes with a scale for each token and head, float8 with scales that
    are kept apart from it, and any other dtype with none.

    Example:
        >>> stored_dtype("fp8_per_head", torch.bfloat16), stored_dtype("auto", torch.bfloat16)
        (torch.float8_e4m3fn, torch.bfloat16)
    """
    if kv_cache_dtype == "auto":
        return model_dtype
    return torch.int8 if kv_cache_dtype.startswith("int8") else torch.float8_e4m3fn


def fp8_scale(largest: Tensor) -> Tensor:
    """The scale for numbers up to `largest`: a power of two with which twice to four times as much can be stored.

    Args:
        largest: any shape, none negative; where it is 0 the scale is 1.

    Returns:
        float32, of the same shape.

    Example: 3 needs a scale of 3 / 448, and with the headroom twice that, 1 / 74.7.
        >>> fp8_scale(torch.tensor(3.0)) == 1 / 64
        tensor(True)
    """
    _, exponent = torch.frexp(largest.float() * (FP8_HEADROOM / FP8_MAX))  # at least half of 2**exponent, and below it
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def to_fp8(numbers: Tensor, scale: Tensor) -> Tensor:
    """Numbers as e4m3 codes.

    Args:
        numbers: [..., Hkv, D].
        scale: one number, or [Hkv], float32.

    Returns:
        [..., Hkv, D] float8_e4m3fn.

    Example: 3.2 lies between 3.0 and 3.25; 900 is clamped.
        >>> to_fp8(torch.tensor([[3.2, 900.0, -torch.inf]]), torch.tensor(1.0)).float()
        tensor([[  3.2500, 448.0000,      nan]])
    """
    # Clamped here, since what the cast does with larger numbers depends on torch's version: NaN in 2.11, 448 in 2.13.
    codes = (numbers.float() / scale[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return torch.where(numbers.isfinite(), codes, torch.nan).to(torch.float8_e4m3fn)


def to_int8(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors as int8 codes, with a scale for each.

    Args:
        numbers: [..., D].

    Returns:
        codes [..., D] int8, scales [...] float32: each vector's largest number over 127.

    Example:
        >>> to_int8(torch.tensor([[0.5, -2.54], [0.0, 0.0]]))
        (tensor([[  25, -127],
                [   0,    0]], dtype=torch.int8), tensor([0.0200, 0.0000]))
    """
    numbers = numbers.float()
    scales = numbers.abs().amax(dim=-1) / INT8_MAX
    # What NaN becomes as an integer is undefined, so quotients that are no number become code 0. In a vector of zeros
    # that is right; in one with NaN or inf so is the scale, and 0 * NaN and 0 * inf are NaN.
    quotients = (numbers / scales[..., None]).nan_to_num(nan=0.0)
    return quotients.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales
