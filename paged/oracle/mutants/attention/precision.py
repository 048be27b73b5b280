"""Class L: range and precision, of scores, exponentials, weights and sums.

What overflows, what is rounded to too few bits, and what is taken for minus infinity and is not.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call, SplitAttention
from paged.oracle.mutants.registry import mutant


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
