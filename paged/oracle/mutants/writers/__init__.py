"""Writers with one mistake each, and writers that are right although they work differently.

plain       the writer that all others deviate from
slots       B, C, D, P: where a token goes
tokens      C, P: which tokens are written
contents    E, L, M, N, P: which numbers are written
scales      O: as which codes and scales
variants    right all the same
"""

from paged.oracle.mutants.registry import defined_in
from paged.oracle.mutants.writers import contents, plain, scales, slots, tokens, variants
from paged.oracle.mutants.writers.plain import PlainWriter

WRITERS = defined_in(PlainWriter, slots, tokens, contents, scales)
RIGHT_WRITERS = defined_in(PlainWriter, plain, variants)

__all__ = ["RIGHT_WRITERS", "WRITERS", "PlainWriter"]
