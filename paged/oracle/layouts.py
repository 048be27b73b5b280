"""Layouts of the cache: the contract's K [N, P, Hkv, D] and V [N, P, Hkv, Dv] as other kernels keep them, and back.

The contract's own order of dimensions is called NHD (slot, head, dim). The others, each with a pair of functions:

    hnd           [N, Hkv, P, D]                       FlashInfer "HND", TensorRT-LLM
    stacked       [2, N, P, Hkv, D]                    vLLM, FlashAttention and Triton backends until 2025
    by_block      [N, 2, P, Hkv, D]                    vLLM since then, FlashInfer's one tensor
    packed        [N, Hkv, P, D + Dv]                  vLLM since pull request 44455
    x_packed      K [N, Hkv, D / x, P, x]              vLLM `paged_attention_v1`, aiter
    transposed    V [N, Hkv, Dv, P]                    goes with it
    flat          [N * P, Hkv, D]                      SGLang's token pool, transformers' continuous batching
    alternating   [N, P, 2 * Hkv, D]                   JAX `ragged_paged_attention`
    latent        [N, P, 1, D + Dv]                    FlashMLA; in `paged.oracle.adapters.latent`

Numbers are moved and never computed with: whatever bits lie in a slot, NaN included, lie in the same slot afterwards.
Functions to a layout give a dense tensor, a copy unless the order is the same; functions back give views where that is
possible. `paged.oracle.metadata` has the tables that go with these.
"""

import torch
from torch import Tensor


def to_hnd(cache: Tensor) -> Tensor:
    """[N, P, Hkv, D] to [N, Hkv, P, D]: the slots of one head lie one behind another.

    Source: FlashInfer, docs/tutorials/kv_layout.rst.

    Example: two slots of two heads; head 0 has 0 and 2.
        >>> to_hnd(torch.arange(4).view(1, 2, 2, 1)).tolist()
        [[[[0], [2]], [[1], [3]]]]
    """
    return cache.transpose(1, 2).contiguous()


def from_hnd(cache: Tensor) -> Tensor:
    """[N, Hkv, P, D] to [N, P, Hkv, D], a view."""
    return cache.transpose(1, 2)


