"""Mutants that are right for small calls: tiles, parts, warps, and integers that are wide enough until they are not.

They were written without looking at the oracle's own cases. A kernel of this kind passes whatever stays below the size
at which its second tile, part or path begins, and goes wrong beyond it.
"""

import itertools
import math

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant

# How decoding kernels cut a context that is too long for one group of threads.
PART = 512


def is_long(count: int) -> bool:
    """Whether a context is cut into parts, which is another path through a kernel."""
    return count > PART


# A and B: a tail on the second path only; slots and positions of 16 bits.


@mutant("A", "vllm#44850")
class LongTailUnmasked(Attention):
    """The path for contexts of more than 1,024 keys reads the whole last block."""

    def keys_read(self, call: Call, length: int) -> int:
        return -(-length // call.block_size) * call.block_size if length > 1024 else length


@mutant("B", "ROCm/ATOM#702")
class SlotIn16Bits(Attention):
    """Not the block's number is cut, but the slot's: block times P plus offset."""

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        slots = blocks[:, None] * cache.shape[1] + torch.arange(cache.shape[1])
        return cache.flatten(0, 1)[slots % (1 << 16)]


@mutant("B", "")
class DistanceIn16Bits(Attention):
    """Positions are subtracted in signed 16 bits: keys further away than 32,767 lie in the future."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        distance = (positions[:, None] - keys).to(torch.int16)
        return super().seen(call, positions, keys) & (distance >= 0)


# C: parts of contexts, and what is left over.


@mutant("C", "")
class LastPartFloored(Attention):
    """Parts are counted by floor division: what is left over is not read where there is a whole part."""

    def keys_read(self, call: Call, length: int) -> int:
        return length // PART * PART if is_long(length) else length


@mutant("C", "")
class FullPartIsEmpty(Attention):
    """The last part holds length modulo 512 keys: none where it is full."""

    def keys_read(self, call: Call, length: int) -> int:
        return length - PART if is_long(length) and length % PART == 0 else length


@mutant("C", "")
class LoneKeyOfTile(Attention):
    """A last tile of 256 keys that holds a single one is skipped."""

    def keys_read(self, call: Call, length: int) -> int:
        return length - 1 if length > 256 and length % 256 == 1 else length


@mutant("C", "")
class BlocksPerPartFloored(Attention):
    """Beyond 1,024 keys four parts get equally many blocks, and nobody gets the rest."""

    def keys_read(self, call: Call, length: int) -> int:
        blocks = -(-length // call.block_size)
        return min(length, blocks // 4 * 4 * call.block_size) if length > 1024 else length


@mutant("C", "")
class AtMost32Parts(Attention):
    """A warp of 32 lanes merges parts of 256 keys; keys behind the 32nd part are lost."""

    def keys_read(self, call: Call, length: int) -> int:
        return min(length, 32 * 256)


@mutant("C", "", block_sizes=(1, 16))
class AtMost512Columns(Attention):
    """A row's first 512 entries are kept in fast memory; later ones wrap around."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return call.block_tables[index, torch.arange(count) % 512].long()


@mutant("C", "")
class BorderAt2048(Attention):
    """Two passes over long contexts overlap in one key."""

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        twice = torch.arange(scores.shape[2]) == 2048
        return super().masked(scores + twice * math.log(2.0), seen)


# D, E and F: which sequence a row belongs to, where its table begins, and tiles of queries.


@mutant("D", "")
class TableOfRowModulo32(Attention):
    """A warp holds the tables of 32 sequences; later ones are given those of the first again."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        return super().blocks(call, index % 32, count)


@mutant("D", "")
class LengthOfRowModulo64(Attention):
    """Lengths live in a buffer of 64."""

    def length(self, call: Call, index: int) -> int:
        return min(super().length(call, index), super().length(call, index % 64))


@mutant("D", "")
class AlignedTableRows(Attention):
    """Entries are loaded four at a time, from an address that is rounded down to four."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        first = index * call.block_tables.shape[1] // 4 * 4
        return call.block_tables.flatten()[first : first + count].long()


@mutant("D", "vllm-project/vllm-ascend#14435", strided_tables=True)
class TableStrideAssumed(Attention):
    """The table's rows are taken to lie one behind another, also where it is a slice of a wider one."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        first = call.block_tables.storage_offset() + index * call.block_tables.shape[1]
        return torch.as_strided(call.block_tables, (count,), (1,), first).long()


@mutant("D", "hw-native-sys/pypto#470")
class RunByItsEnds(Attention):
    """Blocks whose first and last number are as far apart as in a run are loaded as one."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        blocks = super().blocks(call, index, count)
        is_run = count > 1 and int(blocks[-1] - blocks[0]) == count - 1
        return blocks[0] + torch.arange(count) if is_run else blocks


@mutant("D", "")
class PrefixOfTwoForAll(Attention):
    """Blocks that the first two sequences share are read for all others as well."""

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        blocks = super().blocks(call, index, count)
        if len(call.block_tables) > 2:
            first, second = call.block_tables[0], call.block_tables[1]
            shared = int(((first == second) & (first > 0)).long().cumprod(0).sum())
            blocks[:shared] = first[: min(shared, count)]
        return blocks


@mutant("D", "", empty_rows=True)
class TokenOfEmptySequence(Attention):
    """A search for a row's sequence finds one without queries that begins at the same row, and the row is lost."""

    def sequence(self, call: Call, index: int) -> tuple[Tensor, Tensor]:
        out, lse = super().sequence(call, index)
        if index and call.query_start_loc[index] == call.query_start_loc[index - 1]:
            out[:1] = 0.0
        return out, lse


@mutant("D", "")
class DecodesComeFirst(Attention):
    """Counts the decodes of a batch and takes them to be its first rows."""

    def rows(self, call: Call, index: int) -> slice:
        decodes = int((call.query_start_loc.diff() == 1).sum())
        return slice(index, index + 1) if index < decodes else super().rows(call, index)


@mutant("D", "FA#1537")
class UniformQueriesAssumed(Attention):
    """Rows that divide evenly among the sequences are divided evenly."""

    def rows(self, call: Call, index: int) -> slice:
        each, rest = divmod(len(call.query), len(call.block_tables))
        return super().rows(call, index) if rest else slice(index * each, (index + 1) * each)


@mutant("D", "")
class LastTileWrittenWhole(Attention):
    """Chunks are written in tiles of 16 rows, the last one over the rows of the next sequence."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        out, lse = super().__call__(*tensors, **wishes)
        starts = tensors[5].tolist()
        for start, stop in itertools.pairwise(starts):
            if stop - start > 1:
                out[stop : start + -(-(stop - start) // 16) * 16] = 0.0
        return out, lse


@mutant("E", "flagos-ai/FlagAttention#45", strided_caches=True)
class KeyStridesForValues(Attention):
    """V is read with the strides of K, which differ where only one of the two is a view."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        cache = call.value_cache.as_strided(call.value_cache.shape, call.key_cache.stride())
        return self.read(call, cache, call.v_scale, blocks, count)


@mutant("F", "")
class SecondTileOfQueries(Attention):
    """From the 129th query of a chunk on, the row within the tile is taken for the row within the chunk."""

    def positions(self, call: Call, index: int, length: int) -> Tensor:
        positions = super().positions(call, index, length)
        return positions - torch.arange(len(positions)) // 128 * 128


# M and R: many heads, and more sequences than before.


@mutant("M", "")
class GroupsPackedInSixteens(Attention):
    """Rows and heads that share a KV head fill tiles of 16; groups that do not divide 16 lose what is too much."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        row = torch.arange(len(out))[:, None] % -(-16 // call.group)
        out[row * call.group + torch.arange(call.num_heads) % call.group >= 16] = 0.0
        return out, lse


@mutant("M", "flashinfer#2750")
class HeadsBeyond32(Attention):
    """Head numbers have five bits."""

    def kv_heads(self, call: Call) -> Tensor:
        return torch.arange(call.num_heads) % 32 // call.group


@mutant("M", "")
class KvHeadsByMask(Attention):
    """KV heads are found with a mask of bits: of three, the third is the first."""

    def kv_heads(self, call: Call) -> Tensor:
        return super().kv_heads(call) & ((1 << (call.num_kv_heads.bit_length() - 1)) - 1)


@mutant("R", "")
class WorkspaceNeverGrows(Attention):
    """The first call decides how many sequences there is room for; later ones leave the rest unwritten."""

    room: int | None = None

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        self.room = self.room or len(tensors[4])
        return super().__call__(*tensors, **wishes)

    def sequence(self, call: Call, index: int) -> tuple[Tensor, Tensor]:
        out, lse = super().sequence(call, index)
        return (out, lse) if self.room is None or index < self.room else (out * 0.0, lse)
