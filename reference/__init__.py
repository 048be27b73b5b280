"""The naive implementation that `paged` is checked against: slow, obvious, and sharing no code with it.

attention.py      attention from its definition, float64, one sequence at a time
cache.py          a contiguous KV cache: one row of max_model_len slots per sequence
reservation.py    who holds which slots of a contiguous pool
buddy.py          the same with runs that are powers of two
contiguous.py     serving from such a pool without a model, under four policies; served.py, what a step of it did
engine.py         static batching over that cache: the baseline for memory and throughput
tagged_memory.py  a pool that remembers what each slot stands for, to check every read of a schedule
"""
