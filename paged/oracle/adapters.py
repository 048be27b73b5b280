"""Adapters: how a kernel wants its arguments, and how its results are read.

A kernel with this project's contract needs none. Any other kernel has an object with the two methods of `Adapter`,
which turns the contract's tensors into the kernel's own and the kernel's results back:

    class MyAdapter:
        def call(self, kernel, inputs, capabilities):
            cache = torch.stack([inputs.key_cache, inputs.value_cache])          # its cache: [2, N, P, Hkv, D]
            return kernel(inputs.query, cache, inputs.block_tables, inputs.seq_lens, scale=inputs.scale)

        def results(self, returned):
            return returned, None                                                # out [T, Hq, Dv], no log-sum-exp
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from paged.oracle.declarations import Capabilities
from paged.oracle.inputs import Inputs

Kernel = Callable[..., Any]


class Adapter(Protocol):
    """Between the contract and one kind of kernel. Both methods may raise; that is then the verdict."""

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
        wishes: dict[str, Any] = {"scale": inputs.scale}
        if capabilities.window:
            wishes["window"] = inputs.window
        if capabilities.softcap:
            wishes["softcap"] = inputs.softcap
        if capabilities.alibi:
            wishes["alibi_slopes"] = inputs.alibi_slopes
        if capabilities.sinks:
            wishes["sinks"] = inputs.sinks
        if capabilities.kv_scales is not None:
            wishes["k_scale"], wishes["v_scale"] = inputs.k_scale, inputs.v_scale
        tensors = (inputs.query, inputs.key_cache, inputs.value_cache)
        return kernel(*tensors, inputs.block_tables, inputs.seq_lens, inputs.query_start_loc, **wishes)

    def results(self, returned: Any) -> tuple[Any, Any]:
        """`out`, or `(out, lse)`."""
        if isinstance(returned, Tensor):
            return returned, None
        if isinstance(returned, tuple | list) and len(returned) == 2:
            return returned[0], returned[1]
        return returned, None


ADAPTERS: dict[str, Adapter] = {"contract": Contract()}


def adapter_named(adapter: str | Adapter) -> Adapter:
    """One of the adapters that ship, by name, or the one that is given.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(adapter, str):
        return adapter
    if adapter not in ADAPTERS:
        raise ValueError(f"unknown adapter {adapter!r}; there are {', '.join(sorted(ADAPTERS))}, or bring your own")
    return ADAPTERS[adapter]
