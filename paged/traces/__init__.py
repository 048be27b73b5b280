"""Workloads from production and made ones, and what a scheduler does with them, without a model.

trace.py       a request's lengths and which prompts begin alike
formats.py     ShareGPT, Azure, Mooncake and length files          sharegpt.py, for its conversations
synthetic.py   lengths and arrivals that are drawn
cost.py        how long a step takes on a GPU, fitted to measured steps
simulate.py    the real scheduler and block rooms over a trace     ledger.py, what each slot did
baselines.py   the same trace and bytes without paging (reference.contiguous)
records.py     what a simulation gives: a row for each request, a row for each step
"""

from paged.traces.formats import FORMATS, load
from paged.traces.trace import Piece, Trace, TraceError, TraceRequest, request_of

__all__ = ["FORMATS", "Piece", "Trace", "TraceError", "TraceRequest", "load", "request_of"]
