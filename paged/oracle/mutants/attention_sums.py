"""Mutants K, L, O and R: splits and their merge, range and precision, scales of what is stored, other calls."""

import math

import torch
from torch import Tensor

from paged.oracle.mutants.honest import Attention, Call, SplitAttention
from paged.oracle.mutants.registry import mutant

FP8 = ("float8_e4m3fn",)

# K: splits, their merge, and the log-sum-exp.


@mutant("K", "flashinfer#2113", lse="e")
class LseInBase2(Attention):
    """Base 2 where natural is declared."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        out, lse = super().__call__(*tensors, **wishes)
        return out, lse / math.log(2.0)


@mutant("K", "", lse="e", sinks=True)
class LseWithSink(Attention):
    """Counts the sink, and does not say so."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out, lse if call.sinks is None else torch.logaddexp(lse, call.sinks)


@mutant("K", "TRT-LLM#19112", lse="e")
class LseUnscaled(Attention):
    """The maximum in the statistics is that of scores before they were scaled."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out, lse + self.top(scores)[..., 0].T * (1 / call.scale - 1)


@mutant("K", "FA#2842", lse="e")
class LseOfOtherHead(Attention):
    """Written with heads in the reverse order."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out, lse.flip(1)


@mutant("K", "", lse="e")
class LseIn16Bits(Attention):
    """Kept in bfloat16 on the way."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out, lse.bfloat16().float()


@mutant("K", "vllm#39148", empty_rows=True)
class EmptyPartsMerged(SplitAttention):
    """Parts that see nothing are merged like any other: -inf minus -inf is not a number."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.exp(lses - lses.amax(dim=0))
        total = weights.sum(dim=0)
        return (outs * weights[..., None]).sum(dim=0) / total[..., None], lses.logsumexp(dim=0)


@mutant("K", "sglang#6101")
class MergeUnshifted(SplitAttention):
    """Weights of parts are exponentials of the log-sum-exp itself, which overflow."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.exp(lses)
        total = weights.sum(dim=0)
        return (outs * weights[..., None]).sum(dim=0) / total[..., None], total.log()


@mutant("K", "")
class MergeByMean(SplitAttention):
    """All parts weigh the same."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        some = lses.isfinite()
        mean = (outs * some[..., None]).sum(dim=0) / some.sum(dim=0)[..., None].clamp(min=1)
        return mean, lses.logsumexp(dim=0)


@mutant("K", "flashinfer#4485")
class MergeInBase2(SplitAttention):
    """Parts have natural log-sum-exps, the merge takes powers of 2."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return super().merge(outs, lses * math.log(2.0))


@mutant("K", "")
class LastPartLost(SplitAttention):
    """The last part is left out wherever there are several."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        used = int(lses.isfinite().any(dim=2).any(dim=1).sum())
        return super().merge(outs[: max(1, used - 1)], lses[: max(1, used - 1)])


@mutant("K", "")
class BorderCountedTwice(SplitAttention):
    """Parts overlap in one key."""

    def parts(self, count: int) -> list[slice]:
        return [slice(max(0, part.start - 1), part.stop) for part in super().parts(count)]


@mutant("K", "")
class BorderLost(SplitAttention):
    """The last key of a long part is left out."""

    def parts(self, count: int) -> list[slice]:
        parts = super().parts(count)
        return [slice(part.start, part.stop - (part.stop < count and count > 1000)) for part in parts]


