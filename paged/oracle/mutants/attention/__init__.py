"""Attention kernels that are wrong on purpose, and some that are right in another way, by what goes wrong.

honest      the kernel that all others deviate from in one step
tails       A: numbers in slots that must not count
addresses   B, E: from a block's number to a place in memory
lengths     C: how many keys there are
tables      D: the way through the block table
masks       F, G: who sees whom
scores      H, I, J: softcap, sinks, ALiBi
splits      K: parts of a context, their merge, the log-sum-exp
precision   L: range and rounding
heads       M, N: heads that share, widths, scale
scales      O: scales of stored numbers
calls       R: other calls, chance, constants
thresholds  of all classes: right for small calls
together    of all classes: right but where features meet
variants    right all the same
"""

from paged.oracle.mutants.attention import (
    addresses,
    calls,
    heads,
    lengths,
    masks,
    precision,
    scales,
    scores,
    splits,
    tables,
    tails,
    thresholds,
    together,
    variants,
)

__all__ = [
    "addresses",
    "calls",
    "heads",
    "lengths",
    "masks",
    "precision",
    "scales",
    "scores",
    "splits",
    "tables",
    "tails",
    "thresholds",
    "together",
    "variants",
]
