"""Class C: how many keys a sequence has, and how many tokens its last block.

One too many or too few at a border; another sequence's length; the fixed size of a buffer or tile where a length
belongs. Most are right for all lengths but a few, such as multiples of the block size.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant


@mutant("C", "")
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


@mutant("C", "")
class LastPageEmptyAtMultiples(Attention):
    """Tokens of the last block are counted as length modulo P: none where it is full."""

    def keys_read(self, call: Call, length: int) -> int:
        return length if length % call.block_size else length - call.block_size


@mutant("C", "pegainfer#350")
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


@mutant("C", "vllm#57614")
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