@mutant("K", "vllm#28840")
class StaleParts(SplitAttention):
    """A part that sees nothing leaves in the workspace what another sequence's part wrote there."""

    last: tuple[Tensor, Tensor] | None = None

    def part(self, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().part(scores, value)
        if scores.shape[2]:
            self.last = out, lse
        elif self.last is not None and self.last[0].shape == out.shape:
            return self.last
        return out, lse


@mutant("K", "pytorch#194167")
class OtherSequencesNeverWritten(Attention):
    """Only the first sequence's rows are."""

    def sequence(self, call: Call, index: int) -> tuple[Tensor, Tensor]:
        out, lse = super().sequence(call, index)
        return (out, lse) if index == 0 else (out * 0.0, lse)


@mutant("K", "FA#1217")
class BatchStrideZero(SplitAttention):
    """With several parts, every sequence is written to the first one's rows."""

    def rows(self, call: Call, index: int) -> slice:
        first, own = super().rows(call, 0), super().rows(call, index)
        return first if first.stop - first.start == own.stop - own.start else own


@mutant("K", "", empty_rows=True)
class EmptyRowIsMean(Attention):
    """A query that sees nothing gets the mean of all values."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        blind = scores.isinf().all(dim=2, keepdim=True)
        return super().attend(call, torch.where(blind, 0.0, scores), value)


@mutant("K", "flash-attention-npu#168", empty_rows=True)
class EmptyRowIsNan(Attention):
    """0 by 0."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out / (lse > -torch.inf)[..., None], lse


@mutant("K", "", empty_rows=True, lse="e")
class EmptyLseIsLowest(Attention):
    """Not -inf but the lowest finite number."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        out, lse = super().__call__(*tensors, **wishes)
        return out, lse.clamp(min=torch.finfo(torch.float32).min)


# L: range and precision.


@mutant("L", "executorch#18407")
class NoMaximum(Attention):
    """Exponentials of scores as they are."""

    def top(self, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores[..., :1])


@mutant("L", "")
class MaximumFromZero(Attention):
    """The running maximum begins at 0: rows far below it vanish."""

    def top(self, scores: Tensor) -> Tensor:
        return super().top(scores).clamp(min=0.0)


@mutant("L", "flashinfer#4267")
class FiniteSentinel(Attention):
    """What is masked has a score of -50,000, and some that are seen have less."""

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, scores, -5e4)


@mutant("L", "tract#2586", dtypes=("float16",))
class SumIn16Bits(Attention):
    """The sum of weights stands still at 2,048."""

    def total(self, weights: Tensor) -> Tensor:
        return weights.half().cumsum(dim=2)[..., -1].clamp(max=2048.0).float()


@mutant("L", "")
class AccumulatorIn16Bits(Attention):
    """Values are summed in bfloat16, eight keys at a time."""

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        total = torch.zeros(weights.shape[1], weights.shape[0], value.shape[2], dtype=torch.bfloat16)
        for first in range(0, len(value), 8):
            total += super().weighted(weights[..., first : first + 8], value[first : first + 8]).bfloat16()
        return total.float()


@mutant("L", "")
class ScoresIn16Bits(Attention):
    """Scores are stored in bfloat16."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call, query, key).bfloat16().float()


@mutant("L", "llama.cpp#6438", dtypes=("float16",))
class ScoresOverflow(Attention):
    """Products of queries and keys are stored in float16, before they are scaled."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("qhd,nhd->hqn", query, key).half().float() * call.scale


@mutant("L", "aiter#5642")
class WeightsIn8Bits(Attention):
    """Weights are rounded to float8."""

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        return super().weighted(weights.to(torch.float8_e4m3fn).float(), value)


@mutant("L", "")
class QueriesRounded(Attention):
    """Queries times scale are rounded to bfloat16, and the profile does not say so."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("qhd,nhd->hqn", (query * call.scale).bfloat16().float(), key)


@mutant("L", "mistral.rs#2076")
class ExpFlushed(Attention):
    """Weights below 2^-10 of the largest are taken for nothing."""

    def exp(self, scores: Tensor) -> Tensor:
        weights = super().exp(scores)
        return torch.where(weights < 2**-10, 0.0, weights)


@mutant("L", "")
class NoRescale(SplitAttention):
    """Sums so far are not rescaled when a larger maximum is met."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        falling = lses.cummin(dim=0).values if len(lses) < 2 else torch.minimum(lses, lses[:1])
        return super().merge(outs, torch.where(lses.isfinite(), falling, lses))


@mutant("L", "")
class NanHidden(Attention):
    """Whatever went wrong, the output is a number: what overflowed is 0."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.exp(scores)
        out = torch.einsum("hqn,nhd->qhd", weights, value) / weights.sum(dim=2).T[..., None]
        return out.nan_to_num(0.0), weights.sum(dim=2).log().T


# O: scales of stored numbers.


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


# R: what slips through tests that are broken: other calls, chance, constants.


@mutant("R", "")
class RemembersTheFirstCall(Attention):
    """Returns what it returned before, for equal shapes of query and table."""

    def __init__(self) -> None:
        self.kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        shape = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if shape not in self.kept:
            self.kept[shape] = super().__call__(*tensors, **wishes)
        return self.kept[shape]


@mutant("R", "")
class SumsIntoOldOutput(Attention):
    """The output's memory is reused and not cleared."""

    kept: Tensor | None = None

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        out, lse = super().__call__(*tensors, **wishes)
        if self.kept is not None and self.kept.shape == out.shape:
            out = out + self.kept
        self.kept = out
        return out, lse


@mutant("R", "sglang#35795")
class RaceNowAndThen(Attention):
    """Every seventh call loses one key: what a missing barrier does."""

    calls = 0

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        self.calls += 1
        lost = self.calls % 7 == 0 and scores.shape[2] > 2
        return super().masked(scores, seen & (torch.arange(scores.shape[2]) != 1) if lost else seen)


@mutant("R", "KernelBench#165")
class AllZeros(Attention):
    """Returns nothing but zeros."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out * 0.0, lse


@mutant("R", "mlir-air#1427")
class KeysIgnored(Attention):
    """The mean of all values that are seen: what loose tolerances let pass."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call, query, key) * 0.0


@mutant("R", "", batch_invariant=True)
class SplitsByBatch(SplitAttention):
    """Right, but other bits alone than in a batch, and declares that there are none."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        self.splits = len(tensors[4])
        return super().__call__(*tensors, **wishes)
