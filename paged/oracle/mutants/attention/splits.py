"""Class K: contexts that are attended to in parts, the merge of the parts, and the log-sum-exp that it needs.

Parts overlap or leave a gap, weigh the wrong amount or belong to somebody else; rows that see no key come to NaN; the
log-sum-exp is in another base, of another head, or counts something else.
"""

import math

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call, SplitAttention
from paged.oracle.mutants.registry import mutant


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
