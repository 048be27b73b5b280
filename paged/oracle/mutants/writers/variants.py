"""Writers that are right although they work differently. The judge must let all of them pass."""

from typing import Any

import torch
from torch import Tensor

from paged.oracle.mutants.writers.plain import Fp8Writer, Int8TensorWriter, Int8Writer, PlainWriter, Write
from paged.oracle.mutants.writers.tokens import FirstWins
from paged.oracle.writers.case import WriteCapabilities


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
