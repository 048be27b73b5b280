"""Kernels that are wrong on purpose, and kernels that are right in another way: what the oracle itself is tested with.

Every mutant deviates from the honest kernel of `honest` in one step, as kernels did that people have used in earnest;
where it was reported in public, the thread is named. The oracle must find each of them, and none of the variants.

    attention_slots     A to E: which slots are read
    attention_scores    F to J, M, N: who sees whom, and what becomes of a score
    attention_sums      K, L, O, R: softmax, splits, precision, scales, memory of earlier calls
    attention_variants  right all the same
"""

from paged.oracle.mutants import attention_scores, attention_slots, attention_sums, attention_variants
from paged.oracle.mutants.registry import ATTENTION_MUTANTS, ATTENTION_VARIANTS, CLASSES, Mutant, Variant

__all__ = [
    "ATTENTION_MUTANTS",
    "ATTENTION_VARIANTS",
    "CLASSES",
    "Mutant",
    "Variant",
    "attention_scores",
    "attention_slots",
    "attention_sums",
    "attention_variants",
]
