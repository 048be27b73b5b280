"""Right kernels that differ from the honest one in what is theirs to choose. The oracle must let all of them pass."""

import math
from typing import Any

import torch
from torch import Tensor

from paged.oracle.declarations import Conventions, Profile
from paged.oracle.mutants.attention.honest import LOWEST, Attention, Call, SplitAttention
from paged.oracle.mutants.registry import variant

EVERYTHING: dict[str, Any] = {
    "window": True,
    "softcap": True,
    "alibi": True,
    "sinks": True,
    "repeated_blocks": True,
    "strided_caches": True,
    "strided_tables": True,
}


@variant(kv_scales="token", kv_dtypes=("auto", "float8_e4m3fn", "int8"), **EVERYTHING)
class Honest(Attention):
    """With everything that there is."""


@variant(batch_invariant=True)
class HonestAlone(Attention):
    """With the same bits in any batch: it computes a sequence at a time."""


class Online(Attention):
    """Softmax in one pass: tiles of keys, a running maximum, and sums that are rescaled when it grows."""

    tile = 16

    def tiles(self, count: int) -> list[slice]:
        """Keys of each tile, in the order they are read."""
        return [slice(first, first + self.tile) for first in range(0, count, self.tile)]

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Attention`."""
        top = torch.full((*scores.shape[:2], 1), LOWEST)
        total = torch.zeros(scores.shape[:2])
        out = torch.zeros(scores.shape[1], scores.shape[0], value.shape[2])
        for keys in self.tiles(scores.shape[2]):
            higher = torch.maximum(top, self.top(scores[..., keys]))
            shrink, weights = self.exp(top - higher), self.exp(scores[..., keys] - higher)
            total = total * shrink[..., 0] + self.total(weights)
            out = out * shrink[..., 0].T[..., None] + self.weighted(weights, value[keys])
            top = higher
        lse = (top[..., 0] + total.log()).T
        return self.with_sinks(call, out / total.T[..., None].clamp(min=1e-30), lse), lse


@variant(window=True, sinks=True)
class OnlineByBlocks(Online):
    """Sixteen keys at a time."""


@variant(window=True)
class OnlineBackwards(Online):
    """The last tile first."""

    def tiles(self, count: int) -> list[slice]:
        return super().tiles(count)[::-1]


@variant(window=True)
class OnlineBySevens(Online):
    """Tiles that have nothing to do with blocks."""

    tile = 7


@variant(softcap=True, alibi=True)
class Exp2(Online):
    """Powers of 2, as GPUs compute them."""

    tile = 64

    def exp(self, scores: Tensor) -> Tensor:
        return torch.exp2(scores * math.log2(math.e))


@variant()
class LazyRescale(Attention):
    """Less than the largest score will do, as long as nothing overflows."""

    def top(self, scores: Tensor) -> Tensor:
        return super().top(scores) - 4.0


@variant(sinks=True, window=True)
class TwoParts(SplitAttention):
    """Two splits."""

    splits = 2


@variant(sinks=True, window=True)
class EightParts(SplitAttention):
    """Eight splits, many of them empty."""

    splits = 8


@variant(window=True)
class PartsByLength(SplitAttention):
    """As many splits as the context is long."""

    def parts(self, count: int) -> list[slice]:
        self.splits = 1 + count // 100
        return super().parts(count)


@variant(profile=Profile(split_dtype="bfloat16"), dtypes=("bfloat16",))
class PartsIn16Bits(SplitAttention):
    """Partial outputs are stored in bfloat16, which the profile says."""

    def part(self, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().part(scores, value)
        return out.bfloat16().float(), lse


@variant(dtypes=("bfloat16",))
class WeightsIn16Bits(Attention):
    """Weights are rounded to bfloat16 before they meet V."""

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        return super().weighted(weights.bfloat16().float(), value)


@variant(dtypes=("float16",))
class WeightsInFloat16(Attention):
    """Weights are rounded to float16, where those below 2^-25 vanish."""

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        return super().weighted(weights.half().float(), value)


@variant(profile=Profile(p_dtype="float8_e4m3fn"), dtypes=("bfloat16",))
class WeightsIn8BitsDeclared(Attention):
    """Weights are rounded to four significant bits, which the profile says."""

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        return super().weighted(weights.to(torch.float8_e4m3fn).float(), value)


@variant(dtypes=("bfloat16", "float32"))
class FlushesSubnormals(Attention):
    """Numbers below 2^-126 become 0, as on GPUs and where a program asks a CPU for it."""

    def exp(self, scores: Tensor) -> Tensor:
        return self.flushed(super().exp(scores))

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        return self.flushed(super().weighted(weights, value))

    def flushed(self, numbers: Tensor) -> Tensor:
        return torch.where(numbers.abs() < torch.finfo(torch.float32).tiny, 0.0, numbers)


@variant(profile=Profile(exp_rel=2.0**-14), dtypes=("bfloat16", "float16"))
class ApproximateExp(Attention):
    """An exponential that is off by 5e-5, which the profile says."""

    def exp(self, scores: Tensor) -> Tensor:
        return super().exp(scores) * (1 - 5e-5 * torch.cos(scores.clamp(min=LOWEST)))


@variant()
class NormalisedFirst(Attention):
    """Weights are divided by their sum before they meet V, not after."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        top = self.top(scores)
        weights = self.exp(scores - top)
        total = self.total(weights)
        out = self.weighted(weights / total[..., None].clamp(min=1e-30), value)
        return out, (top[..., 0] + total.log()).T


@variant()
class PrescaledQueries(Attention):
    """Queries are scaled in float32, not scores."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("qhd,nhd->hqn", query * call.scale, key)


@variant(profile=Profile(q_prescale_dtype="bfloat16"), dtypes=("bfloat16",))
class PrescaledQueriesIn16Bits(Attention):
    """The same in bfloat16, which the profile says."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return torch.einsum("qhd,nhd->hqn", (query * call.scale).bfloat16().float(), key)


@variant(kv_scales="head", kv_dtypes=("auto", "float8_e4m3fn"))
class ScaledAfterwards(Attention):
    """V's scale multiplies the sum, not the values."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        return self.read(call, call.value_cache, None, blocks, count)

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out if call.v_scale is None else out * call.v_scale[self.kv_heads(call)][:, None], lse


@variant(repeated_blocks=True)
class BlocksRenamed(Attention):
    """Works on a copy of the pool with its blocks in another order."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        query, keys, values, tables, *rest = tensors
        return super().__call__(query, keys.flip(0), values.flip(0), len(keys) - 1 - tables, *rest, **wishes)


@variant()
class TailsPoisoned(Attention):
    """Works on a copy whose every slot that this call does not read is NaN."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        query, keys, values, tables, lengths, *rest = tensors
        live = torch.zeros(keys.shape[:2], dtype=torch.bool)
        for table, length in zip(tables.long(), lengths.tolist(), strict=True):
            places = torch.arange(length)
            live[table[places // keys.shape[1]], places % keys.shape[1]] = True
        copies = [torch.where(live[..., None, None], cache, torch.nan) for cache in (keys, values)]
        return super().__call__(query, *copies, tables, lengths, *rest, **wishes)


@variant(negative_padding=True)
class PaddingSkipped(Attention):
    """Reads whole rows of the table, and neither entries of -1 nor what lies in tails."""

    def keys_read(self, call: Call, length: int) -> int:
        return call.block_tables.shape[1] * call.block_size if length else 0

    def read(self, call: Call, cache: Tensor, scale: Tensor | None, blocks: Tensor, count: int) -> Tensor:
        whole = super().read(call, cache, scale, blocks.clamp(min=0), count)
        return torch.where((blocks >= 0).repeat_interleave(call.block_size)[:, None, None], whole, 0.0).nan_to_num(0.0)


@variant(alibi=True, conventions=Conventions(alibi_origin="first_key"))
class AlibiDeclared(Attention):
    """Distances from the first key: the log-sum-exp is another, and is declared."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes, positions * 0, keys)


@variant(window=True, conventions=Conventions(window_counts_self=False))
class WindowDeclared(Attention):
    """A window of w keys before the query, which is declared."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        distance = positions[:, None] - keys
        return (distance >= 0) if call.window is None else (distance >= 0) & (distance <= call.window)


@variant(conventions=Conventions(empty_lse="+inf", lse_base="2"), lse="2")
class LseDeclared(Attention):
    """Base 2, and +inf for rows that see nothing, both declared."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        out, lse = super().__call__(*tensors, **wishes)
        return out, torch.where(lse == -torch.inf, torch.inf, lse / math.log(2.0))


@variant(window=True, sinks=True)
class InFloat64(Attention):
    """Scores and sums in float64."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores.double(), value.double())
        return out.float(), lse.float()
