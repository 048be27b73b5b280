"""Judging block managers: whoever hands out the blocks of a pool to sequences.

To be read in this order: protocol, operations, asking, books, bookkeeping, verify.
"""
