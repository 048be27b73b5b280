"""Numbers for test cases, from counters: the same in any language, and the same wherever a block lies.

Every number is a function of (seed, tensor, token, head, dim) and of nothing else. So a block that moves keeps its
values, a case that is made smaller keeps the values of what is left, and a program in C++ or Rust can make the same
inputs without reading a file. All arithmetic is on unsigned 64-bit integers, modulo 2^64, and no step rounds:

    G       = 0x9E3779B97F4A7C15
    mix(x)  : x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;  x ^= x >> 27;  x *= 0x94D049BB133111EB;  x ^= x >> 31
    stream  = mix(mix(seed + G) + tensor * G)
    counter = (token * 2^10 + head) * 2^14 + dim
    bits    = mix(stream + (counter + 1) * G)

`mix` and `G` are SplitMix64 (Steele, Lea and Flood 2014), whose n-th output is mix(seed + n * G). A number is made of
four fields of f bits, where f is as large as the significand of the dtype allows:

    sum   = field_0 + field_1 + field_2 + field_3        field_i = (bits >> 16 i) mod 2^f
    value = (sum - 2 (2^f - 1)) / 2^(f - 1)              nearly normal, mean 0, standard deviation 1.155

The value has at most f + 2 significant bits, all of which the dtype holds, so no language has to round. (A sum of
four is near enough to a normal distribution: what tests need is that neighbours have nothing to do with one another.)
"""

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
WORD = 1 << 64

# What a number is for. Tensors of a case have numbers of their own, or keys would equal values.
QUERY, KEY, VALUE, K_SCALE, V_SCALE, PLACE, TARGET, CODE_KEY, CODE_VALUE = range(9)

# Where the fields of a counter begin: heads are below 2^10, dims below 2^14, tokens below 2^40.
HEAD_LIMIT, DIM_LIMIT, TOKEN_LIMIT = 1 << 10, 1 << 14, 1 << 40

# Which bit of a token's number flips the sign of its code, by dim modulo 4.
CANCELLING_BITS = (0, 3, 6, 20)

# f, for each dtype a value may be stored in: 2^(f + 1) - 2 is the largest sum and needs f + 1 bits.
FIELD_BITS = {
    "float64": 14,
    "float32": 14,
    "float16": 9,
    "bfloat16": 6,
    "float8_e4m3fn": 3,
    "float8_e5m2": 2,
    "int8": 6,
}


