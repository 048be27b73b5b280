"""Class D: the way through the block table, from a sequence and a logical block to a physical one.

The table of another sequence, of another call or none at all; a row that is read in the wrong order or with the wrong
width. Where blocks lie in order and calls are alone, several of these go unnoticed.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant


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


@mutant("D", "")
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
