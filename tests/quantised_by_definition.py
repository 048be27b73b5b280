"""e4m3 and int8 by their definitions, in numpy: every code is listed, and the nearest one taken."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _magnitudes() -> Array:
    """What the codes 0 to 126 stand for, in order: 4 bits of exponent with a bias of 7, 3 bits of mantissa."""
    values = []
    for code in range(127):  # 127 is NaN
        exponent, mantissa = code >> 3, code & 7
        values.append(2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)
    return np.array(values)


MAGNITUDES = _magnitudes()
_EVEN = np.arange(127) % 2 == 0


def nearest_e4m3(numbers: Array) -> Array:
    """The nearest number that e4m3 has; of two as near, the one whose code is even; NaN for what is not finite."""
    size = np.minimum(np.abs(numbers), MAGNITUDES[-1])[..., None]
    distance = np.abs(size - MAGNITUDES)
    nearest = distance == distance.min(axis=-1, keepdims=True)
    code = np.where(nearest, 1 + _EVEN, 0).argmax(axis=-1)
    return np.where(np.isfinite(numbers), np.copysign(MAGNITUDES[code], numbers), np.nan)


def read_back_fp8(numbers: Array, scale: Array) -> Array:
    """What is read for numbers [..., Hkv, D] that were stored as fp8, by one scale or by [Hkv]."""
    scale = np.asarray(scale, dtype=np.float64)[..., None]
    return nearest_e4m3(np.asarray(numbers, dtype=np.float32).astype(np.float64) / scale) * scale


def read_back_int8(numbers: Array) -> Array:
    """What is read for vectors [..., D] that were stored as int8: float32 arithmetic, one vector after the other."""
    single = np.asarray(numbers, dtype=np.float32)
    flat = single.reshape(-1, single.shape[-1])
    out = np.zeros(flat.shape)
    for row, vector in enumerate(flat):
        if not np.isfinite(vector).all():
            out[row] = np.nan
        elif vector.any():
            scale = np.abs(vector).max() / np.float32(127)
            out[row] = np.rint(vector / scale).astype(np.float64) * np.float64(scale)
    return out.reshape(single.shape)
