"""Kernels that are wrong on purpose, and kernels that are right in another way: what the oracle itself is tested with.

Every mutant deviates from an honest kernel in one step, as kernels did that people have used in earnest; where that was
reported in public, the thread is named. The oracle must find each of them, and none of the variants.

    attention   kernels of paged attention: classes A to O and R
    writers     kernels that write keys and values: mostly P
    managers    block managers: mostly Q
    registry    the classes, and how mutants of attention are listed
"""

from paged.oracle.mutants import attention
from paged.oracle.mutants.registry import ATTENTION_MUTANTS, ATTENTION_VARIANTS, CLASSES, Mutant, Variant

__all__ = ["ATTENTION_MUTANTS", "ATTENTION_VARIANTS", "CLASSES", "Mutant", "Variant", "attention"]
