"""The numbers of golden files from counters, with Python's integers alone: what a port to another language has to do.

In a language with 64-bit unsigned integers that wrap around, `& WORD` is not needed.
"""

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
QUERY, KEY, VALUE, K_SCALE, V_SCALE, PLACE, TARGET, CODE_KEY, CODE_VALUE = range(9)
FIELD_BITS = {"float64": 14, "float32": 14, "float16": 9, "bfloat16": 6, "float8_e4m3fn": 3, "float8_e5m2": 2}
CANCELLING_BITS = (0, 3, 6, 20)


def mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def random_bits(seed: int, tensor: int, token: int, head: int, dim: int) -> int:
    """64 bits for one number; head is below 2^10, dim below 2^14, token below 2^40."""
    stream = mix((mix((seed + GAMMA) & WORD) + tensor * GAMMA) & WORD)
    counter = (token * 2**10 + head) * 2**14 + dim
    return mix((stream + (counter + 1) * GAMMA) & WORD)


def random_value(bits: int, dtype: str) -> float:
    """A nearly normal number that the dtype holds exactly."""
    f = FIELD_BITS[dtype]
    total = sum((bits >> 16 * i) % 2**f for i in range(4))
    return (total - 2 * (2**f - 1)) / 2 ** (f - 1)


def cancelling_sign(seed: int, token: int, head: int, dim: int, num_dims: int) -> int:
    """What a uniform probe stores as a value: +1 or -1, 1 in the last dim."""
    if dim == num_dims - 1:
        return 1
    b = CANCELLING_BITS[dim % 4]
    sign = -1 if random_bits(seed, CODE_VALUE, token & ~(1 << b), head, dim) >> 63 else 1
    return -sign if token >> b & 1 else sign


def token_number(sequence: int, position: int) -> int:
    """The number of a token; what lies in a block that no table names counts as sequence 2^14."""
    return (sequence + 1) * 2**24 + position
