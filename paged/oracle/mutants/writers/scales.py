"""Writers that store the wrong codes or scales where a cache has fewer bits than what is written: class O.

A code is the number divided by its scale, rounded to the nearest, ties to even, and clamped to the range.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.writers.plain import Fp8Writer, Int8TensorWriter, Int8Writer, Write
from paged.oracle.writers.case import WriteCapabilities


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
