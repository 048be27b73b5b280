"""Writers that write the wrong tokens: too few, too many, in another order, or what nobody asked for.

What is not written must stay as it was, bit for bit: neighbours in a block, other blocks, and the whole pool where
there is no token.
"""

from torch import Tensor

from paged.oracle.mutants.writers.plain import PlainWriter, Write


class LastTokenForgotten(PlainWriter):
    """An even number of tokens is written; the last of an odd number is not."""

    letter = "C"

    def order(self, call: Write) -> list[int]:
        return list(range(len(call.slots) // 2 * 2))


class FirstWins(PlainWriter):
    """Of two tokens with one slot the first one stays."""

    letter = "P"

    def order(self, call: Write) -> list[int]:
        return super().order(call)[::-1]


class PaddingRowsWritten(PlainWriter):
    """Rows of key and value behind the last slot go on behind the last token."""

    letter, threads = "P", ("vllm-project/vllm#13922",)

    def write(self, call: Write) -> None:
        super().write(call)
        slots = call.cache.shape[0] * call.block_size
        for index in range(len(call.slots), len(call.new)):
            last = int(call.slots[-1]) if len(call.slots) else 0
            slot = (last + 1 + index - len(call.slots)) % slots
            self.store(call, *self.place(call, slot), self.row(call, index))


class EmptyWritesSlotZero(PlainWriter):
    """Without tokens, slot 0 is cleared: a launch of one thread block too many."""

    letter, threads = "P", ("mlc-llm#2644",)

    def write(self, call: Write) -> None:
        super().write(call)
        if not len(call.slots):
            call.cache[0, 0] = 0


class ClearsTheRest(PlainWriter):
    """The slots behind a token in its block are cleared."""

    letter, threads = "P", ("vllm-project/vllm#43990",)

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        call.cache[block, offset + 1 :] = 0
        super().store(call, block, offset, row)


class ClearsNextBlock(PlainWriter):
    """A new block is cleared, and so is its neighbour."""

    letter, threads = "P", ("vllm-project/vllm#43990", "kekzl/imp#1709")

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        super().store(call, block, offset, row)
        if offset == 0 and block + 1 < len(call.cache):
            call.cache[block + 1] = 0


class SortsSlots(PlainWriter):
    """Slots are sorted to write memory in order, and the rows are not."""

    letter = "P"

    def write(self, call: Write) -> None:
        super().write(Write(call.name, call.new, call.cache, call.slots.sort().values, call.scale, call.other_scale))
