"""Adapters for kernels that have the contract's tables and keep K and V in another layout.

    "hnd"               K [N, Hkv, P, D] and V [N, Hkv, P, Dv]
    "vllm_stacked"      [2, N, P, Hkv, D]
    "vllm_by_block"     [N, 2, P, Hkv, D]
    "vllm_packed"       [N, Hkv, P, D + Dv]
    "vllm_x_packed"     K [N, Hkv, D / x, P, x] and V [N, Hkv, Dv, P]

All are called as

    kernel(query, *caches, block_tables, seq_lens, query_start_loc, *, scale, ...) -> out | (out, lse)

with query [T, Hq, D] in `Capabilities.dtypes`, caches in `kv_dtypes`, block_tables [B, M] in `table_dtypes`, seq_lens
[B] int32, query_start_loc [B + 1] int32, and window, softcap, alibi_slopes, sinks, k_scale and v_scale where they are
declared: all as in `paged.attention.gathered.paged_attention`. They return out [T, Hq, Dv] in query's dtype and, if
declared, lse [T, Hq] in float32 (float64 for float64 queries), in the base that is declared.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from paged.oracle import layouts
from paged.oracle.adapters.foreign import (
    ONE_SHAPE,
    Arguments,
    Foreign,
    contract_wishes,
    spaced,
)
from paged.oracle.declarations import Capabilities
from paged.oracle.inputs import Inputs


class _OtherCaches(Foreign):
    """The contract in all but the caches."""

    def caches(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """K and V in the kernel's layout."""
        raise NotImplementedError

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """The contract's, with other caches."""
        tables = (inputs.block_tables, inputs.seq_lens, inputs.query_start_loc)
        return (inputs.query, *self.caches(inputs), *tables), contract_wishes(inputs, capabilities)


class Hnd(_OtherCaches):
    """`kernel(query, key_cache [N, Hkv, P, D], value_cache [N, Hkv, P, Dv], block_tables, seq_lens, ...)`."""

    name = "hnd"

    def caches(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Two tensors."""
        found = (layouts.to_hnd(inputs.key_cache), layouts.to_hnd(inputs.value_cache))
        return tuple(spaced(cache, inputs.case) for cache in found)


class Stacked(_OtherCaches):
    """`kernel(query, kv_cache [2, N, P, Hkv, D], block_tables, seq_lens, query_start_loc, *, scale, ...)`.

    Where strided caches are declared, K and V of a block may lie side by side: vLLM keeps this shape over the memory
    of [N, 2, ...] too.
    """

    name = "vllm_stacked"
    cannot: ClassVar[Mapping[str, str]] = {"value_dims": ONE_SHAPE}

    def caches(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """One tensor."""
        if inputs.case.strides == "dense":
            return (layouts.to_stacked(inputs.key_cache, inputs.value_cache),)
        return (spaced(layouts.to_by_block(inputs.key_cache, inputs.value_cache), inputs.case).transpose(0, 1),)


class ByBlock(_OtherCaches):
    """`kernel(query, kv_cache [N, 2, P, Hkv, D], block_tables, seq_lens, query_start_loc, *, scale, ...)`."""

    name = "vllm_by_block"
    cannot: ClassVar[Mapping[str, str]] = {"value_dims": ONE_SHAPE}

    def caches(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """One tensor."""
        return (spaced(layouts.to_by_block(inputs.key_cache, inputs.value_cache), inputs.case),)


class Packed(_OtherCaches):
    """`kernel(query, kv_cache [N, Hkv, P, D + Dv], block_tables, seq_lens, query_start_loc, *, scale, ...)`.

    D is query's; what is behind it is the value.
    """

    name = "vllm_packed"

    def caches(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """One tensor."""
        return (spaced(layouts.to_packed(inputs.key_cache, inputs.value_cache), inputs.case),)


class XPacked(_OtherCaches):
    """`kernel(query, key_cache [N, Hkv, D / x, P, x], value_cache [N, Hkv, Dv, P], block_tables, ...)`.

    x is 16 bytes' worth of numbers of the cache's dtype: 8 of bfloat16, 16 of float8. D must be a multiple of it.
    """

    name = "vllm_x_packed"

    def refuse(self, capabilities: Capabilities) -> None:
        """See that every D has whole pieces of x.

        Raises:
            ValueError: one has not.
        """
        super().refuse(capabilities)
        names = {name for name in capabilities.kv_dtypes if name != "auto"}
        names |= set(capabilities.dtypes) if "auto" in capabilities.kv_dtypes else set()
        for name in sorted(names):
            x = layouts.x_of(getattr(torch, name))
            for width in capabilities.head_dims:
                if width % x:
                    raise ValueError(
                        f"adapter {self.name!r} cannot express head_dim {width} in {name}: x is {x}, and D must be a "
                        "multiple of it"
                    )

    def caches(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Two tensors of different shapes."""
        keys = layouts.to_x_packed(inputs.key_cache, layouts.x_of(inputs.key_cache.dtype))
        return spaced(keys, inputs.case), spaced(layouts.to_transposed(inputs.value_cache), inputs.case)
