"""Sampling noise as a pure function of (seed, position, token): no generator, no state, no order of calls.

A generator with a state gives a request other noise as soon as other requests share its batch. Here the noise of
token `v` at position `p` of a sequence with seed `s` is a hash of the three, so a seeded request gets the same tokens
alone, in any batch, after a preemption, and inside a CUDA graph.

The hash is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) used as a
counter: element `i` of the stream of a key is `mix(key + (i + 1) * GAMMA)`. A sequence's key is the first element of
the stream that its seed starts, moved on by its position. torch's int64 arithmetic wraps, which is what modulo 2^64
means, and only the right shift needs care, since torch keeps the sign.
"""

import torch
from torch import Tensor


def _wrapped(value: int) -> int:
    """An unsigned 64-bit constant as the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


GAMMA = _wrapped(0x9E3779B97F4A7C15)
MIX_1 = _wrapped(0xBF58476D1CE4E5B9)
MIX_2 = _wrapped(0x94D049BB133111EB)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x >> bits` of the unsigned number with the bits of `x`."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """SplitMix64's mixing of each element: 64 bits in, 64 bits out, every bit depends on every other.

    Args:
        x: int64, any shape; read as unsigned.

    Returns:
        int64 of the same shape. The stream of seed 0 begins with `splitmix64(GAMMA)` = 0xE220A8397B1DCDAF.
    """
    x = (x ^ _shifted(x, 30)) * MIX_1
    x = (x ^ _shifted(x, 27)) * MIX_2
    return x ^ _shifted(x, 31)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token of the vocabulary.

    Adding it to the logits and taking the largest samples from softmax(logits) (the Gumbel-max trick; Gumbel 1954).

    Args:
        seeds: [S] int64, one for each sequence.
        positions: [S] int64, the position of the token that is about to be sampled.
        vocab_size: V.

    Returns:
        [S, V] float32, between -2.9 and 16.7.
    """
    keys = splitmix64(splitmix64(seeds + GAMMA) + (positions + 1) * GAMMA)  # [S]
    counters = torch.arange(1, vocab_size + 1, device=seeds.device) * GAMMA  # [V]
    bits = _shifted(splitmix64(keys[:, None] + counters), 41)  # [S, V], 23 bits
    # With 23 bits, (bits + 1/2) / 2^23 is exact in float32 and never 0 or 1, where the logarithms would be infinite.
    uniform = (bits.float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
