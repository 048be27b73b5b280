"""Block managers with one mistake each, and managers that are right although they work differently.

plain         the manager that all others deviate from
sharing       C, G, P, Q: forks, copies, windows, and when a block is free
handing_out   C, Q: which blocks are given, and calls that are refused
prefixes      Q: what is found and what is given up
variants      right all the same
"""

from paged.oracle.mutants.managers import handing_out, plain, prefixes, sharing, variants
from paged.oracle.mutants.managers.plain import PlainManager
from paged.oracle.mutants.registry import defined_in

MANAGERS = defined_in(PlainManager, sharing, handing_out, prefixes)
RIGHT_MANAGERS = defined_in(PlainManager, plain, variants)

__all__ = ["MANAGERS", "RIGHT_MANAGERS", "PlainManager"]
