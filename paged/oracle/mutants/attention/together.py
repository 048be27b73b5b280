"""Mutants of features that meet: windows and tiles, sinks and parts, stored numbers at the ends of their range.

They were written without looking at the oracle's own cases. Each feature alone is right; what is wrong is the path on
which two of them are on, or a number that a feature seldom meets.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call, SplitAttention
from paged.oracle.mutants.registry import mutant

FP8 = ("float8_e4m3fn",)
STORED_IN_8_BITS: dict[str, Any] = {"kv_scales": "tensor", "kv_dtypes": ("auto", *FP8)}


@mutant("A", "vllm#44850", **STORED_IN_8_BITS)
class Float8TailUnmasked(Attention):
    """The path for quantised caches reads the whole last block."""

    def keys_read(self, call: Call, length: int) -> int:
        return length if call.k_scale is None else -(-length // call.block_size) * call.block_size


# G: windows and tiles.


@mutant("G", "", window=True)
class LeftMaskInFirstTile(Attention):
    """Only the tile of 64 keys where the first query's window begins is masked on its left."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        seen = super().seen(call, positions, keys)
        if call.window is None:
            return seen
        first = (positions[:1] - call.window + 1).clamp(min=0) // 64
        return seen | ((keys // 64 > first) & (keys <= positions[:, None]))


@mutant("G", "", window=True)
class WindowNotYetSlid(Attention):
    """A sequence one token longer than the window is taken to fit."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        if call.window is None or len(keys) != call.window + 1:
            return super().seen(call, positions, keys)
        return positions[:, None] >= keys


@mutant("G", "sglang#34273", window=True)
class LongWindowOneMore(Attention):
    """Windows of 128 and more are counted by another path, which sees one key more."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        if call.window is None or call.window < 128:
            return super().seen(call, positions, keys)
        return super().seen(dataclasses.replace(call, window=call.window + 1), positions, keys)


# H, I and J: softcap, sinks and ALiBi with parts, windows, quantised caches, and with each other.


@mutant("H", "", softcap=True)
class CapForgottenInParts(Attention):
    """Decodes over more than 512 keys go another way, where nothing is capped."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        return scores if scores.shape[1] == 1 and scores.shape[2] > 512 else super().cap(call, scores)


@mutant("H", "imp#688", softcap=True, **STORED_IN_8_BITS)
class CapForgottenWhenQuantised(Attention):
    """The path for quantised caches knows no cap."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        return super().cap(call, scores) if call.k_scale is None else scores


@mutant("I", "imp#1345", sinks=True, **STORED_IN_8_BITS)
class SinkForgottenWhenQuantised(Attention):
    """The path for quantised caches knows no sinks."""

    def with_sinks(self, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        return super().with_sinks(call, out, lse) if call.k_scale is None else out


@mutant("I", "rocm-libraries#12227", sinks=True, window=True)
class SinkInFirstPartOnly(SplitAttention):
    """The first part counts the sink; where a window leaves it nothing to see, it does not run."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        without, _ = super().attend(dataclasses.replace(call, sinks=None), scores, value)
        runs = scores[..., self.parts(scores.shape[2])[0]].isfinite().any(dim=2).T
        return torch.where(runs[..., None], out, without), lse


@mutant("I", "", sinks=True)
class SinkOfHeadModulo8(Attention):
    """A tile holds the sinks of eight heads."""

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        return sinks[torch.arange(call.num_heads) % 8]


@mutant("I", "", sinks=True, empty_rows=True)
class NothingButTheSink(Attention):
    """A row that sees no key is divided by a sum that leaves the sink out: 0 by 0."""

    def with_sinks(self, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        shared = super().with_sinks(call, out, lse)
        return shared if call.sinks is None else torch.where(lse[..., None].isinf(), torch.nan, shared)


@mutant("I", "", sinks=True, softcap=True)
class SinkCapped(Attention):
    """The sink is capped like a score."""

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        return self.cap(call, sinks)


@mutant("J", "HabanaAI/vllm-fork#503", alibi=True, lse="e")
class AlibiDistanceIn16Bits(Attention):
    """Distances are bfloat16: beyond 256 only every other one exists. In 16-bit outputs that hides in the rounding."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return slopes[:, None, None] * (keys - positions[:, None]).bfloat16().float()


@mutant("J", "", alibi=True)
class AlibiFromPart(Attention):
    """Keys are counted from the beginning of their part of 512."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes, positions, keys % 512)


@mutant("J", "", alibi=True, window=True)
class AlibiForgottenInWindow(Attention):
    """With a window, nothing is added."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes if call.window is None else slopes * 0.0, positions, keys)


# K and L: parts that see nothing, maxima that are not one's own, products of fewer bits.


@mutant("K", "vllm#28181", window=True)
class RunningMerge(SplitAttention):
    """Merges parts one after another; two that a window leaves empty make NaN of all that follow."""

    splits = 4

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = outs[0], lses[0]
        for other, other_lse in zip(outs[1:], lses[1:], strict=True):
            top = torch.maximum(lse, other_lse)
            mine, its = torch.exp(lse - top), torch.exp(other_lse - top)
            out = (out * mine[..., None] + other * its[..., None]) / (mine + its)[..., None]
            lse = top + (mine + its).log()
        return out, lse


@mutant("L", "")
class MaximumOfAllHeads(Attention):
    """One maximum for all heads: those far below it vanish."""

    def top(self, scores: Tensor) -> Tensor:
        return super().top(scores).amax(dim=0, keepdim=True).expand(len(scores), -1, -1)


@mutant("L", "")
class MaximumOfSequenceBefore(Attention):
    """The running maximum is not reset between sequences: one far below the one before vanishes."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        self.before = torch.tensor(-torch.inf)
        return super().__call__(*tensors, **wishes)

    def top(self, scores: Tensor) -> Tensor:
        top = torch.maximum(super().top(scores), self.before)
        self.before = top.amax(dim=1, keepdim=True)
        return top


@mutant("L", "", dtypes=("float32",))
class TensorFloat32(Attention):
    """Queries and keys of 32 bits are multiplied with 11 bits of significand, and the profile does not say so."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        short = [((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (query, key)]
        return super().scores(call, *short)


@mutant("L", "")
class PartsRounded(SplitAttention):
    """Partial outputs are stored in bfloat16, and the profile does not say so."""

    splits = 8

    def part(self, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().part(scores, value)
        return out.bfloat16().float(), lse


# N and O: scales of scores and of stored numbers, and the ends of their range.


@mutant("N", "")
class ScaleIn16Bits(Attention):
    """The scale, in powers of 2, is rounded to bfloat16."""

    def scale(self, call: Call) -> float:
        return float(torch.tensor(call.scale * math.log2(math.e)).bfloat16()) * math.log(2.0)


@mutant("O", "", kv_scales="head")
class ScaleRowOfSequence(Attention):
    """Scales of heads are looked up in a row for each sequence, where there is one row for all."""

    def sequence(self, call: Call, index: int) -> tuple[Tensor, Tensor]:
        self.index = index
        return super().sequence(call, index)

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        return super().scales(scale.roll(-self.index), blocks, count)


@mutant("O", "aiter#3894", kv_scales="token", kv_dtypes=FP8)
class ScaleOfEveryOtherToken(Attention):
    """Two tokens are loaded at once, with the scale of the first."""

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        return super().scales(scale[:, torch.arange(scale.shape[1]) // 2 * 2], blocks, count)


@mutant("O", "", kv_scales="tensor", sinks=True, kv_dtypes=FP8)
class ValueScaleForgottenWithSinks(Attention):
    """With sinks, values are not scaled."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        return self.read(call, call.value_cache, call.v_scale if call.sinks is None else None, blocks, count)


class Decoding(Attention):
    """Turns stored codes into numbers in a step of its own."""

    def read(self, call: Call, cache: Tensor, scale: Tensor | None, blocks: Tensor, count: int) -> Tensor:
        stored = self.decoded(self.fetch(cache, blocks).float().flatten(0, 1)[:count])
        return stored if scale is None else stored * self.scales(scale, blocks, count)

    def decoded(self, stored: Tensor) -> Tensor:
        """What the codes stand for, before scales."""
        return stored


@mutant("O", "", kv_scales="token", kv_dtypes=("int8",))
class LowestInt8(Decoding):
    """Codes are split into sign and magnitude, and -128 has no magnitude of seven bits."""

    def decoded(self, stored: Tensor) -> Tensor:
        return torch.where(stored == -128, 0.0, stored)


@mutant("O", "vllm#45562", kv_scales="tensor", kv_dtypes=FP8)
class Float8Above240(Decoding):
    """e4m3 is taken to end where e4m3fnuz does."""

    def decoded(self, stored: Tensor) -> Tensor:
        return stored.clamp(-240.0, 240.0)


@mutant("O", "microsoft/onnxruntime#18473", kv_scales="tensor", kv_dtypes=FP8)
class NegativeZeroIsNan(Decoding):
    """The code 0x80 is -0 in e4m3 and NaN in e4m3fnuz."""

    def decoded(self, stored: Tensor) -> Tensor:
        return torch.where((stored == 0) & stored.signbit(), torch.nan, stored)


@mutant("O", "ooples/AiDotNet.Tensors#801", kv_scales="tensor", kv_dtypes=FP8)
class Float8SubnormalsLost(Decoding):
    """Bits are shifted into place as if no code were subnormal: those below 2^-6 become 0."""

    def decoded(self, stored: Tensor) -> Tensor:
        return torch.where(stored.abs() < 2.0**-6, 0.0, stored)
