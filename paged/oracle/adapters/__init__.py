"""Adapters: how a kernel wants its arguments, and how its results are read.

A kernel with this project's contract needs none. Any other kernel has an object with the two methods of `Adapter`,
which turns the contract's tensors into the kernel's own and the kernel's results back:

    class MyAdapter:
        def call(self, kernel, inputs, capabilities):
            cache = torch.stack([inputs.key_cache, inputs.value_cache])          # its cache: [2, N, P, Hkv, D]
            return kernel(inputs.query, cache, inputs.block_tables, inputs.seq_lens, scale=inputs.scale)

        def results(self, returned):
            return returned, None                                                # out [T, Hq, Dv], no log-sum-exp

It may have a third, `refuse(capabilities)`, which raises ValueError for what it cannot express. Those in ADAPTERS are
for the layouts of vLLM, FlashInfer, FlashAttention, SGLang, JAX, transformers and FlashMLA; what their kernels are
called with is said in `paged.oracle.adapters.caches`, `lists`, `slots` and `latent`.
"""

from collections.abc import Callable
from typing import Any, Protocol

from paged.oracle.adapters.caches import ByBlock, Hnd, Packed, Stacked, XPacked
from paged.oracle.adapters.foreign import Foreign, contract_wishes, out_and_lse
from paged.oracle.adapters.latent import Latent
from paged.oracle.adapters.lists import FlashAttention, FlashInfer, JaxRagged
from paged.oracle.adapters.slots import FlatIndices, RequestRows, TokenSlots
from paged.oracle.declarations import Capabilities
from paged.oracle.inputs import Inputs

Kernel = Callable[..., Any]


class Adapter(Protocol):
    """Between the contract and one kind of kernel. Both methods may raise; that is then the verdict.

    `call` may also return a `paged.oracle.guard.Mishap`, which is then the verdict, too.
    """

    def call(self, kernel: Kernel, inputs: Inputs, capabilities: Capabilities) -> Any:
        """Call the kernel with what `inputs` says, in the kernel's own way; give back what it returns."""
        ...

    def results(self, returned: Any) -> tuple[Any, Any]:
        """What the kernel returned as out [T, Hq, Dv] and lse [T, Hq] or None."""
        ...


class Contract:
    """This project's contract: see `paged.attention.gathered.paged_attention`. Only what is declared is passed."""

    def call(self, kernel: Kernel, inputs: Inputs, capabilities: Capabilities) -> Any:
        """Call `kernel(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, *, scale, ...)`."""
        tensors = (inputs.query, inputs.key_cache, inputs.value_cache)
        wishes = contract_wishes(inputs, capabilities)
        return kernel(*tensors, inputs.block_tables, inputs.seq_lens, inputs.query_start_loc, **wishes)

    def results(self, returned: Any) -> tuple[Any, Any]:
        """`out`, or `(out, lse)`."""
        return out_and_lse(returned)


SHIPPED: tuple[Foreign, ...] = (
    Hnd(),
    Stacked(),
    ByBlock(),
    Packed(),
    XPacked(),
    Latent(),
    FlashInfer(),
    FlashInfer("flashinfer_hnd", "HND"),
    FlashAttention(),
    TokenSlots(),
    RequestRows(),
    JaxRagged(),
    FlatIndices(),
)
# The contract's own order of dimensions is NHD.
ADAPTERS: dict[str, Adapter] = {
    "contract": Contract(),
    "nhd": Contract(),
    **{adapter.name: adapter for adapter in SHIPPED},
}


def adapter_named(adapter: str | Adapter, capabilities: Capabilities | None = None) -> Adapter:
    """One of the adapters that ship, by name, or the one that is given.

    Args:
        adapter: a name, or an object.
        capabilities: what is declared. An adapter with a method `refuse` is asked whether it can express that.

    Raises:
        ValueError: an unknown name, an object without those methods, or what cannot be expressed.

    Example:
        >>> adapter_named("flashinfer", Capabilities(alibi=True))
        Traceback (most recent call last):
        ...
        ValueError: adapter 'flashinfer' cannot express alibi: FlashInfer computes the slopes itself. Do not declare it
    """
    if isinstance(adapter, str):
        if adapter not in ADAPTERS:
            raise ValueError(f"unknown adapter {adapter!r}; there are {', '.join(sorted(ADAPTERS))}, or bring your own")
        adapter = ADAPTERS[adapter]
    if isinstance(adapter, type) or not all(callable(getattr(adapter, name, None)) for name in ("call", "results")):
        what = f"the class {adapter.__name__}" if isinstance(adapter, type) else f"a {type(adapter).__name__}"
        raise ValueError(f"an adapter is a name or an object with the methods call and results, got {what}")
    refuse = getattr(adapter, "refuse", None)
    if refuse is not None and capabilities is not None:
        refuse(capabilities)
    return adapter
