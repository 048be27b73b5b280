"""Writers with one mistake each, and writers that are right although they work differently.

`PlainWriter` is right, and written to be broken: each step is a method of a few lines, and a mutant is a subclass that
overrides one of them. It shares no code with the engine's own writer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from paged.oracle.writers.case import WriteCapabilities

FAR = 1 << 31


@dataclass(frozen=True)
class Write:
    """One tensor's part of a call: what is written, into which cache, with which scale, and the other's scale."""

    name: str
    new: Tensor
    cache: Tensor
    slots: Tensor
    scale: Tensor | None
    other_scale: Tensor | None

    @property
    def block_size(self) -> int:
        """P."""
        return self.cache.shape[1]


class PlainWriter:
    """Reshape-and-cache, one token at a time.

    Attributes:
        letter: for mutants, the class of bug in the catalogue, A to R.
        threads: for mutants, public threads in which such a bug was reported, owner/repository#number.
        capabilities: what it is to be asked for.

    Example:
        >>> cache = torch.zeros(2, 2, 1, 1)
        >>> new = torch.ones(2, 1, 1)
        >>> PlainWriter()(new, new, cache, cache.clone(), torch.tensor([3, -1]))
        >>> cache.flatten().tolist()
        [0.0, 0.0, 0.0, 1.0]
    """

    letter: ClassVar[str] = ""
    threads: ClassVar[tuple[str, ...]] = ()
    capabilities: ClassVar[WriteCapabilities] = WriteCapabilities(
        dtypes=("bfloat16", "float32"),
        head_dims=(16, 12),
        block_sizes=(4, 5),
        slot_dtypes=("int64", "int32"),
        negative_slots=True,
        duplicate_slots="last",
        longer_keys=True,
        strided_caches=True,
    )

    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Any:
        """Write in place; see `paged.oracle.writers.verify`."""
        self.write(Write("key", key, key_cache, slot_mapping, k_scale, v_scale))
        self.write(Write("value", value, value_cache, slot_mapping, v_scale, k_scale))

    def write(self, call: Write) -> None:
        """All tokens of one tensor."""
        for index in self.order(call):
            slot = int(call.slots[index])
            if self.is_skipped(call, slot):
                continue
            block, offset = self.place(call, slot)
            self.store(call, block, offset, self.row(call, index))

    def order(self, call: Write) -> list[int]:
        """The tokens, in the order in which they are written."""
        return list(range(len(call.slots)))

    def is_skipped(self, call: Write, slot: int) -> bool:
        """Whether a slot is none."""
        return slot < 0

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        """Block and offset of a slot."""
        return slot // call.block_size, slot % call.block_size

    def row(self, call: Write, index: int) -> Tensor:
        """What is written for a token [Hkv, D]."""
        return call.new[index]

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        """Put a row into its place, as codes if there are scales."""
        if call.cache.dtype == torch.int8 and call.scale is not None and call.scale.dim() == 3:
            codes, call.scale[block, offset] = self.with_scales(row)
            call.cache[block, offset] = codes
            return
        call.cache[block, offset] = self.codes(call, row)

    def codes(self, call: Write, row: Tensor) -> Tensor:
        """Numbers as the cache's dtype, divided by their scale."""
        if call.scale is None and call.cache.dtype.itemsize > 1:
            return row.to(call.cache.dtype)
        quotients = self.quotients(call, row.float())
        if call.cache.dtype == torch.int8:
            return self.rounded(quotients).clamp(-127, 127).to(torch.int8)
        largest = torch.finfo(call.cache.dtype).max
        return quotients.clamp(-largest, largest).to(call.cache.dtype)

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        """Number / scale."""
        return row if call.scale is None else row / self.per_head(call.scale)

    def rounded(self, quotients: Tensor) -> Tensor:
        """To whole numbers."""
        return quotients.round()

    def with_scales(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and the scale of each vector."""
        scales = row.float().abs().amax(dim=-1) / 127
        quotients = torch.where(scales[:, None] > 0, row.float() / scales[:, None], 0.0)
        return self.rounded(quotients).clamp(-127, 127).to(torch.int8), scales

    def per_head(self, scale: Tensor) -> Tensor:
        """A scale that goes with [Hkv, D]."""
        return scale[:, None] if scale.dim() == 1 else scale


class Fp8Writer(PlainWriter):
    """The same into fp8, with a scale for each head."""

    capabilities = WriteCapabilities(
        dtypes=("bfloat16", "float16"), kv_dtypes=("float8_e4m3fn",), head_dims=(16, 7), block_sizes=(4,), scales="head"
    )


class Int8Writer(PlainWriter):
    """The same into int8, with a scale for each token and head, which is written."""

    capabilities = WriteCapabilities(kv_dtypes=("int8",), head_dims=(16, 7), block_sizes=(4,), scales="token")


class Int8TensorWriter(PlainWriter):
    """The same into int8, with one scale for each tensor."""

    capabilities = WriteCapabilities(kv_dtypes=("int8",), head_dims=(16, 7), block_sizes=(4,), scales="tensor")


# Mutants: slots.


class NegativeWraps(PlainWriter):
    """A slot of -1 is the last one of the pool, as torch's indexing has it."""

    letter, threads = "P", ("vllm-project/vllm#13922", "mlc-llm#2644")

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

    letter, threads = "P", ("vllm-project/vllm#13922",)

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


# Mutants: tokens.


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


# Mutants: keys, values, heads and dims.


class KeysAsValues(PlainWriter):
    """Values are a copy of the keys, where both are equally wide."""

    letter, threads = "P", ("ROCm/jax#560",)

    def __call__(self, *tensors: Any, **scales: Any) -> Any:
        key, value, *others = tensors
        return super().__call__(key, key if key.shape == value.shape else value, *others, **scales)


class ValuesForgotten(PlainWriter):
    """Only keys are written."""

    letter = "P"

    def write(self, call: Write) -> None:
        if call.name == "key":
            super().write(call)


class HeadsBackwards(PlainWriter):
    """The last head comes first."""

    letter = "M"

    def row(self, call: Write, index: int) -> Tensor:
        return call.new[index].flip(0)


class FirstHeadOnly(PlainWriter):
    """One head is written, the others keep what was there."""

    letter, threads = "M", ("flashinfer-ai/flashinfer#2750",)

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        call.cache[block, offset, :1] = self.codes(call, row)[:1]


class DimTail(PlainWriter):
    """Dims are copied eight at a time, and what is left over is not."""

    letter, threads = "N", ("flashinfer-ai/flashinfer#4299", "triton#621")

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        whole = row.shape[1] // 8 * 8
        call.cache[block, offset, :, :whole] = self.codes(call, row)[:, :whole]


class DimsRoundedUp(PlainWriter):
    """Dims are copied eight at a time, and the last eight reach beyond the row: into the gap behind it."""

    letter, threads = "N", ("flashinfer-ai/flashinfer#4299",)

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        super().store(call, block, offset, row)
        head, width = call.cache.shape[2] - 1, row.shape[1]
        start = call.cache.storage_offset() + block * call.cache.stride(0) + offset * call.cache.stride(1)
        start += head * call.cache.stride(2) + width
        if width % 8 and start < call.cache.untyped_storage().nbytes() // call.cache.element_size():
            call.cache.as_strided((1,), (1,), start).fill_(0)


# Mutants: memory.


class ContiguousRows(PlainWriter):
    """Rows of key and value are taken to lie one behind another."""

    letter, threads = "E", ("vllm-project/vllm#22003",)

    def row(self, call: Write, index: int) -> Tensor:
        heads, width = call.new.shape[1:]
        start = call.new.storage_offset() + index * heads * width
        return call.new.as_strided((heads, width), (width, 1), start)


class ContiguousBlocks(PlainWriter):
    """Blocks are taken to lie one behind another."""

    letter, threads = "E", ("ROCm/aiter#3498",)

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        _, size, heads, width = call.cache.shape
        start = call.cache.storage_offset() + (block * size + offset) * heads * width
        call.cache.as_strided((heads, width), (width, 1), start).copy_(self.codes(call, row))


class CopiesThePool(PlainWriter):
    """The pool is made contiguous first, so what is written is lost where that is a copy."""

    letter, threads = "E", ("ROCm/aiter#3498",)

    def write(self, call: Write) -> None:
        super().write(Write(call.name, call.new, call.cache.contiguous(), call.slots, call.scale, call.other_scale))


class ScalesInPlace(PlainWriter):
    """Keys are halved in place and doubled when they are written: the caller's tensor is spoilt."""

    letter = "P"

    def row(self, call: Write, index: int) -> Tensor:
        row = call.new[index].clone()
        call.new[index] *= 0.5
        return row


class ThroughFloat16(PlainWriter):
    """Numbers pass through float16, which has fewer bits than float32 and a smaller range than bfloat16."""

    letter = "L"

    def row(self, call: Write, index: int) -> Tensor:
        return call.new[index].half().to(call.new.dtype)


# Mutants: scales.


class ScaleMultiplied(Fp8Writer):
    """Numbers are multiplied by the scale."""

    letter = "O"

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        assert call.scale is not None, "it is declared"
        return row * self.per_head(call.scale)


class ScaleIgnored(Fp8Writer):
    """The scale is not passed on."""

    letter, threads = "O", ("tokenspeed#759",)

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        return row


class KeyScaleForValues(Fp8Writer):
    """Values are divided by the scale of keys."""

    letter, threads = "O", ("ROCm/jax#560",)

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        scale = call.scale if call.name == "key" else call.other_scale
        assert scale is not None, "it is declared"
        return row / self.per_head(scale)


class FirstHeadsScale(Fp8Writer):
    """All heads are divided by the scale of the first one."""

    letter, threads = "O", ("sgl-kernel-xpu#252",)

    def per_head(self, scale: Tensor) -> Tensor:
        return scale[:1, None]


class ScaleFloored(Fp8Writer):
    """A scale below 1 is taken as 1."""

    letter, threads = "O", ("mlxcel#717",)

    def per_head(self, scale: Tensor) -> Tensor:
        return scale.clamp(min=1.0)[:, None]


class Fnuz(Fp8Writer):
    """Codes are those of e4m3fnuz, which stand for half as much."""

    letter, threads = "O", ("vllm-project/vllm#45562", "vllm-project/vllm#45720", "vllm-project/vllm#49380")

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        return super().quotients(call, row) * 2


class RoundsTwice(Fp8Writer):
    """Quotients are rounded to float16 first, and then once more to e4m3."""

    letter = "O"
    capabilities = WriteCapabilities(
        dtypes=("float32",), kv_dtypes=("float8_e4m3fn",), head_dims=(16, 7), block_sizes=(4,), scales="head"
    )

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        return super().quotients(call, row).half().float()


class NotClamped(Fp8Writer):
    """What is beyond the range becomes NaN."""

    letter = "O"

    def codes(self, call: Write, row: Tensor) -> Tensor:
        quotients = self.quotients(call, row.float())
        return torch.where(quotients.abs() > 448, torch.nan, quotients).to(call.cache.dtype)


class CutOff(Int8TensorWriter):
    """Quotients are cut off instead of rounded."""

    letter = "O"

    def rounded(self, quotients: Tensor) -> Tensor:
        return quotients.trunc()


class TiesAway(Int8TensorWriter):
    """Quotients midway between two codes are rounded away from 0, as C's round() does."""

    letter = "O"

    def rounded(self, quotients: Tensor) -> Tensor:
        return (quotients.abs() + 0.5).floor() * quotients.sign()


class WrapsAround(Int8TensorWriter):
    """What is beyond the range wraps around, as a cast in C may."""

    letter = "O"

    def codes(self, call: Write, row: Tensor) -> Tensor:
        return self.quotients(call, row.float()).round().to(torch.int32).to(torch.int8)


class ScaleOfTheToken(Int8Writer):
    """A token has one scale for all its heads."""

    letter, threads = "O", ("ROCm/aiter#3894",)

    def with_scales(self, row: Tensor) -> tuple[Tensor, Tensor]:
        scales = (row.float().abs().max() / 127).expand(len(row)).contiguous()
        quotients = torch.where(scales[:, None] > 0, row.float() / scales[:, None], 0.0)
        return quotients.round().to(torch.int8), scales


class ScaleElsewhere(Int8Writer):
    """Codes go to the slot, scales to the slot before it."""

    letter, threads = "O", ("ROCm/aiter#3894", "kvcached#424")

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        assert call.scale is not None, "it is declared"
        call.cache[block, offset], call.scale[block, offset - 1] = self.with_scales(row)


class AsymmetricScale(Int8Writer):
    """Scales are the largest number over 128."""

    letter = "O"

    def with_scales(self, row: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = super().with_scales(row)
        return codes, scales * 127 / 128


# Right, although different.


class Flat(PlainWriter):
    """All tokens at once, by index_put on the block and offset."""

    def write(self, call: Write) -> None:
        if len(call.slots) == 0:
            return
        # Of tokens with one slot only the last is kept, since index_put does not say which one wins.
        last = {int(slot): index for index, slot in enumerate(call.slots) if slot >= 0}
        index = torch.tensor(list(last.values()), dtype=torch.int64)
        slots = torch.tensor(list(last), dtype=torch.int64)
        rows = call.new[index]
        if len(rows):
            codes = torch.stack([self.codes(call, row) for row in rows])
            call.cache.index_put_((slots // call.block_size, slots % call.block_size), codes)


class ByHead(PlainWriter):
    """Head by head."""

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        codes = self.codes(call, row)
        for head in range(len(row)):
            call.cache[block, offset, head] = codes[head]


class ReadsAndWritesBlocks(PlainWriter):
    """Whole blocks are read, changed and written back: what others hold in them comes back bit for bit."""

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        whole = call.cache[block].clone()
        whole[offset] = self.codes(call, row)
        call.cache[block].copy_(whole)


class Reciprocal(Fp8Writer):
    """Numbers are multiplied by one over the scale, which is exact for a power of two and nearly so for others."""

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        assert call.scale is not None, "it is declared"
        return row * (1.0 / self.per_head(call.scale))


class InFloat64(Int8Writer):
    """Scales and quotients are computed in float64 and rounded once."""

    def with_scales(self, row: Tensor) -> tuple[Tensor, Tensor]:
        scales = row.double().abs().amax(dim=-1) / 127
        quotients = torch.where(scales[:, None] > 0, row.double() / scales[:, None], 0.0)
        return quotients.round().to(torch.int8), scales.float()


class ZeroVectorsHaveScaleOne(Int8Writer):
    """A vector of zeros has the scale 1 and not 0."""

    def with_scales(self, row: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = super().with_scales(row)
        return codes, torch.where(scales > 0, scales, 1.0)


class TwosComplement(Int8TensorWriter):
    """What is far below the range is -128."""

    def codes(self, call: Write, row: Tensor) -> Tensor:
        return self.quotients(call, row.float()).round().clamp(-128, 127).to(torch.int8)


class ReturnsThePool(PlainWriter):
    """Returns the caches that it wrote."""

    def __call__(self, *tensors: Any, **scales: Any) -> Any:
        super().__call__(*tensors, **scales)
        return tensors[2], tensors[3]


class EitherWins(FirstWins):
    """Of two tokens with one slot the first one stays, as is declared with "any"."""

    letter = ""
    capabilities = WriteCapabilities(head_dims=(16, 7), block_sizes=(4,), duplicate_slots="any", negative_slots=True)


class Refuses(PlainWriter):
    """Two tokens with one slot are refused."""

    capabilities = WriteCapabilities(head_dims=(16, 7), block_sizes=(4,), duplicate_slots="refused")

    def __call__(self, *tensors: Any, **scales: Any) -> Any:
        slots = tensors[4].tolist()
        if len(set(slots)) < len(slots):
            raise ValueError("two tokens have one slot")
        super().__call__(*tensors, **scales)


def _defined(is_mutant: Callable[[type[PlainWriter]], bool]) -> tuple[type[PlainWriter], ...]:
    """The writers of this file, in the order in which they are written."""
    found = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, PlainWriter)]
    return tuple(kind for kind in found if is_mutant(kind))


WRITERS = _defined(lambda kind: bool(kind.letter))
RIGHT_WRITERS = _defined(lambda kind: not kind.letter)
