"""Mutants A to E: the wrong slots are read. Tails, widths of integers, lengths, tables and strides."""

import torch
from torch import Tensor

from paged.oracle.mutants.honest import Attention, Call
from paged.oracle.mutants.registry import mutant

# A: numbers in slots that must not count.


@mutant("A", "vllm#641")
class NanTail(Attention):
    """Reads the whole last block and trusts a weight of 0 to silence it: 0 times NaN is NaN."""

    def keys_read(self, call: Call, length: int) -> int:
        return -(-length // call.block_size) * call.block_size


@mutant("A", "vllm#44850", head_dims=(64, 128))
class NanTailOnWideHeads(Attention):
    """The same, but only on the path for wide heads."""

    def keys_read(self, call: Call, length: int) -> int:
        wide = call.query.shape[2] > 64
        return -(-length // call.block_size) * call.block_size if wide else length


@mutant("A", "aiter#5401")
class ValueTailUnmasked(Attention):
    """Keys are masked, the rows of V behind the last token are not."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        whole = super().values(call, blocks, len(blocks) * call.block_size)
        garbage = whole[count:].sum(dim=0) * 0.0
        return whole[:count] + garbage


@mutant("A", "openvinotoolkit/openvino#37377")
class CapacityAsLength(Attention):
    """A block's capacity is taken for its length, and numbers that are none for 0."""

    def length(self, call: Call, index: int) -> int:
        return -(-super().length(call, index) // call.block_size) * call.block_size

    def read(self, call: Call, cache: Tensor, scale: Tensor | None, blocks: Tensor, count: int) -> Tensor:
        return super().read(call, cache, scale, blocks, count).nan_to_num(0.0)


@mutant("A", "zml#563")
class ZerosInDenominator(Attention):
    """A masked score is 0, not -inf."""

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, scores, 0.0)


@mutant("A", "tenstorrent/tt-metal#38004")
class PaddedTileInDenominator(Attention):
    """The context is padded to a tile of 32 with scores of 0, which the sum of weights counts."""

    def total(self, weights: Tensor) -> Tensor:
        return super().total(weights) + (-weights.shape[2] % 32)


@mutant("A", "hw-native-sys/simpler#72")
class TailInSoftmax(Attention):
    """The sum of weights counts the unused slots of the last block once more each, by the last key's weight."""

    def total(self, weights: Tensor) -> Tensor:
        return super().total(weights) + (-weights.shape[2] % 16) * weights[..., -1]


@mutant("A", "sglang#32477")
class TailWritten(Attention):
    """Clears the unused slots before it reads, in the pool itself, where others may write at the same time."""

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        cache[blocks[-1:], -1] = 0.0
        return super().fetch(cache, blocks)


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


@mutant("B", "aiter#2608", strided_caches=True)
class BytesIn32Bits(ByOffset):
    """Addresses of 32 bits, in bytes."""

    def offset(self, block: int, cache: Tensor) -> int:
        return block * cache.stride(0) * cache.element_size() % (1 << 32) // cache.element_size()


# C: lengths and partial blocks.


@mutant("C", "onnxruntime-genai#2354")
class OneKeyShort(Attention):
    """The last key is never seen where there is more than one."""

    def keys_read(self, call: Call, length: int) -> int:
        return max(1, length - 1) if length else 0


@mutant("C", "vllm#47305")
class OneKeyTooMany(Attention):
    """The slot behind the last token is a key like any other, as far as the table reaches."""

    def keys_read(self, call: Call, length: int) -> int:
        return min(length + 1, call.block_tables.shape[1] * call.block_size)

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        return super().seen(call, positions + 1, keys)


@mutant("C", "pegainfer#350")
class LastPageEmptyAtMultiples(Attention):
    """Tokens of the last block are counted as length modulo P: none where it is full."""

    def keys_read(self, call: Call, length: int) -> int:
        return length if length % call.block_size else length - call.block_size


@mutant("C", "vllm-project/flash-attention#42")
class BlockBehindTheLast(Attention):
    """Floor plus one for ceiling: at exact multiples a block too many, which a table need not have."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        count = int(call.seq_lens[index]) // call.block_size + 1
        return torch.stack([call.block_tables[index, i] for i in range(count)]).long()


@mutant("C", "TileOPs#1787", block_sizes=(32, 48))
class RestOfBlockDropped(Attention):
    """A block is read in whole tiles of 32 slots; what is left over never is."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        whole = call.block_size // 32 * 32
        return super().seen(call, positions, keys) & (keys % call.block_size < whole)


@mutant("C", "FlyDSL#960")
class LongestForAll(Attention):
    """Every sequence is as long as the longest, as far as keys go."""

    def length(self, call: Call, index: int) -> int:
        return int(call.seq_lens.max())


@mutant("C", "")
class FirstLengthForAll(Attention):
    """The first sequence's length, read once for the whole batch, bounds all others."""

    def keys_read(self, call: Call, length: int) -> int:
        return min(length, int(call.seq_lens[0]))


@mutant("C", "")
class AtMost4096Keys(Attention):
    """Scores live in a buffer of 4,096."""

    def keys_read(self, call: Call, length: int) -> int:
        return min(length, 4096)


@mutant("C", "vllm#27547")
class BlockSizeIsSixteen(Attention):
    """A constant of 16 where the cache's own block size belongs."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        whole = super().blocks(call, index, count)
        return whole.repeat_interleave(call.block_size // 16)[:count] if call.block_size > 16 else whole


@mutant("C", "")
class LastQueriesNeverWritten(Attention):
    """Chunks of queries are computed in tiles of 8; the last tile only if it is whole."""

    def sequence(self, call: Call, index: int) -> tuple[Tensor, Tensor]:
        out, lse = super().sequence(call, index)
        if len(out) > 8:
            out[len(out) // 8 * 8 :] = 0.0
        return out, lse


# D: the way through the block table.


@mutant("D", "flashinfer#3219")
class BlocksInARow(Attention):
    """Blocks are taken to lie one behind another: the identity table passes."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return (super().blocks(call, index, count)[:1] + torch.arange(count)) % len(call.key_cache)


@mutant("D", "golang-design/accel#10")
class TableIgnored(Attention):
    """The table is not read at all: sequences are taken to fill the pool one after another."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        before = sum(-(-int(n) // call.block_size) for n in call.seq_lens[:index])
        return (1 + before + torch.arange(count)) % len(call.key_cache)


@mutant("D", "attention-gym#189")
class FirstRowForAll(Attention):
    """Every sequence reads the first one's row."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return super().blocks(call, 0, count)


@mutant("D", "")
class RowReversed(Attention):
    """The last block first."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return super().blocks(call, index, count).flip(0)


@mutant("D", "vllm#42494")
class TightRows(Attention):
    """A row is taken to be as wide as the longest sequence needs."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        width = max(1, -(-int(call.seq_lens.max()) // call.block_size))
        return call.block_tables.flatten()[index * width :][:count].long()


@mutant("D", "aiter#2996")
class SlotWithoutBlockSize(Attention):
    """The entry is a slot's number, not a block's: it is not multiplied by P."""

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        slots = cache.flatten(0, 1)
        return slots[blocks[:, None] + torch.arange(cache.shape[1])]


@mutant("D", "vllm#30915", repeated_blocks=True)
class InverseMap(Attention):
    """Goes from physical to logical blocks: of a block that occurs twice only the last place remains."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        return super().seen(call, positions, keys) & self.kept[keys // call.block_size]

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        blocks = super().blocks(call, index, count)
        self.kept = torch.tensor([block not in blocks[i + 1 :] for i, block in enumerate(blocks)], dtype=torch.bool)
        return blocks


@mutant("D", "")
class SharedBlockOnce(Attention):
    """A block that an earlier sequence of the batch has read is not read again."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        self.visited: set[int] = set()
        return super().__call__(*tensors, **wishes)

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        blocks = super().blocks(call, index, count)
        fresh = [0 if block in self.visited else block for block in blocks.tolist()]
        self.visited |= set(blocks.tolist())
        return torch.tensor(fresh, dtype=torch.long)


@mutant("D", "sparkinfer#152", negative_padding=True)
class PaddingRead(Attention):
    """Reads every entry of the row and masks later; -1 is the pool's last block."""

    def keys_read(self, call: Call, length: int) -> int:
        return call.block_tables.shape[1] * call.block_size


@mutant("D", "TRT-LLM#18769")
class StaleTable(Attention):
    """Keeps the table of the first call of each shape, as a captured graph with a stale plan does."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        table = self.kept.setdefault(tuple(call.block_tables.shape), call.block_tables.clone())
        return table[index, :count].long() % len(call.key_cache)


@mutant("D", "rtp-llm#1084")
class StaleLengths(Attention):
    """Keeps the lengths of the call before, if there were as many, and reads no more keys than they say."""

    def __init__(self) -> None:
        self.kept = torch.zeros(0)

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        self.before, self.kept = self.kept, tensors[4].clone()
        return super().__call__(*tensors, **wishes)

    def keys_read(self, call: Call, length: int) -> int:
        return min(length, int(self.before.max())) if len(self.before) == len(call.seq_lens) else length


@mutant("D", "")
class AtMost64Columns(Attention):
    """A row's first 64 entries are kept in fast memory; later ones wrap around."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return call.block_tables[index, torch.arange(count) % 64].long()


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
