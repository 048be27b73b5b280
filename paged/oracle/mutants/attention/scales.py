"""Class O: the scales of stored numbers, which have fewer bits than the queries.

Divided by, forgotten, taken from another tensor, head or token.
"""

from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant

FP8 = ("float8_e4m3fn",)


@mutant("O", "", kv_scales="head", kv_dtypes=FP8)
class ScaleDivides(Attention):
    """Divides where it should multiply."""

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        return 1 / super().scales(scale, blocks, count)


@mutant("O", "vllm#45562", kv_scales="tensor", kv_dtypes=FP8)
class OtherFloat8(Attention):
    """Codes are read as e4m3fnuz: half of what they mean."""

    def read(self, call: Call, cache: Tensor, scale: Tensor | None, blocks: Tensor, count: int) -> Tensor:
        return super().read(call, cache, scale, blocks, count) / 2


@mutant("O", "ROCm/jax#560", kv_scales="head")
class KeyScaleForValues(Attention):
    """Values are scaled like keys."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        return self.read(call, call.value_cache, call.k_scale, blocks, count)


@mutant("O", "vllm#42580", kv_scales="tensor", kv_dtypes=FP8)
class ValueScaleDropped(Attention):
    """Values are not scaled."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        return self.read(call, call.value_cache, None, blocks, count)


@mutant("O", "mlxcel#717", kv_scales="tensor", kv_dtypes=FP8)
class ScaleAtLeastOne(Attention):
    """Scales below 1 are taken for 1."""

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        return super().scales(scale, blocks, count).clamp(min=1.0)


@mutant("O", "tokenspeed#759", kv_scales="head")
class FirstScaleForAll(Attention):
    """One number where each head has its own."""

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        return scale.flatten()[0]


@mutant("O", "aiter#3894", kv_scales="token", kv_dtypes=FP8)
class ScaleByPosition(Attention):
    """A token's scale is looked up by its position in the sequence, not by its slot in the pool."""

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        return scale.flatten(0, 1)[:count, :, None]


@mutant("O", "", kv_scales="token", kv_dtypes=("int8",))
class ScaleOfOtherHead(Attention):
    """Scales of [P, Hkv] are read as [Hkv, P]."""

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        turned = scale[blocks].transpose(1, 2).reshape(len(blocks), scale.shape[1], scale.shape[2])
        return turned.flatten(0, 1)[:count, :, None]
