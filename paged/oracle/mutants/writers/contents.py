"""Writers that put the wrong numbers into the right slot.

Another head's, dim's or tensor's, or what lies elsewhere in memory where tensors are views; rounded on the way, or with
the caller's own tensor spoilt.
"""

from typing import Any

from torch import Tensor

from paged.oracle.mutants.writers.plain import PlainWriter, Write


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