def to_stacked(key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """K and V [N, P, Hkv, D] to one [2, N, P, Hkv, D]: first all keys, then all values.

    Source: vLLM, v1/attention/backends/flash_attn.py, `get_kv_cache_shape`, until 2025.

    Raises:
        ValueError: K and V of different shapes.

    Example:
        >>> to_stacked(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)).flatten().tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    _alike(key_cache, value_cache)
    return torch.stack((key_cache, value_cache))


def from_stacked(cache: Tensor) -> tuple[Tensor, Tensor]:
    """[2, N, P, Hkv, D] to K and V [N, P, Hkv, D], views."""
    return cache[0], cache[1]


def to_by_block(key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """K and V [N, ...] to one [N, 2, ...]: a block's keys, then its values, then the next block.

    The dimensions behind may have either order, NHD or HND.

    Source: FlashInfer, docs/tutorials/kv_layout.rst, `paged_kv_cache` as one tensor.

    Raises:
        ValueError: K and V of different shapes.

    Example: two blocks of one number each.
        >>> to_by_block(torch.tensor([1, 2]).view(2, 1, 1, 1), torch.tensor([3, 4]).view(2, 1, 1, 1)).flatten().tolist()
        [1, 3, 2, 4]
    """
    _alike(key_cache, value_cache)
    return torch.stack((key_cache, value_cache), dim=1)


def from_by_block(cache: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 2, ...] to K and V [N, ...], views."""
    return cache[:, 0], cache[:, 1]


def to_packed(key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """K [N, P, Hkv, D] and V [N, P, Hkv, Dv] to one [N, Hkv, P, D + Dv]: a slot's key, then its value.

    Source: vLLM pull request 44455, the logical shape of its cache.

    Example:
        >>> to_packed(torch.full((1, 2, 1, 1), 7), torch.full((1, 2, 1, 2), 8)).tolist()
        [[[[7, 8, 8], [7, 8, 8]]]]
    """
    return to_hnd(torch.cat((key_cache, value_cache), dim=-1))


def from_packed(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """[N, Hkv, P, D + Dv] to K [N, P, Hkv, D] and V [N, P, Hkv, Dv], views."""
    both = from_hnd(cache)
    return both[..., :head_dim], both[..., head_dim:]


def x_of(dtype: torch.dtype) -> int:
    """x of an x-packed cache: how many numbers make 16 bytes, which one thread loads at once.

    Source: vLLM, csrc/attention/attention_kernels.cuh, `x = 16 / sizeof(cache_t)`.

    Example:
        >>> x_of(torch.float16), x_of(torch.float8_e4m3fn)
        (8, 16)
    """
    return 16 // dtype.itemsize


def to_x_packed(key_cache: Tensor, x: int) -> Tensor:
    """K [N, P, Hkv, D] to [N, Hkv, D / x, P, x]: x numbers of a slot, then the same x of the next slot.

    Source: vLLM, csrc/attention/attention_kernels.cuh, `k_cache`.

    Raises:
        ValueError: D is no multiple of x.

    Example: two slots with four numbers each, x = 2.
        >>> to_x_packed(torch.tensor([[[[0, 1, 2, 3]], [[10, 11, 12, 13]]]]), x=2).tolist()
        [[[[[0, 1], [10, 11]], [[2, 3], [12, 13]]]]]
    """
    blocks, size, heads, dim = key_cache.shape
    if dim % x:
        raise ValueError(f"an x-packed cache has whole pieces of {x} numbers; D is {dim}, no multiple of it")
    return key_cache.reshape(blocks, size, heads, dim // x, x).permute(0, 2, 3, 1, 4).contiguous()


def from_x_packed(cache: Tensor) -> Tensor:
    """[N, Hkv, D / x, P, x] to K [N, P, Hkv, D]."""
    return cache.permute(0, 3, 1, 2, 4).flatten(3)


def to_transposed(value_cache: Tensor) -> Tensor:
    """V [N, P, Hkv, Dv] to [N, Hkv, Dv, P]: one number of all slots, then the next number.

    Source: vLLM, csrc/attention/attention_kernels.cuh, `v_cache`.

    Example: two slots with three numbers each.
        >>> to_transposed(torch.tensor([[[[0, 1, 2]], [[10, 11, 12]]]])).tolist()
        [[[[0, 10], [1, 11], [2, 12]]]]
    """
    return value_cache.permute(0, 2, 3, 1).contiguous()


def from_transposed(cache: Tensor) -> Tensor:
    """[N, Hkv, Dv, P] to V [N, P, Hkv, Dv], a view."""
    return cache.permute(0, 3, 1, 2)


def to_flat(cache: Tensor) -> Tensor:
    """[N, P, Hkv, D] to [N * P, Hkv, D]: slots without blocks; slot = block * P + offset.

    Source: SGLang, srt/mem_cache/memory_pool.py, `MHATokenToKVPool`.

    Example:
        >>> to_flat(torch.arange(4).view(2, 2, 1, 1)).flatten().tolist()
        [0, 1, 2, 3]
    """
    return cache.flatten(0, 1).contiguous()


def from_flat(cache: Tensor, block_size: int) -> Tensor:
    """[N * P, Hkv, D] to [N, P, Hkv, D], a view.

    Raises:
        ValueError: the slots are no whole number of blocks.
    """
    if cache.shape[0] % block_size:
        raise ValueError(f"{cache.shape[0]} slots are no whole number of blocks of {block_size}")
    return cache.view(-1, block_size, *cache.shape[1:])


def to_alternating(key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """K and V [N, P, Hkv, D] to one [N, P, 2 * Hkv, D]: keys at even heads, values at odd ones.

    Source: JAX, experimental/pallas/ops/tpu/ragged_paged_attention/kernel.py, `kv_pages`.

    Raises:
        ValueError: K and V of different shapes.

    Example: two KV heads.
        >>> keys, values = torch.tensor([1, 2]).view(1, 1, 2, 1), torch.tensor([3, 4]).view(1, 1, 2, 1)
        >>> to_alternating(keys, values).flatten().tolist()
        [1, 3, 2, 4]
    """
    _alike(key_cache, value_cache)
    return torch.stack((key_cache, value_cache), dim=3).flatten(2, 3)


def from_alternating(cache: Tensor) -> tuple[Tensor, Tensor]:
    """[N, P, 2 * Hkv, D] to K and V [N, P, Hkv, D], views."""
    return cache[:, :, 0::2], cache[:, :, 1::2]


def _alike(key_cache: Tensor, value_cache: Tensor) -> None:
    if key_cache.shape != value_cache.shape:
        shapes = f"K is {list(key_cache.shape)} and V is {list(value_cache.shape)}"
        raise ValueError(f"K and V of one tensor have one shape; {shapes}")
