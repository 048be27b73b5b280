"""Classes B and E: from a physical block to a place in memory.

B is arithmetic on integers that are too narrow: block numbers of 16 bits, offsets of 32, which wrap in a pool that is
large enough. E is the layout: strides that are taken for granted, axes in another order, keys for values.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant

# B: width of integers.


class ByOffset(Attention):
    """Computes where a block begins, as kernels do, and reads from there."""

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        room = int(cache.untyped_storage().nbytes()) // cache.element_size()
        last = sum((size - 1) * stride for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True))
        found = []
        for block in blocks.tolist():
            # What a GPU would read from another's memory is read from somewhere in the pool.
            start = self.offset(block, cache) % max(1, int(room - cache.storage_offset() - last))
            found.append(torch.as_strided(cache, cache.shape[1:], cache.stride()[1:], cache.storage_offset() + start))
        return torch.stack(found) if found else cache[:0]

    def offset(self, block: int, cache: Tensor) -> int:
        """Numbers from the beginning of the pool to a block."""
        return block * cache.stride(0)


@mutant("B", "ROCm/ATOM#702")
class BlockIn16Bits(Attention):
    """Block numbers above 65,535 are cut."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return super().blocks(call, index, count) % (1 << 16)


@mutant("B", "")
class BlockInSigned16Bits(Attention):
    """Block numbers above 32,767 are cut and become negative: they count from the end."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return super().blocks(call, index, count).to(torch.int16).long() % len(call.key_cache)


@mutant("B", "vllm#47671", strided_caches=True)
class OffsetIn32Bits(ByOffset):
    """Block times stride in signed 32 bits."""

    def offset(self, block: int, cache: Tensor) -> int:
        return (block * cache.stride(0) + (1 << 31)) % (1 << 32) - (1 << 31)


@mutant("B", "flashinfer#3130", strided_caches=True)
class OffsetInUnsigned32Bits(ByOffset):
    """Block times stride in unsigned 32 bits."""

    def offset(self, block: int, cache: Tensor) -> int:
        return block * cache.stride(0) % (1 << 32)


@mutant("B", "aiter#3824", strided_caches=True)
class BytesIn32Bits(ByOffset):
    """Addresses of 32 bits, in bytes."""

    def offset(self, block: int, cache: Tensor) -> int:
        return block * cache.stride(0) * cache.element_size() % (1 << 32) // cache.element_size()


# E: layout and strides.


@mutant("E", "aiter#3498", strided_caches=True)
class ContiguousBlocks(Attention):
    """Block stride is taken to be P * Hkv * D."""

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        _, size, heads, dim = cache.shape
        stride = (size * heads * dim, heads * dim, dim, 1)
        return torch.as_strided(cache, cache.shape, stride, cache.storage_offset())[blocks]


@mutant("E", "vllm#17362", strided_caches=True)
class PlanesSwapped(Attention):
    """Of one tensor for K and V, planes are taken to come first: V is where the second half begins."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        if call.value_cache.untyped_storage().data_ptr() != call.key_cache.untyped_storage().data_ptr():
            return super().values(call, blocks, count)
        return self.read(call, call.value_cache, call.v_scale, (blocks + 1) // 2, count)


@mutant("E", "LMCache#4467")
class HeadsAsSlots(Attention):
    """Takes [N, P, Hkv, D] for [N, Hkv, P, D]."""

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        blocks_read = cache[blocks]
        return blocks_read.reshape(len(blocks), cache.shape[2], cache.shape[1], -1).transpose(1, 2)


@mutant("E", "vllm#29887")
class HeadOffsetMissing(Attention):
    """Every head reads the first KV head's values."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        return super().values(call, blocks, count)[:, :1].expand(-1, call.num_kv_heads, -1)


@mutant("E", "")
class ValuesFromKeys(Attention):
    """V is read from the plane of K."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        return self.read(call, call.key_cache, call.v_scale, blocks, count)


@mutant("E", "")
class PackedKeysMisread(Attention):
    """Keys are packed by 8 numbers, queries by 16: dims meet others."""

    def keys(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        key = super().keys(call, blocks, count)
        return key.reshape(*key.shape[:2], -1, 8, 2).transpose(3, 4).flatten(2)


@mutant("E", "")
class ValuesTransposed(Attention):
    """V blocks of [P, Dv] numbers are read as [Dv, P]."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        stored = call.value_cache[blocks].float().transpose(1, 2)  # [M, Hkv, P, Dv]
        turned = stored.reshape(len(blocks), call.num_kv_heads, -1, call.block_size).transpose(2, 3)
        return turned.transpose(1, 2).flatten(0, 1)[:count]
