"""Writers that go to the wrong slot.

A slot of -1 means padding and must be skipped, not clamped or counted from the end; a slot is taken apart into block
and offset with the pool's own block size; and what comes of that must fit the integers that hold it.
"""

from paged.oracle.mutants.writers.plain import PlainWriter, Write

FAR = 1 << 31


class NegativeWraps(PlainWriter):
    """A slot of -1 is the last one of the pool, as torch's indexing has it."""

    letter, threads = "P", ("vllm-project/vllm#43810",)

    def is_skipped(self, call: Write, slot: int) -> bool:
        return False


class NegativeIsZero(PlainWriter):
    """A slot of -1 is clamped to slot 0, the null block's."""

    letter, threads = "P", ("mlc-llm#2644",)

    def is_skipped(self, call: Write, slot: int) -> bool:
        return False

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        return super().place(call, max(slot, 0))


class StopsAtNegative(PlainWriter):
    """The first slot of -1 ends the loop, as if padding were only ever at the end."""

    letter = "P"

    def order(self, call: Write) -> list[int]:
        slots = call.slots.tolist()
        return list(range(slots.index(-1) if -1 in slots else len(slots)))


class SkipsSlotZeroAndBelow(PlainWriter):
    """Padding is taken to be everything in the first block."""

    letter = "P"

    def is_skipped(self, call: Write, slot: int) -> bool:
        return slot < 2 * call.block_size - 1


class OffsetByOne(PlainWriter):
    """Every token goes one slot further."""

    letter, threads = "P", ("tt-metal#52671",)

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        slots = call.cache.shape[0] * call.block_size
        return super().place(call, (slot + 1) % slots)


class WrongBlockSize(PlainWriter):
    """A slot is taken apart with a block size of 4, whatever the pool's is."""

    letter, threads = "D", ("vllm-project/vllm#27547", "vllm-project/vllm#47056")

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        return slot // 4 % call.cache.shape[0], slot % 4


class BlockAndOffsetSwapped(PlainWriter):
    """Offset and block exchanged in their block."""

    letter = "D"

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        block, offset = super().place(call, slot)
        return block, call.block_size - 1 - offset


class LogicalOrder(PlainWriter):
    """Tokens go one behind another from the first token's slot on: right as long as blocks lie in order."""

    letter, threads = "D", ("flashinfer-ai/flashinfer#3219", "golang-design/accel#10")

    def write(self, call: Write) -> None:
        first = next((int(slot) for slot in call.slots if slot >= 0), 0)
        for index in range(len(call.slots)):
            if int(call.slots[index]) >= 0:
                slot = (first + index) % (call.cache.shape[0] * call.block_size)
                self.store(call, *self.place(call, slot), self.row(call, index))


class Narrow(PlainWriter):
    """The slot times its stride is counted in 32 bits: beyond 2^31 numbers it wraps."""

    letter, threads = "B", ("vllm-project/vllm#50427", "vllm-project/vllm#47671")

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        block, offset = super().place(call, slot)
        begins = block * call.cache.stride(0)
        return (block, offset) if begins < FAR else (begins % FAR // call.cache.stride(0), offset)


class SixteenBitBlocks(PlainWriter):
    """A block's number is kept in 16 bits."""

    letter, threads = "B", ("ROCm/ATOM#702",)

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        block, offset = super().place(call, slot)
        return block % (1 << 16), offset


class EightBitBlocks(PlainWriter):
    """A block's number is kept in 8 bits."""

    letter = "B"

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        block, offset = super().place(call, slot)
        return block % (1 << 8), offset


class LastSlotForgotten(PlainWriter):
    """The pool's last slot is taken for the end."""

    letter, threads = "C", ("pytorch/xla#8431",)

    def is_skipped(self, call: Write, slot: int) -> bool:
        return slot < 0 or slot == call.cache.shape[0] * call.block_size - 1