def mix(x: Bits) -> Bits:
    """SplitMix64's finaliser: 64 bits in, 64 bits out, every bit depends on every other.

    Example: the first output of SplitMix64 for seed 0.
        >>> hex(mix(np.array([GAMMA], dtype=np.uint64))[0])
        '0xe220a8397b1dcdaf'
    """
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, tensor: int, tokens: Integers, num_heads: int, num_dims: int) -> Bits:
    """64 bits for every token, head and dim.

    Args:
        seed: any integer; read modulo 2^64.
        tensor: what the numbers are for, QUERY and so on.
        tokens: [...] token numbers, at least 0 and below 2^40.
        num_heads: H, below 2^10.
        num_dims: D, below 2^14.

    Raises:
        ValueError: a token, head or dim too large, whose counter would meet another's.

    Returns:
        [..., H, D] uint64.

    Example:
        >>> hex(random_bits(0, VALUE, np.array([5]), 2, 3)[0, 1, 2])
        '0xd83a90c7a62a6a33'
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    if num_heads > HEAD_LIMIT or num_dims > DIM_LIMIT:
        raise ValueError(f"at most {HEAD_LIMIT} heads and {DIM_LIMIT} dims have counters, got {num_heads}, {num_dims}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < TOKEN_LIMIT:
        raise ValueError(f"tokens must be 0 to {TOKEN_LIMIT - 1}, got {tokens.min()} to {tokens.max()}")
    first = mix(np.array([(seed + GAMMA) % WORD], dtype=np.uint64))
    stream = mix(first + np.uint64(tensor * GAMMA % WORD))
    token = tokens.astype(np.uint64)[..., None, None] * np.uint64(HEAD_LIMIT)
    head = np.arange(num_heads, dtype=np.uint64)[:, None]
    dim = np.arange(num_dims, dtype=np.uint64)
    counter = (token + head) * np.uint64(DIM_LIMIT) + dim
    return mix(stream + (counter + np.uint64(1)) * np.uint64(GAMMA))


def random_integers(seed: int, tensor: int, tokens: Integers, num_heads: int, num_dims: int, dtype: str) -> Integers:
    """The sums of four fields, around 0: a value times 2^(f - 1).

    Args:
        seed, tensor, tokens, num_heads, num_dims: as for `random_bits`.
        dtype: which significand they have to fit, a name of FIELD_BITS.

    Returns:
        [..., H, D] int64.

    Example: what an int8 cache stores.
        >>> random_integers(0, VALUE, np.array([5]), 1, 4, "int8").tolist()
        [[[-49, 12, -12, -32]]]
    """
    field = FIELD_BITS[dtype]
    bits = random_bits(seed, tensor, tokens, num_heads, num_dims)
    mask = np.uint64((1 << field) - 1)
    total = sum(((bits >> np.uint64(16 * i)) & mask).astype(np.int64) for i in range(4))
    return np.asarray(total - 2 * ((1 << field) - 1), dtype=np.int64)


def random_values(
    seed: int, tensor: int, tokens: Integers, num_heads: int, num_dims: int, dtype: str
) -> npt.NDArray[np.float64]:
    """Nearly normal numbers that `dtype` holds exactly; for int8 they are codes times 2^-5.

    Returns:
        [..., H, D] float64.

    Example:
        >>> random_values(0, VALUE, np.array([5]), 1, 4, "bfloat16").tolist()
        [[[-1.53125, 0.375, -0.375, -1.0]]]
    """
    integers = random_integers(seed, tensor, tokens, num_heads, num_dims, dtype)
    return integers / float(1 << (FIELD_BITS[dtype] - 1))


def random_signs(seed: int, tensor: int, tokens: Integers, num_heads: int, num_dims: int) -> Integers:
    """A code of +1 and -1 for every token and head: bit 63 of its bits, 1 for -1.

    Returns:
        [..., H, D] int64.
    """
    bits = random_bits(seed, tensor, tokens, num_heads, num_dims)
    return 1 - 2 * (bits >> np.uint64(63)).astype(np.int64)


def cancelling_signs(seed: int, tensor: int, tokens: Integers, num_heads: int, num_dims: int) -> Integers:
    """Codes of +1 and -1 whose sums stay small: tokens cancel those 1, 8 or 64 further on, by dim.

        code(token, d) = sign(token without bit b, d) * (-1)^(bit b of token)        b = 0, 3, 6, 20 for d mod 4

    A run of tokens sums to at most 2^b, and to 2^(b / 2) as a rule, so their mean is nearly 0, where floating point is
    fine: one token too many among thousands shows, in bfloat16. Larger b are there so that whole blocks do not cancel:
    else one block in another's place would not show. The last dim is 1 for every token: its mean is the sum of all
    weights, and a kernel that loses the last dim cannot hide behind a sum that is 0.

    Returns:
        [..., H, D] int64.

    Example: the sums of a hundred tokens; every fourth dim is hardly above 1.
        >>> sums = np.abs(cancelling_signs(0, CODE_VALUE, np.arange(101), 1, 65).sum(axis=0))[0]
        >>> int(sums[:64:4].max()), int(sums[1:64:4].max()) <= 8, int(sums[64])
        (1, True, 101)
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    code = np.ones((*tokens.shape, num_heads, num_dims), dtype=np.int64)
    for first, bit in enumerate(CANCELLING_BITS):
        without = tokens & ~(1 << bit)
        signs = random_signs(seed, tensor, without, num_heads, num_dims)
        flip = 1 - 2 * ((tokens >> bit) & 1)
        dims = slice(first, num_dims - 1, len(CANCELLING_BITS))
        code[..., dims] = signs[..., dims] * flip[..., None, None]
    return code
