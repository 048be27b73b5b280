"""K and V in the pool: tensors, and the few things that are done to them.

Each layer has two tensors, `key_cache` [N, P, Hkv, D] and `value_cache` [N, P, Hkv, Dv]: N blocks of P slots. A token
lies in slot `block * P + offset`, at `cache[block, offset]`, in every layer the same. K and V are apart, and so are the
layers, because that is what torch.compile can write into without copying a whole pool.

Stored as int8, they have two more beside them, `key_scale` and `value_scale` [N, P, Hkv]: a scale for each token and
head, which goes wherever its block goes. fp8 has scales as well, but they are the layer's (paged/quantisation.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paged.quantisation import to_fp8, to_int8
from paged.transfer import to_device

# The tensors of one layer, all indexed by block first: key_cache, value_cache; of int8 also key_scale, value_scale.
LayerCache = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps for every token.

    Attributes:
        num_kv_heads: Hkv.
        head_dim: D, the width of a key.
        value_dim: Dv, the width of a value.
    """

    num_kv_heads: int
    head_dim: int
    value_dim: int


def bytes_per_block(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes in all layers together.

    `block_size * Hkv * (D + Dv) * itemsize`, summed over the layers: KV heads, not query heads, and the head's own
    width, which need not be hidden size over heads. int8 adds two scales in float32 for each token and head.

    Example: 32 layers of 8 KV heads of 128 in bfloat16 keep 128 KiB for a token, 2 MiB for a block of 16; in fp8 half.
        >>> layers = [LayerShape(8, 128, 128)] * 32
        >>> [bytes_per_block(layers, 16, dtype) // 2**10 for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8)]
        [2048, 1024, 1056]
    """
    scales = 2 * torch.float32.itemsize if dtype == torch.int8 else 0
    per_token = sum(
        layer.num_kv_heads * ((layer.head_dim + layer.value_dim) * dtype.itemsize + scales) for layer in layers
    )
    return block_size * per_token


def allocate_layer(
    shape: LayerShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
) -> LayerCache:
    """The tensors of one layer, zero everywhere.

    Zero and not empty: what lies in memory by chance may be NaN, and 0 * NaN is NaN even behind a mask.

    Args:
        shape: what the layer keeps for a token.
        num_blocks: N, the null and the trash block included.
        block_size: P.
        dtype, device: of the tensors.

    Returns:
        key_cache [N, P, Hkv, D], value_cache [N, P, Hkv, Dv]; of int8 also key_scale and value_scale [N, P, Hkv].
    """
    slots = (num_blocks, block_size, shape.num_kv_heads)
    key_cache = torch.zeros(*slots, shape.head_dim, dtype=dtype, device=device)
    value_cache = torch.zeros(*slots, shape.value_dim, dtype=dtype, device=device)
    if dtype != torch.int8:
        return key_cache, value_cache
    key_scale, value_scale = (torch.zeros(*slots, dtype=torch.float32, device=device) for _ in range(2))
    return key_cache, value_cache, key_scale, value_scale


def write(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write the K and V of T tokens into their slots, in place, quantised if there are scales.

    Args:
        key_cache, value_cache: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        key, value: [T, Hkv, D] and [T, Hkv, Dv].
        slot_mapping: [T] int64, `block * P + offset`; padded tokens point into the trash block.
        k_scale, v_scale: None; of fp8 a number or [Hkv], which is read; of int8 [N, P, Hkv], which is written.

    Example:
        >>> keys, values = torch.zeros(3, 2, 1, 1), torch.zeros(3, 2, 1, 1)
        >>> write(keys, values, torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.tensor([3]))  # block 1, offset 1
        >>> keys.flatten().tolist()
        [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    """
    block_size = key_cache.shape[1]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    # Not through a view of the pool: the compiler would copy all of it (docs/design.md).
    for cache, new, scale in ((key_cache, key, k_scale), (value_cache, value, v_scale)):
        if scale is None:
            cache[blocks, offsets] = new.to(cache.dtype)
        elif cache.dtype == torch.int8:
            cache[blocks, offsets], scale[blocks, offsets] = to_int8(new)
        else:
            cache[blocks, offsets] = to_fp8(new, scale)


def finite_values(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of which every value is a number; where one was none, the key is none either.

    Some forms of attention compute `0 * value` for slots that are not in use, and what a block's last owner left there
    must not become NaN in somebody else's sequence. A key that is no number makes its own sequence's output NaN, so the
    error is not hidden.

    Args:
        key, value: [T, Hkv, D] and [T, Hkv, Dv].

    Example:
        >>> key, value = finite_values(torch.ones(1, 1, 2), torch.tensor([[[1.0, torch.inf]]]))
        >>> key.isnan().any().item(), value.tolist()
        (True, [[[1.0, 0.0]]])
    """
    spoilt = (value * 0).sum(dim=-1, keepdim=True)  # 0, or NaN
    return key + spoilt, torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


def allocate_on_host(cache: LayerCache, num_blocks: int) -> LayerCache:
    """Room in host memory for so many blocks of one layer.

    Not zero, unlike the pool: a host block is written as a whole before it is read. So a CPU takes the memory only as
    blocks are swapped out, however much was asked for.

    Args:
        cache: the layer's tensors, each [N, ...].
        num_blocks: H, blocks of the host's pool.

    Returns:
        Tensors like those, each [H, ...]; for a GPU's in memory that it can copy from directly (pinned).
    """
    return tuple(
        torch.empty(num_blocks, *tensor.shape[1:], dtype=tensor.dtype, pin_memory=tensor.is_cuda) for tensor in cache
    )


def swap_blocks(sources: Iterable[LayerCache], targets: Iterable[LayerCache], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks in every layer from one pool to another, on whatever devices they are.

    Args:
        sources, targets: the tensors of every layer, each with a block as its first dimension.
        pairs: (block of the source, block of the target).

    Example: block 2 goes to host block 1.
        >>> pool, host = torch.arange(3.0), torch.zeros(2)
        >>> swap_blocks([(pool,)], [(host,)], [(2, 1)])
        >>> host.tolist()
        [0.0, 2.0]
    """
    from_blocks, to_blocks = [block for block, _ in pairs], [block for _, block in pairs]
    for source_cache, target_cache in zip(sources, targets, strict=True):
        for source, target in zip(source_cache, target_cache, strict=True):
            target[to_blocks] = source[from_blocks].to(target.device)


def copy_blocks(caches: Iterable[LayerCache], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks in every layer, in place: what copy-on-write asks for.

    Args:
        caches: the tensors of every layer.
        pairs: (source, target) blocks. No target may be the source of another pair: all sources are read first.

    Raises:
        ValueError: a target is also a source or occurs twice, so the result would depend on the order.
    """
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    if len(set(targets)) != len(targets) or set(targets) & set(sources):
        raise ValueError(f"block copies {pairs} depend on their order: a target is written twice or read as a source")
    tensors = [tensor for cache in caches for tensor in cache]
    device = tensors[0].device
    from_blocks, to_blocks = to_device(np.array(sources), device), to_device(np.array(targets), device)
    for tensor in tensors:
        tensor[to_blocks] = tensor[from_blocks]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors really take: those of their storages, each storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
