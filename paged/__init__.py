"""PagedAttention in plain PyTorch: an engine to read, an oracle to check kernels with, and pictures of KV memory.

from paged import LLM, SamplingParams

llm = LLM(model="tiny")
for output in llm.generate(["To be, or not to be"], SamplingParams(temperature=0, max_tokens=32)):
    print(output.outputs[0].text)
"""

from typing import TYPE_CHECKING, Any

from paged.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, RequestOutput
from paged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from paged.async_engine import AsyncEngine
    from paged.engine import Engine
    from paged.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "Engine",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that `paged --help` and the integer rooms stay quick."""
    if name == "LLM":
        from paged.llm import LLM

        return LLM
    if name == "AsyncEngine":
        from paged.async_engine import AsyncEngine

        return AsyncEngine
    if name == "Engine":
        from paged.engine import Engine

        return Engine
    raise AttributeError(f"module 'paged' has no attribute {name!r}")
